"""The commands of `mohd demo`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from mohd_train.errors import UserError
from mohd_train.resources import find


def run(**given: str | int | None) -> None:
    """The whole demo, in the current folder."""
    from mohd_train.demo.sequence import Options, run_demo

    for name in ("raw", "eval_data"):  # a tokenizer may be a name on the hub
        path = given.get(name)
        if isinstance(path, str) and not find(path).exists():
            raise UserError(f"--{name.replace('_', '-')}: there is no {path}")
    limit = given.get("limit")
    if isinstance(limit, int) and limit < 2:  # mohd eval would refuse it too, half an hour later
        raise UserError(f"--limit is {limit}; it must be 2 or more")
    run_demo(Options(**{name: value for name, value in given.items() if value is not None}))  # type: ignore[arg-type]


def corpus(folder: Path) -> None:
    """Writes the corpus, unless it is already complete, and prints what it holds."""
    from mohd_train.demo.corpus import build_corpus, read_corpus

    index = read_corpus(folder)
    if index is not None:
        print(f"{folder}: already there")
    for domain, entry in (index or build_corpus(folder)).items():
        print(f"{domain:<8} {entry['documents']:>5} documents {entry['bytes'] / 1e6:6.2f} MB  {folder / domain}")


def tokenizer(raw: Path, model: Path, vocab_size: int) -> None:
    """Learns a tokenizer of ``vocab_size`` pieces from the rows below ``raw``, all domains alike."""
    from mohd_train.demo.tokenizer import train_tokenizer

    pieces = train_tokenizer(_texts(raw), model, vocab_size=vocab_size)
    print(f"{model}: {pieces.get_piece_size()} pieces, BPE with byte fallback")


def curves(runs: list[Path], output: Path) -> None:
    """Draws the loss curves of ``runs``."""
    from mohd_train.demo.curves import draw, read_curve

    draw([read_curve(run) for run in runs], output)
    print(output)


def _texts(raw: Path) -> Iterator[str]:
    """Documents below ``raw``, one of each file in turn, so that any prefix holds every domain.

    Bad rows are skipped: mohd prepare, which comes next, reports them.
    """
    from mohd_train.data.raw import Source, find_sources, parse_rows, range_lines, unpacked_units

    def texts(source: Source) -> Iterator[str]:
        lines: Iterator[bytes]
        if source.compression:
            lines = (line for unit, _ in unpacked_units(source) for line in unit.splitlines())
        else:
            lines = range_lines(source.path, 0, source.bytes)
        return (row.text for row in parse_rows(lines) if row.text is not None)

    sources = [source for files in find_sources(raw).domains.values() for source in files if source.split == "train"]
    for documents in zip_longest(*map(texts, sources)):
        yield from (text for text in documents if text is not None)
