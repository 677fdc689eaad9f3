"""Attention over pages equals attention written out, whatever the steps, with the same bits."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fastsafe import _native
from fastsafe.model.cpu_ops import AttentionFlags
from fastsafe.model.cpu_paged import PAGE, Paged, page_shapes, paged_attention

TABLE = torch.tensor([[1]], dtype=torch.int32)


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.instruction_set()
    if not _native.use_instruction_set(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    _native.use_instruction_set(before)


def close(got: Tensor, plain: Callable[..., Tensor], *args: Tensor) -> None:
    """Error against fp64 is at most twice that of torch in fp32, plus a rounding step."""
    exact = plain(*(a.double() for a in args))
    scale = exact.abs().max().item()
    plain_error = (plain(*args) - exact).abs().max().item()
    budget = 2 * (plain_error + torch.finfo(torch.float32).eps * scale)
    assert (got - exact).abs().max().item() <= budget


def attend(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], window: int | None, cap: float | None
) -> Tensor:
    """Attention written out, sequence by sequence."""
    outs = []
    group = q.shape[1] // k.shape[1]
    for qs, ks, vs in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        n = len(qs)
        ks, vs = (x.repeat_interleave(group, 1) for x in (ks, vs))
        scores = torch.einsum("ihd,jhd->hij", qs, ks) * 0.3
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        distance = torch.arange(n)[:, None] - torch.arange(n)
        hidden = (distance < 0) | (distance >= (window or n))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        outs.append(torch.einsum("hij,jhd->ihd", weights, vs))
    return torch.cat(outs)


def paged(
    q: Tensor, k: Tensor, v: Tensor, cuts: list[list[int]], window: int | None, cap: float | None
) -> Tensor:
    """Attention over pages of rows that are computed in steps; ``cuts`` of each row's tokens."""
    lengths = [sum(cut) for cut in cuts]
    width = -(-max(lengths) // PAGE)
    pages = torch.randperm(len(cuts) * width + 1)[1:].to(torch.int32).view(len(cuts), width)
    shapes = page_shapes(len(cuts) * width + 1, k.shape[1], k.shape[2])
    keys, values = (torch.full(shape, torch.nan) for shape in shapes)
    first = torch.tensor([0, *lengths]).cumsum(0)
    out = torch.full_like(q, torch.nan)
    done = [0] * len(cuts)
    for step in range(max(map(len, cuts))):
        rows = [i for i, cut in enumerate(cuts) if step < len(cut)]
        counts = [cuts[i][step] for i in rows]
        positions = torch.cat(
            [torch.arange(done[i], done[i] + n) for i, n in zip(rows, counts, strict=True)]
        )
        owner = torch.tensor(rows).repeat_interleave(torch.tensor(counts))
        places = pages[owner, positions // PAGE].long() * PAGE + positions % PAGE
        starts = torch.tensor([0, *counts]).cumsum(0)
        table = Paged(starts, positions, places, pages[rows], len(keys))
        at = first[owner] + positions
        flags = AttentionFlags(0.3, window, cap)
        found = paged_attention(q[at], k[at], v[at], keys, values, table, flags)
        out[at] = found
        for i, n in zip(rows, counts, strict=True):
            done[i] += n
    return out


@pytest.mark.parametrize(
    ("window", "cap"), [(None, None), (9, None), (None, 2.0), (16, None), (70, 2.0)]
)
@pytest.mark.parametrize(("heads", "dim"), [(2, 20), (4, 16), (6, 40), (10, 7)])
def test_paged_attention(
    instructions: str, window: int | None, cap: float | None, heads: int, dim: int
) -> None:
    torch.manual_seed(0)
    cuts = [[1], [17], [40], [100]]
    lengths = [sum(cut) for cut in cuts]
    fused = 2 * torch.randn(sum(lengths), heads + 4, dim)
    q, k, v = fused.split([heads, 2, 2], 1)
    got = paged(q, k, v, cuts, window, cap)
    close(got, lambda q, k, v: attend(q, k, v, lengths, window, cap), q, k, v)


@pytest.mark.parametrize("window", [None, 9, 33])
def test_paged_attention_has_the_same_bits_however_a_row_is_cut(
    instructions: str, window: int | None
) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(100, n, 20) for n in (6, 2, 2))
    k[60], v[60] = torch.nan, torch.inf  # of a later token: those before it never see it
    whole = paged(q, k, v, [[100]], window, None)
    assert whole[:60].isfinite().all()
    for cut in ([1] * 100, [37, 63], [16, 16, 1, 67], [99, 1], [5] * 20):
        assert torch.equal(paged(q, k, v, [cut], window, None)[:60], whole[:60])
    both = paged(*(torch.cat([x, x[:50]]) for x in (q, k, v)), [[100], [7, 43]], window, None)
    assert torch.equal(both[:60], whole[:60])
    assert torch.equal(both[100:], whole[:50])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Paged(*[torch.tensor(t) for t in ([0, 2], [0, 1], [0, 32])], TABLE, 2),
        lambda: Paged(*[torch.tensor(t) for t in ([0, 2], [0, 16], [0, 1])], TABLE, 2),
        lambda: Paged(*[torch.tensor(t) for t in ([0, 1], [0, 1], [0, 1])], TABLE, 2),
        lambda: Paged(*[torch.tensor(t) for t in ([0, 2], [0, 1], [0, 1])], TABLE, 1),
        lambda: paged_attention(
            *[torch.zeros(2, 1, 8)] * 3,
            *[torch.zeros(2, 1, 16, 16)] * 2,
            Paged(*[torch.tensor(t) for t in ([0, 2], [0, 1], [0, 1])], TABLE, 2),
            AttentionFlags(1.0, None, None),
        ),
    ],
)
def test_what_would_read_beyond_its_memory_is_refused(wrong: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="tensors do not fit"):
        wrong()
