"""`mohd estimate`: memory, time and disk of a run before it starts. `python scripts/estimate.py --help` says more."""

from mohd_train.cli import script

if __name__ == "__main__":
    script("estimate")
