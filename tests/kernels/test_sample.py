"""Drawing tokens: the noise, the filters, and rows that know nothing of each other."""

import math
from typing import Any

import pytest
import scipy.stats
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsafe_kernels import _noise, _ranking
from fastsafe_kernels._spec import INTERPRET, runs_reference
from fastsafe_kernels.sample import BLOCK, KERNEL, reference, sample

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(logits: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sample with one setting for all rows; seeds count from 0 and positions from 100."""
    n, device = len(logits), logits.device
    given = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | options
    floats = {
        name: torch.full((n,), float(given[name]), device=device)
        for name in ("temperature", "top_p", "min_p")
    }
    top_k = torch.full((n,), given["top_k"], device=device)
    seeds = torch.arange(n, device=device)
    at, stops = seeds + 100, options.get("stop_ids")
    return sample(logits, top_k=top_k, seeds=seeds, positions=at, stop_ids=stops, **floats)


def kept(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Which tokens the filters keep, -inf left out."""
    n, device = len(logits), logits.device
    settings = (
        torch.full((n,), temperature, device=device),
        torch.full((n,), top_k, device=device),
        torch.full((n,), top_p, device=device),
        torch.full((n,), min_p, device=device),
    )
    if runs_reference(logits):
        return _ranking.keep_head(logits.float(), *settings) > -math.inf
    edge, last = (x[:, None] for x in _ranking.head_ends(logits, *settings))
    ids = torch.arange(logits.shape[1], device=device)
    return (logits > -math.inf) & ((logits > edge) | ((logits == edge) & (ids <= last)))


def scrambled(h: int) -> int:
    """MurmurHash3's finalizer."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
    h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
    return h ^ (h >> 16)


def uniform(seed: int, position: int, token: int) -> float:
    """The hash in whole numbers, as a number in (0, 1)."""
    key = scrambled(seed % 2**32 ^ 0x9E3779B9)
    key = scrambled(key ^ (seed >> 32) % 2**32)
    key = scrambled(key ^ position % 2**32)
    bits = scrambled(key ^ scrambled(token * 0x9E3779B1 % 2**32))
    return ((bits >> 9) + 0.5) * 2.0**-23


def test_noise_is_a_hash_of_seed_position_and_token() -> None:
    seeds = [0, 1, -1, 2**31, 2**63 - 1, -(2**63), 7 + (1 << 40)]
    positions = [0, 3, 2**31, 5, 2**40, 1, 8191]
    noise = _noise.gumbel(torch.tensor(seeds), torch.tensor(positions), 70)
    want = [[uniform(s, p, t) for t in range(70)] for s, p in zip(seeds, positions, strict=True)]
    assert torch.equal(noise, -torch.log(-torch.log(torch.tensor(want))))


@triton.jit
def _uniform_kernel(seed_ptr, u_ptr, inverse_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    n = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    seed = tl.load(seed_ptr + n)
    bits = _noise.mix(_noise.row_key(seed, seed) ^ _noise.token_key(i))
    tl.store(u_ptr + n * BLOCK + i, _noise.uniform(bits))
    tl.store(inverse_ptr + n * BLOCK + i, _noise.uniform(bits ^ 0xFFFFFFFF))


@pytest.mark.parametrize("device", DEVICES)
def test_kernels_hash_as_the_definition_does(device: str) -> None:
    seeds = [0, 1, -1, 2**31, 2**63 - 1, -(2**63), 7 + (1 << 40)]
    numbers = torch.tensor(seeds, device=device)
    if runs_reference(numbers):
        pytest.skip("needs a GPU or TRITON_INTERPRET=1")
    u, inverse = torch.empty(2, len(seeds), 64, device=device)
    _uniform_kernel[(len(seeds),)](numbers, u, inverse, BLOCK=64)
    want = [[uniform(s, s, t) for t in range(64)] for s in seeds]
    assert torch.equal(u.cpu(), torch.tensor(want))
    assert torch.equal(inverse.cpu().double(), 1 - torch.tensor(want, dtype=torch.float64))


def test_noise_is_finite_where_the_hash_is_at_its_ends() -> None:
    """One in 2^23 hashes rounds to 1 if it is not cut: this range has one."""
    seeds = torch.arange(200, 240)
    assert _noise.gumbel(seeds, torch.zeros_like(seeds), 128_256).isfinite().all()


def test_noise_is_gumbel_and_uncorrelated_over_seeds_and_positions() -> None:
    seeds = torch.arange(400).repeat_interleave(5)
    noise = _noise.gumbel(seeds, torch.arange(5).repeat(400), 50).double()
    assert scipy.stats.kstest(noise.flatten()[:20_000].numpy(), "gumbel_r").pvalue > 1e-3
    for a, b in ((noise[:-1], noise[1:]), (noise[:, :-1], noise[:, 1:])):
        pair = torch.stack([a.flatten(), b.flatten()])
        assert abs(torch.corrcoef(pair)[0, 1].item()) < 0.01


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_those_of_the_noise(device: str, dtype: torch.dtype) -> None:
    """Flat rows have many rivals for the maximum, peaked ones few; huge quotients round."""
    torch.manual_seed(0)
    spread = torch.tensor([0.0, 0.1, 1.0, 4.0, 12.0], device=device).repeat(6)
    logits = (torch.randn(30, 300, device=device) * spread[:, None] - 3).to(dtype)
    temperature = torch.tensor([0.02, 0.3, 0.7, 1.0, 1.3, 9.0], device=device)
    temperature = temperature.repeat_interleave(5)
    seeds = torch.arange(30, device=device) << 33
    zero = torch.zeros(30, device=device)
    tokens, _, _, _ = sample(logits, temperature, zero.long(), zero + 1, zero, seeds, seeds.flip(0))
    noise = _noise.gumbel(seeds, seeds.flip(0), 300)
    assert torch.equal(tokens, (logits.float() / temperature[:, None] + noise).argmax(-1))


@pytest.mark.parametrize("device", DEVICES)
def test_of_equal_scores_the_lowest_id_wins(device: str) -> None:
    """Quotients near 10^7 are whole numbers, and so are the scores."""
    logits = torch.full((8, 200), 1e6, device=device)
    tokens, _, _, _ = draw(logits, temperature=0.1)
    seeds = torch.arange(8, device=device)
    scores = logits / 0.1 + _noise.gumbel(seeds, seeds + 100, 200)
    is_best = scores == scores.amax(-1, keepdim=True)
    assert is_best.sum() > 8
    assert torch.equal(tokens, is_best.int().argmax(-1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [0.8, 2.0])
def test_frequencies_match_softmax(device: str, temperature: float) -> None:
    logits = torch.linspace(-2, 2, 7, device=device)
    count = 150 if INTERPRET else 20_000
    tokens, _, _, _ = draw(logits.expand(count, -1), temperature=temperature)
    expected = (logits / temperature).softmax(-1).double().cpu()
    expected = (count * expected / expected.sum()).tolist()
    counts = torch.bincount(tokens, minlength=7).tolist()
    assert scipy.stats.chisquare(counts, expected).pvalue > 1e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_row_draws_the_same_in_any_batch(device: str, dtype: torch.dtype) -> None:
    dims = {"N": 6, "V": 700, "filters": 1}
    torch.manual_seed(0)
    args = KERNEL.make(dims, dtype, torch.device(device))
    together = sample(*args)
    order = torch.randperm(6, device=device)
    for got, want in zip(sample(*(x[order] for x in args)), together, strict=True):
        assert torch.equal(got, want[order])
    for i in range(6):
        alone = sample(*(x[i : i + 1] for x in args))
        assert all(torch.equal(a, b[i : i + 1]) for a, b in zip(alone, together, strict=True))
    wide = torch.randn(12, 720, device=device).to(dtype)
    wide[::2, :700] = args[0]
    strided = sample(wide[::2, :700], *args[1:])
    assert all(torch.equal(a, b) for a, b in zip(strided, together, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_do_not_depend_on_the_blocks(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    args = KERNEL.make({"N": 6, "V": 1100, "filters": 1}, torch.float32, torch.device(device))
    tokens, _, _, _ = sample(*args)
    monkeypatch.setattr("fastsafe_kernels._ranking.BLOCK", 256)
    for block, rows in ((1024, 1), (256, 3)):
        monkeypatch.setitem(sample.__globals__, "BLOCK", block)
        monkeypatch.setitem(sample.__globals__, "ROWS", rows)
        assert torch.equal(sample(*args)[0], tokens)


@pytest.mark.parametrize("device", DEVICES)
def test_greedy_rows_take_the_lowest_of_the_largest(device: str) -> None:
    logits = torch.zeros(4, BLOCK + 20, device=device)
    logits[0, [5, 9, BLOCK + 3]] = 2.0
    logits[1, [BLOCK + 4, BLOCK + 7]] = 2.0
    logits[2, :BLOCK] = -math.inf
    logits[3] = -logits[0]
    tokens, _, _, _ = draw(logits, temperature=0.0, top_k=3, top_p=0.5)
    assert tokens.tolist() == [5, BLOCK + 4, BLOCK, 0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("logits", "settings", "want"),
    [
        ([1, 3, 3, 3, 0], {"top_k": 2}, {1, 2}),
        ([1, 3, 3, 3, 0], {"top_k": 4}, {0, 1, 2, 3}),
        ([0, 0, 0, 0], {"top_k": 1}, {0}),
        ([2, 1], {"top_k": 5}, {0, 1}),
        ([-0.0, 0.0, -1], {"top_k": 1}, {0}),
        ([1e38, -1e38, 1e-40, -1e-40, 0], {"top_k": 3}, {0, 2, 4}),
        ([1e38, -1e38, 1e-40, -1e-40, 0], {"top_k": 4}, {0, 2, 3, 4}),
        ([-math.inf, 1, -math.inf, 0], {"top_k": 3}, {1, 3}),
        ([0] * 8, {"top_p": 0.5}, {0, 1, 2, 3}),
        ([0] * 8, {"top_p": 0.51}, {0, 1, 2, 3, 4}),
        ([0] * 8, {"top_p": 1e-6}, {0}),
        ([0] * 10, {"top_p": 0.7}, set(range(7))),
        ([-200, 5, 5, -200, 5, 5], {"top_p": 0.5}, {1, 2}),
        ([0] * 8, {"top_k": 4, "top_p": 0.5}, {0, 1}),
        ([0] * 8, {"top_k": 2, "top_p": 0.9}, {0, 1}),
        ([0, -1, -2, 0], {"min_p": 0.3}, {0, 1, 3}),
        ([0, -1, -2, 0], {"min_p": 0.3, "temperature": 2.0}, {0, 1, 2, 3}),
        ([0, -1, -2, 0], {"min_p": 0.1, "top_k": 3}, {0, 1, 3}),
        ([0, -1, -2, 0], {"min_p": 0.3, "top_k": 1}, {0}),
        ([3, 0, 2, 1], {"top_p": 0.7}, {0, 2}),  # 0.644 of the mass is not enough
        ([3, 0, 2, 1], {"top_p": 0.6}, {0}),
        ([3, 0, 2, 1], {"top_p": 0.6, "temperature": 2.0}, {0, 2}),
        ([-30, -33, -31, -32], {"top_p": 0.7, "min_p": 0.01}, {0, 2}),
        ([-math.inf] * 3, {"top_k": 1, "top_p": 0.5}, set()),
    ],
)
def test_filters_keep_what_they_should(
    logits: list[float], settings: dict[str, Any], want: set[int], device: str
) -> None:
    row = torch.tensor([logits], dtype=torch.float32, device=device)
    assert set(kept(row, **settings)[0].nonzero()[:, 0].tolist()) == want


@pytest.mark.parametrize("device", DEVICES)
def test_filters_rank_logits_and_not_quotients(device: str) -> None:
    """A division may round two logits to one number; the larger one is still the first."""
    low = torch.linspace(1, 2, 50, device=device)
    high = torch.nextafter(low, torch.tensor(3.0, device=device))
    merges = low / 3 == high / 3
    assert merges.any()
    logits = torch.stack([low, high], -1)[merges]
    assert kept(logits, temperature=3.0, top_k=1)[:, 1].all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_filters_tell_neighbouring_numbers_apart(device: str, dtype: torch.dtype) -> None:
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    step = torch.arange(5, device=device).to(bits)
    for start in (-1.0, 1.0, 0.0, 2.0**-14):
        first = torch.tensor([start], dtype=dtype, device=device).view(bits)
        logits = (first + step).view(dtype)[None]
        for k in (1, 2, 3):
            want = logits.float().topk(k).indices
            assert set(kept(logits, top_k=k)[0].nonzero()[:, 0].tolist()) == set(want[0].tolist())


@pytest.mark.parametrize("device", DEVICES)
def test_ties_are_counted_across_blocks(device: str) -> None:
    n = 2 * _ranking.BLOCK
    logits = torch.zeros(1, n, device=device)
    assert kept(logits, top_k=n - 3)[0].nonzero()[:, 0].tolist() == list(range(n - 3))
    logits[0, 1::2] = -50.0
    half = kept(logits, top_p=0.75)[0].nonzero()[:, 0].tolist()
    assert half == list(range(0, 3 * n // 4, 2))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_filters_keep_what_sorting_keeps(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(4, 500, device=device) * 3 - 1).to(dtype)
    logits[:, ::5] = logits[:, 1::5]
    for settings in (
        {"top_k": 37},
        {"top_p": 0.83, "temperature": 0.7},
        {"top_k": 90, "top_p": 0.6, "min_p": 0.01, "temperature": 1.7},
    ):
        ordered, order = logits.float().sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(500, device=device).expand(4, -1)
        keep = rank < settings.get("top_k", 500)
        p = (ordered.double() / settings.get("temperature", 1.0)).masked_fill(~keep, -math.inf)
        p = p.softmax(-1)
        keep &= (p.cumsum(-1) - p < settings.get("top_p", 2.0)) & (
            p >= settings.get("min_p", 0.0) * p[:, :1]
        )
        want = torch.zeros_like(keep).scatter(-1, order, keep)
        assert torch.equal(kept(logits, **settings), want), settings


@pytest.mark.parametrize("device", DEVICES)
def test_only_kept_tokens_are_sampled(device: str) -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3], device=device).log().expand(30, -1)
    assert set(draw(logits[:9], top_k=2)[0].tolist()) == {1, 3}
    assert set(draw(0 * logits[:9], top_k=2)[0].tolist()) == {0, 1}
    assert set(draw(logits[:9], top_k=3, top_p=0.75)[0].tolist()) == {1, 3}  # of the 0.9 left
    assert set(draw(logits)[0].tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("device", DEVICES)
def test_logprobs_are_those_before_temperature_and_filters(device: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, BLOCK + 9, device=device)
    tokens, logprobs, _, _ = draw(logits, temperature=0.5, top_k=4)
    want = logits.double().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    assert torch.allclose(logprobs.double(), want, atol=1e-5)


def test_logprobs_may_be_left_out() -> None:
    torch.manual_seed(0)
    args = KERNEL.make({"N": 6, "V": 40, "filters": 1}, torch.float32, torch.device("cpu"))
    tokens, logprobs, finite, _ = reference(*args, with_logprobs=False)
    assert logprobs.isnan().all()
    assert torch.equal(tokens, reference(*args)[0])
    assert finite.all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, when interpreted
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.5, "min_p": 0.1}],
    ids=str,
)
def test_rows_that_are_not_finite_are_told(device: str, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 50, device=device)
    logits[0, 7] = math.nan
    logits[1, 7] = math.inf
    logits[2] = -math.inf
    logits[4] = math.nan
    tokens, logprobs, finite, _ = draw(logits, **settings)
    assert finite.tolist() == [False, False, False, True, False]
    assert tokens[~finite].tolist() == [0] * 4
    assert logprobs.isnan().tolist() == [True, True, True, False, True]
    logits[[0, 1, 2, 4]] = 0.0
    again = draw(logits, **settings)
    assert again[2].all()
    assert torch.equal(again[0][3], tokens[3])
    assert torch.equal(again[1][3], logprobs[3])


@pytest.mark.parametrize("device", DEVICES)
def test_stop_ids_are_flagged(device: str) -> None:
    logits = torch.eye(5, device=device)
    stop_ids = torch.tensor([[0, -1], [3, 1], [-1, -1], [4, 2], [4, 4]], device=device)
    is_stop = draw(logits, temperature=0.0, stop_ids=stop_ids)[3]
    assert is_stop.tolist() == [True, True, False, False, True]
    assert not draw(logits, temperature=0.0)[3].any()


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows_and_one_token(device: str) -> None:
    empty = draw(torch.zeros(0, 9, device=device))
    assert [x.shape for x in empty] == [(0,)] * 4
    tokens, logprobs, finite, _ = draw(torch.full((2, 1), -3.0, device=device), top_p=0.5)
    assert tokens.tolist() == [0, 0]
    assert logprobs.tolist() == [0.0, 0.0]
    assert finite.all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"logits": torch.zeros(2, 5, dtype=torch.float64)},
            TypeError,
            "sample: logits is torch.float64, expected float32 or bfloat16 or float16",
        ),
        (
            {"logits": torch.zeros(5, 2).T},
            ValueError,
            "sample: logits has stride 2 in V, expected 1; call .contiguous()",
        ),
        (
            {"logits": torch.zeros(2, 0)},
            ValueError,
            "sample: logits is [2, 0], expected V from 1 to 4194303",
        ),
        (
            {"top_k": torch.zeros(2)},
            TypeError,
            "sample: top_k is torch.float32, expected int64 or int32",
        ),
        (
            {"seeds": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            "sample: seeds is [3], expected [N] with N=2 from logits",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    change: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    zero, ids = torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    args = {"logits": torch.zeros(2, 5), "temperature": zero, "top_k": ids, "top_p": zero + 1}
    args |= {"min_p": zero, "seeds": ids, "positions": ids}
    with pytest.raises(error) as caught:
        sample(**(args | change))
    assert str(caught.value) == message
