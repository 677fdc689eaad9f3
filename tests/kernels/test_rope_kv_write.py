"""rope_kv_write is rope and a copy, bit for bit, and touches nothing else."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastsafe_kernels.rope import make_tables, rope
from fastsafe_kernels.rope_kv_write import rope_kv_write

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16]
SLOTS = [6, -1, 0, 11, 5]


def random(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def inputs(
    dtype: torch.dtype, device: str, H: int = 3, Hkv: int = 2, D: int = 16, R: int = 16, P: int = 3
) -> dict[str, Any]:
    """Five rows for pages of four tokens; pages are views of one cache, its strides in no order."""
    torch.manual_seed(7)
    cos, sin = (t.to(device) for t in make_tables(len(SLOTS), R, torch.device("cpu")))
    cache = random(Hkv, 4, P, 2, D, seed=1, dtype=dtype, device=device).permute(3, 2, 0, 1, 4)
    return {
        "qkv": random(len(SLOTS), (H + 2 * Hkv) * D, dtype=dtype, device=device),
        "cos": cos,
        "sin": sin,
        "k_pages": cache[0],
        "v_pages": cache[1],
        "slots": torch.tensor(SLOTS, device=device),
    }


def norms(D: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    q_norm, k_norm = random(2, D, seed=2, dtype=dtype, device=device)
    return {"q_norm": q_norm, "k_norm": k_norm}


def unfused(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """rope of both parts, then one row after the other."""
    kv_heads, page_size, D = k_pages.shape[1:]
    heads = qkv.view(len(qkv), -1, D)
    k = rope(heads[:, -2 * kv_heads : -kv_heads], cos, sin, k_norm, **options)
    for n, slot in enumerate(slots.tolist()):
        if slot >= 0:
            k_pages[slot // page_size, :, slot % page_size] = k[n]
            v_pages[slot // page_size, :, slot % page_size] = heads[n, -kv_heads:]
    return rope(heads[:, : -2 * kv_heads], cos, sin, q_norm, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        {"H": 3, "Hkv": 2, "D": 16, "R": 16},
        {"H": 5, "Hkv": 1, "D": 48, "R": 20},
        {"H": 14, "Hkv": 2, "D": 128, "R": 128},  # a tile ends within the values
    ],
    ids=str,
)
def test_every_bit_is_that_of_rope_and_a_copy(
    shape: dict[str, int], norm: bool, dtype: torch.dtype, device: str
) -> None:
    options: dict[str, Any] = {"one_plus": True} if norm else {}
    found = []
    for fn in (rope_kv_write, unfused):
        args = inputs(dtype, device, **shape)
        before = args["k_pages"].clone()
        weights = norms(shape["D"], dtype, device) if norm else {}
        found.append((fn(**args, **weights, **options), args["k_pages"], args["v_pages"]))
        assert not torch.equal(args["k_pages"], before)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("device", DEVICES)
def test_rows_without_a_slot_are_rotated_but_not_written(device: str) -> None:
    args = inputs(torch.float32, device)
    before = args["k_pages"].clone(), args["v_pages"].clone()
    q = rope_kv_write(**args | {"slots": torch.full((5,), -1, device=device)})
    assert torch.equal(args["k_pages"], before[0])
    assert torch.equal(args["v_pages"], before[1])
    assert torch.equal(q, rope_kv_write(**args))
    assert not torch.equal(args["k_pages"], before[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_batch(dtype: torch.dtype, device: str) -> None:
    weights = norms(16, dtype, device)
    args = inputs(dtype, device)
    q = rope_kv_write(**args, **weights)
    orders = ([4, 2, 0, 3, 1],), ([3], [0, 1], [2, 4])
    for order in orders:
        pages = {name: args[name].clone() for name in ("k_pages", "v_pages")}
        for t in pages.values():
            t[2, :, 3], t[0, :, 0] = 0, 0  # where rows 3 and 2 go
        for rows in order:
            some = {name: args[name][rows] for name in ("qkv", "cos", "sin", "slots")}
            assert torch.equal(rope_kv_write(**some, **pages, **weights), q[rows])
        assert all(torch.equal(t, args[name]) for name, t in pages.items())


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_a_wider_matrix_need_no_copy(device: str) -> None:
    found = []
    for wide in (False, True):
        args = inputs(torch.float32, device)
        if wide:
            for name in ("qkv", "cos", "sin"):
                args[name] = torch.cat((args[name], args[name]), 1)[:, : args[name].shape[1]]
        found.append((rope_kv_write(**args), args["k_pages"], args["v_pages"]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("device", DEVICES)
def test_no_gradient_is_recorded(device: str) -> None:
    args = inputs(torch.float32, device)
    args["qkv"].requires_grad_()
    assert not rope_kv_write(**args).requires_grad
    assert not args["k_pages"].requires_grad


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows(device: str) -> None:
    args = inputs(torch.float32, device)
    before = args["k_pages"].clone()
    none = {name: args[name][:0] for name in ("qkv", "cos", "sin", "slots")}
    assert rope_kv_write(**args | none).shape == (0, 3, 16)
    assert torch.equal(args["k_pages"], before)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"qkv": torch.zeros(5, 64)},
            ValueError,
            "rope_kv_write: qkv is [5, 64], expected [N, (H+2*Hkv)*D] with Hkv=2, D=16 from"
            " k_pages",
        ),
        (
            {"qkv": torch.zeros(5, 113)},
            ValueError,
            "rope_kv_write: qkv is [5, 113], expected [N, (H+2*Hkv)*D] with Hkv=2, D=16 from"
            " k_pages",
        ),
        (
            {"v_pages": torch.zeros(3, 2, 8, 16)},
            ValueError,
            "rope_kv_write: v_pages is [3, 2, 8, 16], expected [P, Hkv, S, D] with S=4 from"
            " k_pages",
        ),
        (
            {"k_pages": torch.zeros(3, 2, 4, 16).bfloat16()},
            TypeError,
            "rope_kv_write: k_pages is torch.bfloat16, expected float32",
        ),
        (
            {"slots": torch.zeros(5, dtype=torch.int32)},
            TypeError,
            "rope_kv_write: slots is torch.int32, expected int64",
        ),
        (
            {"slots": torch.zeros(10, dtype=torch.int64)[::2]},
            ValueError,
            "rope_kv_write: slots has stride 2 in N, expected 1; call .contiguous()",
        ),
        (
            {"v_pages": torch.zeros(3, 2, 16, 4).mT},
            ValueError,
            "rope_kv_write: v_pages has stride 4 in D, expected 1; call .contiguous()",
        ),
        (
            {"q_norm": torch.zeros(16)},
            ValueError,
            "rope_kv_write: k_norm is None, expected [D] like q_norm; give both or none",
        ),
        (
            {"k_norm": torch.zeros(16)},
            ValueError,
            "rope_kv_write: q_norm is None, expected [D] like k_norm; give both or none",
        ),
        (
            {"q_norm": torch.zeros(8), "k_norm": torch.zeros(8)},
            ValueError,
            "rope_kv_write: q_norm is [8], expected [D] with D=16 from k_pages",
        ),
        (
            {"cos": torch.zeros(5, 18), "sin": torch.zeros(5, 18)},
            ValueError,
            "rope_kv_write: cos is [5, 18], expected an even R up to D=16",
        ),
    ],
)
def test_refuses(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        rope_kv_write(**inputs(torch.float32, "cpu") | change)
    assert str(caught.value) == message
