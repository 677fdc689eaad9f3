"""Attention of packed sequences on a GPU: forward, gradients, and the same bits again."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fastsafe_kernels._varlen import varlen_attention


def plain(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Attention of one sequence in fp64."""
    group = q.shape[1] // k.shape[1]
    ones = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device)
    hidden = ones.triu(1) if window is None else ones.triu(1) | ones.tril(-window)
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * 0.1
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(group, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 1, 20])
def test_on_a_gpu_it_equals_plain_attention_and_repeats_its_bits(window: int | None) -> None:
    """Whatever backend this machine has: forward, gradients, and the same bits again."""
    torch.manual_seed(0)
    bounds = [0, 1, 301, 318, 382]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32).cuda()
    q, k, v, upstream = (torch.randn(382, n, 64).cuda().bfloat16() for n in (8, 2, 2, 8))
    wide = tuple(x.double().requires_grad_() for x in (q, k, v))
    parts = [tuple(x[a:b] for x in wide) for a, b in pairwise(bounds)]
    want = torch.cat([plain(q1, k1, v1, window) for q1, k1, v1 in parts])
    wanted = torch.autograd.grad(want, wide, upstream.double())
    found = []
    for _ in range(3):
        narrow = tuple(x.detach().requires_grad_() for x in (q, k, v))
        y = varlen_attention(narrow[0], narrow[1], narrow[2], cu_seqlens, 300, 0.1, window)
        found.append((y.detach(), *torch.autograd.grad(y, narrow, upstream)))
    for got, truth in zip(found[0], (want, *wanted), strict=True):
        error = (got.double() - truth).abs().max()
        assert error <= 4 * torch.finfo(torch.bfloat16).eps * truth.abs().max()
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))
    # two neighbours fewer, and a larger bound on the length
    fewer = varlen_attention(q[:301], k[:301], v[:301], cu_seqlens[:3], 512, 0.1, window)
    assert torch.equal(fewer, found[0][0][:301])
