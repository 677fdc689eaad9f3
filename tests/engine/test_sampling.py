"""Sampling parameters reach the op: frequencies, filters, greedy rows beside sampled ones."""

from typing import Any

import pytest
import scipy.stats
import torch

from fastsafe.engine.request import SamplingParams
from fastsafe.engine.sampling import RowParams, sample
from fastsafe.errors import UsageError


def draw(logits: torch.Tensor, count: int, **options: float) -> torch.Tensor:
    params = [SamplingParams(**({"temperature": 1.0, "seed": i} | options)) for i in range(count)]
    rows = RowParams.stack(params, logits.device, [()] * len(params))
    return sample(logits.expand(count, -1), rows, torch.arange(count), False)[0]


def frequencies(tokens: torch.Tensor, size: int) -> list[int]:
    return torch.bincount(tokens, minlength=size).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_match_softmax(temperature: float) -> None:
    logits = torch.linspace(-2, 2, 11)
    counts = frequencies(draw(logits, 20_000, temperature=temperature), 11)
    expected = (logits / temperature).softmax(-1).double()
    expected = (20_000 * expected / expected.sum()).tolist()
    assert scipy.stats.chisquare(counts, expected).pvalue > 1e-3


def test_filters_keep_what_they_should() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    assert set(draw(logits, 500, top_k=2).tolist()) == {1, 3}
    assert set(draw(logits, 500, top_p=0.5).tolist()) == {1, 3}  # 0.4 alone is too little
    assert set(draw(logits, 500, top_p=0.4).tolist()) == {1}
    assert set(draw(logits, 500, min_p=0.6).tolist()) == {1, 3}
    assert set(draw(logits, 500, top_k=3, top_p=0.75).tolist()) == {1, 3}  # of the 0.9 left
    assert set(draw(logits, 500, top_k=1).tolist()) == {1}
    assert set(draw(logits, 2000).tolist()) == {0, 1, 2, 3}


def test_filters_match_transformers() -> None:
    warpers = pytest.importorskip("transformers.generation.logits_process")
    torch.manual_seed(0)
    logits = 3 * torch.randn(64, 50)
    params = SamplingParams(temperature=0.7, top_k=20, top_p=0.8, min_p=0.05)
    want = logits
    for warper in (
        warpers.TemperatureLogitsWarper(0.7),
        warpers.TopKLogitsWarper(20),
        warpers.TopPLogitsWarper(0.8),
        warpers.MinPLogitsWarper(0.05),
    ):
        want = warper(None, want)
    # a token survives here when some noise lets it win
    rows = RowParams.stack([params] * 64, logits.device, [()] * 64)
    sampled = torch.zeros(64, 50, dtype=torch.bool)
    for seed in range(300):
        seeded = rows._replace(seeds=torch.full((64,), seed))
        sampled[torch.arange(64), sample(logits, seeded, torch.arange(64), True)[0]] = True
    kept = want.isfinite()
    assert not (sampled & ~kept).any()
    likely = want.softmax(-1) > 0.03
    assert sampled[likely].all()


def test_temperature_zero_is_argmax_beside_sampled_rows() -> None:
    logits = torch.randn(4, 30)
    params = [SamplingParams(temperature=t) for t in (0.0, 1.0, 0.0, 3.0)]
    rows = RowParams.stack(params, logits.device, [()] * len(params))
    chosen, _, _, _ = sample(logits, rows, torch.zeros(4, dtype=torch.long), True)
    assert chosen[[0, 2]].tolist() == logits.argmax(-1)[[0, 2]].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0, expected a whole number from 1"),
        ({"max_tokens": "5"}, "max_tokens is '5'"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5"),
        ({"temperature": -1.0}, "temperature is -1.0, expected a number from 0$"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": None}, "temperature is None"),
        ({"top_p": 0.0}, r"top_p is 0.0, expected a number in \(0, 1\]"),
        ({"top_k": -1}, r"top_k is -1, expected a whole number from 0 \(0 means off\)$"),
        ({"top_k": 2**70}, "top_k is 1180591620717411303424"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": 1.0}, r"min_p is 1.0, expected a number in \[0, 1\)$"),
        ({"seed": 1.5}, "seed is 1.5, expected a whole number of 64 bits"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"seed": -(2**63) - 1}, "seed is -9223372036854775809"),
        ({"stop": ["a", ""]}, "stop has an empty string"),
        ({"stop": None}, "stop is None, expected a text or a list of texts"),
        ({"stop": [5]}, r"stop is \[5\]"),
        ({"stop_token_ids": 5}, "stop_token_ids is 5, expected a list of token ids"),
        ({"stop_token_ids": ["a"]}, r"stop_token_ids is \['a'\]"),
        ({"logprobs": 5}, "logprobs is 5, expected True or False"),
        ({"ignore_eos": None}, "ignore_eos is None, expected True or False$"),
    ],
)
def test_wrong_parameters(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SamplingParams(**options)


@pytest.mark.parametrize("temperature", [1e-45, 1e-40, 1e-37, 1e-30, 1e-12])
def test_the_coldest_temperatures_are_greedy(temperature: float) -> None:
    logits = torch.tensor([-40.0, 39.999, 40.0, 3.0])
    assert set(draw(logits, 20, temperature=temperature).tolist()) == {2}


@pytest.mark.parametrize("temperature", [1e-3, 1e-4, 1e-6])
def test_very_cold_temperatures_are_sampled(temperature: float) -> None:
    """Logits that are close on the scale of the temperature keep their odds."""
    odds = torch.tensor([0.2, 0.5, 0.3])
    logits = temperature * odds.log()
    counts = frequencies(draw(logits, 5_000, temperature=temperature), 3)
    assert scipy.stats.chisquare(counts, (5_000 * odds).tolist()).pvalue > 1e-3


def test_whole_numbers_are_settings_too() -> None:
    whole, fractional = (
        SamplingParams(temperature=1, top_p=1, min_p=0),
        SamplingParams(temperature=1.0),
    )
    device, logits = torch.device("cpu"), torch.linspace(0, 1, 5)[None]
    drawn = [
        sample(logits, RowParams.stack([p], device, [()]), torch.zeros(1, dtype=torch.long), True)
        for p in (whole, fractional)
    ]
    assert [column.tolist() for column in drawn[0]] == [column.tolist() for column in drawn[1]]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_columns_have_their_types_on_the_device_of_the_model(count: int) -> None:
    params = [SamplingParams(stop_token_ids=[4])] * count
    rows = RowParams.stack(params, torch.device("meta"), [{4}] * count)
    dtypes = [torch.int64, torch.float32, torch.int64, torch.float32, torch.float32, torch.int64]
    assert [column.dtype for column in rows] == dtypes
    assert {column.device.type for column in rows} == {"meta"}
    assert [tuple(column.shape) for column in rows] == [*[(count,)] * 5, (count, min(count, 1))]


def test_the_lowest_temperature_is_still_sampled() -> None:
    params = [SamplingParams(temperature=t) for t in (0.0, 0.9e-30, 1e-30, 0.7)]
    rows = RowParams.stack(params, torch.device("cpu"), [()] * 4)
    assert rows.temperature.tolist() == torch.tensor([0.0, 0.0, 1e-30, 0.7]).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_log_probabilities_are_computed_on_demand(temperature: float) -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    rows = RowParams.stack([SamplingParams(temperature=temperature)], logits.device, [()])
    without, with_them = (
        sample(logits, rows, torch.zeros(1, dtype=torch.long), wanted) for wanted in (False, True)
    )
    assert without[0].tolist() == with_them[0].tolist()
    assert without[1].isnan().all()
    assert with_them[1].item() == pytest.approx(logits.log_softmax(-1)[0, with_them[0]].item())


def test_seeds_of_64_bits_are_kept_as_signed_numbers() -> None:
    given = [-(2**63), -1, 0, 5, 2**63 - 1, 2**63, 2**64 - 1]
    params = [SamplingParams(seed=seed) for seed in given]
    rows = RowParams.stack(params, torch.device("cpu"), [()] * len(given))
    assert rows.seeds.tolist() == [-(2**63), -1, 0, 5, 2**63 - 1, -(2**63), -1]
    assert rows.seeds.dtype == torch.int64


def test_stop_ids_are_flagged() -> None:
    logits = torch.eye(4)[[1, 2, 3]]
    rows = RowParams.stack([SamplingParams()] * 3, logits.device, [{1, 0}, {3}, ()])
    assert rows.stop_ids.tolist() == [[0, 1], [3, -1], [-1, -1]]
    tokens, _, _, is_stop = sample(logits, rows, torch.zeros(3, dtype=torch.long), True)
    assert tokens.tolist() == [1, 2, 3]
    assert is_stop.tolist() == [True, False, False]
