import pytest
import torch
from torch import Tensor

from fastsafe.model.attention import PackedAttention, _plan
from fastsafe.model.cpu_ops import AttentionFlags

H, HKV, D = 4, 2, 8
KINDS = {
    "plain": {"window": None, "softcap": None},
    "window": {"window": 5, "softcap": None},
    "softcap": {"window": None, "softcap": 1.5},
    "both": {"window": 5, "softcap": 1.5},
}


def qkv_of(total: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(total)
    return tuple(
        torch.randn(total, heads, D, generator=generator).to(dtype) for heads in (H, HKV, HKV)
    )  # type: ignore[return-value]


def dense(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Attention of one sequence, written out."""
    k, v = k.repeat_interleave(H // HKV, 1), v.repeat_interleave(H // HKV, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(len(q))[:, None] - torch.arange(len(k))
    seen = (distance >= 0) & (distance < (window or len(k)))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "lengths", [(1,), (16,), (40,), (3, 17, 60, 16, 1, 41, 17), (32, 32), (7, 7, 7)]
)
def test_equals_dense_attention_and_its_gradients(kind: str, lengths: tuple[int, ...]) -> None:
    packed = [x.double().requires_grad_() for x in qkv_of(sum(lengths))]
    apart = [x.detach().clone().requires_grad_() for x in packed]
    got = PackedAttention(lengths)(0, *packed, AttentionFlags(0.3, **KINDS[kind]))
    want = torch.cat(
        [
            dense(*parts, scale=0.3, **KINDS[kind])
            for parts in zip(*(x.split(lengths) for x in apart), strict=True)
        ]
    )
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(1)).double()
    got.backward(upstream)
    want.backward(upstream)
    for x, y in zip(packed, apart, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_has_the_same_bits_in_any_company(kind: str, dtype: torch.dtype) -> None:
    """Forward and backward, whatever the neighbours' number, length and order."""
    lengths = (3, 17, 60, 16, 41, 17, 32)
    inputs = [x.requires_grad_() for x in qkv_of(sum(lengths), dtype)]
    together = PackedAttention(lengths)(0, *inputs, AttentionFlags(0.3, **KINDS[kind]))
    together.backward(torch.ones_like(together))
    start = 0
    for n in lengths:
        rows = slice(start, start + n)
        alone_inputs = [x.detach()[rows].clone().requires_grad_() for x in inputs]
        alone = PackedAttention([n])(0, *alone_inputs, AttentionFlags(0.3, **KINDS[kind]))
        alone.backward(torch.ones_like(alone))
        assert torch.equal(alone, together[rows])
        for x, y in zip(inputs, alone_inputs, strict=True):
            assert torch.equal(x.grad[rows], y.grad)
        start += n


def test_equal_lengths_that_need_no_padding_are_not_copied() -> None:
    assert _plan((32, 32, 32))[1] is None
    assert _plan((30, 30))[1] is not None


@pytest.mark.parametrize("lengths", [(), (3, 0), (4, -1)])
def test_refuses_lengths_that_are_not_positive(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"PackedAttention: lengths is \["):
        PackedAttention(lengths)
