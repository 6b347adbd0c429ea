"""`mohd prepare`: raw rows -> shards to train on. `python data_prep/prepare.py --help` says more."""

from mohd_train.cli import script

if __name__ == "__main__":
    script("prepare")
