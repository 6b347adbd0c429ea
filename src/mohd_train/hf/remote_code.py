"""The code that an exported folder carries, so that ``trust_remote_code=True`` loads it where this package isn't installed.

It is assembled from this package's own files, with their comments and docstrings: the model that is exported is the model that was
trained.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import mohd_train
from mohd_train.config.schema import ModelConfig, MoHDSettings

CONFIGURATION, MODELING = "configuration_mohd", "modeling_mohd"
AUTO_MAP = {
    "AutoConfig": f"{CONFIGURATION}.MoHDConfig",
    "AutoModel": f"{MODELING}.MoHDModel",
    "AutoModelForCausalLM": f"{MODELING}.MoHDForCausalLM",
    "AutoModelForSequenceClassification": f"{MODELING}.MoHDForSequenceClassification",
}
FILES = {
    CONFIGURATION: ("config/plan.py", "hf/configuration.py"),
    MODELING: (
        "kernels/reference.py", "hf/remote_ops.py", "model/random_routing.py", "model/mohd.py", "model/moe.py",
        "model/init.py", "model/llama.py", "hf/modeling.py",
    ),
}  # fmt: skip
LEFT_OUT = {"make_plan", "_PLAN_FIELDS"}  # they read this package's own configs
STAND_INS = {
    CONFIGURATION: '''class UserError(ValueError):
    """Bad input."""


class SubDimensionConfig(NamedTuple):
    """N, K and S of one component."""

    sub_dims: int
    top_k: int
    shared_sub_dims: int
''',
    MODELING: "",
}
NEEDED = {
    CONFIGURATION: ["from typing import NamedTuple"],
    MODELING: [f"from .{CONFIGURATION} import ModelPlan, MoHDConfig, SubDimPlan"],
}


def write(folder: Path) -> None:
    """Writes ``configuration_mohd.py`` and ``modeling_mohd.py`` into ``folder``."""
    for name in FILES:
        (folder / f"{name}.py").write_text(assemble(name), encoding="utf-8")


def assemble(name: str) -> str:
    """The text of one file: its imports, then what each source file defines, in order."""
    package = Path(mohd_train.__file__).parent
    imports, bodies = list(NEEDED[name]), [STAND_INS[name]]
    for source in FILES[name]:
        found, body = _parts((package / source).read_text(encoding="utf-8"))
        imports += found
        bodies.append(body)
    body = re.sub(r"\breference\.(?=[a-z_]+\()", "", "\n\n".join(part.strip() for part in bodies if part))
    head = f'"""MoHD (Mixture of Hidden Dimensions, arXiv:2412.05644), as mohd_train {mohd_train.__version__} exports it."""\n'
    text = "\n".join([head, "from __future__ import annotations", "", *_merged(imports, body), "", "", body, ""])
    defined = Counter(_names(ast.parse(text)))
    twice = [key for key, count in defined.items() if count > 1]
    if twice:  # the later definition would silently replace the earlier one
        raise RuntimeError(
            f"{name}.py would define {', '.join(twice)} twice; rename it in one of {', '.join(FILES[name])}"
        )
    return text


def _parts(text: str) -> tuple[list[str], str]:
    """The imports of other packages, and everything else that the file defines, with its docstring as a comment."""
    lines, tree = text.splitlines(), ast.parse(text)
    imports: list[str] = []
    title = "".join(f"# {line}".rstrip() + "\n" for line in (ast.get_docstring(tree) or "").splitlines())
    kept, start = [f"# {'=' * 100}\n{title}"], 0
    for node in tree.body:
        first, start = start, node.end_lineno or 0
        piece = "\n".join(lines[first:start]).strip("\n")  # with its comments and decorators
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            if not module.startswith(("mohd_train", "__future__")):
                imports.append(ast.unparse(node))
        elif not isinstance(node, ast.Expr) and not LEFT_OUT & set(_names(ast.Module([node], []))):
            gap = "\n\n\n" if isinstance(node, ast.FunctionDef | ast.ClassDef) else "\n"
            kept.append(gap + re.sub(r"\b(ModelConfig|MoHDSettings)\.(\w+)", _default, piece))
    return imports, "".join(kept)


def _default(match: re.Match[str]) -> str:
    owner = {"ModelConfig": ModelConfig, "MoHDSettings": MoHDSettings}[match[1]]
    return repr(getattr(owner, match[2]))


def _names(tree: ast.Module) -> list[str]:
    """What a module's top level defines."""
    names: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
    return names


def _merged(imports: list[str], body: str) -> list[str]:
    """One line for each module, with the names that the body uses; relative ones last."""
    plain: set[str] = set()
    names: dict[str, set[str]] = {}
    for node in ast.parse("\n".join(imports)).body:
        if isinstance(node, ast.Import):
            plain |= {ast.unparse(node)}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            used = {ast.unparse(name) for name in node.names if re.search(rf"\b{name.asname or name.name}\b", body)}
            names.setdefault(module, set()).update(used)
    lines = [f"from {module} import {', '.join(sorted(found))}" for module, found in sorted(names.items()) if found]
    return [*sorted(plain), *(line for line in lines if " ." not in line), *(line for line in lines if " ." in line)]
