"""Draw one token per row, with its log-probability and whether it ends the row.

    x[n] = argmax over kept v of z[n, v] / T[n] + g[n, v];    T[n] = 0: argmax of z[n, v]
    y[n] = z[n, x[n]] - log sum_v exp z[n, v],    over all v and without T

g is Gumbel noise, a function of (seed[n], position[n], v) alone (``_noise.py``). Top-k, top-p and
min-p say which tokens are kept (``_ranking.py``). Of equal scores the lowest id wins. A token that
is among the row's stop ids is flagged.

Shapes   z [N, V]; T, top_k, top_p, min_p, seed, position [N]; stop [N, K]
         ->  x, y, is_finite, is_stop [N]
Dtypes   z fp32, bf16 or fp16; T, top_p, min_p fp32; seed, position, stop, x int64; g, y, sums
         fp32
Cost     reads z once; a row with top_k or top_p reads it about 20 times more in fp32, 12 in bf16,
         and about twice that with both, mostly from the L2 cache
Source   Gumbel 1954
Used by  fastsafe.engine
"""

import torch
from torch import Tensor

from ._noise import gumbel, mix, row_key, score, token_key, uniform
from ._ranking import head_ends, keep_head
from ._spec import FLOATS, Dims, Kernel, match, runs_reference
from ._triton import tl, triton

# Of a program; a power of two. Which token wins does not depend on either.
BLOCK = 4096
ROWS = 4


def reference(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    stop_ids: Tensor | None = None,
    with_logprobs: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Define the op in plain torch; the noise is fp32 always."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    best, token_ids = z.max(-1)
    is_finite = best.isfinite()
    rows = (temperature > 0).nonzero()[:, 0]
    if len(rows):
        params = (temperature, top_k, top_p, min_p, seeds, positions)
        t, k, p, m, seed, at = (x[rows] for x in params)
        kept = z if len(rows) == len(z) else z[rows]
        if bool(((k > 0) | (p < 1) | (m > 0)).any()):
            kept = keep_head(kept, t, k, p, m)
        noise = gumbel(seed, at, z.shape[1])
        token_ids[rows] = (kept / t[:, None]).add_(noise).argmax(-1)
    token_ids.masked_fill_(~is_finite, 0)
    logprobs = torch.full_like(best, float("nan"))
    if with_logprobs:
        chosen = z.gather(-1, token_ids[:, None])[:, 0]
        logprobs = torch.where(is_finite, chosen - z.logsumexp(-1), logprobs)
    is_stop = torch.zeros_like(is_finite)
    if stop_ids is not None:
        is_stop = (token_ids[:, None] == stop_ids).any(-1)
    return token_ids, logprobs, is_finite, is_stop


@triton.jit(do_not_specialize=["N"])
def _split_kernel(
    z_ptr, t_ptr, seed_ptr, position_ptr, edge_ptr, last_ptr, id_ptr, m_ptr, s_ptr, z_stride, N, V,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Best token and softmax sums of one block of a few rows, which share the tokens' hashes.

    Noise costs two logarithms. They are taken only where they can decide: with E = -log u, the
    winner has the least E / exp(z / T), and 1 - u <= E <= (1 - u) / u needs no logarithm.
    """
    split = tl.program_id(1)
    i = tl.arange(0, BLOCK)
    v = split * BLOCK + i
    tokens = token_key(v)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for n in range(first, tl.minimum(first + ROWS, N)):
        row_ptr = z_ptr + n * z_stride
        z = tl.load(row_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)
        m = tl.max(z, 0)
        # a block that is all -inf (banned tokens) must not compute -inf - -inf
        shift = tl.where(m == -float("inf"), 0.0, m)
        s = tl.sum(tl.exp2((z - shift) * 1.4426950408889634), 0)
        t = tl.load(t_ptr + n)
        if t > 0:
            edge = tl.load(edge_ptr + n)
            if edge > -float("inf"):
                kept = (z > edge) | ((z == edge) & (v <= tl.load(last_ptr + n)))
                z = tl.where(kept, z, -float("inf"))
            key = row_key(tl.load(seed_ptr + n), tl.load(position_ptr + n))
            scale = tl.minimum(1.4426950408889634 / t, 1e30)
            race = tl.exp2(tl.minimum(shift * scale - z * scale, 120.0))
            race = race * uniform(mix(key ^ tokens) ^ 0xFFFFFFFF)
            # positive floats rank as their bits do; the lowest bits give way to the index
            race = (race.to(tl.int32, bitcast=True) & -BLOCK) | i
            least = tl.min(race, 0)
            winner = split * BLOCK + (least & (BLOCK - 1))
            bits = mix(key ^ token_key(winner))
            # room for the bits given up and for rounding in the scores, which grows with z / T
            room = tl.minimum(2e-3 + 1e-6 * tl.minimum(tl.abs(shift), 1e6) * scale, 60.0)
            bound = (least & -BLOCK).to(tl.float32, bitcast=True) / uniform(bits) * tl.exp2(room)
            # races of kept tokens that can win stay below 2^90, those of dropped ones above
            bound = tl.minimum(bound.to(tl.int32, bitcast=True) | (BLOCK - 1), 217 << 23)
            race = tl.where(race == least, 0x7FFFFFFF, race)
            least = tl.min(race, 0)
            if least <= bound:
                best = score(tl.load(row_ptr + winner).to(tl.float32), t, bits)
                while least <= bound:
                    rival = split * BLOCK + (least & (BLOCK - 1))
                    bits = mix(key ^ token_key(rival))
                    other = score(tl.load(row_ptr + rival).to(tl.float32), t, bits)
                    wins = (other > best) | ((other == best) & (rival < winner))
                    winner = tl.where(wins, rival, winner)
                    best = tl.where(wins, other, best)
                    race = tl.where(race == least, 0x7FFFFFFF, race)
                    least = tl.min(race, 0)
        else:
            winner = tl.min(tl.where(z == m, v, V), 0)
        at = n * tl.num_programs(1) + split
        tl.store(id_ptr + at, tl.minimum(winner, V - 1))
        tl.store(m_ptr + at, m)
        tl.store(s_ptr + at, s)


@triton.jit
def _join_kernel(
    z_ptr, t_ptr, seed_ptr, position_ptr, edge_ptr, last_ptr, id_ptr, m_ptr, s_ptr, token_ptr,
    logprob_ptr, finite_ptr, stop_ptr, is_stop_ptr, z_stride, V, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr, STOPS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    at = n * SPLITS + i
    m_i = tl.load(m_ptr + at, mask=i < SPLITS, other=-float("inf"))
    s_i = tl.load(s_ptr + at, mask=i < SPLITS, other=0.0)
    m = tl.max(m_i, 0)
    shift = tl.where(m == -float("inf"), 0.0, m)
    lse = shift + tl.log(tl.sum(s_i * tl.exp(m_i - shift), 0))  # NaN if any logit is
    finite = tl.abs(lse) < float("inf")
    v = tl.load(id_ptr + at, mask=i < SPLITS, other=V - 1)
    z = tl.load(z_ptr + n * z_stride + v).to(tl.float32)
    edge = tl.load(edge_ptr + n)
    kept = (z > edge) | ((z == edge) & (v <= tl.load(last_ptr + n)))
    scores = z
    t = tl.load(t_ptr + n)
    if t > 0:
        key = row_key(tl.load(seed_ptr + n), tl.load(position_ptr + n))
        scores = score(z, t, mix(key ^ token_key(v)))
    scores = tl.where(kept, scores, -float("inf"))
    token = tl.min(tl.where(scores == tl.max(scores, 0), v, V - 1), 0)
    token = tl.where(finite, token, 0)
    logprob = tl.load(z_ptr + n * z_stride + token).to(tl.float32) - lse
    tl.store(token_ptr + n, token.to(tl.int64))
    tl.store(logprob_ptr + n, tl.where(finite, logprob, float("nan")))
    tl.store(finite_ptr + n, finite)
    is_stop = token < 0
    for k in range(STOPS):
        is_stop |= token == tl.load(stop_ptr + n * STOPS + k)
    tl.store(is_stop_ptr + n, is_stop)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    stop_ids: Tensor | None = None,
    with_logprobs: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw a token for every row.

    A row's results depend on its own logits and parameters alone. Rows may mix all settings.

    Args:
        logits: [N, V] fp32, bf16 or fp16, contiguous in V, V below 2^22. Not modified. -inf bans
            a token.
        temperature: [N] fp32; 0 takes the largest logit.
        top_k: [N] int64 or int32; keep this many tokens, 0 keeps all.
        top_p: [N] fp32 in (0, 1]; 1 keeps all.
        min_p: [N] fp32 in [0, 1); 0 keeps all.
        seeds: [N] int64, any value.
        positions: [N] int64, index of the sampled token in its sequence.
        stop_ids: [N, K] int64, tokens that end each row; -1 fills a shorter list. None = none.
        with_logprobs: False spares a CPU one pass; the log-probabilities may then be NaN.

    Returns:
        Token ids [N] int64; their log-probabilities [N] fp32 in nats, before temperature and
        filters; whether the row is finite [N] bool; whether the token is a stop id [N] bool. A
        row with a NaN or +inf, or with nothing but -inf, is not finite: it gets token 0 and NaN.

    Raises:
        ValueError: Shapes or devices disagree, V is 0 or too large, or ``logits`` is strided in V.
        TypeError: A dtype is not listed above.

    Example:
        >>> one, zero, seed = torch.ones(1), torch.zeros(1), torch.tensor([7])
        >>> logits = torch.tensor([[0.0, 2.0, 1.0]])
        >>> sample(logits, zero, torch.tensor([0]), one, zero, seed, seed)
        (tensor([1]), tensor([-0.4076]), tensor([True]), tensor([False]))
    """
    size = match(
        "sample",
        logits=(logits, "N V", FLOATS),
        temperature=(temperature, "N", (torch.float32,)),
        top_k=(top_k, "N", (torch.int64, torch.int32)),
        top_p=(top_p, "N", (torch.float32,)),
        min_p=(min_p, "N", (torch.float32,)),
        seeds=(seeds, "N", (torch.int64,)),
        positions=(positions, "N", (torch.int64,)),
    )
    if stop_ids is not None:
        stops = (stop_ids, "N K", (torch.int64,))
        match("sample", logits=(logits, "N V", FLOATS), stop_ids=stops)
    N, V = size["N"], size["V"]
    if not 0 < V < 1 << 22:
        raise ValueError(f"sample: logits is {[N, V]}, expected V from 1 to {(1 << 22) - 1}")
    if V > 1 and logits.stride(1) != 1:
        found = f"stride {logits.stride(1)} in V, expected 1"
        raise ValueError(f"sample: logits has {found}; call .contiguous()")
    rows = temperature, top_k, top_p, min_p, seeds, positions
    if runs_reference(logits):
        return reference(logits, *rows, stop_ids, with_logprobs)
    t, k, p, m, seeds, positions = (x.contiguous() for x in rows)
    splits = triton.cdiv(V, BLOCK)
    token_ids = torch.empty(N, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(N, dtype=torch.float32, device=logits.device)
    is_finite, is_stop = torch.empty(2, N, dtype=torch.bool, device=logits.device)
    stop = token_ids if stop_ids is None else stop_ids.contiguous()
    if N:
        edge, last = head_ends(logits, t, k, p, m)
        maxima, sums = logprobs.new_empty(2, N, splits)
        winners = last.new_empty(N, splits)
        stride = logits.stride(0)
        _split_kernel[(triton.cdiv(N, ROWS), splits)](
            logits, t, seeds, positions, edge, last, winners, maxima, sums, stride, N, V,
            ROWS=ROWS, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
        _join_kernel[(N,)](
            logits, t, seeds, positions, edge, last, winners, maxima, sums, token_ids, logprobs,
            is_finite, stop, is_stop, stride, V, SPLITS=splits,
            BLOCK=triton.next_power_of_2(splits),
            STOPS=0 if stop_ids is None else stop_ids.shape[1], num_warps=1,
        )  # fmt: skip
    return token_ids, logprobs, is_finite, is_stop


def _make(dims: Dims, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Peaked and flat rows, ties, banned tokens; with ``filters``, rows of every setting."""
    N, V = dims["N"], dims["V"]
    n = torch.arange(N, device=device)
    z = (torch.randn(N, V, device=device) * (1 + n % 3)[:, None]).mul(8).round().div(8)
    z[:, V // 2 :: 7] = -float("inf")
    use = torch.full((N,), dims["filters"], dtype=torch.bool, device=device)
    temperature = torch.where(n % 5 == 4, 0.0, 0.7 + 0.15 * (n % 3))
    top_k = torch.where(use & (n % 2 == 0), 1 + n % 50, 0)
    top_p = torch.where(use & (n % 3 == 1), 0.85, 1.0)
    min_p = torch.where(use & (n % 4 == 3), 0.05, 0.0)
    stop_ids = torch.stack([n % V, torch.full_like(n, V // 3), torch.full_like(n, -1)], 1)
    seeds = 977 * n - 5 + (n << 40)
    return z.to(dtype), temperature, top_k, top_p, min_p, seeds, 3 * n, stop_ids


KERNEL = Kernel(
    fn=sample,
    reference=reference,
    make=_make,
    tests=(
        {"N": 1, "V": 3, "filters": 0},
        {"N": 11, "V": 997, "filters": 1},
        {"N": 5, "V": 2 * BLOCK + 1, "filters": 1},
        {"N": 6, "V": 2 * BLOCK + 1, "filters": 0},
    ),
    bench=(
        {"N": 1024, "V": 128_256, "filters": 0},
        {"N": 1024, "V": 128_256, "filters": 1},
    ),
    min_bytes=lambda d, dtype: d["N"] * d["V"] * dtype.itemsize,
)
