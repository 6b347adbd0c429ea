"""Block sizes that the triton kernels chose are part of a run: stored with its checkpoints, given back before the first step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.utils import dist
from train.test_callbacks import state_at
from train.train_support import make_config

from mohd_train.checkpoint.read import SAFE
from mohd_train.kernels import ops
from mohd_train.train import parallel
from mohd_train.train.callbacks import KernelSizes
from mohd_train.train.composer_model import MoHDComposerModel
from mohd_train.train.train import train

launch = pytest.importorskip("mohd_train.kernels.triton.launch")
SIZES = (launch.Size({"BN": 64}, 4, 3), launch.Size({"BN": 128}, 8, 3))


class Gpu:
    """A process whose every forward pass launches one kernel, on a GPU where its block size `fastest` is the fastest."""

    __name__ = "stand_in_kernel"
    arg_names = ("x", "C", "BN")

    def __init__(self, fastest: int, monkeypatch: pytest.MonkeyPatch, capability: int = 90) -> None:
        self.launched: list[int] = []
        self.timed = 0
        self.fastest = fastest
        monkeypatch.setattr(launch, "CHOSEN", {})
        monkeypatch.setattr(launch, "KERNELS", {})
        monkeypatch.setattr(launch, "capability", lambda: capability)
        monkeypatch.setattr(launch, "milliseconds", self._time)
        monkeypatch.setattr(parallel, "resolve_kernels", lambda *_: "triton")
        self.kernel = launch.tuned(SIZES)(self)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **options: self.launched.append(options["BN"])

    def _time(self, run: Callable[[], None]) -> float:
        run()
        self.timed += 1
        return float(self.launched.pop() != self.fastest)


@pytest.fixture(autouse=True)
def forward_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = MoHDComposerModel.forward

    def forward(self: MoHDComposerModel, batch: Any) -> Any:
        launch.KERNELS["stand_in_kernel"].launch("grid", torch.zeros(1), C=64)
        return plain(self, batch)

    monkeypatch.setattr(MoHDComposerModel, "forward", forward)


def stored(checkpoint: Path) -> Any:
    with torch.serialization.safe_globals(SAFE):
        state = torch.load(checkpoint, weights_only=True)["state"]
    return json.loads(state["callbacks"]["KernelSizes"]["json"])


def test_a_new_run_stores_its_choices_and_a_resumed_one_makes_none(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tmp_path, data, "run_name=a", "autoresume=true", "eval_first=true")
    first = Gpu(128, monkeypatch)
    with (
        monkeypatch.context() as patch
    ):  # killed right after the checkpoint of batch 2, before anything else is written
        patch.setattr("mohd_train.train.callbacks.run_recorder.RunRecorder.batch_checkpoint", _killed_once_saved)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert first.timed == 2
    assert set(first.launched) == {128}
    checkpoints = tmp_path / "runs" / "a" / "checkpoints"
    found = stored(checkpoints / "ep0-ba2-rank0.pt")
    key = json.dumps(["stand_in_kernel", {"C": 64}, ["float32"]])
    assert found == {
        "gpu": "sm90", "sizes": {key: {"blocks": {"BN": 128}, "warps": 8, "stages": 3, "capability": 80}}
    }  # fmt: skip

    resumed = Gpu(64, monkeypatch)  # it would choose another
    train(config)
    assert resumed.timed == 0
    assert set(resumed.launched) == {128}
    assert stored(checkpoints / "ep0-ba6-rank0.pt") == found
    assert "chosen again" not in capsys.readouterr().err


def test_on_another_gpu_they_are_chosen_anew_and_the_run_says_so(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tmp_path, data, "run_name=a", "autoresume=true", "max_duration=4ba")
    Gpu(128, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr("mohd_train.train.callbacks.run_recorder.RunRecorder.batch_checkpoint", _killed_once_saved)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    other = Gpu(64, monkeypatch, capability=80)
    train(config)
    assert set(other.launched) == {64}
    lines = [line for line in capsys.readouterr().err.splitlines() if "chosen again" in line]
    assert len(lines) == 1
    assert "chosen on sm90, and this GPU is sm80" in lines[0]
    record = json.loads((tmp_path / "runs" / "a" / "run.json").read_text())
    assert [warning["kind"] for warning in record["warnings"]] == ["kernels"]


def test_all_processes_take_the_choice_of_the_lowest_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(64, monkeypatch)
    for width in (64, 96):
        gpu.kernel.launch("grid", torch.zeros(1), C=width)
    mine = ops.chosen_sizes()
    both, one, third = (json.dumps(["stand_in_kernel", {"C": width}, ["float32"]]) for width in (64, 96, 128))
    large = {"blocks": {"BN": 128}, "warps": 8, "stages": 3, "capability": 80}
    first = {"gpu": "sm90", "sizes": {both: large, third: large}}  # of rank 0; this process is rank 1
    monkeypatch.setattr(dist, "all_gather_object", lambda found: [first, found])
    callback = KernelSizes(lambda *_: None)  # type: ignore[arg-type]
    callback.batch_end(state_at(1), None)  # type: ignore[arg-type]
    together = {"gpu": "sm90", "sizes": {both: large, one: mine["sizes"][one], third: large}}
    assert ops.chosen_sizes() == together
    assert json.loads(callback.state_dict()["json"]) == together
    for width in (64, 96, 128):
        gpu.kernel.launch("grid", torch.zeros(1), C=width)
    assert gpu.launched == [64, 64, 128, 64, 128]


def _killed_once_saved(self: Any, state: Any, logger: Any) -> None:
    if self.saver.last_checkpoint_batch == state.timestamp.batch:
        raise KeyboardInterrupt
