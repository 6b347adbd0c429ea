"""`mohd figures`: the paper's figures from a sweep. `python eval/make_figures.py --help` says more."""

from mohd_train.cli import script

if __name__ == "__main__":
    script("figures")
