"""How the triton kernels choose block sizes, store them and are given them: with stand-ins for the GPU and its clock."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

launch = pytest.importorskip("mohd_train.kernels.triton.launch")

SMALL, LARGE, NEWER = (
    launch.Size({"BN": 64}, 4, 3),
    launch.Size({"BN": 128}, 8, 3),
    launch.Size({"BN": 256}, 8, 4, 90),
)
TILES = {64: (SMALL, LARGE), 128: (SMALL, LARGE, NEWER)}
X = torch.zeros(2, dtype=torch.bfloat16)


class Function:
    """A `triton.jit` function that writes down what it is launched with."""

    __name__ = "stand_in_kernel"
    arg_names = ("x", "OUT", "T", "C", "BM", "BN")

    def __init__(self) -> None:
        self.launched: list[dict[str, Any]] = []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **options: self.launched.append(options)


class Gpu:
    """`kernel` on a GPU where block sizes take the times in `times`, by BN; counts what is timed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.function, self.capability, self.times, self.timed = Function(), 90, {64: 3.0, 128: 2.0, 256: 1.0}, 0
        monkeypatch.setattr(launch, "capability", lambda: self.capability)
        monkeypatch.setattr(launch, "milliseconds", self._time)
        monkeypatch.setattr(launch, "CHOSEN", {})
        monkeypatch.setattr(launch, "KERNELS", {})
        self.kernel = launch.tuned(TILES)(self.function)

    def _time(self, run: Callable[[], None]) -> float:
        run()
        self.timed += 1
        return self.times[self.function.launched.pop()["BN"]]

    def run(self, out: int = 512, tokens: int = 7, x: torch.Tensor = X, **constants: Any) -> int:
        """Launches it, and returns the BN that it ran with."""
        self.kernel.launch("grid", x, out, tokens, **{"C": 64, "BM": 128, **constants})
        return int(self.function.launched[-1]["BN"])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def test_the_fastest_is_chosen_once_for_each_shape_and_dtype(gpu: Gpu) -> None:
    assert gpu.run() == 256
    assert gpu.function.launched == [{"C": 64, "BM": 128, "BN": 256, "num_warps": 8, "num_stages": 4}]
    gpu.run(tokens=9)  # not a key
    assert gpu.timed == 3
    assert gpu.run(BM=64) == 128  # fewer to choose among
    gpu.run(out=256)
    gpu.run(C=96)
    gpu.run(x=X.float())
    assert gpu.timed == 3 + 2 + 3 * 3
    assert len(launch.CHOSEN) == 5


def test_an_older_gpu_has_fewer(gpu: Gpu) -> None:
    gpu.capability = 80
    assert gpu.run() == 128


def test_one_that_the_gpu_has_no_room_for_is_not_chosen(gpu: Gpu) -> None:
    gpu.times[256] = float("inf")
    assert gpu.run() == 128


def test_another_process_that_is_given_them_chooses_none(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.chosen() == {}
    gpu.run()
    gpu.run(BM=64)
    stored = json.loads(json.dumps(launch.chosen()))
    assert stored["gpu"] == "sm90"
    key = json.dumps(["stand_in_kernel", {"BM": 128, "OUT": 512, "C": 64}, ["bfloat16"]])
    assert stored["sizes"][key] == {"blocks": {"BN": 256}, "warps": 8, "stages": 4, "capability": 90}

    other = Gpu(monkeypatch)
    other.times = {64: 1.0, 128: 2.0, 256: 3.0}  # its clock would choose otherwise
    assert launch.use(stored) is None
    assert launch.chosen() == stored
    assert [other.run(), other.run(BM=64), other.timed] == [256, 128, 0]
    assert [other.run(out=256), other.timed] == [64, 3]  # what the earlier one never ran


def test_choices_of_another_gpu_are_named_and_made_anew(gpu: Gpu) -> None:
    gpu.run()
    stored = launch.chosen()
    gpu.capability = 80
    assert "chosen on sm90, and this GPU is sm80" in (launch.use(stored) or "")
    assert launch.chosen() == {}
    assert gpu.run() == 128


def test_a_size_that_is_gone_is_named_and_chosen_anew(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.run()
    gpu.run(BM=64)
    stored = launch.chosen()
    newer = Gpu(monkeypatch)
    newer.kernel = launch.tuned({**TILES, 128: (SMALL, LARGE)})(newer.function)
    assert "1 of 2 block sizes" in (launch.use(stored) or "")
    assert [newer.run(BM=64), newer.timed] == [128, 0]
    assert [newer.run(), newer.timed] == [128, 2]
    monkeypatch.setattr(launch, "KERNELS", {})  # and the whole kernel
    assert "2 of 2 block sizes" in (launch.use(stored) or "")
