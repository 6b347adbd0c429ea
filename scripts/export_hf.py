"""`mohd export`: a checkpoint as a Hugging Face folder. `python scripts/export_hf.py --help` says more."""

from mohd_train.cli import script

if __name__ == "__main__":
    script("export")
