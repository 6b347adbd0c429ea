"""`mohd import`: a pretrained LLaMA as a checkpoint to train on. `python scripts/import_hf.py --help` says more."""

from mohd_train.cli import script

if __name__ == "__main__":
    script("import")
