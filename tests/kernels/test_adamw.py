"""AdamW of many adapters: each as if it were alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastsafe_kernels.adamw import KERNEL, SEGMENT, adamw

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NAMES = ("params", "grads", "m", "v", "learning_rate", "step", "lengths")
NAMES += ("beta1", "beta2", "eps", "weight_decay", "max_grad_norm")


def inputs(adapters: int, width: int, device: str = "cpu") -> dict[str, Any]:
    """Arguments by name; the last adapter of several stands still."""
    torch.manual_seed(0)
    dims = {"A": adapters, "P": width}
    values = KERNEL.make(dims, torch.float32, torch.device(device))
    return dict(zip(NAMES, values, strict=True))


def stepped(args: dict[str, Any]) -> dict[str, Tensor]:
    """Norms and the buffers after a step; ``args`` stay as they are."""
    args = {k: x.clone() if isinstance(x, Tensor) else x for k, x in args.items()}
    return {"norms": adamw(**args)} | {name: args[name] for name in NAMES[:4]}


@pytest.mark.parametrize("device", DEVICES)
def test_each_adapter_takes_the_steps_of_torch(device: str) -> None:
    torch.manual_seed(0)
    lengths, width = [70, 33, 70, 1], 70
    rates, decays = [1e-2, 1e-3, 3e-2, 1e-2], [0.0, 0.1, 0.01, 0.0]
    clips, late = [1.0, 0.0, 0.05, 100.0], [0, 2, 0, 1]
    p = torch.randn(4, width, device=device)
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    alone = [p[a, :n].clone().requires_grad_() for a, n in enumerate(lengths)]
    optimizers = [
        torch.optim.AdamW([x], lr=rate, weight_decay=decay, betas=(0.9, 0.98), eps=1e-6)
        for x, rate, decay in zip(alone, rates, decays, strict=True)
    ]
    for step in range(1, 6):
        g = torch.randn(4, width, device=device)
        t = torch.tensor([max(0, step - start) for start in late], device=device)
        norms = adamw(
            p, g, m, v, torch.tensor(rates, device=device), t,
            torch.tensor(lengths, device=device), 0.9, 0.98, 1e-6,
            torch.tensor(decays, device=device), torch.tensor(clips, device=device),
        )  # fmt: skip
        for a, x in enumerate(alone):
            if not t[a]:
                assert norms[a] == 0
                continue
            x.grad = g[a, : lengths[a]].clone()
            limit = clips[a] or float("inf")
            assert norms[a] == pytest.approx(
                torch.nn.utils.clip_grad_norm_([x], limit).item(), rel=1e-6
            )
            optimizers[a].step()
            assert torch.allclose(p[a, : lengths[a]], x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_an_adapter_has_the_same_bits_among_others(device: str) -> None:
    args = inputs(4, 2500, device)
    together = stepped(args)
    for a in range(4):
        one = {k: x[a : a + 1] if isinstance(x, Tensor) else x for k, x in args.items()}
        for name, x in stepped(one).items():
            assert torch.equal(x, together[name][a : a + 1]), name


@pytest.mark.parametrize("device", DEVICES)
def test_the_width_of_the_buffer_does_not_show(device: str) -> None:
    args = inputs(2, SEGMENT + 300, device)
    narrow = stepped(args)
    wide = dict(args)
    for name in NAMES[:4]:
        wide[name] = torch.full((2, 3 * SEGMENT + 5), float("nan"), device=device)
        wide[name][:, : SEGMENT + 300] = args[name]
    for name, x in stepped(wide).items():
        assert torch.equal(x if name == "norms" else x[:, : SEGMENT + 300], narrow[name]), name
        assert name == "norms" or x[:, SEGMENT + 300 :].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_not_in_use_stays_as_it_is(device: str) -> None:
    args = inputs(3, 900, device)
    after = stepped(args)
    assert args["step"].tolist() == [1, 8, 0]
    assert (args["lengths"] < 900).tolist() == [False, True, True]
    assert torch.equal(after["grads"], args["grads"])
    for name in ("params", "m", "v"):
        changed = after[name] != args[name]
        for a, length in enumerate(args["lengths"].tolist()):
            used = length if args["step"][a] else 0
            assert changed[a, :used].float().mean() > 0.99 or not used
            assert not changed[a, used:].any()
    assert (after["norms"] > 0).tolist() == [True, True, False]


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_and_tensors_are_the_same_settings(device: str) -> None:
    args = inputs(2, 40, device)
    numbers = stepped(args | {"weight_decay": 0.5, "max_grad_norm": 0.25})
    half = torch.full((2,), 0.5, device=device)
    tensors = stepped(args | {"weight_decay": half, "max_grad_norm": half / 2})
    doubled = {"learning_rate": args["learning_rate"].double(), "step": args["step"].float()}
    doubles = stepped(args | doubled | {"weight_decay": 0.5, "max_grad_norm": 0.25})
    for name, x in numbers.items():
        assert torch.equal(x, tensors[name])
        assert torch.equal(x, doubles[name])


@pytest.mark.parametrize("device", DEVICES)
def test_a_gradient_that_is_not_finite_spoils_its_own_adapter_only(device: str) -> None:
    args = inputs(4, 100, device)
    good = stepped(args)
    args["grads"][0, 7] = float("nan")
    bad = stepped(args)
    assert bad["norms"].isnan().tolist() == [True, False, False, False]
    assert bad["params"][0].isnan().all()  # as with torch: the clip spreads it
    for name in ("params", "m", "v", "norms"):
        assert torch.equal(bad[name][1:], good[name][1:])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("adapters", "width"), [(0, 7), (3, 0)])
def test_nothing_to_do(device: str, adapters: int, width: int) -> None:
    args = inputs(1, 5, device)
    args = {
        name: x[:1].repeat_interleave(adapters, 0) if isinstance(x, Tensor) else x
        for name, x in args.items()
    }
    for name in NAMES[:4]:
        args[name] = torch.zeros(adapters, width, device=device)
    args["lengths"] = torch.full((adapters,), width, device=device)
    assert adamw(**args).tolist() == [0.0] * adapters


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"m": torch.zeros(2, 5)},
            ValueError,
            "adamw: m is [2, 5], expected [A, P] with P=4 from params",
        ),
        (
            {"grads": torch.zeros(4, 2).T},
            ValueError,
            "adamw: grads has strides [1, 2], expected [4, 1]; allocate it contiguous",
        ),
        (
            {"grads": torch.zeros(2, 4, dtype=torch.bfloat16)},
            TypeError,
            "adamw: grads is torch.bfloat16, expected float32",
        ),
        (
            {"max_grad_norm": torch.zeros(3)},
            ValueError,
            "adamw: max_grad_norm is [3], expected [A] with A=2 from params",
        ),
        (
            {"beta2": 1.0},
            ValueError,
            "adamw: beta1 is 0.9 and beta2 is 1.0, expected both in (0, 1)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        adamw(**(inputs(2, 4) | change))
    assert str(caught.value) == message
