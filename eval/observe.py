"""`mohd observe`: activation study, interventions on sub-dimensions. `python eval/observe.py --help` says more."""

from mohd_train.cli import script

if __name__ == "__main__":
    script("observe")
