"""Options and sampling parameters: what is in range, what a refusal says, what a result prints."""

from math import inf, nan
from typing import Any

import pytest
import torch

from fastsafe.engine.request import Completion, SamplingParams, check_options
from fastsafe.engine.sampling import RowParams, sample
from fastsafe.errors import UsageError

WHOLE_64 = "a whole number of 64 bits"
# name, values in range, values that are not, what is expected
RANGES: list[tuple[str, list[Any], list[Any], str]] = [
    ("max_tokens", [1, 2**62], [0, 1.5, "1"], "a whole number from 1"),
    ("temperature", [0, 0.5, 1e30], [-1e-9, inf, nan, "1"], "a number from 0"),
    ("top_k", [0, 1], [-1, 0.5, None], "a whole number from 0 (0 means off)"),
    ("top_p", [1e-9, 1], [0, 1 + 1e-9, 2, "x"], "a number in (0, 1]"),
    ("min_p", [0, 1 - 1e-9], [1, -1e-9, None], "a number in [0, 1)"),
    ("seed", [-(2**63), 2**64 - 1], [-(2**63) - 1, 2**64, 0.5], WHOLE_64),
    ("stop", ["a", ["a", "b"], ()], [3, [3], {"a"}], "a text or a list of texts"),
    ("stop_token_ids", [(), [3]], [3, ["3"], {3}], "a list of token ids"),
    ("logprobs", [True, False], [2, "yes", None], "True or False"),
    ("ignore_eos", [True, False], [2, "yes", None], "True or False"),
]


@pytest.mark.parametrize(("name", "good", "bad", "expected"), RANGES, ids=[r[0] for r in RANGES])
def test_ranges(name: str, good: list[Any], bad: list[Any], expected: str) -> None:
    for value in good:
        assert getattr(SamplingParams(**{name: value}), name) == value
    for value in bad:
        with pytest.raises(UsageError) as caught:
            SamplingParams(**{name: value})
        assert str(caught.value) == (
            f"SamplingParams: {name} is {value!r:.60}, expected {expected}"
        )


def test_a_stop_text_is_not_empty() -> None:
    with pytest.raises(UsageError, match=r"^SamplingParams: stop has an empty string, expected"):
        SamplingParams(stop=["a", ""])


@pytest.mark.parametrize("size", [1, 2, 256, "auto"])
def test_batch_sizes(size: Any) -> None:
    assert check_options("cpu", "float32", size) == "cpu"


@pytest.mark.parametrize("size", [0, -1, 1.0, True, "all", None])
def test_wrong_batch_sizes(size: Any) -> None:
    with pytest.raises(UsageError) as caught:
        check_options("cpu", "float32", size)
    expected = "expected a whole number from 1 or 'auto'"
    assert str(caught.value) == f"LLM: batch_size is {size!r}, {expected}"


def test_dtypes_are_those_of_the_backend() -> None:
    message = "dtype is 'float16', expected one of float32, bfloat16$"
    with pytest.raises(UsageError, match=message):
        check_options("cpu", "float16", 1, ("float32", "bfloat16"))
    assert check_options("cpu", "float16", 1) == "cpu"


def test_a_completion_prints_its_beginning() -> None:
    def completion(text: str) -> Completion:
        return Completion(
            text=text, token_ids=(5, 6), logprobs=None, finish_reason="stop", num_prompt_tokens=3
        )

    assert repr(completion("a" * 60)) == f"Completion({'a' * 60!r}, 2 tokens, 'stop')"
    assert repr(completion("a" * 61)) == f"Completion({'a' * 57 + '...'!r}, 2 tokens, 'stop')"


def test_rows_are_stacked_on_the_device() -> None:
    params = [
        SamplingParams(seed=2**64 - 1, min_p=0.25),
        SamplingParams(temperature=1e-30, top_k=3),
    ]
    rows = RowParams.stack(params, torch.device("cpu"), [{7}, {9, 4}])
    assert rows.seeds.tolist() == [-1, 0]
    assert rows.seeds.dtype == rows.top_k.dtype == rows.stop_ids.dtype == torch.int64
    assert rows.temperature.tolist() == pytest.approx([0, 1e-30])
    assert rows.temperature.dtype == rows.top_p.dtype == rows.min_p.dtype == torch.float32
    assert rows.top_k.tolist() == [0, 3]
    assert rows.top_p.tolist() == [1, 1]
    assert rows.min_p.tolist() == [0.25, 0]
    assert rows.stop_ids.tolist() == [[7, -1], [4, 9]]
    there = RowParams.stack(params, torch.device("meta"), [{7}, {9, 4}])
    assert {column.device.type for column in there} == {"meta"}
    nobody = RowParams.stack([], torch.device("cpu"), [])
    assert nobody.stop_ids.shape == (0, 0)
    assert nobody.seeds.dtype == nobody.top_k.dtype == torch.int64


def test_log_probabilities_are_computed_where_they_are_asked_for() -> None:
    rows = RowParams.stack([SamplingParams()], torch.device("cpu"), [[]])
    logits = torch.tensor([[0.0, 1.0, 3.0]])
    ids, logprobs, finite, stops = sample(logits, rows, torch.tensor([4]), True)
    assert (ids.tolist(), finite.tolist(), stops.tolist()) == ([2], [True], [False])
    assert logprobs.tolist() == pytest.approx([logits.log_softmax(-1)[0, 2].item()])
    assert sample(logits, rows, torch.tensor([4]), False)[1].tolist() != logprobs.tolist()
