"""`mohd train`: train a model. `python scripts/train.py --help` says more."""

from mohd_train.cli import script

if __name__ == "__main__":
    script("train")
