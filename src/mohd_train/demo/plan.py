"""What the demo does: its steps, each a command that can be typed by itself, and what of them is there already."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from mohd_train.config.load import load_config
from mohd_train.config.schema import Config
from mohd_train.data.manifest import Manifest
from mohd_train.data.raw import shares
from mohd_train.demo import state
from mohd_train.errors import UserError

SETTINGS = ("dense", "50", "x2")  # configs/mohd
SEQ_LEN = 512
VAL_TOKENS = 40_000
DEMO_QUESTIONS = "eval/demo_questions"
REAL_LIMIT = 5  # examples a task (a subject, in MMLU) with EVAL_DATA: minutes, not hours, on two cores
REAL_BATCHES = 50  # a large vocabulary makes a step of the tiny model several times as slow


@dataclass(frozen=True)
class Options:
    """What a user chooses. Paths are relative to the checkout, where every command runs."""

    out: str = "runs/demo"
    raw: str | None = None  # RedPajama rows; None: a corpus of this Python installation's own text
    tokenizer: str | None = None  # a sentencepiece model or what prepare.py takes; None: one learned from the corpus
    eval_data: str | None = None  # DIR/<task>/<split>.jsonl; None: the questions written for this project
    limit: int | None = None  # examples a task; None: all of the demo questions, REAL_LIMIT of EVAL_DATA
    max_duration: str | None = None  # None: the recipe's, or REAL_BATCHES with RAW

    @property
    def folder(self) -> Path:
        return Path(self.out)

    @property
    def raw_folder(self) -> str:
        return self.raw or f"{self.out}/raw"

    @property
    def tokenizer_path(self) -> str:
        return self.tokenizer or f"{self.out}/tokenizer.model"

    @property
    def question_limit(self) -> int | None:
        return self.limit or (REAL_LIMIT if self.eval_data else None)


@dataclass(frozen=True)
class Step:
    """One command of the demo."""

    name: str  # of its log
    title: str
    command: tuple[str, ...]  # run in the checkout; `python` and `composer` are those of the environment
    done: Callable[[], str | None]  # what its output, found whole, consists of; None: the command has to run
    under_way: Callable[[], str | None] = lambda: None  # what of its output the command goes on from

    @property
    def line(self) -> str:
        """The command as a user types it."""
        return shlex.join(self.command)


def claim(options: Options) -> None:
    """Takes the output folder for a demo of these inputs.

    Raises:
        UserError: it holds one of other inputs, or can't be written to.
    """
    record = options.folder / "demo.json"
    ours = {key: value for key, value in asdict(options).items() if key != "out"}
    if record.is_file():
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
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    part = record.with_name("demo.json.part")
    part.write_text(json.dumps(ours, indent=2) + "\n", encoding="utf-8")
    os.replace(part, record)


def mix(manifest: Manifest) -> dict[str, float]:
    """Proportions of the domains that the data has: LLaMA-1's where it names them, else by their tokens."""
    tokens = {name: splits["train"].tokens for name, splits in manifest.domains.items()}
    return {name: round(share, 4) for name, share in shares(sorted(tokens), tokens).items()}


def write_recipe(options: Options) -> None:
    """``OUT/recipe.yaml``: what the demo recipe says otherwise for this data (its folder, mix, vocabulary, length)."""
    manifest = state.manifest(options.folder / "data")
    assert manifest is not None, "the shards come first"
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
    path = options.folder / "recipe.yaml"
    part = path.with_name("recipe.yaml.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def recipe_files(options: Options, setting: str) -> list[str]:
    """The YAML files that make one run's config, left to right."""
    files = ["configs/recipe/demo.yaml", "configs/model/tiny.yaml", f"configs/mohd/{setting}.yaml"]
    plain = options == Options(eval_data=options.eval_data, limit=options.limit)
    return files if plain else [*files, f"{options.out}/recipe.yaml"]


def steps(options: Options) -> list[Step]:
    """All steps in their order. The commands name every path, so that each can be run by itself."""
    names = [f"tiny-{setting}" for setting in SETTINGS]
    data = [] if options.raw else [_corpus(options)]
    data += [] if options.tokenizer else [_tokenizer(options)]
    trained = [_train(options, setting) for setting in SETTINGS]
    evaluated = [_evaluate(options, name) for name in names]
    return [*data, _shards(options), *trained, *evaluated, _table(options), _curves(options, names)]


def _corpus(options: Options) -> Step:
    command = ("python", "scripts/demo.py", "corpus", options.raw_folder)
    return Step("corpus", "a corpus of this Python's own text", command, lambda: state.corpus(Path(options.raw_folder)))


def _tokenizer(options: Options) -> Step:
    command = ("python", "scripts/demo.py", "tokenizer", options.raw_folder, options.tokenizer_path)
    return Step("tokenizer", "a tokenizer", command, lambda: state.tokenizer(Path(options.tokenizer_path)))


def _shards(options: Options) -> Step:
    data = f"{options.out}/data"
    command = ["python", "data_prep/prepare.py", "--raw", options.raw_folder, "--out", data]
    command += ["--tokenizer", options.tokenizer_path, "--seq-len", str(SEQ_LEN), "--val-tokens", str(VAL_TOKENS)]
    return Step("shards", "shards", tuple(command), lambda: state.shards(Path(data), options.tokenizer_path, SEQ_LEN))


def _train(options: Options, setting: str) -> Step:
    files = recipe_files(options, setting)

    def config() -> Config:
        if f"{options.out}/recipe.yaml" in files:
            write_recipe(options)
        return load_config(files)

    return Step(
        f"train-tiny-{setting}",
        f"training tiny-{setting}",
        ("composer", "-n", "1", "scripts/train.py", *files),
        lambda: state.run(config()),
        under_way=lambda: state.progress(f"{options.out}/tiny-{setting}"),
    )


def _evaluate(options: Options, name: str) -> Step:
    checkpoint, output = state.checkpoint_of(f"{options.out}/{name}"), f"{options.out}/eval"
    command = ["python", "eval/run_eval.py", "--checkpoint", str(checkpoint), "--output", output]
    command += ["--data-dir", options.eval_data or DEMO_QUESTIONS]
    command += ["--limit", str(options.question_limit)] if options.question_limit else []
    return Step(
        f"eval-{name}",
        f"ten tasks for {name}",
        tuple(command),
        lambda: state.evaluation(Path(output, name), checkpoint, options.question_limit),
        under_way=lambda: state.answered(Path(output, name), checkpoint),
    )


def _table(options: Options) -> Step:
    command = (
        "python",
        "eval/make_tables.py",
        f"{options.out}/eval",
        "--format",
        "md",
        "--output",
        f"{options.out}/table.md",
    )
    return Step("table", "the table", command, lambda: None)


def _curves(options: Options, names: list[str]) -> Step:
    runs = [f"{options.out}/{name}" for name in names]
    command = ("python", "scripts/demo.py", "curves", *runs, "--output", f"{options.out}/curves.png")
    return Step("curves", "the loss curves", command, lambda: None)
