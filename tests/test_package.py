"""What pyproject.toml declares is what is imported; a wheel brings all that its commands read, wherever they are called."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import setuptools

from mohd_train import resources
from mohd_train.cli import VERBS, main
from mohd_train.config.load import load_config, to_yaml
from mohd_train.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COMMANDS = ("src", "scripts", "data_prep", "eval")
# Declared for what other packages load by name, or for what an installation needs.
NOT_IMPORTED = {
    "accelerate": "lm-eval's Hugging Face models",
    "pandas": "a frame of results",
    "protobuf": "transformers converts sentencepiece models with it",
    "sentencepiece": "tokenizers of LLaMA",
    "tensorboard": "Composer's logger",
}
# with torch, on Linux; with pytest, before Python 3.11; make benchmark-peers installs it
OPTIONAL = {"triton", "tomli", "litgpt"}
CONFIGS = ["configs/recipe/demo.yaml", "configs/model/tiny.yaml", "configs/mohd/x2.yaml"]


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements: list[str]) -> set[str]:
    names = [re.match(r"[A-Za-z0-9._-]+", requirement) for requirement in requirements]
    return {normalized(name[0]) for name in names if name}


@functools.cache
def distributions() -> dict[str, list[str]]:
    """Module -> the distributions that install it."""
    return dict(importlib.metadata.packages_distributions())


def imported(*folders: str) -> set[str]:
    """Distributions whose modules the code below ``folders`` imports, at the top of a file or inside a function."""
    modules = set()
    for file in [file for folder in folders for file in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module.partition(".")[0])
    ours = {"mohd_train", *(path.name for path in (ROOT / "tests").iterdir())}
    modules -= ours | OPTIONAL | set(sys.stdlib_module_names)
    return {normalized(distributions().get(module, [module])[0]) for module in modules}


def test_what_the_package_imports_is_declared() -> None:
    extras = PROJECT["optional-dependencies"]
    assert imported(*COMMANDS) - declared(PROJECT["dependencies"] + extras["gpu"]) == set()
    assert imported("tests") - declared(PROJECT["dependencies"] + extras["dev"]) == set()


def test_what_is_declared_is_needed() -> None:
    assert declared(PROJECT["dependencies"]) - imported(*COMMANDS) <= set(NOT_IMPORTED)


def test_what_is_declared_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
    assert declared(wanted) - declared([line for line in lines if not line.startswith("#")]) == set()


def test_a_file_of_the_user_wins_over_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "configs/model/tiny.yaml"
    assert resources.find(name) == ROOT / name == resources.path(name)
    Path(name).parent.mkdir(parents=True)
    Path(name).write_text("model: {}")
    assert resources.find(name) == Path(name)
    assert resources.find("configs/model/other.yaml") == Path("configs/model/other.yaml")  # neither: as it was given
    for not_ours in ("pyproject.toml", "configs/../pyproject.toml", "eval/results"):  # only what a wheel carries too
        assert resources.find(not_ours) == Path(not_ours)
    with pytest.raises(UserError, match=r"lacks configs/nothing\.yaml .*install it again"):
        resources.path("configs/nothing.yaml")


def test_configs_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = to_yaml(load_config([str(ROOT / name) for name in CONFIGS]))
    monkeypatch.chdir(tmp_path)
    assert to_yaml(load_config(CONFIGS)) == here
    with pytest.raises(UserError, match=r"no such config file \(did you mean 'configs/model/355m\.yaml'\?\)"):
        load_config(["configs/model/356m.yaml"])


@pytest.mark.parametrize("verb", VERBS)
def test_help_loads_nothing_slow(verb: str) -> None:
    """Neither torch nor Composer: they take seconds. sweep's own module is all it may load."""
    program = (
        "import sys\n"
        "from mohd_train.cli import main\n"
        f"try:\n    main([{verb!r}, '--help'])\nexcept SystemExit as left:\n    assert not left.code\n"
        "slow = {'torch', 'composer', 'streaming', 'transformers', 'lm_eval', 'datasets', 'matplotlib', 'pandas'}\n"
        "assert not slow & set(sys.modules), slow & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: mohd {verb}")
    assert "%(prog)s" not in done.stdout


def test_usage_errors_of_mohd() -> None:
    for words, message in (([], "which verb?"), (["tarin"], "there is no verb 'tarin' (did you mean 'train'?)")):
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-m", "mohd_train.cli", *words], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1] == f"error: {message}"
        assert time.monotonic() - began < 5  # 0.1 s on an idle machine


@pytest.mark.parametrize(("verb", "option"), [("count", "--json"), ("train", "--print-config")])
def test_overrides_may_stand_behind_options(verb: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["configs/recipe/paper_50b.yaml", "configs/model/355m.yaml", "configs/mohd/dense.yaml"]
    prints = []
    for line in ([*words, "model.name=a", option], [*words, option, "model.name=a"]):
        assert not main([verb, *line])
        prints.append(capsys.readouterr().out)
    assert prints[0] == prints[1] != ""


class Wheel:
    """The wheel, unpacked, and another folder to call its commands from."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder = path, folder

    def mohd(self, *words: object, code: int = 0, timeout: float = 240) -> str:
        """What ``mohd WORDS`` prints."""
        command = [sys.executable, "-m", "mohd_train.cli", *map(str, words)]
        environment = os.environ | {"PYTHONPATH": str(self.path), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=self.folder, env=environment, timeout=timeout
        )
        assert done.returncode == code, done.stderr + done.stdout
        return done.stdout + (done.stderr if code else "")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    """Built from a source distribution, as a package index would have it."""
    assert int(setuptools.__version__.partition(".")[0]) >= 77, "setuptools is old; run make setup"
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in (*COMMANDS, "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.rmtree(source / "eval" / "results", ignore_errors=True)  # what a user's evaluations wrote
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt"):
        shutil.copy(ROOT / name, source)

    def build(what: str, where: Path) -> Path:
        program = f"from setuptools import build_meta; build_meta.build_{what}({str(folder)!r})"
        done = subprocess.run([sys.executable, "-c", program], cwd=where, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (built,) = folder.glob("mohd_train-*.whl" if what == "wheel" else "mohd_train-*.tar.gz")
        return built

    shutil.unpack_archive(build("sdist", source), folder / "unpacked")
    (source,) = (folder / "unpacked").iterdir()
    with zipfile.ZipFile(build("wheel", source)) as file:
        file.extractall(folder / "installed")
    (folder / "elsewhere").mkdir()
    return Wheel(folder / "installed", folder / "elsewhere")


def test_a_wheel_carries_every_file_and_the_command(wheel: Wheel) -> None:
    data = wheel.path / "mohd_train" / "_data"
    for name in resources.CARRIED:
        files = [ROOT / name] if (ROOT / name).is_file() else sorted((ROOT / name).rglob("*"))
        files = [file for file in files if file.is_file() and "__pycache__" not in file.parts]
        assert files
        for file in files:
            assert (data / file.relative_to(ROOT)).read_bytes() == file.read_bytes()
    (information,) = wheel.path.glob("*.dist-info")
    assert "mohd = mohd_train.cli:console" in (information / "entry_points.txt").read_text()
    assert {path.name for path in wheel.path.iterdir()} == {"mohd_train", information.name}


def test_a_wheel_works_in_another_folder(wheel: Wheel) -> None:
    rows = json.loads(wheel.mohd("count", "--all", "--json"))
    assert {row["name"]: row["activated"] for row in rows}["355m-x2"] == 289406976
    assert all(row["paper"] for row in rows)
    shown = wheel.mohd("train", *CONFIGS, "--print-config")
    assert f"# {CONFIGS[0]}: {wheel.path}/mohd_train/_data/{CONFIGS[0]}\n" in shown
    assert shown.endswith("\n" + to_yaml(load_config([str(ROOT / name) for name in CONFIGS])))
    assert "355m-x2-no-fusion" in wheel.mohd("sweep", "show", "configs/sweep/table4.yaml")
    assert wheel.mohd("tables", "--paper-only", "--table", 2).count("| MoHD-") > 5
    assert wheel.mohd("verify", "nowhere", code=1).startswith("error: no data folder nowhere")


@pytest.mark.expensive
@pytest.mark.timeout(1800)
def test_a_wheel_trains_and_evaluates(wheel: Wheel) -> None:
    """The demo from a folder that holds nothing: corpus, tokenizer, shards, three models, ten tasks, table and figure."""
    shown = wheel.mohd("demo", "run", "--max-duration", "2ba", "--limit", 2, timeout=1700)
    assert shown.endswith("figure  runs/demo/curves.png\n")
    table = (wheel.folder / "runs/demo/table.md").read_text(encoding="utf-8")
    assert all(f"| **{name}** |" in table for name in ("tiny-dense", "tiny-50", "tiny-x2"))
