"""A plot of your own, from the data frames of `mohd_train.results`: copy it and change it.

    python docs/plot_results.py runs/sweep/table4-tiny --task validation --metric perplexity
    python docs/plot_results.py eval/results --task sciq --metric acc --output sciq.png

Left: the metric of each model, mean over seeds, with its standard error. Right, for a sweep: training loss over tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mohd_train.errors import UserError, run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="the folder of a launched sweep, or results of mohd eval")
    parser.add_argument("--task", help="default: all that have the metric, averaged")
    parser.add_argument("--metric", default="acc", help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("results.png"), help="default: %(default)s")
    args = parser.parse_args()

    import matplotlib

    matplotlib.use("Agg")  # a file, no screen
    import matplotlib.pyplot as plt

    from mohd_train import results

    scores = results.load(args.path).query("metric == @args.metric").dropna(subset="value")
    if args.task:
        scores = scores[scores["task"] == args.task]
    if scores.empty:
        raise UserError(f"{args.path} has no {args.metric}{f' of {args.task}' if args.task else ''}")
    for note in scores["notes"][scores["notes"] != ""].unique():
        print(f"not comparable with the paper: {note}")

    each = scores.groupby(["model", "seed"], dropna=False, sort=False)["value"].mean()  # over tasks
    over_seeds = each.groupby("model", sort=False).agg(["mean", "sem", "count"])
    print(over_seeds.to_string())
    sweep = scores["run"].notna().any()
    figure, axes = plt.subplots(
        1, 2 if sweep else 1, figsize=(10 if sweep else 5, 4), layout="constrained", squeeze=False
    )
    bars = axes[0, 0]
    bars.bar(over_seeds.index, over_seeds["mean"], yerr=over_seeds["sem"], color="#999999", capsize=3)
    bars.tick_params("x", rotation=30)
    bars.set_ylabel(f"{args.metric} ({args.task or 'mean over tasks'})")
    if sweep:
        loss = "loss/train/cross_entropy"
        curves = results.load_curves(args.path, metrics=[loss])
        for model, curve in curves.groupby("model", sort=False):
            mean = curve.groupby("tokens")[loss].mean()  # over seeds
            axes[0, 1].plot(mean.index / 1e6, mean, label=model)
        axes[0, 1].set(xlabel="tokens (millions)", ylabel="training loss (nats per token)")
        axes[0, 1].legend(frameon=False, fontsize=8)
    figure.savefig(args.output, dpi=150)
    print(f"plot: {args.output}")


if __name__ == "__main__":
    run_cli(main)
