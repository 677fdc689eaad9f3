"""A shared prefix and each row's own tokens, merged, are attention over both."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastsafe_kernels._spec import INTERPRET
from fastsafe_kernels.merge_attention import merge_attention
from fastsafe_kernels.paged_decode import paged_decode
from fastsafe_kernels.prefix_attention import prefix_attention

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ["cpu", GPU]
not_promised = pytest.mark.skipif(not INTERPRET, reason="the CPU reference promises no bits")
KERNELS = [pytest.param("cpu", marks=not_promised), GPU]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("prefix", [0, 1, 75])
def test_prefix_and_suffix_merge_to_unshared_attention(
    prefix: int, softcap: float, device: str
) -> None:
    """The judge's decode: one rubric, rows of different lengths, one of them without a token."""
    torch.manual_seed(0)
    contexts, H, Hkv, D, S = [0, 1, 16, 41], 4, 2, 16, 16
    q = torch.randn(4, H, D, device=device)
    shared = torch.randn(2, prefix, Hkv, D, device=device)
    own = torch.randn(2, 4, 3 * S, Hkv, D, device=device)
    pages = own.view(2, 12, S, Hkv, D).transpose(2, 3).contiguous()
    table = torch.arange(12, device=device).view(4, 3)
    lengths = torch.tensor(contexts, device=device)
    front = prefix_attention(q, shared[0], shared[1], 0.3, softcap)
    back = paged_decode(q, pages[0], pages[1], table, lengths, 0.3, softcap=softcap)
    y, lse = merge_attention(*front, *back)
    for row, context in enumerate(contexts):
        k, v = torch.cat([shared, own[:, row, :context]], 1).double().repeat_interleave(2, 2)
        if len(k) == 0:
            assert not y[row].any()
            assert (lse[row] == -torch.inf).all()
            continue
        scores = torch.einsum("hd,thd->ht", q[row].double(), k) * 0.3
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        want = torch.einsum("ht,thd->hd", scores.softmax(-1), v)
        torch.testing.assert_close(y[row].double(), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse[row].double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", KERNELS)
def test_bits_do_not_depend_on_the_other_rows(device: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(*n, 16, device=device) for n in ((67, 6), (150, 2), (150, 2)))
    if device == "cpu":
        # numpy's matrix product, which interprets tl.dot, is only the same for every row of a tile
        # where it is exact: for small whole numbers
        q, k, v = (x.round().clamp(-2, 2) for x in (q, k, v))
    q, k, v = (x.bfloat16() for x in (q, k, v))
    y, lse = prefix_attention(q, k, v, 0.03)
    order = torch.randperm(67, generator=torch.Generator().manual_seed(1)).to(device)
    moved, moved_lse = prefix_attention(q[order], k, v, 0.03)
    assert torch.equal(moved, y[order])
    assert torch.equal(moved_lse, lse[order])
    for rows in (slice(0, 1), slice(41, 44), slice(66, 67)):
        alone, alone_lse = prefix_attention(q[rows], k, v, 0.03)
        assert torch.equal(alone, y[rows])
        assert torch.equal(alone_lse, lse[rows])


@pytest.mark.parametrize("device", DEVICES)
def test_strided_arguments(device: str) -> None:
    torch.manual_seed(0)
    fused = torch.randn(70, 4 + 2 * 2, 16, device=device)
    q, k, v = fused[:, :4], fused[:, 4:6], fused[:, 6:]
    want = prefix_attention(q.contiguous(), k.contiguous(), v.contiguous(), 0.3)
    by_head = q.transpose(0, 1).contiguous().transpose(0, 1)
    for strided in (q, by_head):
        found = prefix_attention(strided, k, v, 0.3)
        torch.testing.assert_close(found[0], want[0])
        torch.testing.assert_close(found[1], want[1])


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows_and_no_prefix(device: str) -> None:
    q, k = torch.ones(2, 4, 16, device=device), torch.ones(3, 2, 16, device=device)
    y, lse = prefix_attention(q[:0], k, k, 0.3)
    assert y.shape == (0, 4, 16)
    assert lse.shape == (0, 4)
    y, lse = prefix_attention(q, k[:0], k[:0], 0.3)
    assert torch.equal(y, torch.zeros_like(q))
    assert (lse == -torch.inf).all()
    assert lse.shape == (2, 4)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": zeros(5, 3, 16)}, ValueError, "q has 3 heads, expected a multiple of Hkv=2"),
        (
            {"v_prefix": zeros(8, 2, 16)},
            ValueError,
            "v_prefix is [8, 2, 16], expected [L, Hkv, D] with L=7 from k_prefix",
        ),
        (
            {"k_prefix": zeros(7, 2, 16, dtype=torch.float16)},
            TypeError,
            "k_prefix is torch.float16, expected float32",
        ),
        (
            {"q": zeros(5, 4, 300), "k_prefix": zeros(7, 2, 300), "v_prefix": zeros(7, 2, 300)},
            ValueError,
            "q has D=300, expected at most 256",
        ),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0, expected 0 (none) or more"),
        (
            {"k_prefix": zeros(7, 16, 2).transpose(1, 2)},
            ValueError,
            "k_prefix has stride 2 in D, expected 1; call .contiguous()",
        ),
    ],
)
def test_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    args: dict[str, Any] = {
        "q": zeros(5, 4, 16),
        "k_prefix": zeros(7, 2, 16),
        "v_prefix": zeros(7, 2, 16),
        "scale": 1.0,
    }
    prefix_attention(**args)
    with pytest.raises(error) as caught:
        prefix_attention(**args | change)
    assert str(caught.value) == f"prefix_attention: {message}"
