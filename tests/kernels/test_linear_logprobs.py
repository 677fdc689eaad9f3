"""Log-probabilities through the head: chunks that do not show, and rows that do not mix."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastsafe_kernels import _head, token_logprobs
from fastsafe_kernels._spec import INTERPRET
from fastsafe_kernels.linear_logprobs import KERNEL, linear_logprobs

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16]


def inputs(rows: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    dims = {"T": rows, "E": 48, "V": 300, "capped": 0}
    hidden, head, targets, *_ = KERNEL.make(dims, dtype, torch.device(device))
    return hidden, head, targets


def with_gradient(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    leaf = hidden.detach().requires_grad_()
    y = linear_logprobs(leaf, *rest)
    (gradient,) = torch.autograd.grad(y, leaf, torch.linspace(0.5, 2, len(y), device=y.device))
    return y.detach(), gradient


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_batch(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu" and not INTERPRET:
        pytest.skip("the reference multiplies by MKL, whose bits depend on the number of rows")
    monkeypatch.setattr(_head, "CHUNK", 16)
    hidden, head, targets = inputs(21, dtype, device)
    y, gradient = with_gradient(hidden, head, targets)
    order = torch.randperm(21, device=device)
    shuffled = linear_logprobs(hidden[order], head, targets[order])
    assert torch.equal(shuffled, y[order])
    for i in (0, 15, 16, 20):
        leaf = hidden[i : i + 1].detach().requires_grad_()
        alone = linear_logprobs(leaf, head, targets[i : i + 1])
        upstream = torch.linspace(0.5, 2, 21, device=device)[i : i + 1]
        assert torch.equal(alone, y[i : i + 1])
        assert torch.equal(torch.autograd.grad(alone, leaf, upstream)[0], gradient[i : i + 1])


@pytest.mark.parametrize("device", DEVICES)
def test_chunks_do_not_show(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, targets = inputs(21, torch.float32, device)
    y, gradient = with_gradient(hidden, head, targets)
    for rows in (5, 7, 21):
        monkeypatch.setattr(_head, "CHUNK", rows)
        got, dx = with_gradient(hidden, head, targets)
        assert torch.allclose(got, y, atol=1e-5)
        assert torch.allclose(dx, gradient, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_it_is_the_composition_of_product_and_logprobs(device: str) -> None:
    hidden, head, targets = inputs(4, torch.float32, device)
    logits = hidden @ head.T / 3
    want = token_logprobs(5 * torch.tanh(logits / 5), targets)
    assert torch.allclose(linear_logprobs(hidden, head, targets, 3, 5), want, atol=1e-5)
    want = token_logprobs(logits, targets)
    assert torch.allclose(linear_logprobs(hidden, head, targets, 3), want, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_logits_of_all_rows_are_never_in_memory(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu" and not INTERPRET:
        pytest.skip("the reference keeps them")
    monkeypatch.setattr(_head, "CHUNK", 8)
    hidden, head, targets = inputs(60, torch.float32, device)
    with Largest() as seen:
        with_gradient(hidden, head, targets)
    assert seen.elements == head.numel()  # a view of it
    assert seen.elements < 60 * 300


@pytest.mark.parametrize("device", DEVICES)
def test_a_gradient_is_computed_only_when_asked_for(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, head, targets = inputs(3, torch.float32, device)
    y, _ = with_gradient(hidden, head, targets)
    monkeypatch.setattr(_head, "_gradient_kernel", None)  # a launch would fail
    assert not linear_logprobs(hidden, head, targets).requires_grad
    leaf = hidden.requires_grad_()
    with torch.no_grad():
        assert torch.equal(linear_logprobs(leaf, head, targets), y)


@pytest.mark.parametrize("device", DEVICES)
def test_upstream_of_zero_and_no_rows(device: str) -> None:
    hidden, head, targets = inputs(3, torch.float32, device)
    leaf = hidden.requires_grad_()
    y = linear_logprobs(leaf, head, targets)
    y[1].backward()
    assert leaf.grad is not None
    assert (leaf.grad != 0).any(-1).tolist() == [False, True, False]
    y, gradient = with_gradient(hidden[:0], head, targets[:0])
    assert y.shape == (0,)
    assert gradient.shape == (0, 48)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"head": torch.zeros(7, 5)},
            ValueError,
            "linear_logprobs: head is [7, 5], expected [V, E] with E=4 from hidden",
        ),
        (
            {"head": torch.zeros(7, 4, dtype=torch.bfloat16)},
            TypeError,
            "linear_logprobs: head is torch.bfloat16, expected float32",
        ),
        (
            {"head": torch.zeros(4, 7).T},
            ValueError,
            "linear_logprobs: head has stride 7 in E, expected 1; call .contiguous()",
        ),
        (
            {"head": torch.zeros(7, 4).requires_grad_()},
            ValueError,
            "linear_logprobs: head requires a gradient, expected a frozen one; call .detach()",
        ),
        (
            {"targets": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            "linear_logprobs: targets is [3], expected [T] with T=2 from hidden",
        ),
        (
            {"logits_scale": 0.0},
            ValueError,
            "linear_logprobs: logits_scale is 0.0, expected more than 0",
        ),
        (
            {"softcap": -1.0},
            ValueError,
            "linear_logprobs: softcap is -1.0, expected 0 (none) or more",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    args: dict[str, Any] = {"hidden": torch.zeros(2, 4), "head": torch.zeros(7, 4)}
    args["targets"] = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(error) as caught:
        linear_logprobs(**(args | change))
    assert str(caught.value) == message
