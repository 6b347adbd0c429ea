"""`mohd tables`: the paper's tables with our numbers beside. `python eval/make_tables.py --help` says more."""

from mohd_train.cli import script

if __name__ == "__main__":
    script("tables")
