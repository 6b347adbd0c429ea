"""Trains the runs of the command line, one after another, in the processes of one launch."""

import sys

from train.distributed_support import jobs_of, run

from mohd_train.errors import run_cli


def main() -> None:
    for job in jobs_of(sys.argv[1]):
        run(job)


if __name__ == "__main__":
    run_cli(main)
