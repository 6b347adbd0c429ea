from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from sweep.sweep_support import request

from mohd_train.cli.sweep import parse
from mohd_train.errors import UserError
from mohd_train.sweep.commands import Request, launch, resume
from mohd_train.sweep.folder import SweepFolder
from mohd_train.sweep.launch.kubernetes import job_name
from mohd_train.sweep.status import job_states, run_status
from mohd_train.utils.jobs import fill, shell_word

DENSE, X2, BARE = (f"tiny-355m-{setting}-s1" for setting in ("dense", "x2", "x2-no-fusion"))


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on PATH for fake programs; each notes its words in ``NAME.words``."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder


def fake(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f'#!/bin/sh\necho "$@" >> "{folder}/{name}.words"\n{body}\n')
    path.chmod(0o755)


def words(folder: Path, name: str) -> list[str]:
    return (folder / f"{name}.words").read_text().splitlines()


def finish(folder: SweepFolder, name: str, status: str = "finished") -> None:
    (folder.path / name).mkdir()
    record = {"status": status, "config": folder.config(name), "batch": 1}
    (folder.path / name / "run.json").write_text(json.dumps(record))


def test_slurm_array_job_and_its_states(
    sweep_file: Path, data: Path, programs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(programs, "sbatch", "echo '4711;cluster'")
    asked = request(
        sweep_file, data, launcher="slurm", parallel=2, processes=4, submit_args="--partition=gpu --time='1:00:00'"
    )
    assert launch(asked) == 0
    assert "submitted array job 4711" in capsys.readouterr().out
    folder = SweepFolder(sweep_file.parent / "out")
    script = folder.path / "jobs" / "launch-1.sbatch"
    assert words(programs, "sbatch") == [f"--parsable --partition=gpu --time=1:00:00 {script}"]
    text = script.read_text()
    assert "{{" not in text
    assert "#SBATCH --array=0-2%2\n" in text
    assert "#SBATCH --gpus-per-node=4\n" in text
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    assert (folder.path / "jobs" / "launch-1.runs").read_text().split() == [DENSE, X2, BARE]

    fake(programs, "squeue", "echo '0 RUNNING'; echo '2 PENDING'; echo '1 COMPLETED'")
    states, notes = job_states(folder)
    assert (states, notes) == ({DENSE: "running", BARE: "queued"}, [])
    assert words(programs, "squeue")[0] == "--noheader --array --jobs=4711 --format=%K %T"
    finish(folder, X2, "failed")
    assert resume(Request(target=folder.path, launcher="slurm")) == 0  # only what is neither queued nor running
    folder = SweepFolder(folder.path)
    assert (folder.path / "jobs" / "launch-2.runs").read_text().split() == [X2]
    assert folder.launch_of(X2)["job"] == "4711"  # type: ignore[index]
    fake(programs, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert job_states(folder) == ({}, [])
    fake(programs, "squeue", "echo 'connection refused' >&2; exit 1")
    assert "connection refused" in job_states(folder)[1][0]
    with pytest.raises(UserError, match=r"can't tell which runs are under way: .*connection refused"):
        resume(Request(target=folder.path, launcher="slurm"))


def test_an_array_task_trains_the_run_of_its_index(sweep_file: Path, data: Path, programs: Path, root: Path) -> None:
    fake(programs, "sbatch", "echo 4711")
    launch(request(sweep_file, data, launcher="slurm"))
    folder = SweepFolder(sweep_file.parent / "out")
    finish(folder, X2)
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": "1", "PYTHONPATH": str(root / "src")}
    done = subprocess.run(
        ["bash", str(folder.path / "jobs" / "launch-1.sbatch")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{X2} is already finished\n"


@pytest.mark.parametrize("words", ["--partition=gpu", "--partition=gpu --time=1:00:00"])
def test_words_for_sbatch_may_begin_with_dashes(words: str) -> None:
    for line in (["--submit-args", words], [f"--submit-args={words}"]):
        assert parse(["launch", "table4", *line, "optimizer.lr=1e-3"], "mohd sweep")[1].submit_args == words


def test_slurm_refusals(sweep_file: Path, data: Path, programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="sbatch is not installed here"):
        launch(request(sweep_file, data, launcher="slurm"))
    fake(programs, "sbatch", "echo 'invalid partition' >&2; exit 1")
    with pytest.raises(UserError, match=r"`sbatch --parsable .*` failed: invalid partition"):
        launch(request(sweep_file, data, launcher="slurm"))
    folder = SweepFolder(sweep_file.parent / "out")
    assert folder.record["launches"] == []
    assert run_status(folder, DENSE).state == "waiting"


def test_kubernetes_jobs_and_their_states(sweep_file: Path, data: Path, programs: Path) -> None:
    fake(programs, "kubectl", "exit 0")
    asked = request(
        sweep_file,
        data,
        launcher="k8s",
        image="registry/mohd:1",
        claim="team:/work",
        namespace="ml",
        only=("dense", "x2"),
    )
    assert launch(asked) == 0
    folder = SweepFolder(sweep_file.parent / "out")
    names = ["mohd-tiny-355m-dense-s1-l1", "mohd-tiny-355m-x2-s1-l1"]
    assert words(programs, "kubectl") == [f"apply --namespace ml -f {folder.path}/jobs/{name}.yaml" for name in names]
    job = yaml.safe_load((folder.path / "jobs" / f"{names[0]}.yaml").read_text())
    assert job["metadata"] == {"name": names[0], "namespace": "ml", "labels": {"app": "mohd-train", "sweep": "small"}}
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert container["command"][-2:] == ["--only", DENSE]
    assert container["command"][1:6] == ["-m", "mohd_train.cli", "sweep", "run", str(folder.path)]
    assert container["image"] == "registry/mohd:1"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 1}
    assert container["volumeMounts"][0]["mountPath"] == "/work"
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "team"}

    items = [
        {"metadata": {"name": names[0]}, "status": {"active": 1, "ready": 1}},
        {"metadata": {"name": names[1]}, "status": {"conditions": [{"type": "Failed", "status": "True"}]}},
    ]
    (programs / "answer").write_text(json.dumps({"items": items}))
    fake(programs, "kubectl", f"cat {programs}/answer")
    assert job_states(folder) == ({DENSE: "running"}, [])
    (programs / "answer").write_text(json.dumps(items[0]))  # kubectl's form for one
    assert job_states(folder) == ({DENSE: "running"}, [])
    resumed = Request(target=folder.path, launcher="k8s", image="i", claim="c:/m")
    assert resume(resumed) == 0
    assert SweepFolder(folder.path).launch_of(X2)["jobs"] == {X2: "mohd-tiny-355m-x2-s1-l2"}  # type: ignore[index]


def test_a_job_that_is_refused_leaves_those_before_it_recorded(sweep_file: Path, data: Path, programs: Path) -> None:
    fake(programs, "kubectl", 'case "$*" in *x2-s1*) echo "quota exceeded" >&2; exit 1;; esac')
    with pytest.raises(UserError, match="quota exceeded"):
        launch(request(sweep_file, data, launcher="k8s", image="i", claim="c:/m"))
    assert SweepFolder(sweep_file.parent / "out").record["launches"][0]["runs"] == [DENSE]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "needs --image IMAGE and --claim PVC:MOUNT_PATH"),
        ({"image": "i", "claim": "c"}, "needs --image"),
        ({"image": "i", "claim": "c:/m", "parallel": 2}, "--parallel does not go with --launcher k8s"),
    ],
)
def test_kubernetes_refusals(sweep_file: Path, data: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        launch(request(sweep_file, data, launcher="k8s", **changes))


def test_job_names_are_what_kubernetes_takes() -> None:
    assert job_name("tiny-1.13b-x2_A-s1", 3) == "mohd-tiny-1-13b-x2-a-s1-l3"
    assert len(job_name("x" * 200, 12)) <= 63


def test_templates(tmp_path: Path) -> None:
    template = tmp_path / "t"
    template.write_text("a {{name}} {{name}} $HOME {other}")
    assert fill(template, {"name": "x"}, shell_word) == "a x x $HOME {other}"
    template.write_text("{{nmae}}")
    with pytest.raises(UserError, match=r"unknown placeholder {{nmae}}; known: name"):
        fill(template, {"name": "x"}, shell_word)
    with pytest.raises(UserError, match="can't read the job template"):
        fill(tmp_path / "none", {}, shell_word)
    template.write_text('cd "{{name}}"')
    assert fill(template, {"name": "/a/b"}, shell_word) == 'cd "/a/b"'  # harmless, so an older template still works
    with pytest.raises(UserError, match=r"write {{name}} without quotes around it"):
        fill(template, {"name": "/a b"}, shell_word)
    with pytest.raises(UserError, match=r"name is .*control characters"):
        fill(template, {"name": "a\nrm -r x"}, shell_word)


ODD = """a b $(touch hit) `touch hit` 'q' "d" ;touch hit; %j #SBATCH"""


def test_nothing_in_a_path_runs_in_a_job(
    sweep_file: Path, data: Path, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rendered script under a real shell, a stand-in for Python noting the words it is given and where it stands."""
    place = tmp_path / ODD
    place.mkdir()
    monkeypatch.chdir(place)
    python = place / "python"
    python.write_text('#!/bin/bash\npwd > "$NOTES"\nprintf "%s\\0" "$@" >> "$NOTES"\n')
    python.chmod(0o755)
    fake(programs, "sbatch", "echo 4711")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(python))
        launch(request(sweep_file, data, launcher="slurm", out=place / "sweep"))
    script = place / "sweep" / "jobs" / "launch-1.sbatch"
    notes = tmp_path / "notes"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": "1", "NOTES": str(notes)}
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, env=environment, cwd=elsewhere)
    assert (done.returncode, done.stderr) == (0, "")
    stood, _, given = notes.read_text().partition("\n")
    assert stood == str(place)
    assert given.split("\0")[-7:-1] == ["run", str(place / "sweep"), "--processes", "1", "--only", X2]
    assert not list(tmp_path.rglob("hit"))
    (output,) = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH --output=")]
    (log,) = shlex.split(output.removeprefix("#SBATCH "))
    assert log == f"--output={place}/sweep/jobs/%A_%a.log".replace("%j", "%%j")


def test_nothing_in_a_path_runs_in_a_pod(
    sweep_file: Path, data: Path, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The words are a list, and Kubernetes would replace ``$(NAME)`` in it; elsewhere text is as it was given."""
    place = tmp_path / ODD
    place.mkdir()
    monkeypatch.chdir(place)
    fake(programs, "kubectl", "exit 0")
    odd = 'i", command: ["rm"] # $(X)'
    launch(request(sweep_file, data, launcher="k8s", image=odd, claim=f"c:/m {ODD}", only=("x2",), out=place / "sweep"))
    (file,) = (place / "sweep" / "jobs").glob("*.yaml")
    pod = yaml.safe_load(file.read_text())["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert (container["image"], container["workingDir"]) == (odd, str(place))
    assert container["volumeMounts"][0]["mountPath"] == f"/m {ODD}"
    assert container["command"][-5:-3] == [str(place / "sweep").replace("$(", "$$("), "--processes"]
    assert not list(tmp_path.rglob("hit"))
