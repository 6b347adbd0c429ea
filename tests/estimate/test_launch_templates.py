"""The templates of scripts/launch: rendered, parsed, and run as two "nodes" on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from composer.cli import launcher
from composer.utils import get_free_tcp_port
from train.train_support import ROOT, make_config, make_data, write_config

from mohd_train.errors import UserError
from mohd_train.run_folder.metrics import read_metrics
from mohd_train.sweep.launch.kubernetes import kubernetes_job
from mohd_train.train.train import train

LAUNCH = ROOT / "scripts" / "launch"
JOB = {"name": "mohd-x2", "image": "registry/mohd:1", "claim": "team:/work", "workdir": "/work/mohd"}

# What srun does, for two nodes that are this machine: the command on each, its number in SLURM_NODEID, /tmp its own.
SRUN = """#!/bin/bash
shift
here=$(dirname "$0")
mkdir "$here/tmp0" "$here/tmp1"
SLURM_NODEID=1 TMPDIR=$here/tmp1 "$@" & second=$!
SLURM_NODEID=0 TMPDIR=$here/tmp0 "$@" && wait $second
"""
# A node has shared memory of its own, where streaming's first process of the node makes its names: here a prefix stands for it.
OWN_SHARED_MEMORY = """
import os, _posixshmem
def of_node(call):
    return lambda path, *args, **kwargs: call(f"/node{os.environ['SLURM_NODEID']}-{path.lstrip('/')}", *args, **kwargs)
if "SLURM_NODEID" in os.environ:
    _posixshmem.shm_open, _posixshmem.shm_unlink = of_node(_posixshmem.shm_open), of_node(_posixshmem.shm_unlink)
"""


def program(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("name", ["run.sbatch", "node.sh"])
def test_shell_parses(name: str) -> None:
    assert subprocess.run(["bash", "-n", str(LAUNCH / name)]).returncode == 0


def test_sbatch_says_how_it_is_used() -> None:
    done = subprocess.run(["bash", str(LAUNCH / "run.sbatch")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage: sbatch" in done.stderr


def test_two_nodes_through_slurm_train_as_one_process(tmp_path: Path) -> None:
    """The whole of run.sbatch but SLURM itself: two launchers, ranks 0 and 1, loopback, gloo."""
    data = make_data(tmp_path / "data")
    config = write_config(tmp_path, data)
    programs = tmp_path / "bin"
    program(programs, "srun", SRUN)
    (programs / "sitecustomize.py").write_text(OWN_SHARED_MEMORY)
    program(programs, "scontrol", '#!/bin/sh\n[ "$3" = "here[0-1]" ] && printf "127.0.0.1\\nunused\\n"\n')
    composer = program(programs, "launch", f'#!/bin/sh\nexec {sys.executable} -m composer.cli "$@"\n')
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": f"{programs}:{ROOT / 'src'}",
        "OMP_NUM_THREADS": "1",
        "COMPOSER": str(composer),
        "GPUS_PER_NODE": "1",
        "MASTER_PORT": str(get_free_tcp_port()),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "here[0-1]",
        "SLURM_JOB_ID": "4711",
    }
    mohd = str(ROOT / "configs/mohd/x2.yaml")
    words = [str(config), mohd, "run_name=two", "max_duration=3ba", "eval_interval=3ba"]
    command = ["bash", str(LAUNCH / "run.sbatch"), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "2 × cpu" in done.stdout
    train(make_config(tmp_path, data, "run_name=one", "max_duration=3ba", "eval_interval=3ba"))
    one, two = (read_metrics(tmp_path / "runs" / name / "metrics.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 3
    for left, right in zip(one, two, strict=True):
        assert left["loss/train/cross_entropy"] == pytest.approx(right["loss/train/cross_entropy"], rel=2e-5)
        assert left["tokens"] == right["tokens"]


def test_words_of_any_kind_reach_the_run_as_they_are(tmp_path: Path) -> None:
    """Through run.sbatch and node.sh; ``composer`` notes what it is given."""
    place = tmp_path / "a b $(touch hit) 'q'"
    launch = place / "scripts" / "launch"
    launch.mkdir(parents=True)
    for name in ("run.sbatch", "node.sh"):
        (launch / name).write_text((LAUNCH / name).read_text())
    programs = tmp_path / "bin"
    program(programs, "srun", '#!/bin/bash\nshift\nSLURM_NODEID=0 exec "$@"\n')
    program(programs, "scontrol", "#!/bin/sh\necho 127.0.0.1\n")
    composer = program(place, "launch", '#!/bin/bash\nprintf "%s\\0" "$@" > "$NOTES"\n')
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}", "COMPOSER": str(composer), "NOTES": str(tmp_path / "notes"),
        "SLURM_SUBMIT_DIR": str(place), "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n", "SLURM_JOB_ID": "1",
    }  # fmt: skip
    words = ["run_name=$(touch hit)", "data.local=/a b/`touch hit`", """x='"q"';touch hit""", "*"]
    done = subprocess.run(["bash", str(launch / "run.sbatch"), *words], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "notes").read_text().split("\0")[:-1] == ["scripts/train.py", *words, "autoresume=true"]
    assert not list(tmp_path.rglob("hit"))


def test_words_of_any_kind_reach_the_pod_as_they_are() -> None:
    words = ["run_name=$(HOME)", 'a="b" # c', "x: {y}"]
    job = list(yaml.safe_load_all(kubernetes_job(words, **{**JOB, "workdir": '/w "x" $(Y)'})))[1]
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert container["workingDir"] == '/w "x" $(Y)'
    assert container["command"][2:] == ["run_name=$$(HOME)", *words[1:]]  # which Kubernetes reads as $(HOME)


@pytest.mark.parametrize("notice", [signal.SIGTERM, signal.SIGUSR1])
def test_a_notice_reaches_the_training_processes_and_not_the_launcher(tmp_path: Path, notice: signal.Signals) -> None:
    """SIGTERM from Kubernetes, SIGUSR1 from SLURM; the stand-in for a rank saves and ends with a code of its own."""
    rank = program(
        tmp_path,
        "rank.py",
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n"
        f"    pathlib.Path('{tmp_path}/saved').touch()\n"
        "    sys.exit(3)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        f"pathlib.Path('{tmp_path}/started').touch()\n"
        "time.sleep(60)\n",
    )
    composer = program(tmp_path, "launch", f'#!/bin/bash\n{sys.executable} {rank} "$@" &\nwait $!\n')
    node = subprocess.Popen(["bash", str(LAUNCH / "node.sh"), "a.yaml"], env=os.environ | {"COMPOSER": str(composer)})
    limit = time.monotonic() + 30
    while not (tmp_path / "started").exists() and time.monotonic() < limit:
        time.sleep(0.02)
    node.send_signal(notice)
    assert node.wait(timeout=30) == 3
    assert (tmp_path / "saved").exists()


def test_kubernetes_job_is_what_composer_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    text = kubernetes_job(["a.yaml", "run_name=x"], nodes=2, gpus=4, retries=3, **JOB)  # type: ignore[arg-type]
    assert "{{" not in text
    service, job = yaml.safe_load_all(text)
    assert service["metadata"]["name"] == job["metadata"]["name"] == "mohd-x2"
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": "mohd-x2"}
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"], spec["backoffLimit"]) == (
        "Indexed",
        2,
        2,
        6,
    )
    pod = spec["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    container = pod["containers"][0]
    assert container["command"] == ["bash", "scripts/launch/node.sh", "a.yaml", "run_name=x"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "team"}
    env = {one["name"]: one.get("value", "1") for one in container["env"]}  # as in the pod of index 1
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["composer", "scripts/train.py", "a.yaml"])
    read = launcher._parse_args()
    assert (read.world_size, read.nproc, read.node_rank, read.base_rank) == (8, 4, 1, 4)
    assert (read.master_addr, read.master_port) == ("mohd-x2-0.mohd-x2", 29500)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "MoHD"}, "Kubernetes takes lower-case letters"),
        ({"claim": "team"}, "give PVC:MOUNT_PATH"),
        ({"nodes": 0}, "give at least 1, 1 and 0"),
    ],
)
def test_kubernetes_refusals(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        kubernetes_job(["a.yaml"], **{**JOB, **change})


def test_kubernetes_job_from_the_command_line(tmp_path: Path) -> None:
    config = write_config(tmp_path, tmp_path / "data")
    options = [f"--{key}={value}" for key, value in JOB.items()]
    command = [sys.executable, str(LAUNCH / "kubernetes_job.py"), *options, "--nodes=2", str(config)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(list(yaml.safe_load_all(done.stdout))) == 2
    done = subprocess.run([*command, "optimizer.lrr=1"], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: override 'optimizer.lrr=1'")
