"""`mohd report`: a page about a sweep. `python eval/make_report.py --help` says more."""

from mohd_train.cli import script

if __name__ == "__main__":
    script("report")
