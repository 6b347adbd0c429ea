"""`mohd eval`: score checkpoints on the ten tasks, or by perplexity. `python eval/run_eval.py --help` says more."""

from mohd_train.cli import script

if __name__ == "__main__":
    script("eval")
