"""What a sharded run writes, read by everything that reads checkpoints: two processes under FSDP write it.

See tests/train/test_distributed.py for what is real in that and what is answered in CUDA's place.
"""

from __future__ import annotations

import hashlib
import json
import runpy
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.native import save_tokenizer, swap_words
from train.distributed_support import Place, run, run_in
from train.train_support import SEQ_LEN, VOCAB, make_config, make_data
from transformers import AutoModelForCausalLM, AutoTokenizer

from mohd_train import checkpoint
from mohd_train.analysis.routing import router_selection
from mohd_train.checkpoint.identity import tokenizer_sha256
from mohd_train.checkpoint.resume import latest_valid
from mohd_train.checkpoint.sharded import SafeReader
from mohd_train.data.manifest import TokenizerInfo, load_manifest, save_manifest
from mohd_train.errors import UserError
from mohd_train.hf.convert import load_native
from mohd_train.train.train import dry_run, train

SHARDED = "fsdp_config={state_dict_type: sharded}"
RUN = "x2-sharded"


@dataclass
class Runs(Place):
    """A run in two processes with sharded checkpoints, and the same one in one process, whose checkpoints are files."""

    fixed = ("max_duration=2ba", "save_interval=1ba", "eval_interval=2ba")

    def sharded(self, name: str) -> Path:
        """By the folder's own name, or by the link."""
        return self.run(RUN) / "checkpoints" / {"folder": "ep0-ba2", "link": "latest-rank0.pt"}[name]


def give_tokenizer(data: Path, *, edited: bool = False) -> None:
    """A tokenizer that loads, in place of the one that training's own tests need none of; or the edited one that is there."""
    folder, manifest = data / "tokenizer", load_manifest(data)
    if not edited:
        shutil.rmtree(folder)
        save_tokenizer(folder, VOCAB)
    sha256 = tokenizer_sha256(AutoTokenizer.from_pretrained(folder))
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}
    info = TokenizerInfo(sha256, VOCAB, bos_id=1, eos_id=2, name="words", files=files)
    save_manifest(replace(manifest, tokenizer=info), data)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    made = Runs(tmp_path_factory.mktemp("readers"))
    make_data(made.path / "data")
    give_tokenizer(made.path / "data")
    run(made.job("x2-one", "x2"))
    run_in(2, made.job(RUN, "x2", SHARDED, fsdp=True))
    entry = {"model": "mini", "setting": "x2", "label": "x2", "seed": 17, "command": []}
    plan = checkpoint.open(made.sharded("folder")).metadata["plan"]
    record = {
        "format": "mohd_train.sweep/1", "name": "s", "title": "s", "file": "s.yaml", "scale": "tiny", "overrides": [],
        "launches": [], "data": {"folder": str(made.path / "data")}, "runs": [{"name": RUN, "plan": plan, **entry}],
    }  # fmt: skip
    (made.path / "runs" / "sweep.json").write_text(json.dumps(record))
    (made.path / "runs" / "configs").mkdir()
    shutil.copy(made.run(RUN) / "config.yaml", made.path / "runs" / "configs" / f"{RUN}.yaml")
    return made


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, root: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """``call(script, *arguments)`` -> what it prints, as the command line prints it; it must end with 0."""

    def call(script: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(root / script), run_name="__main__")
        shown = capsys.readouterr()
        assert ended.value.code in (0, None), shown.err
        return shown.out

    return call


by = pytest.mark.parametrize("name", ["folder", "link"])


@by
def test_the_model_is_the_one_that_was_trained(runs: Runs, name: str) -> None:
    one = load_native(runs.run("x2-one") / "checkpoints" / "latest-rank0.pt")
    two = load_native(runs.sharded(name))
    ids = torch.randint(VOCAB, (2, SEQ_LEN))
    with torch.no_grad():
        torch.testing.assert_close(two(ids).logits, one(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_flipped_byte_in_a_shard_is_found(runs: Runs, tmp_path: Path) -> None:
    """In the middle of the largest parameter's part: the metadata, the sizes and the other parts are as they were."""
    copy = shutil.copytree(runs.sharded("folder"), tmp_path / "ep0-ba2")
    assert checkpoint.open(copy).verify().kind == "sharded"
    parts = SafeReader(copy).read_metadata().storage_data
    index, part = max(parts.items(), key=lambda entry: entry[1].length)
    with (copy / part.relative_path).open("r+b") as file:
        file.seek(part.offset + part.length // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    found = checkpoint.open(copy)  # what it says of itself is whole
    with pytest.raises(UserError, match=rf"{part.relative_path}, {index.fqn} is corrupt: .* differs from its checksum"):
        found.verify()
    shutil.copytree(runs.sharded("folder").with_name("ep0-ba1"), tmp_path / "ep0-ba1")
    newest, skipped = latest_valid(tmp_path)
    assert newest == tmp_path / "ep0-ba1"
    assert len(skipped) == 1
    assert "is corrupt" in skipped[0]


@by
def test_run_eval(runs: Runs, call: Any, name: str, root: Path, tmp_path: Path) -> None:
    questions = tmp_path / "questions" / "sciq"
    questions.mkdir(parents=True)
    row = {"question": "w4", "correct_answer": "w5", "support": "w6 w7"}
    rows = [json.dumps(row | {f"distractor{i}": f"w{i + j}" for i in (1, 2, 3)}) for j in (10, 20)]
    (questions / "test.jsonl").write_text("\n".join(rows) + "\n")
    asked = ("--tasks", "sciq", "--data-dir", questions.parent, "--device", "cpu", "--output", tmp_path)
    assert "sciq: acc" in call("eval/run_eval.py", "--checkpoint", runs.sharded(name), *asked)
    ours = json.loads((tmp_path / "mini-x2" / "sciq.json").read_text())["mohd_train"]
    assert ours["model"]["checkpoint"] == str(runs.sharded("folder").resolve())
    assert (ours["model"]["kind"], ours["model"]["run"], "unfinished" in ours["model"]) == ("native", RUN, False)
    assert ours["settings"]["tokenizer"] == load_manifest(runs.path / "data").tokenizer.sha256
    other = {"folder": "link", "link": "folder"}[name]
    assert "reused" in call("eval/run_eval.py", "--checkpoint", runs.sharded(other), *asked)


@by
def test_perplexity(runs: Runs, call: Any, name: str, tmp_path: Path) -> None:
    """Equal to the validation within training, which the last line of metrics.jsonl holds."""
    words = ("--perplexity", "--data", runs.path / "data", "--device", "cpu", "--output", tmp_path)
    assert "perplexity" in call("eval/run_eval.py", "--checkpoint", runs.sharded(name), *words)
    stored = json.loads((tmp_path / "mini-x2" / "perplexity.json").read_text())["mohd_train"]
    lines = [json.loads(line) for line in (runs.run(RUN) / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "metrics/cc/LanguagePerplexity" in line][-1]
    for domain in ("cc", "wiki"):
        expected = trained[f"metrics/{domain}/LanguagePerplexity"]
        assert stored["domains"][domain]["perplexity"] == pytest.approx(expected, rel=1e-4)


@by
def test_observe(runs: Runs, call: Any, name: str, tmp_path: Path) -> None:
    words = ("--data", runs.path / "data", "--tokens", "64", "--device", "cpu", "--output", tmp_path / "out")
    call("eval/observe.py", "--model", runs.sharded(name), *words)
    record = json.loads((tmp_path / "out" / "observation.json").read_text())
    assert (record["model"]["kind"], record["model"]["run"], record["model"]["name"]) == ("native", RUN, "mini-x2")
    assert len(json.loads((tmp_path / "out" / "router.json").read_text())["selections"]) == 4


@by
def test_export_hf(runs: Runs, call: Any, name: str, tmp_path: Path) -> None:
    call("scripts/export_hf.py", runs.sharded(name), tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.randint(VOCAB, (2, SEQ_LEN))
    with torch.no_grad():
        torch.testing.assert_close(
            again(ids).logits, load_native(runs.sharded("folder"))(ids).logits, rtol=1e-5, atol=1e-5
        )


def test_make_figures_router(runs: Runs, call: Any, tmp_path: Path) -> None:
    call("eval/make_figures.py", runs.path / "runs", "--router", RUN, "--output", tmp_path)
    for component in ("attention", "ffn"):
        assert (tmp_path / f"fig11_router_{component}_layer1.png").stat().st_size > 1000
        found = [
            router_selection(runs.sharded(name), runs.path / "data", layer=1, component=component)
            for name in ("folder", "link")
        ]
        assert found[0] == found[1]
        assert sum(found[0].selected["cc"]) == pytest.approx(checkpoint.open(runs.sharded("link")).plan.ffn.top_k)


def test_training_goes_on_from_it_by_the_link(runs: Runs) -> None:
    """load_path, in two processes; and what a copy from object storage has in the link's place."""
    folder = runs.path / "copied" / "checkpoints"
    shutil.copytree(runs.sharded("folder"), folder / "ep0-ba2")
    (folder / "latest-rank0.pt.symlink").write_text("runs/stored/ep0-ba2")
    for name, source in (("by-link", runs.sharded("link")), ("by-text", folder / "latest-rank0.pt")):
        run_in(2, runs.job(name, "x2", SHARDED, "max_duration=3ba", f"load_path={source}", fsdp=True))
        assert json.loads((runs.run(name) / "run.json").read_text())["sessions"][0]["from"] == str(source)
        assert checkpoint.open(runs.run(name) / "checkpoints" / "latest-rank0.pt").path.name == "ep0-ba3"


def test_training_takes_a_checkpoint_of_its_own_tokenizer_alone(runs: Runs, tmp_path: Path) -> None:
    """Named by the hash of today, or by that of an earlier version; `--dry-run` says the same as the run."""
    source = runs.run("x2-one") / "checkpoints" / "ep0-ba2-rank0.pt"
    tokenizer = AutoTokenizer.from_pretrained(runs.path / "data" / "tokenizer")
    content = torch.load(source, weights_only=False)
    metadata = content["state"]["callbacks"]["RunMetadata"]
    assert metadata["tokenizer_sha256"] == tokenizer_sha256(tokenizer)

    def start(data: Path, sha256: str, begin: Any = dry_run) -> None:
        metadata["tokenizer_sha256"] = sha256
        torch.save(content, tmp_path / "from.pt")
        begin(make_config(tmp_path, data, "run_name=a", f"load_path={tmp_path / 'from.pt'}"))

    for version in (1, 2):
        start(runs.path / "data", tokenizer_sha256(tokenizer, version=version))
    data = Path(shutil.copytree(runs.path / "data", tmp_path / "data"))
    swap_words(data / "tokenizer")
    give_tokenizer(data, edited=True)
    for version in (1, 2):
        for begin in (dry_run, train):
            with pytest.raises(UserError, match=r"from\.pt was trained with another tokenizer than this data's"):
                start(data, tokenizer_sha256(tokenizer, version=version), begin)
    assert not (tmp_path / "runs").exists()


def test_a_tokenizer_edited_in_the_data_is_refused_before_training(runs: Runs, tmp_path: Path) -> None:
    data = Path(shutil.copytree(runs.path / "data", tmp_path / "data"))
    file = data / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace('"w5"', '"w05"'))
    for start in (dry_run, train):
        with pytest.raises(
            UserError, match=r"tokenizer\.json: differs from the manifest's hash .*copy the folder tokeni"
        ):
            start(make_config(tmp_path, data, "run_name=a"))
    assert not (tmp_path / "runs" / "a" / "run.json").exists()
