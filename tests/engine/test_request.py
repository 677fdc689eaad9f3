"""Options of a model are checked, flags are flags, and a completion prints itself shortly."""

from typing import Any

import pytest

from fastsafe.engine.request import Completion, SamplingParams, check_options
from fastsafe.errors import UsageError


@pytest.mark.parametrize("batch_size", [1, 2, 4096, "auto"])
def test_batch_sizes_from_one(batch_size: Any) -> None:
    assert check_options("cpu", "float32", batch_size) == "cpu"


@pytest.mark.parametrize("batch_size", [0, -1, 1.0, 8.0, True, "8", None])
def test_other_batch_sizes_are_refused(batch_size: Any) -> None:
    message = f"batch_size is {batch_size!r}, expected a whole number from 1 or 'auto'"
    with pytest.raises(UsageError, match=message):
        check_options("cpu", "float32", batch_size)


def test_dtypes_are_those_of_the_backend() -> None:
    message = "dtype is 'float16', expected one of float32, bfloat16$"
    with pytest.raises(UsageError, match=message):
        check_options("cpu", "float16", 1, ("float32", "bfloat16"))
    assert check_options("cpu", "float16", 1) == "cpu"


@pytest.mark.parametrize("name", ["logprobs", "ignore_eos"])
def test_flags_are_true_or_false(name: str) -> None:
    assert [getattr(SamplingParams(**{name: flag}), name) for flag in (True, False)] == [
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("text", "shown"),
    [("short", "'short'"), ("x" * 60, f"'{'x' * 60}'"), ("x" * 61, f"'{'x' * 57}...'")],
)
def test_a_completion_shows_at_most_60_characters(text: str, shown: str) -> None:
    completion = Completion(
        text=text, token_ids=(5, 6, 7), logprobs=None, finish_reason="stop", num_prompt_tokens=2
    )
    assert repr(completion) == f"Completion({shown}, 3 tokens, 'stop')"
