"""An OpenAI-compatible endpoint as a recipe describes it: address, limits, budget."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any

from fastsafe.errors import UsageError, nearest


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a model answers, how hard it may be asked, and what it may cost.

    Attributes:
        url: Base address before ``/chat/completions``, such as ``https://host/v1``.
        model: Its name there.
        api_key_env: Environment variable that the command line reads the key from; "" sends none.
        concurrency: Calls under way at once.
        timeout_s: Longest silence of the endpoint.
        max_retries: Further tries of a call that failed in passing.
        max_wait_s: Longest wait before a try; an endpoint that asks for longer has failed.
        max_failures: Rows that fail in a row before the endpoint counts as down.
        max_calls, max_tokens, max_cost: Budget of all runs that share a folder; 0 is no limit.
        price_in, price_out: Money per million tokens of the prompt and of the reply.
        temperature: 0 is greedy.
    """

    url: str
    model: str
    api_key_env: str = ""
    concurrency: int = 8
    timeout_s: float = 60.0
    max_retries: int = 5
    max_wait_s: float = 60.0
    max_failures: int = 8
    max_calls: int = 0
    max_tokens: int = 0
    max_cost: float = 0.0
    price_in: float = 0.0
    price_out: float = 0.0
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise UsageError(f"endpoint: url is {self.url!r}, expected http:// or https://")
        for name in ("concurrency", "max_failures"):
            if getattr(self, name) < 1:
                raise UsageError(f"endpoint: {name} is {getattr(self, name)}, expected at least 1")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in (int, float) and not (isfinite(value) and value >= 0):
                raise UsageError(f"endpoint: {field.name} is {value}, expected at least 0")
        if self.max_cost and not (self.price_in or self.price_out):
            raise UsageError("endpoint: max_cost is set, expected price_in and price_out with it")


def endpoint(spec: Any, where: str) -> Endpoint:
    """Build an `Endpoint` from a recipe's mapping.

    Raises:
        UsageError: A key is unknown or missing, or a value has a wrong type or range.
    """
    if not isinstance(spec, Mapping):
        raise UsageError(f"{where}: endpoint is {type(spec).__name__}, expected a mapping")
    known = {field.name: field for field in fields(Endpoint)}
    values: dict[str, Any] = {}
    for key, value in spec.items():
        if key not in known:
            raise UsageError(f"{where}: endpoint has no key {key!r}; {nearest(str(key), known)}")
        wanted: Any = known[key].type
        value = float(value) if wanted is float and type(value) is int else value
        if type(value) is not wanted:
            raise UsageError(f"{where}: endpoint.{key} is {value!r}, expected {wanted.__name__}")
        values[key] = value
    for key in ("url", "model"):
        if not values.get(key):
            raise UsageError(f"{where}: endpoint.{key} is missing, expected a text")
    return Endpoint(**values)
