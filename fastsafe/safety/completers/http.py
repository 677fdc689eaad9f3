"""A completer over any OpenAI-compatible endpoint: chat, raw prompts, and odds of labels.

Bounded: calls at once, retries, waits, reply size, and a budget in calls, tokens and money that
holds across restarts. A row that cannot be had is an error of that row; a refused key stops
everything at once. The key goes into one header and nowhere else.
"""

import hashlib
import json
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from math import inf
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from fastsafe.errors import JudgeError, UsageError
from fastsafe.safety.completers.endpoint import Endpoint
from fastsafe.safety.completers.ledger import Ledger, Spending
from fastsafe.safety.completers.protocol import Ask, Finish, Reply
from fastsafe.safety.completers.settings import from_mapping

if TYPE_CHECKING:
    import httpx
    from tenacity import RetryCallState

MAX_REPLY_BYTES = 4 << 20
CHARS_PER_TOKEN = 3  # for booking alone: more tokens than English text has
TOP_LOGPROBS = 20  # the most that OpenAI's interface gives
MAX_SILENCES = 10  # longest reply, in time limits: one that drips never falls silent

_STOPS_ALL = (401, 403, 404)
_PASSING = (408, 409, 425, 429)


class _FailedError(Exception):
    """One call failed for good; the message is the row's."""


class _PassingError(_FailedError):
    """One call failed and may be tried again, after ``after_s`` seconds where they are given."""

    def __init__(self, cause: str, after_s: float | None = None) -> None:
        super().__init__(cause)
        self.after_s = after_s


class _SpentError(_FailedError):
    """The budget does not allow the call; it says nothing of the endpoint."""


class HttpCompleter:
    """Asks an endpoint; replies are kept, so that what was answered once is never paid twice."""

    def __init__(
        self,
        target: Endpoint,
        *,
        api_key: str = "",
        folder: Path | None = None,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        """Remember the address; nothing is written or sent before the first ask.

        Args:
            target: The endpoint and its limits.
            api_key: Sent as a bearer token; "" sends none.
            folder: Where replies and spending are kept; None keeps them in memory.
            sleep: Waits before a retry; None sleeps, and wakes up when everything is stopped.

        Raises:
            UsageError: httpx or tenacity is not installed.
        """
        try:
            import httpx  # noqa: F401
            import tenacity  # noqa: F401
        except ImportError as error:
            raise UsageError(
                f"endpoint {target.url}: {error.name} is missing; pip install 'fastsafe[judge]'"
            ) from error
        self.target = target
        self._api_key = api_key
        self._folder = folder
        self._stop = threading.Event()
        self._sleep = sleep or self._rest
        self._account = f"{target.url} {target.model}"
        self._down = ""  # why nothing more is sent
        self._failures = 0
        self._lock = threading.Lock()

    @cached_property
    def ledger(self) -> Ledger:
        """Replies and spending."""
        return Ledger(self._folder)

    @cached_property
    def _client(self) -> "httpx.Client":
        import httpx

        # no proxies or certificates from the environment, no redirects: the address is the user's
        return httpx.Client(
            timeout=self.target.timeout_s,
            trust_env=False,
            follow_redirects=False,
            headers={"Authorization": f"Bearer {self._api_key}"} if self._api_key else {},
            limits=httpx.Limits(max_connections=self.target.concurrency),
        )

    @property
    def identity(self) -> str:
        """sha256 of address, model and decoding; keys, limits and prices are no part of it."""
        parts = ["http", self.target.url, self.target.model, self.target.temperature]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def close(self) -> None:
        """Close connections and ledger, where they were opened."""
        for part in ("_client", "ledger"):
            if part in vars(self):
                getattr(self, part).close()

    def complete(self, asks: Sequence[Ask]) -> list[Reply]:
        """Answer every ask; equal questions are sent once.

        Raises:
            JudgeError: The endpoint refuses the key or knows no such model or path.
            StoreError: The ledger cannot be written.
        """
        keys = [self._key(ask) for ask in asks]
        unique = dict(zip(keys, asks, strict=True))
        _ = self.ledger, self._client  # made once, before the threads
        pool = ThreadPoolExecutor(self.target.concurrency)
        try:
            replies = dict(zip(unique, pool.map(self._one, unique, unique.values()), strict=True))
        except BaseException as error:
            self._down = self._down or type(error).__name__
            self._stop.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        return [replace(replies[key], key=ask.key) for key, ask in zip(keys, asks, strict=True)]

    def _key(self, ask: Ask) -> str:
        parts = [self.identity, self._path(ask), self._body(ask), ask.labels, ask.attempt]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @staticmethod
    def _path(ask: Ask) -> str:
        return "/chat/completions" if ask.messages else "/completions"

    def _body(self, ask: Ask) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.target.model,
            "temperature": self.target.temperature,
            "max_tokens": 1 if ask.labels else ask.max_tokens,
        }
        if not ask.messages:
            return (
                body | {"prompt": ask.prompt} | ({"logprobs": TOP_LOGPROBS} if ask.labels else {})
            )
        body["messages"] = [dict(message) for message in ask.messages]
        if ask.prompt:
            body["messages"].append({"role": "assistant", "content": ask.prompt})
            body |= {"add_generation_prompt": False, "continue_final_message": True}
        if ask.labels:
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        return body | ({"chat_template_kwargs": dict(ask.variables)} if ask.variables else {})

    def _one(self, key: str, ask: Ask) -> Reply:
        """Answer one ask from the ledger or the endpoint; a failure is a reply."""
        if kept := self.ledger.reply(key):
            text, logprobs, finish = kept
            odds = tuple(-inf if p is None else p for p in json.loads(logprobs))
            return Reply(key=key, text=text, logprobs=odds, finish=finish)  # type: ignore[arg-type]
        try:
            reply = self._ask_with_retries(ask)
        except _FailedError as error:
            with self._lock:
                self._failures += not isinstance(error, _SpentError)
                if self._failures >= self.target.max_failures and not self._down:
                    self._down = f"endpoint {self.target.url} is down: {error}"
            return Reply(key=key, text=str(error), finish="error")
        except JudgeError as error:
            self._down = str(error)
            raise
        with self._lock:
            self._failures = 0
        odds_json = json.dumps([p if p > -inf else None for p in reply.logprobs])
        self.ledger.keep(key, reply.text, odds_json, reply.finish)
        return reply

    def _ask_with_retries(self, ask: Ask) -> Reply:
        from tenacity import Retrying, retry_if_exception_type, stop_after_attempt

        retrying = Retrying(
            retry=retry_if_exception_type(_PassingError),
            stop=stop_after_attempt(1 + self.target.max_retries),
            wait=self._wait,
            sleep=self._sleep,
            reraise=True,
        )
        reply: Reply = retrying(self._post, ask)
        return reply

    def _rest(self, seconds: float) -> None:
        self._stop.wait(seconds)

    def _wait(self, state: "RetryCallState") -> float:
        """Seconds before the next try: what the endpoint asks for, else 1, 2, 4... with jitter."""
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, _PassingError) and error.after_s is not None:
            return error.after_s
        most = min(self.target.max_wait_s, 2.0 ** (state.attempt_number - 1))
        return most * random.uniform(0.5, 1)

    def _post(self, ask: Ask) -> Reply:
        import httpx

        if self._down:
            raise _FailedError(self._down)
        body = self._body(ask)
        booked = self._cost(len(json.dumps(body)) // CHARS_PER_TOKEN, body["max_tokens"])
        limits = Spending(self.target.max_calls, self.target.max_tokens, self.target.max_cost)
        if passed := self.ledger.book(self._account, booked, limits):
            limit = getattr(limits, passed)
            raise _SpentError(f"budget: max_{passed} is {limit}, spent; raise it to go on")
        try:
            url = self.target.url.rstrip("/") + self._path(ask)
            last = monotonic() + MAX_SILENCES * self.target.timeout_s
            with self._client.stream("POST", url, json=body) as response:
                data = b""
                for piece in response.iter_bytes():
                    data += piece
                    if monotonic() > last:
                        took = MAX_SILENCES * self.target.timeout_s
                        raise _PassingError(f"endpoint: reply took over {took:.0f} s")
                    if len(data) > MAX_REPLY_BYTES:
                        raise _FailedError(f"endpoint: reply has over {MAX_REPLY_BYTES} bytes")
        except httpx.HTTPError as error:
            raise _PassingError(f"endpoint: {type(error).__name__}") from error
        self._check(response)
        answer = _parsed(data)
        usage = answer.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        used = [
            count
            for name in ("prompt_tokens", "completion_tokens")
            if type(count := usage.get(name)) is int and count >= 0
        ]
        if len(used) == 2:
            self.ledger.settle(self._account, booked, self._cost(*used))
        return _reply(answer, ask)

    def _cost(self, tokens_in: int, tokens_out: int) -> Spending:
        cost = (tokens_in * self.target.price_in + tokens_out * self.target.price_out) / 1e6
        return Spending(1, tokens_in + tokens_out, cost)

    def _check(self, response: "httpx.Response") -> None:
        status = response.status_code
        if status == 200:
            return
        cause = f"endpoint: status {status}"
        if status in _STOPS_ALL or status // 100 == 3:
            raise JudgeError(
                f"endpoint {self.target.url}: status is {status} for model {self.target.model!r}, "
                "expected 200; check the address, the model's name and the key"
            )
        if status not in _PASSING and status < 500:
            raise _FailedError(cause)
        after_s = _retry_after(response.headers)
        if after_s is not None and after_s > self.target.max_wait_s:
            raise _FailedError(f"{cause}, and it asks to wait {after_s:.0f} s")
        raise _PassingError(cause, after_s)


def open_endpoint(
    spec: Any, location: str, api_keys: Mapping[str, str] | None, folder: Path | None
) -> HttpCompleter:
    """Return the completer of a recipe's mapping.

    Args:
        spec: The keys of `Endpoint`.
        location: Names the mapping in errors, e.g. "judge harmbench".
        api_keys: Environment variable -> the key that it holds.
        folder: As `HttpCompleter` takes it.

    Raises:
        UsageError: The mapping does not check, or the variable that it names holds no key.
    """
    endpoint = from_mapping(Endpoint, spec, f"{location}: endpoint")
    key = (api_keys or {}).get(endpoint.api_key_env, "")
    if endpoint.api_key_env and not key:
        raise UsageError(
            f"{location}: {endpoint.api_key_env} holds no key, expected the endpoint's"
        )
    return HttpCompleter(endpoint, api_key=key, folder=folder)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that ``Retry-After`` asks for, given in seconds or as a date; None without it."""
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    until = _date(value)
    if until is None:
        return None
    # by the endpoint's own clock where it tells the time
    now = _date(headers.get("date", "")) or datetime.now(UTC)
    return max(0.0, (until - now).total_seconds())


def _date(value: str) -> datetime | None:
    try:
        found = parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(data)
        answer["choices"][0]
    except (ValueError, RecursionError, KeyError, IndexError, TypeError) as error:
        raise _PassingError("endpoint: reply is not a completion in JSON") from error
    return answer  # type: ignore[no-any-return]


def _reply(answer: Mapping[str, Any], ask: Ask) -> Reply:
    """Read the first choice; what it lacks stays empty, which no judge can read as a verdict."""
    choice = answer["choices"][0]
    choice = choice if isinstance(choice, dict) else {}
    message = choice.get("message") if ask.messages else choice
    message = message if isinstance(message, dict) else {}
    text = message.get("content" if ask.messages else "text")
    finish: Finish = "length" if choice.get("finish_reason") == "length" else "stop"
    declined = message.get("refusal")
    if declined or choice.get("finish_reason") == "content_filter":
        said = declined if isinstance(declined, str) else text
        return Reply(key=ask.key, text=said if isinstance(said, str) else "", finish="refused")
    text = text if isinstance(text, str) else ""
    if not ask.labels:
        return Reply(key=ask.key, text=text, finish=finish)
    listed = _listed(choice.get("logprobs"))
    odds = tuple(listed.get(label, -inf) for label in ask.labels)
    return Reply(key=ask.key, logprobs=odds, finish=finish)


def _listed(logprobs: Any) -> dict[str, float]:
    """Token text, outer spaces aside, -> its log-probability at the first position."""
    try:
        if "content" in logprobs:
            pairs = [
                (top["token"], top["logprob"]) for top in logprobs["content"][0]["top_logprobs"]
            ]
        else:
            pairs = list(logprobs["top_logprobs"][0].items())
        found: dict[str, float] = {}
        for token, logprob in pairs:
            found[token.strip()] = max(float(logprob), found.get(token.strip(), -inf))
        return found
    except (TypeError, KeyError, IndexError, AttributeError, ValueError):
        return {}
