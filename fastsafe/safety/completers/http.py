"""A completer over an OpenAI-compatible endpoint: chat, raw prompts, label log-probabilities.

Concurrency, retries, waits, the time and size of a reply, and a budget in calls, tokens and money
are all bounded; the budget holds across restarts. A failed call is an error of its row alone; a
rejected key ends the whole call of ``complete``. The key goes into one header and nowhere else.

Calls run in an event loop, where one deadline can bound a whole exchange: sockets alone bound each
read, which a server that drips headers, hints or bytes never exceeds.
"""

import asyncio
import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsafe.errors import JudgeError, UsageError
from fastsafe.safety.completers import openai_reply
from fastsafe.safety.completers.endpoint import Endpoint
from fastsafe.safety.completers.ledger import Ledger, Spending
from fastsafe.safety.completers.protocol import Ask, Reply
from fastsafe.safety.completers.settings import from_mapping

if TYPE_CHECKING:
    import httpx2
    from tenacity import RetryCallState

MAX_REPLY_BYTES = 4 << 20
CHARS_PER_TOKEN = 3  # for booking alone: overestimates the tokens of English text
TOP_LOGPROBS = 20  # maximum of OpenAI's interface
MAX_SILENCES = 10  # longest exchange, in timeouts

# Statuses that concern every row -> what to do.
_FATAL = {
    401: "check the key",
    402: "the account there has no credit",
    403: "check what the key may do there",
    404: "check the address and the model's name",
    405: "check the address, which ends before /chat/completions",
}
_TRANSIENT = (408, 409, 425, 429)  # and all from 500


class _FailedError(Exception):
    """A call failed for good; the message becomes the row's reply."""


class _TransientError(_FailedError):
    """A call failed and may be retried, after ``after_s`` seconds where the endpoint says so."""

    def __init__(self, cause: str, after_s: float | None = None) -> None:
        super().__init__(cause)
        self.after_s = after_s


class _RowError(_FailedError):
    """A call is not made or not answered for a reason that is no outage of the endpoint."""


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
            sleep: Waits before a retry; None lets other calls go on meanwhile.

        Raises:
            UsageError: httpx2 or tenacity is not installed, or no header can hold the key.
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
        self._api_key = api_key.strip()  # no header can begin or end with a space
        if not all("!" <= c <= "~" for c in self._api_key):
            name = f" in {target.api_key_env}" if target.api_key_env else ""
            raise UsageError(
                f"endpoint {target.url}: the key{name} has a character that no header can hold, "
                "expected printable ASCII without spaces; copy the key again"
            )
        self._folder = folder
        self._sleep = sleep
        self._account = f"{target.url} {target.model}"
        self._down = ""  # reason why no further call is sent
        self._fatal: JudgeError | None = None
        self._failures, self._has_answered = 0, False  # failures in a row

    @cached_property
    def ledger(self) -> Ledger:
        """Replies and spending."""
        return Ledger(self._folder)

    @property
    def address(self) -> str:
        """Address and model, for messages."""
        return f"{self.target.url} (model {self.target.model})"

    @property
    def identity(self) -> str:
        """Return the sha256 of address, model and decoding, without keys, limits and prices."""
        target = self.target
        parts: list[Any] = ["http", target.url, target.model, target.temperature]
        more = dict(target.extra_body or {})
        if target.chat_template_kwargs:
            more["chat_template_kwargs"] = dict(target.chat_template_kwargs)
        if target.max_tokens_name is None:
            more["max_tokens"] = None
        parts += [more] if more else []
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def close(self) -> None:
        """Close the ledger, where it was opened."""
        if "ledger" in vars(self):
            self.ledger.close()

    def complete(self, asks: Sequence[Ask]) -> list[Reply]:
        """Answer every ask; equal asks are sent once.

        Raises:
            JudgeError: The endpoint rejects the key or has no such model or path.
            StoreError: The ledger cannot be written.
        """
        from anyio.from_thread import start_blocking_portal

        keys = [self._key(ask) for ask in asks]
        unique = dict(zip(keys, asks, strict=True))
        replies = {key: reply for key in unique if (reply := self._kept(key))}
        if pending := {key: ask for key, ask in unique.items() if key not in replies}:
            # a loop of its own thread: the caller may run one, and an interrupt ends every call
            with start_blocking_portal() as portal:
                replies |= portal.call(self._complete, pending)
        return [replace(replies[key], key=ask.key) for key, ask in zip(keys, asks, strict=True)]

    async def _complete(self, asks: Mapping[str, Ask]) -> dict[str, Reply]:
        slots = asyncio.Semaphore(self.target.concurrency)
        async with self._client() as client:

            async def answer(key: str, ask: Ask) -> Reply:
                async with slots:
                    return await self._answer(client, key, ask)

            tasks = [asyncio.create_task(answer(key, ask)) for key, ask in asks.items()]
            try:
                replies = dict(zip(asks, await asyncio.gather(*tasks), strict=True))
            finally:  # of an interrupt
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        if self._fatal:
            raise self._fatal
        return replies

    def _client(self) -> "httpx2.AsyncClient":
        import httpx2

        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        # no proxies or certificates from the environment, no redirects: the address is the user's
        return httpx2.AsyncClient(
            timeout=self.target.timeout_s,
            trust_env=False,
            follow_redirects=False,
            headers=headers,
            limits=httpx2.Limits(max_connections=self.target.concurrency),
        )

    def _key(self, ask: Ask) -> str:
        parts = [self.identity, self._path(ask), self._body(ask), ask.labels, ask.attempt]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @staticmethod
    def _path(ask: Ask) -> str:
        return "/chat/completions" if ask.messages else "/completions"

    def _body(self, ask: Ask) -> dict[str, Any]:
        target = self.target
        body: dict[str, Any] = {"model": target.model, **(target.extra_body or {})}
        if target.temperature is not None:
            body["temperature"] = target.temperature
        if target.max_tokens_name is not None:
            body[target.max_tokens_name] = _reply_tokens(ask)
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
        variables = {**(target.chat_template_kwargs or {}), **ask.variables}
        return body | ({"chat_template_kwargs": variables} if variables else {})

    def _kept(self, key: str) -> Reply | None:
        """Return the reply that the ledger holds, None without one."""
        if not (kept := self.ledger.reply(key)):
            return None
        text, logprobs, finish = kept
        odds = tuple(-inf if p is None else p for p in json.loads(logprobs))
        return Reply(key=key, text=text, logprobs=odds, finish=finish)  # type: ignore[arg-type]

    async def _answer(self, client: "httpx2.AsyncClient", key: str, ask: Ask) -> Reply:
        """Ask the endpoint and keep its reply; a failure is a reply, too, which is not kept."""
        try:
            reply = await self._post_with_retries(client, ask)
        except _FailedError as error:
            self._failures += not isinstance(error, _RowError)
            if self._failures >= self.target.max_failures and not self._down:
                self._down = f"endpoint {self.target.url} is down: {error}"
            return Reply(key=key, text=str(error), finish="error")
        except JudgeError as error:  # raised when the calls under way, which are paid, have ended
            self._down, self._fatal = str(error), error
            return Reply(key=key, text=str(error), finish="error")
        self._failures, self._has_answered = 0, True
        odds_json = json.dumps([p if p > -inf else None for p in reply.logprobs])
        self.ledger.keep(key, reply.text, odds_json, reply.finish)
        return reply

    async def _post_with_retries(self, client: "httpx2.AsyncClient", ask: Ask) -> Reply:
        from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_TransientError),
            stop=stop_after_attempt(1 + self.target.max_retries),
            wait=self._wait,
            sleep=self._pause,
            reraise=True,
        )
        return await retrying(self._post, client, ask)

    async def _pause(self, seconds: float) -> None:
        if self._sleep:
            self._sleep(seconds)
        else:
            await asyncio.sleep(seconds)

    def _wait(self, state: "RetryCallState") -> float:
        """Return the seconds before a retry: as the endpoint says, else 1, 2, 4... with jitter."""
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, _TransientError) and error.after_s is not None:
            return error.after_s
        longest = min(self.target.max_wait_s, 2.0 ** (state.attempt_number - 1))
        return longest * random.uniform(0.5, 1)

    async def _post(self, client: "httpx2.AsyncClient", ask: Ask) -> Reply:
        if self._down:
            raise _FailedError(self._down)
        # as ASCII: half a surrogate pair in a prompt cannot be sent otherwise
        body = json.dumps(self._body(ask)).encode()
        booked = self._cost(len(body) // CHARS_PER_TOKEN, _reply_tokens(ask))
        limits = Spending(self.target.max_calls, self.target.max_tokens, self.target.max_cost)
        if exceeded := self.ledger.book(self._account, booked, limits):
            spent = f"max_{exceeded} is {getattr(limits, exceeded)}, spent"
            raise _RowError(f"budget: {spent}; raise it to go on")
        response, data = await self._exchange(client, self._path(ask), body)
        if response.status_code // 100 != 2:
            return self._refused(response, data, ask)
        answer = openai_reply.parsed(data)
        choice = openai_reply.choice_of(answer)
        if choice is None:
            if openai_reply.is_filtered(data, self.target.model):
                return self._filtered(data, ask)
            is_error = isinstance(answer, dict) and answer.get("error")
            what = "an error" if is_error else "no completion"
            raise _TransientError(
                f"endpoint: status {response.status_code} with {what}{self._quoted(data)}"
            )
        if used := openai_reply.usage(answer):
            self.ledger.settle(self._account, booked, self._cost(*used))
        return openai_reply.read(choice, ask)

    async def _exchange(
        self, client: "httpx2.AsyncClient", path: str, body: bytes
    ) -> tuple["httpx2.Response", bytes]:
        """Return the response and its body, all within one deadline and one size."""
        import httpx2

        url = self.target.url.rstrip("/") + path
        longest = MAX_SILENCES * self.target.timeout_s
        data = bytearray()
        try:
            async with (
                asyncio.timeout(longest),
                client.stream("POST", url, content=body) as response,
            ):
                encoding = response.headers.get("content-encoding", "identity")
                if encoding.strip().lower() not in ("identity", ""):
                    # a kilobyte of it can decode to gigabytes
                    shown = openai_reply.shown(encoding)
                    raise _FailedError(f"endpoint: reply has the encoding {shown}, expected none")
                async for piece in response.aiter_raw():
                    data += piece
                    if len(data) > MAX_REPLY_BYTES:
                        raise _FailedError(f"endpoint: reply has over {MAX_REPLY_BYTES} bytes")
        except TimeoutError as error:
            # not retried: it waited long already
            raise _FailedError(f"endpoint: reply took over {longest:g} s") from error
        except httpx2.HTTPError as error:
            raise _TransientError(f"endpoint: {type(error).__name__}") from error
        return response, bytes(data)

    def _cost(self, tokens_in: int, tokens_out: int) -> Spending:
        cost = (tokens_in * self.target.price_in + tokens_out * self.target.price_out) / 1e6
        return Spending(1, tokens_in + tokens_out, cost)

    def _quoted(self, data: bytes) -> str:
        """Return the endpoint's own words behind a colon, "" where it has none."""
        words = openai_reply.error_words(data)
        return f": {openai_reply.shown(words, self._api_key)}" if words.strip() else ""

    def _filtered(self, data: bytes, ask: Ask) -> Reply:
        """Return the reply to a row that a content filter stopped."""
        return Reply(key=ask.key, text=f"filtered{self._quoted(data)}", finish="filtered")

    def _refused(self, response: "httpx2.Response", data: bytes, ask: Ask) -> Reply:
        """Read a status without a completion: as a filter's reply, else as a failure.

        Raises:
            JudgeError: The status concerns every row.
            _FailedError: It concerns this call.
        """
        status = response.status_code
        is_transient = status in _TRANSIENT or status >= 500
        if not is_transient and status != 401 and openai_reply.is_filtered(data, self.target.model):
            return self._filtered(data, ask)
        if status in _FATAL or status // 100 == 3:
            # the words of a rejected key may hold parts of it
            words = "" if status == 401 else self._quoted(data)
            advice = _FATAL.get(status, "name the address that it redirects to")
            if status == 401 and self.target.api_key_env:
                advice += f" in {self.target.api_key_env}"
            elif status == 401:
                advice = "name the environment variable of its key as api_key_env"
            raise JudgeError(
                f"endpoint {self.target.url}: status is {status} for model {self.target.model!r}"
                f"{words}, expected 200; {advice}"
            )
        cause = f"endpoint: status {status}{self._quoted(data)}"
        if not is_transient:
            advice, is_for_all = openai_reply.remedy(data)
            cause += f"; {advice}" if advice else ""
            if is_for_all and not self._has_answered:
                self._down = cause
                raise _FailedError(cause)
            raise _RowError(cause)
        after_s = openai_reply.retry_after(response.headers)
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


def _reply_tokens(ask: Ask) -> int:
    return 1 if ask.labels else ask.max_tokens
