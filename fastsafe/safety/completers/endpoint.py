"""The settings of an OpenAI-compatible endpoint: address, limits, budget."""

from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from fastsafe.safety.completers.settings import STRICT


def _is_http(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ValueError("expected http:// or https://")
    return url


Url = Annotated[str, AfterValidator(_is_http)]
Count = Annotated[int, Field(ge=0)]
PositiveInt = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Endpoint:
    """An endpoint's address, its limits and its budget.

    Attributes:
        url: Base address before ``/chat/completions``, such as ``https://host/v1``.
        model: Name of the model there.
        api_key_env: Environment variable that the command line reads the key from; "" sends none.
        concurrency: Concurrent calls.
        timeout_s: Longest silence of the endpoint.
        max_retries: Retries of a call after a transient failure.
        max_wait_s: Longest wait before a retry; an endpoint that asks for longer has failed.
        max_failures: Consecutive failed rows after which the endpoint counts as down.
        max_calls, max_tokens, max_cost: Budget of all runs that share a folder; 0 is no limit.
        price_in, price_out: Price of a million tokens of the prompt and of the reply.
        temperature: 0 is greedy.
    """

    url: Annotated[str, AfterValidator(_is_http)]
    model: Annotated[str, Field(min_length=1)]
    api_key_env: str = ""
    concurrency: PositiveInt = 8
    timeout_s: Amount = 60.0
    max_retries: Count = 5
    max_wait_s: Amount = 60.0
    max_failures: PositiveInt = 8
    max_calls: Count = 0
    max_tokens: Count = 0
    max_cost: Amount = 0.0
    price_in: Amount = 0.0
    price_out: Amount = 0.0
    temperature: Amount = 0.0

    def __post_init__(self) -> None:
        if self.max_cost and not (self.price_in or self.price_out):
            raise ValueError("max_cost is set, expected price_in and price_out with it")
