"""The settings of an OpenAI-compatible endpoint: address, limits, budget, and what a call holds."""

from collections.abc import Mapping
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, JsonValue
from pydantic.dataclasses import dataclass

from fastsafe.safety.completers.settings import STRICT


def _is_http(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ValueError("expected http:// or https://")
    try:
        is_whole = bool(urlsplit(url).hostname) and urlsplit(url).port != 0
    except ValueError:  # no port, or no address in its brackets
        is_whole = False
    if not is_whole:
        raise ValueError("expected a host and, behind a colon, a port")
    return url


Url = Annotated[str, AfterValidator(_is_http)]
Count = Annotated[int, Field(ge=0)]
PositiveInt = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0)]
JsonObject = Mapping[str, JsonValue]

# Keys of a call that `HttpCompleter` fills in by the row and by the other settings.
OWN_KEYS = {"model", "messages", "prompt", "temperature", "max_tokens", "max_completion_tokens"}
OWN_KEYS |= {"logprobs", "top_logprobs", "n", "stream", "chat_template_kwargs"}
OWN_KEYS |= {"add_generation_prompt", "continue_final_message"}


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
        temperature: 0 is greedy; None leaves it out.
        max_tokens_name: Key of a call that limits the reply; None leaves the limit out.
        chat_template_kwargs: Variables of the model's chat template.
        extra_body: Further keys of every call, such as ``reasoning_effort``.
    """

    url: Url
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
    temperature: Amount | None = 0.0
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] | None = "max_tokens"
    chat_template_kwargs: JsonObject | None = None
    extra_body: JsonObject | None = None

    def __post_init__(self) -> None:
        if self.max_cost and not (self.price_in or self.price_out):
            raise ValueError("max_cost is set, expected price_in and price_out with it")
        if taken := sorted(OWN_KEYS & (self.extra_body or {}).keys()):
            raise ValueError(
                f"extra_body sets {', '.join(taken)}, expected keys that fastsafe does not set"
            )
