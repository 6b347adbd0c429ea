"""Which backend runs, and what is refused at the start."""

import pytest
import torch

from mohd_train.errors import UserError
from mohd_train.kernels.ops import resolve_backend

CPU = torch.device("cpu")


def test_auto_is_grouped_on_a_cpu_in_any_dtype() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert resolve_backend("auto", CPU, dtype, width=64) == "grouped"


@pytest.mark.parametrize("name", ["reference", "grouped"])
def test_a_named_backend_is_taken(name: str) -> None:
    assert resolve_backend(name, CPU, torch.float64, width=7) == name


def test_triton_on_a_cpu_is_refused_with_the_fallback() -> None:
    with pytest.raises(UserError, match=r"triton cannot run: .*; use kernels: grouped"):
        resolve_backend("triton", CPU, torch.float32, width=64)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'fast'.*auto, reference, grouped, triton"):
        resolve_backend("fast", CPU, torch.float32)
