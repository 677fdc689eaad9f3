"""Paged decode attention equals attention over each row's own tokens, and keeps a row's bits."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastsafe_kernels._spec import INTERPRET
from fastsafe_kernels.paged_decode import SPLIT, paged_decode

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ["cpu", GPU]
not_promised = pytest.mark.skipif(not INTERPRET, reason="the CPU reference promises no bits")
KERNELS = [pytest.param("cpu", marks=not_promised), GPU]

H, HKV, D, S = 4, 2, 16, 64
CONTEXTS = [1, 0, 37, S, SPLIT, SPLIT + 1, 2 * SPLIT + 70]


class Pages:
    """Rows of random keys and values, and any number of ways to lay them out in pages."""

    def __init__(
        self, contexts: list[int], device: str, dtype: torch.dtype = torch.float32
    ) -> None:
        torch.manual_seed(0)
        self.contexts = torch.tensor(contexts, dtype=torch.int32, device=device)
        self.q = torch.randn(len(contexts), H, D, dtype=dtype, device=device)
        tokens = -(-max(contexts) // S) * S
        self.k, self.v = torch.randn(2, len(contexts), tokens, HKV, D, dtype=dtype, device=device)

    def laid_out(self, seed: int, width: int = 0) -> Any:
        """Five tensors: pages in an order of the seed, NaN where no token, -1 where no page."""
        N, tokens = self.k.shape[:2]
        B = tokens // S
        used = torch.arange(tokens, device=self.q.device) < self.contexts[:, None]
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(N * B + 3, generator=generator)[: N * B].to(self.q.device)
        pages = []
        for x in (self.k, self.v):
            held = x.masked_fill(~used[:, :, None, None], torch.nan)
            pool = x.new_full((N * B + 3, HKV, S, D), torch.nan)
            pool[order] = held.view(N * B, S, HKV, D).transpose(1, 2)
            pages.append(pool)
        table = order.view(N, B).masked_fill(~used.view(N, B, S).any(-1), -1)
        table = torch.nn.functional.pad(table, (0, max(0, width - B)), value=-1)
        return self.q, *pages, table.to(torch.int32), self.contexts

    def plain(self, row: int, scale: float, window: int, softcap: float) -> tuple[Tensor, Tensor]:
        """Attention of one row in fp64, token by token as the formula says."""
        end = int(self.contexts[row])
        begin = max(0, end - window) if window else 0
        k, v = (x[row, begin:end].double().repeat_interleave(H // HKV, 1) for x in (self.k, self.v))
        scores = torch.einsum("hd,thd->ht", self.q[row].double(), k) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        return torch.einsum("ht,thd->hd", scores.softmax(-1), v), scores.logsumexp(-1)


def decode(tensors: Any, window: int = 0, softcap: float = 0.0) -> tuple[Tensor, Tensor]:
    q, k_pages, v_pages, table, contexts = tensors
    return paged_decode(q, k_pages, v_pages, table, contexts, 0.3, window, softcap)


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (1, 0.0), (70, 0.0), (SPLIT + 2, 2.0)])
def test_equals_attention_over_each_rows_own_tokens(
    window: int, softcap: float, device: str
) -> None:
    rows = Pages(CONTEXTS, device)
    y, lse = decode(rows.laid_out(1), window, softcap)
    for row, context in enumerate(CONTEXTS):
        if context:
            want, want_lse = rows.plain(row, 0.3, window, softcap)
            torch.testing.assert_close(y[row].double(), want, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(lse[row].double(), want_lse, rtol=1e-5, atol=1e-5)
        else:
            assert not y[row].any()
            assert (lse[row] == -torch.inf).all()


@pytest.mark.parametrize("device", KERNELS)
@pytest.mark.parametrize("window", [0, SPLIT + 2])
def test_bits_do_not_depend_on_pages_or_the_width_of_the_table(window: int, device: str) -> None:
    rows = Pages([5, SPLIT], device, torch.bfloat16)
    narrow = rows.laid_out(1)
    assert narrow[3].shape[1] * S == SPLIT, "one split: written at once"
    once = decode(narrow, window)
    assert same(decode(rows.laid_out(2), window), once)
    wide = rows.laid_out(3, width=3 * SPLIT // S)
    assert same(decode(wide, window), once)
    strided = wide[3].new_full((2, 50), -1)
    strided[:, : wide[3].shape[1]] = wide[3]
    assert same(decode((*wide[:3], strided[:, :33], wide[4]), window), once)
    longs = (wide[3].to(torch.int64), wide[4].to(torch.int64))
    assert same(decode((*wide[:3], *longs), window), once)


@pytest.mark.parametrize("device", KERNELS)
def test_bits_do_not_depend_on_the_other_rows(device: str) -> None:
    q, k, v, table, contexts = Pages(CONTEXTS, device, torch.bfloat16).laid_out(1)
    y, lse = decode((q, k, v, table, contexts))
    order = torch.tensor([3, 6, 0, 5, 1, 4, 2], device=device)
    moved = decode((q[order], k, v, table[order], contexts[order]))
    assert same(moved, (y[order], lse[order]))
    for i in range(len(CONTEXTS)):
        row = slice(i, i + 1)
        alone = decode((q[row], k, v, table[row], contexts[row]))
        assert same(alone, (y[row], lse[row]))


@pytest.mark.parametrize("device", KERNELS)
def test_bits_do_not_depend_on_a_neighbour_that_grows(device: str) -> None:
    """Peers split a row by what the batch leaves free; here a row splits by its own length."""
    short = Pages([300, 8000], device, torch.bfloat16)
    q, k, v, table, contexts = short.laid_out(1)
    for neighbour in (0, 1, SPLIT, 8000):
        contexts[1] = neighbour
        found = decode((q, k, v, table, contexts))
        first = found[0][:1].clone(), found[1][:1].clone()
        width = 5 if neighbour < 8000 else table.shape[1]
        alone = decode((q[:1], k, v, table[:1, :width], contexts[:1]))
        assert same(first, alone)


@pytest.mark.parametrize("device", DEVICES)
def test_pages_before_the_window_need_not_exist(device: str) -> None:
    q, k, v, table, contexts = Pages([2 * SPLIT + 70], device).laid_out(1)
    window = 100
    whole = decode((q, k, v, table, contexts), window)
    first = (int(contexts[0]) - window) // S
    k[table[0, :first].long()] = torch.nan
    v[table[0, :first].long()] = torch.nan
    table[0, :first] = -1
    assert same(decode((q, k, v, table, contexts), window), whole)
    assert not whole[0].isnan().any()


@pytest.mark.parametrize("device", DEVICES)
def test_strided_queries_and_pools_of_several_layers(device: str) -> None:
    q, k, v, table, contexts = Pages([90, 20], device).laid_out(1)
    want = decode((q, k, v, table, contexts))
    fused = torch.randn(2, H + 2 * HKV, D, device=device)
    fused[:, :H] = q
    by_head = q.transpose(0, 1).contiguous().transpose(0, 1)
    pool = torch.stack([k, v], 1)
    for strided in (fused[:, :H], by_head):
        found = decode((strided, pool[:, 0], pool[:, 1], table, contexts))
        assert same(found, want)


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows(device: str) -> None:
    q, k, v, table, contexts = Pages([20], device).laid_out(1)
    y, lse = decode((q[:0], k, v, table[:0], contexts[:0]))
    assert y.shape == (0, H, D)
    assert lse.shape == (0, H)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": zeros(2, 3, 16)}, ValueError, "q has 3 heads, expected a multiple of Hkv=2"),
        (
            {"k_pages": zeros(3, 2, 64, 16, dtype=torch.bfloat16)},
            TypeError,
            "k_pages is torch.bfloat16, expected float32",
        ),
        (
            {"v_pages": zeros(3, 2, 32, 16)},
            ValueError,
            "v_pages is [3, 2, 32, 16], expected [P, Hkv, S, D] with S=64 from k_pages",
        ),
        (
            {"block_table": zeros(2, 5)},
            TypeError,
            "block_table is torch.float32, expected int32 or int64",
        ),
        (
            {"context_lens": zeros(3, dtype=torch.int32)},
            ValueError,
            "context_lens is [3], expected [N] with N=2 from q",
        ),
        (
            {"k_pages": zeros(3, 2, 48, 16), "v_pages": zeros(3, 2, 48, 16)},
            ValueError,
            "k_pages has S=48, expected a power of two from 16 on",
        ),
        (
            {
                "q": zeros(2, 4, 300),
                "k_pages": zeros(3, 2, 64, 300),
                "v_pages": zeros(3, 2, 64, 300),
            },
            ValueError,
            "q has D=300, expected at most 256",
        ),
        (
            {"window": -1},
            ValueError,
            "window=-1 and softcap=0.0, expected no negative number; 0 = none",
        ),
        (
            {"q": zeros(2, 16, 4).transpose(1, 2)},
            ValueError,
            "q has stride 4 in D, expected 1; call .contiguous()",
        ),
        (
            {"v_pages": zeros(3, 2, 16, 64).transpose(2, 3)},
            ValueError,
            "v_pages has strides [1, 64] in S and D, expected [16, 1]; call .contiguous()",
        ),
        (
            {"block_table": zeros(5, 2, dtype=torch.int32).T},
            ValueError,
            "block_table has stride 2 in its last dimension, expected 1; call .contiguous()",
        ),
    ],
)
def test_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    args: dict[str, Any] = {
        "q": zeros(2, 4, 16),
        "k_pages": zeros(3, 2, 64, 16),
        "v_pages": zeros(3, 2, 64, 16),
        "block_table": zeros(2, 5, dtype=torch.int32),
        "context_lens": zeros(2, dtype=torch.int32),
        "scale": 1.0,
        "window": 0,
        "softcap": 0.0,
    }
    paged_decode(**args)
    with pytest.raises(error) as caught:
        paged_decode(**args | change)
    assert str(caught.value) == f"paged_decode: {message}"
