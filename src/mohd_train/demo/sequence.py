"""The demo: the whole path as commands in sequence, each printed, run and logged.

Every command can be typed by itself; it resumes where it was interrupted, and skips what it has finished. A
second demo runs the same commands again.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from mohd_train.data.manifest import MANIFEST, Manifest, load_manifest
from mohd_train.data.raw import shares
from mohd_train.errors import UserError
from mohd_train.run_folder.paths import latest_checkpoint
from mohd_train.utils.files import write_atomic, write_json
from mohd_train.utils.processes import Command, Every, Job, SharedLock, Supervisor

PROGRAMS = {  # of this environment, even if its folder is not on the PATH
    "python": [sys.executable],
    "mohd": [sys.executable, "-m", "mohd_train.cli"],
    "composer": [sys.executable, "-m", "composer.cli.launcher"],
}
SETTINGS = ("dense", "50", "x2")  # configs/mohd
SEQ_LEN = 512
VAL_TOKENS = 40_000
DEMO_QUESTIONS = "eval/demo_questions"
REAL_LIMIT = 5  # examples a task (a subject, in MMLU) with EVAL_DATA: minutes, not hours, on two cores
REAL_BATCHES = 50  # a large vocabulary makes a step of the tiny model several times as slow
SILENCE = 60.0  # seconds without output after which, without a terminal, a line says that a step is running


@dataclass(frozen=True)
class Options:
    """What a user chooses. Paths are relative to the current folder, where every command runs."""

    out: str = "runs/demo"
    raw: str | None = None  # RedPajama rows; None: a corpus of this Python installation's own text
    tokenizer: str | None = None  # a sentencepiece model or what mohd prepare takes; None: one learned from the corpus
    eval_data: str | None = None  # DIR/<task>/<split>.jsonl; None: the questions written for this project
    limit: int | None = None  # examples a task; None: all of the demo questions, REAL_LIMIT of EVAL_DATA
    max_duration: str | None = None  # None: the recipe's, or REAL_BATCHES with RAW

    @property
    def folder(self) -> Path:
        return Path(self.out)

    @property
    def question_limit(self) -> int | None:
        return self.limit or (REAL_LIMIT if self.eval_data else None)

    @property
    def plain(self) -> bool:
        """Whether the recipe of configs/recipe fits as it is: its data, its vocabulary, its length, its folder."""
        return self == Options(eval_data=self.eval_data, limit=self.limit)


@dataclass(frozen=True)
class Step:
    """One command of the demo."""

    name: str  # of its log
    title: str
    command: tuple[str, ...]  # `mohd` and `composer` are those of the environment
    leaves: Path  # what exists once it has succeeded
    before: Callable[[], None] = lambda: None

    @property
    def line(self) -> str:
        """The command as a user types it."""
        return shlex.join(self.command)


def steps(options: Options) -> list[Step]:
    """The sequence. The commands name every path, so that each can be run by itself."""
    out, folder = options.out, options.folder
    raw, tokenizer = options.raw or f"{out}/raw", options.tokenizer or f"{out}/tokenizer.model"
    questions = ["--data-dir", options.eval_data or DEMO_QUESTIONS]
    questions += ["--limit", str(options.question_limit)] if options.question_limit else []
    names = [f"tiny-{setting}" for setting in SETTINGS]
    sequence: list[Step] = []

    def then(name: str, title: str, *command: str, leaves: Path, before: Callable[[], None] = lambda: None) -> None:
        sequence.append(Step(name, title, command, leaves, before))

    if not options.raw:
        corpus = ("mohd", "demo", "corpus", raw)
        then("corpus", "a corpus of this Python's own text", *corpus, leaves=Path(raw))
    if not options.tokenizer:
        then("tokenizer", "a tokenizer", "mohd", "demo", "tokenizer", raw, tokenizer, leaves=Path(tokenizer))
    then(
        "shards", "shards", "mohd", "prepare", "--raw", raw, "--out", f"{out}/data", "--tokenizer", tokenizer,
        "--seq-len", str(SEQ_LEN), "--val-tokens", str(VAL_TOKENS), leaves=folder / "data" / MANIFEST,
    )  # fmt: skip
    for setting, name in zip(SETTINGS, names, strict=True):
        train = ("composer", "-n", "1", "-m", "mohd_train.cli", "train", *recipe_files(options, setting))
        checkpoint = latest_checkpoint(folder / name)
        then(f"train-{name}", f"training {name}", *train, leaves=checkpoint, before=lambda: write_recipe(options))
    for name in names:
        checkpoint = latest_checkpoint(folder / name)
        evaluate = ("mohd", "eval", "--checkpoint", str(checkpoint), "--output", f"{out}/eval")
        then(f"eval-{name}", f"ten tasks for {name}", *evaluate, *questions, leaves=folder / "eval" / name)
    table = ("mohd", "tables", f"{out}/eval", "--format", "md", "--output", f"{out}/table.md")
    then("table", "the table", *table, leaves=folder / "table.md")
    runs = [f"{out}/{name}" for name in names]
    curves = ("mohd", "demo", "curves", *runs, "--output", f"{out}/curves.png")
    then("curves", "the loss curves", *curves, leaves=folder / "curves.png")
    return sequence


def recipe_files(options: Options, setting: str) -> list[str]:
    """The YAML files that make one run's config, left to right."""
    files = ["configs/recipe/demo.yaml", "configs/model/tiny.yaml", f"configs/mohd/{setting}.yaml"]
    return files if options.plain else [*files, f"{options.out}/recipe.yaml"]


def write_recipe(options: Options) -> None:
    """``OUT/recipe.yaml``: what differs from the demo recipe for this data (its folder, mix, vocabulary, length)."""
    if options.plain:
        return
    manifest = load_manifest(options.folder / "data")
    recipe: dict[str, object] = {
        "run_folder": f"{options.out}/{{run_name}}",
        "data": {"local": f"{options.out}/data", "domains": mix(manifest)},
        "model": {"vocab_size": manifest.tokenizer.vocab_size},
    }
    if options.max_duration or options.raw:
        recipe["max_duration"] = options.max_duration or f"{REAL_BATCHES}ba"
    if options.max_duration:  # a run may be shorter than the recipe's warm-up
        recipe["scheduler"] = {"t_warmup": "0.1dur"}
    text = "# Written by the demo: on top of configs/recipe/demo.yaml\n" + yaml.safe_dump(recipe, sort_keys=False)
    write_atomic(options.folder / "recipe.yaml", text)


def mix(manifest: Manifest) -> dict[str, float]:
    """Proportions of the domains that the data has: LLaMA-1's where it names them, else by their tokens."""
    tokens = {name: splits["train"].tokens for name, splits in manifest.domains.items()}
    return {name: round(share, 4) for name, share in shares(sorted(tokens), tokens).items()}


def claim(options: Options) -> None:
    """Takes the output folder for a demo of these inputs.

    Raises:
        UserError: it holds one of other inputs, or can't be written to.
    """
    record = options.folder / "demo.json"
    ours = {key: value for key, value in asdict(options).items() if key != "out"}
    if not record.is_file():
        write_json(record, ours)
        return
    try:
        theirs = json.loads(record.read_text("utf-8"))
    except ValueError:
        raise UserError(f"{record}: not JSON; choose another OUT, or remove {options.out}") from None
    for key, value in ours.items():
        if theirs.get(key) != value:
            raise UserError(
                f"{options.out} holds a demo with {key} = {theirs.get(key)!r}, not {value!r}; "
                f"choose another OUT, or remove {options.out}"
            )


def run_demo(options: Options) -> None:
    """Runs the sequence, and prints the paths of the table and the figure last.

    Raises:
        UserError: the folder holds another demo, or a step fails; the message names it, its command and its log.
    """
    began = time.monotonic()
    claim(options)
    sequence = steps(options)
    # A step that outlives a killed demo keeps holding the lock
    with SharedLock(options.folder / ".lock").holding(
        f"another demo, or a step of one that was killed, is running in {options.out}; "
        "wait for it, end it, or choose another OUT"
    ) as lock:
        print(f"Demo in {options.out}: {len(sequence)} steps. Each is a command of its own, printed after `$`.")
        if not options.raw:
            print("The corpus, the models and the questions are toys: the path is real, the numbers mean nothing.")
        for number, step in enumerate(sequence, 1):
            heading = f"[{number}/{len(sequence)}] {_clock(time.monotonic() - began)} {step.title}"
            step.before()
            print(f"\n{heading}\n$ {step.line}", flush=True)
            run_step(step, options.folder / "logs" / f"{step.name}.log", f"{number}/{len(sequence)}", lock)
    print(f"\nDone in {_clock(time.monotonic() - began)}.")
    print(f"table   {options.out}/table.md\nfigure  {options.out}/curves.png", flush=True)


def run_step(step: Step, log: Path, number: str, *keep: int) -> None:
    """Runs one command with its output on the terminal, progress bars and all, and in ``log``.

    Args:
        number: ``3/11``, for messages.
        keep: file descriptors that the command inherits.

    Raises:
        UserError: it fails, or leaves nothing behind.
    """
    command = [*PROGRAMS.get(step.command[0], [step.command[0]]), *step.command[1:]]
    codes: list[int] = []
    line = Every(SILENCE)

    def look(command: Command) -> None:
        if not sys.stdout.isatty() and command.silent_for > SILENCE and line.due():
            print(f"[{number}] {step.title}: running for {_clock(time.monotonic() - command.began)}", flush=True)

    job = Job(
        step.name,
        lambda slot: Command(command, log, keep=keep, echo=True, shown=step.line),
        lambda done, code: codes.append(code),
    )
    with Supervisor() as supervisor:
        try:
            supervisor.run(job, look)
        except KeyboardInterrupt:
            show_cursor = "\x1b[?25h" if sys.stdout.isatty() else ""  # a bar may have hidden it
            print(f"{show_cursor}\ninterrupted: ending this step; run the demo again to resume", flush=True)
            raise
    if codes[0] != 0:
        raise UserError(
            f"step {number} ({step.title}) failed with exit code {codes[0]}: `{step.line}`; its output is in {log}; "
            "once fixed, run the demo again: it resumes here"
        )
    if not step.leaves.exists():
        raise UserError(
            f"step {number} ({step.title}) left no {step.leaves} although `{step.line}` succeeded; see {log}"
        )


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
