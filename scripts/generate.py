"""`mohd generate`: text from a checkpoint. `python scripts/generate.py --help` says more."""

from mohd_train.cli import script

if __name__ == "__main__":
    script("generate")
