"""Cluster jobs, for sweeps and preparation: options, templates, calls to the scheduler's programs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mohd_train import resources
from mohd_train.errors import UserError
from mohd_train.utils.text import printable

TEMPLATES = resources.root() / "scripts/launch"


@dataclass(frozen=True)
class ClusterOptions:
    """How jobs are submitted.

    Attributes:
        template: of the job, in place of the project's.
        arguments: further arguments for sbatch or kubectl apply.
        image, namespace, claim: Kubernetes: the container image, the namespace, ``PVC:MOUNT_PATH`` of the shared file system.
    """

    template: Path | None = None
    arguments: tuple[str, ...] = ()
    image: str | None = None
    namespace: str = "default"
    claim: str | None = None


class Rendered(str):
    """A value already in the template's language: a command line, a JSON list."""


def shell_word(value: str) -> str:
    """One word of a shell, whatever is in it; also of an ``#SBATCH`` line, which SLURM reads with a shell's quotes."""
    return shlex.quote(value)


def yaml_text(value: str) -> str:
    """The inside of a double-quoted YAML string."""
    return json.dumps(value, ensure_ascii=False)[1:-1]


def yaml_list(args: list[str]) -> Rendered:
    """A command as a YAML list. Kubernetes would substitute a variable for ``$(NAME)``; it reads ``$$(`` as ``$(``."""
    return Rendered(json.dumps([arg.replace("$(", "$$(") for arg in args], ensure_ascii=False))


def fill(template: Path, values: dict[str, object], quote: Callable[[str], str]) -> str:
    """A template's text with every ``{{name}}`` replaced.

    Args:
        values: each is quoted, but for :class:`Rendered` ones.
        quote: for the template's language: :func:`shell_word` (where the template has no quotes around the name) or
            :func:`yaml_text` (where it has double ones).

    Raises:
        UserError: a missing file, an unknown name, or quotes around what is quoted here.
    """
    try:
        text = template.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{template}: can't read the job template ({error.strerror})") from None
    for name in re.findall(r"\{\{(\w+)\}\}", text):
        if name not in values:
            raise UserError(f"{template}: unknown placeholder {{{{{name}}}}}; known: {', '.join(values)}")
    quoted = {name: _quoted(value, name, quote) for name, value in values.items()}
    if quote is shell_word:
        for before, name in re.findall(r"^(.*?)\{\{(\w+)\}\}", text, re.MULTILINE):
            inside = before.count('"') % 2 or before.count("'") % 2
            if inside and quoted[name] != str(values[name]):
                raise UserError(
                    f"{template}: write {{{{{name}}}}} without quotes around it; {values[name]} is quoted when it is filled in"
                )
    return re.sub(r"\{\{(\w+)\}\}", lambda match: quoted[match[1]], text)


def _quoted(value: object, name: str, quote: Callable[[str], str]) -> str:
    text = printable(str(value), name)  # a line break would end a comment or an #SBATCH line
    return text if isinstance(value, Rendered) else quote(text)


def call(command: list[str]) -> str:
    """Output of a scheduler's program. Raises UserError if it isn't installed here or refuses."""
    if shutil.which(command[0]) is None:
        raise UserError(
            f"{command[0]} is not installed here; launch from a machine of the cluster, or use --launcher local"
        )
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"`{shlex.join(command)}` failed: {(done.stderr or done.stdout).strip() or done.returncode}")
    return done.stdout.strip()


def sbatch(*args: str) -> str:
    """Submits a job to SLURM; returns its number. Raises UserError as :func:`call`."""
    return call(["sbatch", "--parsable", *args]).splitlines()[-1].partition(";")[0]


def claim_of(options: ClusterOptions) -> dict[str, object]:
    """The options that a Kubernetes template may name. Raises UserError if image or claim are missing."""
    if not options.image or not options.claim or ":" not in options.claim:
        raise UserError(
            "--launcher k8s needs --image IMAGE and --claim PVC:MOUNT_PATH (the file system with checkout, data and runs)"
        )
    claim, _, mount = options.claim.partition(":")
    return {"image": options.image, "namespace": options.namespace, "claim": claim, "mount": mount}
