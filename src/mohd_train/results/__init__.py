"""Stored results: reading and writing them, tables, figures, and data frames for your own plots.

    from mohd_train import results

    scores = results.load("eval/results")  # one row for each model, task, metric and seed
    curves = results.load_curves("runs/sweep/table4-tiny")  # one row for each run and batch

Nothing here imports torch or Composer, so that a table or a figure opens at once.
"""

from mohd_train.results.frame import load, load_curves

__all__ = ["load", "load_curves"]
