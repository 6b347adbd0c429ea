"""`mohd study`: compare the runs of a sweep, paired by seed. `python scripts/study.py --help` says more."""

from mohd_train.cli import script

if __name__ == "__main__":
    script("study")
