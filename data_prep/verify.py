"""`mohd verify`: check prepared data against its hashes. `python data_prep/verify.py --help` says more."""

from mohd_train.cli import script

if __name__ == "__main__":
    script("verify")
