"""``python -m mohd_train.cli VERB``: what commands that start one another use; ``composer -m mohd_train.cli train`` too."""

from mohd_train.cli import console

if __name__ == "__main__":  # worker processes that are spawned import this module again
    console()
