"""The chunked cross-entropy against the plain one: loss and both gradients. And when Liger's is called, with a stand-in for it."""

import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mohd_train.errors import UserError
from mohd_train.kernels import loss as loss_module
from mohd_train.kernels.loss import linear_cross_entropy, loss_name


def inputs(tokens: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = torch.randn(tokens, 12, dtype=dtype, requires_grad=True)
    head = torch.randn(31, 12, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 31, (tokens,))
    labels[::3] = -100
    return hidden, head, labels


def plain(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, head).to(torch.promote_types(hidden.dtype, torch.float32)), labels)


@pytest.mark.parametrize("chunk", [1, 4, 7, 100, None])
def test_equals_the_plain_one(chunk: int | None) -> None:
    hidden, head, labels = inputs(23)
    loss, expected = linear_cross_entropy(hidden, head, labels, chunk_tokens=chunk), plain(hidden, head, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    got = torch.autograd.grad(3 * loss, (hidden, head))
    want = torch.autograd.grad(3 * expected, (hidden, head))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


def test_ignored_label_gives_no_gradient() -> None:
    hidden, head, labels = inputs(9)
    (grad,) = torch.autograd.grad(linear_cross_entropy(hidden, head, labels, chunk_tokens=2), hidden)
    assert (grad[::3] == 0).all()
    assert (grad[1::3] != 0).all()


def test_one_side_frozen_and_no_grad() -> None:
    hidden, head, labels = inputs(9)
    expected = torch.autograd.grad(plain(hidden, head, labels), hidden)[0]
    got = torch.autograd.grad(linear_cross_entropy(hidden, head.detach(), labels), hidden)[0]
    torch.testing.assert_close(got, expected)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, head, labels), plain(hidden, head, labels))


def test_autocast_multiplies_in_bfloat16_and_sums_in_float32() -> None:
    hidden, head, labels = inputs(23, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, expected = linear_cross_entropy(hidden, head, labels, chunk_tokens=5), plain(hidden, head, labels)
    assert loss.dtype == torch.float32
    # The same bfloat16 logits: only the order of the float32 sum differs.
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    got, want = (torch.autograd.grad(value, (hidden, head)) for value in (loss, expected))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 2**-6 * b.norm()  # a few roundings of 2^-9 each


def test_gradients_accumulate_over_calls() -> None:
    hidden, head, labels = inputs(10)
    (linear_cross_entropy(hidden, head, labels) + linear_cross_entropy(hidden, head, labels)).backward()
    want = torch.autograd.grad(plain(hidden, head, labels), head)[0]
    torch.testing.assert_close(head.grad, 2 * want)


def test_compiles_without_a_graph_break() -> None:
    hidden, head, labels = inputs(23)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    loss = compiled(hidden, head, labels, chunk_tokens=8)
    got = torch.autograd.grad(loss, (hidden, head))
    torch.testing.assert_close(got, torch.autograd.grad(plain(hidden, head, labels), (hidden, head)))


def test_no_label_counts_gives_nan_and_no_gradient() -> None:
    hidden, head, labels = inputs(9)
    labels[:] = -100
    for run in (plain, linear_cross_entropy):
        loss = run(hidden, head, labels)
        assert loss.isnan()
        assert all((grad == 0).all() for grad in torch.autograd.grad(loss, (hidden, head)))


def test_which_loss_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "_liger_version", lambda: "0.8.5")
    assert loss_name("cuda", torch.bfloat16) == "liger 0.8.5"
    assert loss_name("cuda", torch.float64) == loss_name("cpu", torch.bfloat16) == "chunked"
    monkeypatch.setattr(loss_module, "_liger_version", lambda: None)
    assert loss_name("cuda", torch.bfloat16) == "chunked"


def test_a_liger_that_sums_in_bfloat16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "_liger_version", lambda: "0.6.1")
    with pytest.raises(UserError, match=r"liger-kernel 0\.6\.1 .*install 'liger-kernel>=0\.6\.2'"):
        loss_name("cuda", torch.bfloat16)
    assert loss_name("cpu", torch.bfloat16) == "chunked"


def test_the_extra_requires_the_liger_that_the_loss_does(root: Any) -> None:
    assert f'"liger-kernel>={loss_module.LEAST_LIGER}"' in (root / "pyproject.toml").read_text()


def test_liger_sums_the_heads_gradient_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with Liger's signature is called as Liger documents: weight, input, target."""
    asked: list[dict[str, Any]] = []

    class Fused:
        def __init__(self, *, ignore_index: int, accum_dtype: torch.dtype) -> None:
            asked.append({"ignore_index": ignore_index, "accum_dtype": accum_dtype})

        def __call__(self, weight: torch.Tensor, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            assert not torch.is_autocast_enabled("cpu")
            asked[-1]["dtypes"] = (weight.dtype, hidden.dtype)
            return plain(hidden, weight, target)

    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    stand_in = types.ModuleType("liger_kernel.transformers")
    stand_in.LigerFusedLinearCrossEntropyLoss = Fused  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", stand_in)
    monkeypatch.setattr(loss_module, "loss_name", lambda kind, dtype: "liger 0.8.5")
    hidden, head, labels = inputs(23, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, expected = linear_cross_entropy(hidden, head, labels), plain(hidden, head, labels)
    assert asked == [{"ignore_index": -100, "accum_dtype": torch.float32, "dtypes": (torch.bfloat16, torch.bfloat16)}]
    torch.testing.assert_close(loss, expected)
