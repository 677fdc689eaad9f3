"""Variables of a chat template that a user sets."""

from typing import Any

import pytest

from fastsafe.errors import UsageError
from fastsafe.io.template_variables import MAX_DEPTH, check_variables


def test_json_values_pass() -> None:
    given = {"enable_thinking": False, "effort": "low", "n": [1, 2.5, None], "more": {"a": {}}}
    assert check_variables(given) == given
    assert check_variables(None) == {}


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 0


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ([1], "is list"),
        ({"messages": []}, "messages is set by fastsafe itself"),
        ({"add_generation_prompt": False}, "is set by fastsafe itself"),
        ({"eos_token": "x"}, "is set by fastsafe itself"),
        ({"a b": 1}, "is no variable"),
        ({1: 1}, "is no variable"),
        ({"a": float("nan")}, "expected a value of JSON"),
        ({"a": object()}, "expected a value of JSON"),
        ({"a": {1: 2}}, "a key that is no text"),
        ({"a": 1 << 63}, "beyond 64 bits"),
        ({"a": "\ud800"}, "lone surrogate"),
        ({"a": nested(MAX_DEPTH + 1)}, "deeper than"),
        ({"a": "x" * 70_000}, "characters as JSON"),
    ],
)
def test_what_is_no_variable(variables: Any, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        check_variables(variables)
