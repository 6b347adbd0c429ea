"""`mohd prefetch`: fetch the questions of the tasks. `python eval/prefetch.py --help` says more."""

from mohd_train.cli import script

if __name__ == "__main__":
    script("prefetch")
