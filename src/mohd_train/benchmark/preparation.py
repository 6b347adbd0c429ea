"""Preparation compared with its alternatives on the same raw rows: time, processor time, memory."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mohd_train.errors import UserError
from mohd_train.utils.environment import verb_command

SEQ_LEN = 2048


def measure(raw: Path, tokenizer: Path, workers: int, rounds: int) -> list[dict[str, Any]]:
    """``mohd prepare``, ``datasets.map`` and datatrove (where it is installed) in turn, each in a process of its own, on every
    JSON-lines file below ``raw``, which may not be compressed.

    Returns:
        A row for each, of its fastest round: seconds, processor seconds, MB/s of raw text, and the memory of its largest
        process.
    """
    files = sorted(str(path) for path in raw.rglob("*.jsonl"))
    size = sum(os.path.getsize(file) for file in files)
    with tempfile.TemporaryDirectory() as folder:
        fast = _fast_tokenizer(tokenizer, Path(folder) / "tokenizer")
        own = ("--raw", raw, "--tokenizer", tokenizer, "--seq-len", SEQ_LEN, "--val-tokens", 0, "--workers", workers)
        commands: dict[str, Callable[[str], list[str]]] = {
            "mohd prepare": lambda out: verb_command("prepare", *own, "--out", out)
        }
        for name in PEERS if importlib.util.find_spec("datatrove") else ["datasets.map"]:
            given = json.dumps({"files": files, "tokenizer": str(fast), "workers": workers})
            commands[name] = lambda out, name=name, given=given: [sys.executable, "-m", __name__, name, given, out]  # type: ignore[misc]
        best: dict[str, dict[str, Any]] = {}
        for number in range(rounds):
            for name, command in commands.items():
                row = _timed(command(f"{folder}/{name.replace(' ', '-')}-{number}"))
                if name not in best or row["seconds"] < best[name]["seconds"]:
                    best[name] = {"name": name, "workers": workers, **row, "mb_per_second": size / 1e6 / row["seconds"]}
    for row in best.values():
        row["ratio"] = row["seconds"] / best["mohd prepare"]["seconds"]
        row["processor_ratio"] = row["processor_seconds"] / best["mohd prepare"]["processor_seconds"]
    return list(best.values())


# Runs between this process and what it times: Linux counts the memory of the forking process as its child's
TIMER = """
import json, os, sys, time
start = time.perf_counter()
_, status, usage = os.wait4(os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ), 0)
seconds, processor = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
print(json.dumps({"seconds": seconds, "processor_seconds": processor, "largest_process_mb": usage.ru_maxrss / 1024}))
sys.exit(os.waitstatus_to_exitcode(status))
"""


def _timed(command: list[str]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-S", "-c", TIMER, *command], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command[1:5])} ... failed: {done.stderr.strip()[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _fast_tokenizer(model: Path, folder: Path) -> Path:
    """The tokenizer in a form that transformers and datatrove read."""
    from mohd_train.data.tokenizer import load_tokenizer

    load_tokenizer(str(model)).hf.save_pretrained(folder)
    return folder


def _datasets_map(files: list[str], tokenizer: str, workers: int, out: str) -> None:
    """As transformers' run_clm.py does it: tokenize, then cut the concatenation into rows, and save."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    cache = f"{out}-cache"
    rows = load_dataset("json", data_files=files, split="train", cache_dir=cache)

    def tokenize(batch: dict[str, list[Any]]) -> dict[str, Any]:
        return {"input_ids": encode(batch["text"], return_attention_mask=False)["input_ids"]}

    def pack(batch: dict[str, list[Any]]) -> dict[str, Any]:
        ids = [token for row in batch["input_ids"] for token in row]
        return {"input_ids": [ids[i : i + SEQ_LEN] for i in range(0, len(ids) - SEQ_LEN + 1, SEQ_LEN)]}

    processes = workers if workers > 1 else None
    tokens = rows.map(tokenize, batched=True, num_proc=processes, remove_columns=rows.column_names)
    tokens.map(pack, batched=True, num_proc=processes).save_to_disk(out)


def _datatrove(files: list[str], tokenizer: str, workers: int, out: str) -> None:
    """Its tokenization pipeline: a folder of ids for each task, unshuffled."""
    trove = {
        name: importlib.import_module(f"datatrove.{name}")
        for name in ("executor", "pipeline.readers", "pipeline.tokens")
    }
    read = trove["pipeline.readers"].JsonlReader(os.path.commonpath(files), glob_pattern="**/*.jsonl", text_key="text")
    encode = trove["pipeline.tokens"].DocumentTokenizer(
        out, tokenizer_name_or_path=f"{tokenizer}/tokenizer.json", shuffle_documents=False
    )
    trove["executor"].LocalPipelineExecutor(
        pipeline=[read, encode],
        tasks=len(files),
        workers=workers,
        logging_dir=f"{out}-logs",
    ).run()


PEERS: dict[str, Callable[..., None]] = {"datasets.map": _datasets_map, "datatrove": _datatrove}

if __name__ == "__main__":
    PEERS[sys.argv[1]](**json.loads(sys.argv[2]), out=sys.argv[3])
