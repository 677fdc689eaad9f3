"""An endpoint's faults J1 to J3, from a scripted server on this machine."""

import math
import threading
import time
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from fastsafe.errors import JudgeError, UsageError
from fastsafe.safety.completers.endpoint import Endpoint
from fastsafe.safety.completers.http import HttpCompleter
from fastsafe.safety.completers.protocol import Ask, Completer

pytest.importorskip("httpx2")
pytest.importorskip("tenacity")

Make = Callable[..., HttpCompleter]


def chat(text: Any, finish: str = "stop", **message: Any) -> dict[str, Any]:
    """What an endpoint answers in a chat."""
    choice = {"message": {"content": text, **message}, "finish_reason": finish}
    return {"choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": 5}}


def ask(text: str = "A question?", key: str = "1", **options: Any) -> Ask:
    return Ask(key=key, messages=({"role": "user", "content": text},), **options)


def test_a_chat(fake: Any, make: Make) -> None:
    completer = make(api_key="sk-secret")
    assert isinstance(completer, Completer)
    (reply,) = completer.complete([ask(max_tokens=7, variables={"risk": "harm"})])
    assert (reply.key, reply.text, reply.finish) == ("1", "Sure.", "stop")
    (call,) = fake.calls
    assert call == {
        "path": "/v1/chat/completions",
        "model": "m",
        "temperature": 0.0,
        "max_tokens": 7,
        "messages": [{"role": "user", "content": "A question?"}],
        "chat_template_kwargs": {"risk": "harm"},
    }
    assert fake.headers[0]["Authorization"] == "Bearer sk-secret"


def test_a_raw_prompt_and_a_begun_turn(fake: Any, make: Make) -> None:
    fake.script = lambda n, body: {"choices": [{"text": " safe", "finish_reason": "stop"}]}
    completer = make()
    (reply,) = completer.complete([Ask(key="1", prompt="[INST] x [/INST]")])
    assert reply.text == " safe"
    assert fake.calls[0]["path"] == "/v1/completions"
    assert fake.calls[0]["prompt"] == "[INST] x [/INST]"
    assert "Authorization" not in fake.headers[0]
    completer.complete([Ask(key="1", messages=ask().messages, prompt="\n\n")])
    assert fake.calls[1]["messages"][-1] == {"role": "assistant", "content": "\n\n"}
    assert fake.calls[1]["continue_final_message"] is True


def test_odds_of_labels(fake: Any, make: Make) -> None:
    tops = [{"token": " Yes", "logprob": -0.1}, {"token": "Yes", "logprob": -3.0}]
    listed = {"content": [{"token": "Yes", "logprob": -0.1, "top_logprobs": tops}]}

    def script(n: int, body: dict[str, Any]) -> dict[str, Any]:
        assert body["max_tokens"] == 1
        if "messages" in body:
            assert body["logprobs"] is True
            return {"choices": [{"message": {"content": "Yes"}, "logprobs": listed}]}
        return {"choices": [{"text": "No", "logprobs": {"top_logprobs": [{"No": -0.2}]}}]}

    fake.script = script
    labels = ("Yes", "No")
    asks = [ask(key="a", labels=labels), Ask(key="b", prompt="p", labels=labels)]
    first, second = make().complete(asks)
    assert first.logprobs == (-0.1, -math.inf)
    assert second.logprobs == (-math.inf, -0.2)
    fake.script = lambda n, body: chat("Yes")  # an endpoint that lists no odds
    (reply,) = make().complete([ask(labels=labels)])
    assert reply.logprobs == (-math.inf, -math.inf)


def test_j1_back_off_honours_retry_after(fake: Any, make: Make, waits: list[float]) -> None:
    fake.date = formatdate(1_000_000_000, usegmt=True)  # a clock that is years behind
    dated = {"Retry-After": formatdate(1_000_000_030, usegmt=True)}
    faults: list[Any] = [(429, {"Retry-After": "7"}, b""), (429, dated, b"")]
    faults += [(status, {}, b"") for status in (500, 502, 503, 529)]
    fake.script = lambda n, body: faults[n] if n < len(faults) else chat("Sure.")
    (reply,) = make(max_retries=6).complete([ask()])
    assert reply.text == "Sure."
    assert len(fake.calls) == 7
    assert waits[:2] == [7, 30]
    assert [0.5 * 2**n <= wait <= 2**n for n, wait in enumerate(waits[2:], start=2)] == [True] * 4


@pytest.mark.parametrize("is_dated", [False, True])
def test_j1_an_endpoint_that_asks_for_too_long_has_failed(
    is_dated: bool, fake: Any, make: Make, waits: list[float]
) -> None:
    asked = formatdate(time.time() + 7200, usegmt=True) if is_dated else "3600"
    fake.script = lambda n, body: (429, {"Retry-After": asked}, b"")
    (reply,) = make(max_wait_s=60.0).complete([ask()])
    assert reply.finish == "error"
    assert "asks to wait" in reply.text
    assert (len(fake.calls), waits) == (1, [])


@pytest.mark.parametrize("asked", ["soon", "-5", "1e9", "\u0667", ""])
def test_j1_a_header_that_is_no_time_is_no_wait(
    asked: str, fake: Any, make: Make, waits: list[float]
) -> None:
    headers = {"Retry-After": asked.encode("utf-8").decode("latin-1")}
    fake.script = lambda n, body: chat("Sure.") if n else (503, headers, b"")
    assert make().complete([ask()])[0].text == "Sure."
    assert 0.5 <= waits[0] <= 1


@pytest.mark.parametrize(
    "fault",
    [
        None,  # the connection ends without an answer
        (200, {"Content-Length": "999"}, b'{"choices": [{"mess'),  # reset in the body
        (200, {}, b'{"choices": [{"mess'),  # half a JSON
        (200, {}, b"<html>Bad gateway</html>"),
        (200, {}, b"{}"),
        (200, {}, b'{"choices": []}'),
        (200, {}, b"[" * 100_000),
        (200, {}, b"\xff\xfe"),
        (502, {}, b"<html></html>"),
    ],
)
def test_j2_retry_then_an_error_of_the_row(fault: Any, fake: Any, make: Make) -> None:
    fake.script = lambda n, body: fault
    (reply,) = make(max_retries=2).complete([ask()])
    assert reply.finish == "error"
    assert len(fake.calls) == 3
    fake.script = lambda n, body: fault if n < 4 else chat("Sure.")
    assert make(max_retries=2).complete([ask()])[0].text == "Sure."


def test_j2_timeout(fake: Any, make: Make) -> None:
    release = threading.Event()

    def script(n: int, body: dict[str, Any]) -> Any:
        if n == 0:
            release.wait(5)
        return chat("Sure.")

    fake.script = script
    (reply,) = make(timeout_s=0.2, max_retries=1).complete([ask()])
    release.set()
    assert reply.text == "Sure."
    assert len(fake.calls) == 2


def test_j2_an_endless_reply_is_cut_off(fake: Any, make: Make) -> None:
    fake.script = lambda n, body: (200, {}, b" " * (5 << 20))
    (reply,) = make().complete([ask()])
    assert reply.finish == "error"
    assert "over 4194304 bytes" in reply.text


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_j3_a_refused_key_stops_everything_at_once(status: int, fake: Any, make: Make) -> None:
    fake.script = lambda n, body: (status, {"Location": "http://127.0.0.1:9/"}, b"")
    completer = make(api_key="sk-secret", concurrency=2)
    with pytest.raises(JudgeError, match=f"status is {status}") as caught:
        completer.complete([ask(str(i), key=str(i)) for i in range(50)])
    assert "sk-secret" not in str(caught.value)
    assert len(fake.calls) <= 2  # those already under way; no retry, no further row


def test_a_call_under_way_is_kept_when_another_ends_the_rest(
    fake: Any, make: Make, tmp_path: Path
) -> None:
    """It is paid for: the next run does not ask for it again."""
    under_way, refused = threading.Event(), threading.Event()

    def script(n: int, body: dict[str, Any]) -> Any:
        if body["messages"][0]["content"] == "slow":
            under_way.set()
            refused.wait(10)
            return chat("Sure.")
        under_way.wait(10)
        threading.Timer(0.2, refused.set).start()
        return 403, {}, b""

    fake.script = script
    asks = [ask("slow", key="1"), ask("refused", key="2"), ask("never", key="3")]
    with pytest.raises(JudgeError, match="status is 403"):
        make(tmp_path, concurrency=2).complete(asks)
    assert len(fake.calls) == 2
    fake.script = lambda n, body: chat("Again.")
    replies = make(tmp_path, concurrency=2).complete(asks)
    assert [reply.text for reply in replies] == ["Sure.", "Again.", "Again."]
    assert len(fake.calls) == 4


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_row_that_the_endpoint_will_not_take_fails_alone(
    status: int, fake: Any, make: Make
) -> None:
    fake.script = lambda n, body: (
        (status, {}, b"") if "long" in body["messages"][0]["content"] else chat("Sure.")
    )
    replies = make().complete([ask("long", key="a"), ask("short", key="b")])
    assert [reply.finish for reply in replies] == ["error", "stop"]
    assert len(fake.calls) == 2


def test_failures_between_answers_do_not_count_as_down(fake: Any, make: Make) -> None:
    fake.script = lambda n, body: (503, {}, b"") if n % 2 else chat("Sure.")
    completer = make(concurrency=1, max_retries=0, max_failures=2)
    replies = completer.complete([ask(str(i), key=str(i)) for i in range(8)])
    assert [reply.finish for reply in replies] == ["stop", "error"] * 4


def test_nothing_is_written_before_the_first_ask(make: Make, tmp_path: Path) -> None:
    completer = make(tmp_path)
    assert completer.identity
    completer.close()
    assert list(tmp_path.iterdir()) == []
    completer.complete([ask()])
    assert (tmp_path / "judge.sqlite").is_file()


def test_no_more_calls_at_once_than_allowed(fake: Any, make: Make) -> None:
    barrier = threading.Barrier(3, timeout=10)

    def script(n: int, body: dict[str, Any]) -> dict[str, Any]:
        barrier.wait()
        return chat("Sure.")

    fake.script = script
    asks = [ask(str(i), key=str(i)) for i in range(9)]
    replies = make(concurrency=3).complete(asks)
    assert [reply.key for reply in replies] == [a.key for a in asks]
    assert fake.most_at_once == 3


def test_the_environments_proxies_are_not_used(
    fake: Any, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert make().complete([ask()])[0].text == "Sure."


def test_nobody_there(make: Make) -> None:
    target = Endpoint(url="http://127.0.0.1:9/v1", model="m", max_retries=0)
    (reply,) = HttpCompleter(target).complete([ask()])
    assert reply.finish == "error"
    assert reply.text == "endpoint: ConnectError"


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "tenacity", None)
    with pytest.raises(UsageError, match=r"tenacity is missing; run `pip install '\.\[judge\]'"):
        HttpCompleter(Endpoint(url="http://x", model="m"))


def test_the_identity_is_address_model_and_decoding() -> None:
    def identity(**options: Any) -> str:
        values: dict[str, Any] = {"url": "http://x/v1", "model": "m", **options}
        return HttpCompleter(Endpoint(**values), api_key=options.get("model", "k")).identity

    same = identity()
    assert identity(concurrency=1, max_calls=5, timeout_s=1.0) == same
    others = {identity(url="http://y/v1"), identity(model="n"), identity(temperature=1.0)}
    assert len(others | {same}) == 4
