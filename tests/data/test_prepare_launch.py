"""``mohd prepare --launcher``: jobs of stand-ins for SLURM and Kubernetes, which run them as processes of this machine."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from data.conftest import SEQ_LEN
from data.test_prepare import tree

from mohd_train.cli import main
from mohd_train.data.manifest import Manifest
from mohd_train.errors import UserError

# Runs an array job's tasks one after the other, and each wrapped command; a line in `calls` for each
SBATCH = """
import os, subprocess, sys
from pathlib import Path

bin = Path(sys.argv[0]).parent
with (bin / "calls").open("a") as calls:
    print(*sys.argv[1:], file=calls)
if sys.argv[-1].startswith("--wrap="):
    print("4712")
    sys.exit(subprocess.run(["sh", "-c", sys.argv[-1].removeprefix("--wrap=")], stdout=2).returncode)
script = Path(sys.argv[-1])
last = next(line.partition("0-")[2] for line in script.read_text().splitlines() if line.startswith("#SBATCH --array="))
for task in range(int(last) + 1):
    done = subprocess.run(["bash", script], env=os.environ | {"SLURM_ARRAY_TASK_ID": str(task)}, stdout=2)
    if done.returncode:
        sys.exit(done.returncode)
print("4711;cluster")
"""
# In the place of the interpreter of the jobs: the first command of task 1 is killed before it is done
KILLED = """
import os, signal, sys
from pathlib import Path

mark = Path({mark!r})
if "1/3" in sys.argv and not mark.exists():
    mark.touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on PATH for stand-ins."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return folder


def put(folder: Path, name: str, code: str) -> None:
    (folder / name).write_text(f"#!{sys.executable}\n{code}")
    (folder / name).chmod(0o755)


def words(raw: Path, out: Path, pieces: Path, *more: str) -> list[str]:
    sizes = ("--seq-len", str(SEQ_LEN), "--val-tokens", "1500", "--workers", "1")
    return ["prepare", "--raw", str(raw), "--out", str(out), "--tokenizer", str(pieces), *sizes, *more]


def test_a_slurm_array_with_a_killed_task_makes_the_same_bytes(
    raw: Path, pieces: Path, prepared: tuple[Path, Manifest], tmp_path: Path, programs: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    put(programs, "sbatch", SBATCH)
    kills = tmp_path / "kills"
    kills.mkdir()
    (kills / "sitecustomize.py").write_text(KILLED.format(mark=str(tmp_path / "killed")))
    monkeypatch.setenv("PYTHONPATH", f"{kills}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.chdir(raw.parent)
    out = tmp_path / "an out"
    asked = words(
        Path(raw.name), out, pieces, "--launcher", "slurm", "--tasks", "3", "--submit-args", "--partition=cpu"
    )
    assert main(asked) is None
    assert "submitted array job 4711 of 3 tasks, and job 4712, which finishes" in capsys.readouterr().out
    assert (tmp_path / "killed").exists()
    assert tree(out) == tree(prepared[0])
    array, finish = (shlex.split(line) for line in (programs / "calls").read_text().splitlines())
    assert array[:2] == ["--parsable", "--partition=cpu"]
    assert "--dependency=afterany:4711" in finish
    assert "--partition=cpu" in finish
    assert subprocess.run(["bash", "-n", f"{out}.jobs/prepare.sbatch"]).returncode == 0
    main(asked)
    assert f"already done: {out}" in capsys.readouterr().out
    assert len((programs / "calls").read_text().splitlines()) == 2


def test_a_task_that_fails_by_itself_is_not_repeated(raw: Path, pieces: Path, tmp_path: Path, programs: Path) -> None:
    """Its input is gone by the time it starts."""
    put(programs, "sbatch", "print(4711)")
    main(words(raw, tmp_path / "out", pieces, "--launcher", "slurm", "--tasks", "2"))
    script = tmp_path / "out.jobs" / "prepare.sbatch"
    script.write_text(script.read_text().replace(str(raw), str(tmp_path / "gone")))
    done = subprocess.run(
        ["bash", script], env=os.environ | {"SLURM_ARRAY_TASK_ID": "0"}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1


def test_a_kubernetes_job_makes_the_same_bytes(
    raw: Path, pieces: Path, prepared: tuple[Path, Manifest], tmp_path: Path, programs: Path
) -> None:
    """All its pods at once; the last one waits for the others."""
    put(programs, "kubectl", "")
    out = tmp_path / "out"
    main(
        words(
            raw, out, pieces, "--launcher", "k8s", "--tasks", "2", "--image", "registry/mohd:1", "--claim", "team:/work"
        )
    )
    job = yaml.safe_load((tmp_path / "out.jobs" / "prepare.yaml").read_text())
    assert job["metadata"]["name"] == "mohd-prepare-out"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 3
    container = job["spec"]["template"]["spec"]["containers"][0]
    pods = [
        subprocess.Popen(container["command"], env=os.environ | {"JOB_COMPLETION_INDEX": str(index)}, text=True)
        for index in range(3)
    ]
    assert [pod.wait(120) for pod in pods] == [0, 0, 0]
    assert tree(out) == tree(prepared[0])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--launcher", "slurm"], "--launcher and --tasks go together"),
        (["--tasks", "2"], "--launcher and --tasks go together"),
        (["--launcher", "slurm", "--tasks", "0"], "'0' is not a positive whole number"),
        (["--launcher", "slurm", "--tasks", "2", "--shard", "0/2"], "--launcher, --shard and --finish-after exclude"),
    ],
)
def test_usage_errors(
    raw: Path, pieces: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words(raw, tmp_path / "out", pieces, *more))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--launcher", "slurm", "--tasks", "999"], "a file is not divided; give at most"),
        (["--launcher", "k8s", "--tasks", "2"], "--launcher k8s needs --image IMAGE and --claim PVC:MOUNT_PATH"),
        (["--launcher", "slurm", "--tasks", "2"], "sbatch is not installed here"),
    ],
)
def test_refusals(
    raw: Path, pieces: Path, tmp_path: Path, more: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=message):
        main(words(raw, tmp_path / "out", pieces, *more))
    assert not (tmp_path / "out").exists()
