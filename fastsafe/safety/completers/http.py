"""A completer over an OpenAI-compatible endpoint: chat, raw prompts, label log-probabilities.

Concurrency, retries, waits, the size of a reply, and a budget in calls, tokens and money are all
bounded; the budget holds across restarts. A failed call is an error of its row alone; a rejected
key ends the whole call of ``complete``. The key goes into one header and nowhere else.
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
from functools import cached_property, partial
from math import inf
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

from fastsafe.errors import JudgeError, UsageError
from fastsafe.safety.completers.endpoint import Endpoint
from fastsafe.safety.completers.ledger import Ledger, Spending
from fastsafe.safety.completers.protocol import Ask, Finish, Reply
from fastsafe.safety.completers.settings import from_mapping

if TYPE_CHECKING:
    import httpx2
    from tenacity import RetryCallState

MAX_REPLY_BYTES = 4 << 20
CHARS_PER_TOKEN = 3  # for booking alone: overestimates the tokens of English text
TOP_LOGPROBS = 20  # maximum of OpenAI's interface
MAX_SILENCES = 10  # longest reply, in timeouts: a reply that drips never times out

_FATAL = (401, 403, 404)  # statuses that concern every row
_TRANSIENT = (408, 409, 425, 429)  # and all from 500


class _FailedError(Exception):
    """A call failed for good; the message becomes the row's reply."""


class _TransientError(_FailedError):
    """A call failed and may be retried, after ``after_s`` seconds where the endpoint says so."""

    def __init__(self, cause: str, after_s: float | None = None) -> None:
        super().__init__(cause)
        self.after_s = after_s


class _SpentError(_FailedError):
    """The budget does not allow the call; the endpoint did not fail."""


class _Session(NamedTuple):
    ledger: Ledger
    client: "httpx2.Client"


class HttpCompleter:
    """Asks an endpoint; its replies are cached in a ledger, so that none is paid twice."""

    def __init__(
        self,
        target: Endpoint,
        *,
        api_key: str = "",
        folder: Path | None = None,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        """Configure the completer; nothing is written or sent before the first ask.

        Args:
            target: The endpoint and its limits.
            api_key: Sent as a bearer token; "" sends none.
            folder: Folder of the ledger; None keeps it in memory.
            sleep: Waits before a retry; None sleeps, and wakes up when a fatal error ends the call.

        Raises:
            UsageError: httpx2 or tenacity is not installed.
        """
        try:
            import httpx2  # noqa: F401
            import tenacity  # noqa: F401
        except ImportError as error:
            raise UsageError(
                f"endpoint {target.url}: {error.name} is missing; run `pip install '.[judge]'` in "
                "the clone of fastsafe"
            ) from error
        self.target = target
        self._api_key = api_key
        self._folder = folder
        self._stop = threading.Event()
        self._sleep = sleep or self._interruptible_sleep
        self._account = f"{target.url} {target.model}"
        self._down = ""  # reason why no further call is sent
        self._failures = 0  # consecutive
        self._lock = threading.Lock()

    @property
    def ledger(self) -> Ledger:
        """Replies and spending."""
        return self._session.ledger

    @cached_property
    def _session(self) -> _Session:
        import httpx2

        # no proxies or certificates from the environment, no redirects: the address is the user's
        client = httpx2.Client(
            timeout=self.target.timeout_s,
            trust_env=False,
            follow_redirects=False,
            headers={"Authorization": f"Bearer {self._api_key}"} if self._api_key else {},
            limits=httpx2.Limits(max_connections=self.target.concurrency),
        )
        return _Session(Ledger(self._folder), client)

    @property
    def identity(self) -> str:
        """Return the sha256 of address, model and decoding, without keys, limits and prices."""
        parts = ["http", self.target.url, self.target.model, self.target.temperature]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def close(self) -> None:
        """Close connections and ledger, where they were opened."""
        if "_session" in vars(self):
            self._session.client.close()
            self._session.ledger.close()

    def complete(self, asks: Sequence[Ask]) -> list[Reply]:
        """Answer every ask; equal asks are sent once.

        Raises:
            JudgeError: The endpoint rejects the key or has no such model or path.
            StoreError: The ledger cannot be written.
        """
        keys = [self._key(ask) for ask in asks]
        unique = dict(zip(keys, asks, strict=True))
        answer = partial(self._answer, self._session)  # one session for all threads
        pool = ThreadPoolExecutor(self.target.concurrency)
        try:
            replies = dict(zip(unique, pool.map(answer, unique, unique.values()), strict=True))
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

    def _answer(self, session: _Session, key: str, ask: Ask) -> Reply:
        """Answer one ask from the ledger or the endpoint; a failure is a reply."""
        if cached := session.ledger.reply(key):
            text, logprobs, finish = cached
            odds = tuple(-inf if p is None else p for p in json.loads(logprobs))
            return Reply(key=key, text=text, logprobs=odds, finish=finish)  # type: ignore[arg-type]
        try:
            reply = self._post_with_retries(session, ask)
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
        session.ledger.keep(key, reply.text, odds_json, reply.finish)
        return reply

    def _post_with_retries(self, session: _Session, ask: Ask) -> Reply:
        from tenacity import Retrying, retry_if_exception_type, stop_after_attempt

        retrying = Retrying(
            retry=retry_if_exception_type(_TransientError),
            stop=stop_after_attempt(1 + self.target.max_retries),
            wait=self._wait,
            sleep=self._sleep,
            reraise=True,
        )
        reply: Reply = retrying(self._post, session, ask)
        return reply

    def _interruptible_sleep(self, seconds: float) -> None:
        self._stop.wait(seconds)

    def _wait(self, state: "RetryCallState") -> float:
        """Return the seconds before a retry: as the endpoint says, else 1, 2, 4... with jitter."""
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, _TransientError) and error.after_s is not None:
            return error.after_s
        longest = min(self.target.max_wait_s, 2.0 ** (state.attempt_number - 1))
        return longest * random.uniform(0.5, 1)

    def _post(self, session: _Session, ask: Ask) -> Reply:
        import httpx2

        if self._down:
            raise _FailedError(self._down)
        body = self._body(ask)
        booked = self._cost(len(json.dumps(body)) // CHARS_PER_TOKEN, body["max_tokens"])
        limits = Spending(self.target.max_calls, self.target.max_tokens, self.target.max_cost)
        if exceeded := session.ledger.book(self._account, booked, limits):
            limit = getattr(limits, exceeded)
            raise _SpentError(f"budget: max_{exceeded} is {limit}, spent; raise it to go on")
        try:
            url = self.target.url.rstrip("/") + self._path(ask)
            longest = MAX_SILENCES * self.target.timeout_s
            deadline = monotonic() + longest
            with session.client.stream("POST", url, json=body) as response:
                data = b""
                for chunk in response.iter_bytes():
                    data += chunk
                    if monotonic() > deadline:
                        raise _TransientError(f"endpoint: reply took over {longest:.0f} s")
                    if len(data) > MAX_REPLY_BYTES:
                        raise _FailedError(f"endpoint: reply has over {MAX_REPLY_BYTES} bytes")
        except httpx2.HTTPError as error:
            raise _TransientError(f"endpoint: {type(error).__name__}") from error
        self._check_status(response)
        answer = _parsed(data)
        usage = answer.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        used = [
            count
            for name in ("prompt_tokens", "completion_tokens")
            if type(count := usage.get(name)) is int and count >= 0
        ]
        if len(used) == 2:
            session.ledger.settle(self._account, booked, self._cost(*used))
        return _reply(answer, ask)

    def _cost(self, tokens_in: int, tokens_out: int) -> Spending:
        cost = (tokens_in * self.target.price_in + tokens_out * self.target.price_out) / 1e6
        return Spending(1, tokens_in + tokens_out, cost)

    def _check_status(self, response: "httpx2.Response") -> None:
        status = response.status_code
        if status == 200:
            return
        cause = f"endpoint: status {status}"
        if status in _FATAL or status // 100 == 3:
            raise JudgeError(
                f"endpoint {self.target.url}: status is {status} for model {self.target.model!r}, "
                "expected 200; check the address, the model's name and the key"
            )
        if status not in _TRANSIENT and status < 500:
            raise _FailedError(cause)
        after_s = _retry_after(response.headers)
        if after_s is not None and after_s > self.target.max_wait_s:
            raise _FailedError(f"{cause}, and it asks to wait {after_s:.0f} s")
        raise _TransientError(cause, after_s)


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
    """Return the seconds of a ``Retry-After`` header, which may hold a date; None without it."""
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
        date = parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(data)
        answer["choices"][0]
    except (ValueError, RecursionError, KeyError, IndexError, TypeError) as error:
        raise _TransientError("endpoint: reply is not a completion in JSON") from error
    return answer  # type: ignore[no-any-return]


def _reply(answer: Mapping[str, Any], ask: Ask) -> Reply:
    """Read the first choice; missing parts stay empty, which no judge can read as a verdict."""
    choice = answer["choices"][0]
    choice = choice if isinstance(choice, dict) else {}
    message = choice.get("message") if ask.messages else choice
    message = message if isinstance(message, dict) else {}
    text = message.get("content" if ask.messages else "text")
    finish: Finish = "length" if choice.get("finish_reason") == "length" else "stop"
    refusal = message.get("refusal")
    if refusal or choice.get("finish_reason") == "content_filter":
        words = refusal if isinstance(refusal, str) else text
        return Reply(key=ask.key, text=words if isinstance(words, str) else "", finish="refused")
    text = text if isinstance(text, str) else ""
    if not ask.labels:
        return Reply(key=ask.key, text=text, finish=finish)
    logprobs = _first_logprobs(choice.get("logprobs"))
    odds = tuple(logprobs.get(label, -inf) for label in ask.labels)
    return Reply(key=ask.key, logprobs=odds, finish=finish)


def _first_logprobs(logprobs: Any) -> dict[str, float]:
    """Return the log-probabilities at the first position by token text, outer spaces stripped."""
    try:
        if "content" in logprobs:
            pairs = [
                (top["token"], top["logprob"]) for top in logprobs["content"][0]["top_logprobs"]
            ]
        else:
            pairs = list(logprobs["top_logprobs"][0].items())
        best: dict[str, float] = {}
        for token, logprob in pairs:
            best[token.strip()] = max(float(logprob), best.get(token.strip(), -inf))
        return best
    except (TypeError, KeyError, IndexError, AttributeError, ValueError):
        return {}
