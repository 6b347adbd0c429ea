"""`mohd demo`: the whole path on small data. `python scripts/demo.py --help` says more."""

from mohd_train.cli import script

if __name__ == "__main__":
    script("demo")
