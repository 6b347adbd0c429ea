"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

from mohd_train.cli import VERBS

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "mohd_train"

# Imports run one way: errors, utils <- config <- kernels <- model <- checkpoint <- data, run_folder <- hf, train, sweep
# <- analysis <- results <- evaluate <- cli <- scripts. errors, resources, storage and utils are open to all; what is not named here
# is not allowed.
MAY_IMPORT = {
    "utils": set(),
    "config": set(),
    "kernels": set(),
    "model": {"config", "kernels"},
    "checkpoint": {"config", "model", "run_folder"},
    "hf": {"config", "kernels", "model", "checkpoint", "run_folder"},
    "data": {"config", "checkpoint"},
    "run_folder": {"config"},
    "train": {"config", "model", "checkpoint", "data", "kernels", "run_folder"},
    "evaluate": {"config", "model", "checkpoint", "hf", "data", "run_folder", "sweep", "results"},
    "results": {"config", "model", "checkpoint", "run_folder", "sweep", "analysis"},
    "analysis": {"config", "model", "checkpoint", "hf", "data", "run_folder", "sweep"},
    "sweep": {"config", "data", "model", "run_folder"},
    "benchmark": {"config", "kernels", "model", "hf", "data", "train", "sweep", "run_folder", "estimate"},
    "estimate": {"config", "kernels", "model", "data", "train"},
    "demo": {"data", "run_folder"},
    "study": {"config", "data", "run_folder", "analysis", "sweep", "results"},
}
MAY_IMPORT["cli"] = set(MAY_IMPORT)  # and nothing imports cli


def imported(file: Path) -> set[str]:
    """Parts of the package that ``file`` imports."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = node.module
            names |= {module} if module != "mohd_train" else {f"mohd_train.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("mohd_train.")}


@pytest.mark.parametrize("part", sorted(path.name for path in SOURCE.iterdir() if (path / "__init__.py").is_file()))
def test_imports_run_one_way(part: str) -> None:
    allowed = MAY_IMPORT[part] | {part, "errors", "resources", "storage", "utils", "compat", "__version__"}
    for file in (SOURCE / part).rglob("*.py"):
        assert imported(file) <= allowed, f"{file.relative_to(ROOT)} imports {imported(file) - allowed}"


def _imported_at_module_level(file: Path, modules: dict[str, Path]) -> set[str]:
    """Modules of the package that importing ``file`` imports; not those inside functions or under TYPE_CHECKING."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & modules.keys()


def test_no_import_circle() -> None:
    """Every module can be imported before those that import it: taking away what imports nothing leaves nothing."""
    modules = {
        ".".join(file.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__"): file
        for file in SOURCE.rglob("*.py")
    }
    left = {name: _imported_at_module_level(file, modules) - {name} for name, file in modules.items()}
    while free := [name for name, imports in left.items() if not imports & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"modules that import each other, directly or not: {sorted(left)}"


def test_a_script_is_a_verb_and_nothing_else() -> None:
    found = {
        f"{folder}/{file.name}" for folder in ("scripts", "data_prep", "eval") for file in (ROOT / folder).glob("*.py")
    }
    assert found == {verb.script for verb in VERBS.values()} | {"scripts/setup_env.py"}  # it makes the environment
    for name, verb in VERBS.items():
        tree = ast.parse((ROOT / verb.script).read_text(encoding="utf-8"))
        assert ast.unparse(ast.Module(tree.body[1:], [])) == (
            f"from mohd_train.cli import script\nif __name__ == '__main__':\n    script('{name}')"
        )


def test_every_verb_is_a_function_with_help() -> None:
    for name, verb in VERBS.items():
        module, _, function = verb.function.partition(":")
        assert inspect.getdoc(getattr(importlib.import_module(f"mohd_train.cli.{module}"), function)), name


def test_files_stay_readable() -> None:
    for file in SOURCE.rglob("*.py"):
        lines = len(file.read_text(encoding="utf-8").splitlines())
        assert lines <= 500, f"{file.relative_to(ROOT)} has {lines} lines"


def test_every_public_function_and_class_has_a_docstring() -> None:
    missing = []
    for file in SOURCE.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in tree.body:
            if (
                isinstance(node, ast.FunctionDef | ast.ClassDef)
                and not node.name.startswith("_")
                and not ast.get_docstring(node)
            ):
                missing.append(f"{file.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not missing, "\n".join(missing)


def test_transformers_never_asks_whether_to_run_a_folders_code() -> None:
    """Without ``trust_remote_code`` it asks on standard input, where `yes |` answers."""
    found, forgotten = 0, []
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            function = node.func if isinstance(node, ast.Call) else None
            if isinstance(function, ast.Attribute) and ast.unparse(function).startswith("Auto"):
                if function.attr not in ("from_pretrained", "from_config"):
                    continue
                found += 1
                assert isinstance(node, ast.Call)
                if "trust_remote_code" not in [keyword.arg for keyword in node.keywords]:
                    forgotten.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert found >= 3
    assert not forgotten, "\n".join(forgotten)
