"""Every file name of a run, once.

========================  ==============================================================================================
``run.json``              what the run is, its sessions, its progress (record.py)
``config.yaml``           the resolved config
``metrics.jsonl``         every metric, a line a batch (metrics.py)
``tokenizer/``            the data's tokenizer
``checkpoints/``          ``ep{epoch}-ba{batch}-rank0.pt``, or a folder ``ep{epoch}-ba{batch}`` if sharded;
                          ``latest-rank0.pt`` links to the newest
``logs/``                 ``rank{rank}.log``
========================  ==============================================================================================

If ``save_folder`` is elsewhere, it has a ``tokenizer/`` of its own and ``owner.json``, which names the run. If it is on
object storage, the run folder keeps ``checkpoints/``; copies go there, with ``run.json``, ``config.yaml``,
``metrics.jsonl`` and ``tokenizer/``; ``latest-rank0.pt.symlink`` names the newest, as Composer's does.
"""

from __future__ import annotations

import re
from pathlib import Path

from mohd_train.config.load import RUN_CONFIG, RUN_RECORD
from mohd_train.config.schema import Config
from mohd_train.storage import is_remote

RECORD, CONFIG, METRICS = RUN_RECORD, RUN_CONFIG, "metrics.jsonl"
OWNER = "owner.json"  # in a save_folder outside the run folder
TOKENIZER, CHECKPOINTS, LOGS = "tokenizer", "checkpoints", "logs"
LATEST = "latest-rank0.pt"
LATEST_LINK = f"{LATEST}.symlink"  # on object storage
CHECKPOINT_FILE = "ep{epoch}-ba{batch}-rank{rank}.pt"  # Composer fills these in
_CHECKPOINT = re.compile(r"ep\d+-ba(\d+)(-rank0\.pt)?")


def local_save_folder(config: Config) -> Path:
    """Where checkpoints are written: ``save_folder``, or ``checkpoints/`` of the run folder if that is remote."""
    return Path(config.run_folder) / CHECKPOINTS if is_remote(config.save_folder) else Path(config.save_folder)


def latest_checkpoint(folder: Path) -> Path:
    """The link to the newest checkpoint, in a run folder that keeps its checkpoints itself."""
    return folder / CHECKPOINTS / LATEST


def checkpoint_batch(name: str) -> int | None:
    """The batch of a checkpoint by its name, a file's or a sharded folder's; None if it isn't one's."""
    match = _CHECKPOINT.fullmatch(name)
    return int(match[1]) if match else None


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """Batch -> checkpoint, oldest first."""
    found = {batch: path for path in folder.glob("ep*-ba*") if (batch := checkpoint_batch(path.name)) is not None}
    return dict(sorted(found.items()))
