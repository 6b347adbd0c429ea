"""Scores a checkpoint on the ten tasks of the paper's Table 2 through lm-eval, and stores one JSON file a task.

    python eval/run_eval.py --checkpoint runs/355m-x2/checkpoints/latest-rank0.pt
    python eval/run_eval.py --checkpoint HF_FOLDER --tasks sciq,arc_easy --data-dir DIR --limit 100 --output eval/results

    python eval/run_eval.py --checkpoint CHECKPOINT --perplexity --data PREPARED_FOLDER
    python eval/run_eval.py --sweep SWEEP_DIR [--perplexity] [--jobs N]      # every finished run, into SWEEP_DIR/eval

Without --data-dir the rows come from the Hugging Face hub. What is stored already is not computed again. --perplexity measures
the validation perplexity per domain instead of the tasks.
"""

from __future__ import annotations

from mohd_train.errors import run_cli
from mohd_train.evaluate.options import EvalOptions, SweepEvalOptions, parse


def main() -> int:
    options = parse(__doc__)
    if isinstance(options, EvalOptions):  # imported after parsing: --help and usage errors answer at once
        from mohd_train.evaluate.run import run_eval

        return run_eval(options)
    if isinstance(options, SweepEvalOptions):
        from mohd_train.evaluate.sweep_eval import run_sweep

        return run_sweep(options)
    from mohd_train.evaluate.perplexity import run_perplexity

    return run_perplexity(options)


if __name__ == "__main__":
    run_cli(main)
