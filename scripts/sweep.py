"""`mohd sweep`: many runs from one file: launch, watch, resume. `python scripts/sweep.py --help` says more."""

from mohd_train.cli import script

if __name__ == "__main__":
    script("sweep")
