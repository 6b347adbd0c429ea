"""`mohd count`: parameters and FLOPs of a model. `python scripts/count.py --help` says more."""

from mohd_train.cli import script

if __name__ == "__main__":
    script("count")
