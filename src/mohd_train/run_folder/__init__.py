"""A run's folder: its file names, its record (``run.json``) and its metrics (``metrics.jsonl``).

Nothing here imports Composer or torch.distributed, so that a table or a sweep's status opens in a second.
"""
