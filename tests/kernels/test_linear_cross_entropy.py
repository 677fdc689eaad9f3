"""The loss through the head: weights, the divergence and its direction."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsafe_kernels import _head
from fastsafe_kernels._spec import INTERPRET
from fastsafe_kernels.linear_cross_entropy import KERNEL, linear_cross_entropy
from fastsafe_kernels.linear_logprobs import linear_logprobs

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16]


def inputs(rows: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Any, ...]:
    """Hidden, head, targets, weights, kl_hidden and kl_weight."""
    torch.manual_seed(0)
    dims = {"T": rows, "E": 48, "V": 300, "weighted": 1, "kl": 1, "capped": 0}
    return KERNEL.make(dims, dtype, torch.device(device))[:6]


def gradient_of(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("device", DEVICES)
def test_it_is_torch_cross_entropy_plus_kl_div(device: str) -> None:
    hidden, head, targets, w, near, k = inputs(9, torch.float32, device)
    leaf = hidden.requires_grad_()
    z, q = leaf @ head.T, (near @ head.T).log_softmax(-1)
    ce = (w * F.cross_entropy(z, targets, reduction="none")).sum()
    kl = F.kl_div(z.log_softmax(-1), q, reduction="none", log_target=True).sum(-1)
    want = ce + (k * kl).sum()
    loss = linear_cross_entropy(leaf, head, targets, w, near, k)
    assert torch.allclose(loss, want, rtol=1e-5)
    assert torch.allclose(gradient_of(loss, leaf), gradient_of(want, leaf), atol=1e-5)
    assert torch.allclose(linear_cross_entropy(leaf, head, targets, w), ce, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_the_divergence_is_from_the_second_model_to_the_first(device: str) -> None:
    """Two tokens: KL(q || p) with q = (3/4, 1/4) and p = (1/2, 1/2)."""
    head = torch.tensor([[1.0], [0.0]], device=device)
    p, q = torch.zeros(1, 1, device=device), torch.tensor([[3.0]], device=device).log()
    zero = torch.zeros(1, device=device)
    targets = torch.zeros(1, dtype=torch.int64, device=device)
    loss = linear_cross_entropy(p, head, targets, zero, q)
    assert loss.item() == pytest.approx(0.1308, abs=1e-4)  # the other direction is 0.1438
    assert linear_cross_entropy(q, head, targets, zero, q).item() == 0.0


@pytest.mark.parametrize("device", DEVICES)
def test_defaults_weigh_every_row_once(device: str) -> None:
    hidden, head, targets, w, near, _ = inputs(5, torch.float32, device)
    ones = torch.ones_like(w)
    explicit = linear_cross_entropy(hidden, head, targets, ones, near, ones)
    assert torch.equal(linear_cross_entropy(hidden, head, targets, None, near), explicit)
    want = -linear_logprobs(hidden, head, targets).sum()
    assert torch.allclose(linear_cross_entropy(hidden, head, targets), want, rtol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_weight_zero_get_no_gradient(device: str) -> None:
    hidden, head, targets, w, near, k = inputs(6, torch.float32, device)
    leaf, second = hidden.requires_grad_(), near.requires_grad_()
    w, k = w.clone(), k.clone()
    w[2] = k[2] = 0.0
    loss = linear_cross_entropy(leaf, head, targets, w, second, k)
    dx = gradient_of(3 * loss, leaf)
    assert (dx != 0).any(-1).tolist() == [True, True, False, True, True, True]
    again = linear_cross_entropy(leaf, head, targets, w, second, k)
    again.backward()
    assert second.grad is None
    assert leaf.grad is not None
    assert torch.allclose(dx, 3 * leaf.grad, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_gradient_has_the_same_bits_in_any_batch(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu" and not INTERPRET:
        pytest.skip("the reference multiplies by MKL, whose bits depend on the number of rows")
    monkeypatch.setattr(_head, "CHUNK", 16)
    hidden, head, targets, w, near, k = inputs(19, dtype, device)

    def gradient(index: Tensor) -> Tensor:
        leaf = hidden[index].requires_grad_()
        rows = (targets[index], w[index], near[index], k[index])
        return gradient_of(linear_cross_entropy(leaf, head, *rows), leaf)

    together = gradient(torch.arange(19, device=device))
    order = torch.randperm(19, device=device)
    assert torch.equal(gradient(order), together[order])
    for i in (0, 15, 18):
        index = torch.tensor([i], device=device)
        assert torch.equal(gradient(index), together[index])


@pytest.mark.parametrize("device", DEVICES)
def test_no_gradient_gives_the_same_loss(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, *rest = inputs(5, torch.float32, device)
    loss = linear_cross_entropy(hidden.clone().requires_grad_(), head, *rest)
    monkeypatch.setattr(_head, "_gradient_kernel", None)  # a launch would fail
    plain = linear_cross_entropy(hidden, head, *rest)
    assert not plain.requires_grad
    assert torch.equal(plain, loss.detach())


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows(device: str) -> None:
    hidden, head, *rest = inputs(3, torch.float32, device)
    leaf = hidden[:0].requires_grad_()
    loss = linear_cross_entropy(leaf, head, *(x[:0] for x in rest))
    assert loss.item() == 0.0
    assert gradient_of(loss, leaf).shape == (0, 48)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"weights": torch.ones(3)},
            ValueError,
            "linear_cross_entropy: weights is [3], expected [T] with T=2 from targets",
        ),
        (
            {"weights": torch.ones(2, dtype=torch.bfloat16)},
            TypeError,
            "linear_cross_entropy: weights is torch.bfloat16, expected float32",
        ),
        (
            {"kl_hidden": torch.zeros(2, 5)},
            ValueError,
            "linear_cross_entropy: kl_hidden is [2, 5], expected [T, E] with E=4 from hidden",
        ),
        (
            {"kl_weight": torch.ones(2)},
            ValueError,
            "linear_cross_entropy: kl_weight has no kl_hidden to weigh; give both or neither",
        ),
        (
            {"head": torch.zeros(7, 4).requires_grad_()},
            ValueError,
            "linear_cross_entropy: head requires a gradient, expected a frozen one; call .detach()",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    args: dict[str, Any] = {"hidden": torch.zeros(2, 4), "head": torch.zeros(7, 4)}
    args["targets"] = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(error) as caught:
        linear_cross_entropy(**(args | change))
    assert str(caught.value) == message
