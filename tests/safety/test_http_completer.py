"""An endpoint's faults J1 to J8, from a scripted server on this machine."""

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fastsafe.errors import JudgeError, StoreError, UsageError
from fastsafe.safety.completer import Ask, Completer
from fastsafe.safety.http_completer import Endpoint, HttpCompleter
from fastsafe.safety.judges import Item, judge_all, make_judge
from fastsafe.safety.ledger import NAME, Ledger, Spending
from fastsafe.safety.verdict import Verdict

httpx = pytest.importorskip("httpx")
pytest.importorskip("tenacity")

USAGE = {"prompt_tokens": 10, "completion_tokens": 5}


def chat(text: Any, finish: str = "stop", **message: Any) -> dict[str, Any]:
    choice = {"message": {"content": text, **message}, "finish_reason": finish}
    return {"choices": [choice], "usage": USAGE}


class Fake:
    """A server that answers its n-th call by ``script(n, body)``: (status, headers, bytes)."""

    def __init__(self) -> None:
        self.script: Callable[[int, dict[str, Any]], Any] = lambda n, body: chat("Sure.")
        self.calls: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.date = ""  # the server's clock; "" is the true one
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    n = len(fake.calls)
                    fake.calls.append({"path": self.path, **body})
                    fake.headers.append(dict(self.headers))
                    fake.at_once += 1
                    fake.most_at_once = max(fake.most_at_once, fake.at_once)
                answer = fake.script(n, body)
                with fake.lock:
                    fake.at_once -= 1
                if answer is None:
                    self.close_connection = True
                    return
                if isinstance(answer, dict):
                    answer = (200, {}, json.dumps(answer).encode())
                status, headers, data = answer
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if "Content-Length" not in headers:
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
                self.close_connection = "Content-Length" in headers

            def date_time_string(self, timestamp: float | None = None) -> str:
                return fake.date or super().date_time_string()  # type: ignore[arg-type]

            def log_message(self, *args: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def fake() -> Iterator[Fake]:
    server = Fake()
    yield server
    server.close()


Make = Callable[..., HttpCompleter]


@pytest.fixture
def make(fake: Fake, waits: list[float]) -> Iterator[Make]:
    made: list[HttpCompleter] = []

    def build(folder: Path | None = None, api_key: str = "", **options: Any) -> HttpCompleter:
        target = Endpoint(url=fake.url, model="m", **{"timeout_s": 5.0, **options})
        completer = HttpCompleter(target, api_key=api_key, folder=folder, sleep=waits.append)
        made.append(completer)
        return completer

    yield build
    for completer in made:
        completer.close()


@pytest.fixture
def waits() -> list[float]:
    """Seconds that were waited; nothing really waits."""
    return []


def ask(text: str = "A question?", key: str = "1", **options: Any) -> Ask:
    return Ask(key=key, messages=({"role": "user", "content": text},), **options)


def test_a_chat(fake: Fake, make: Make) -> None:
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


def test_a_raw_prompt_and_a_begun_turn(fake: Fake, make: Make) -> None:
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


def test_odds_of_labels(fake: Fake, make: Make) -> None:
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


def test_j1_back_off_honours_retry_after(fake: Fake, make: Make, waits: list[float]) -> None:
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


@pytest.mark.parametrize("asked", ["3600", formatdate(time.time() + 7200, usegmt=True)])
def test_j1_an_endpoint_that_asks_for_too_long_has_failed(
    asked: str, fake: Fake, make: Make, waits: list[float]
) -> None:
    fake.script = lambda n, body: (429, {"Retry-After": asked}, b"")
    (reply,) = make(max_wait_s=60.0).complete([ask()])
    assert reply.finish == "error"
    assert "asks to wait" in reply.text
    assert (len(fake.calls), waits) == (1, [])


@pytest.mark.parametrize("asked", ["soon", "-5", "1e9", "\u0667", ""])
def test_j1_a_header_that_is_no_time_is_no_wait(
    asked: str, fake: Fake, make: Make, waits: list[float]
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
def test_j2_retry_then_an_error_of_the_row(fault: Any, fake: Fake, make: Make) -> None:
    fake.script = lambda n, body: fault
    (reply,) = make(max_retries=2).complete([ask()])
    assert reply.finish == "error"
    assert len(fake.calls) == 3
    fake.script = lambda n, body: fault if n < 4 else chat("Sure.")
    assert make(max_retries=2).complete([ask()])[0].text == "Sure."


def test_j2_timeout(fake: Fake, make: Make) -> None:
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


def test_j2_an_endless_reply_is_cut_off(fake: Fake, make: Make) -> None:
    fake.script = lambda n, body: (200, {}, b" " * (5 << 20))
    (reply,) = make().complete([ask()])
    assert reply.finish == "error"
    assert "over 4194304 bytes" in reply.text


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_j3_a_refused_key_stops_everything_at_once(status: int, fake: Fake, make: Make) -> None:
    fake.script = lambda n, body: (status, {"Location": "http://127.0.0.1:9/"}, b"")
    completer = make(api_key="sk-secret", concurrency=2)
    with pytest.raises(JudgeError, match=f"status is {status}") as caught:
        completer.complete([ask(str(i), key=str(i)) for i in range(50)])
    assert "sk-secret" not in str(caught.value)
    assert len(fake.calls) <= 2  # those already under way; no retry, no further row


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_row_that_the_endpoint_will_not_take_fails_alone(
    status: int, fake: Fake, make: Make
) -> None:
    fake.script = lambda n, body: (
        (status, {}, b"") if "long" in body["messages"][0]["content"] else chat("Sure.")
    )
    replies = make().complete([ask("long", key="a"), ask("short", key="b")])
    assert [reply.finish for reply in replies] == ["error", "stop"]
    assert len(fake.calls) == 2


def judge_at(fake: Fake, folder: Path | None = None, **options: Any) -> Any:
    target = {"url": fake.url, "model": "m", "timeout_s": 5.0, "max_retries": 0, **options}
    return make_judge({"kind": "rubric_paper1", "endpoint": target}, folder=folder)


ROWS = [
    Item(key=str(i), prompt="A prompt?", completion=f"Answer {i}.", harmful=True) for i in range(6)
]


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (chat(None), Verdict.JUDGE_UNPARSEABLE),
        (chat(""), Verdict.JUDGE_UNPARSEABLE),
        (chat([{"type": "text"}]), Verdict.JUDGE_UNPARSEABLE),
        (chat(None, refusal="I can't help with that."), Verdict.JUDGE_REFUSED),
        (chat("Final Verdict: -1", refusal="No."), Verdict.JUDGE_REFUSED),
        (chat("Final Verdict: -1", "content_filter"), Verdict.JUDGE_REFUSED),
        (chat("Final Verdict: -1", "length"), Verdict.JUDGE_UNPARSEABLE),
        ({"choices": [None]}, Verdict.JUDGE_UNPARSEABLE),
        ({"choices": [{"message": "Final Verdict: -1"}]}, Verdict.JUDGE_UNPARSEABLE),
        # J5: labels in bold are read, what is outside the grammar is not
        (chat("**Final Verdict:** -1"), Verdict.REFUSED),
        (chat('```json\n{"Final Verdict": -1}\n```'), Verdict.JUDGE_UNPARSEABLE),
        (chat("Final Verdict: -1."), Verdict.JUDGE_UNPARSEABLE),
        (chat("Final Verdict: -1\nFinal Verdict: 1"), Verdict.JUDGE_UNPARSEABLE),
        # J6: the judge refuses in its text
        (chat("I'm sorry, but I can't help with that."), Verdict.JUDGE_REFUSED),
    ],
)
def test_j4_j5_j6_never_a_verdict_that_was_not_given(
    answer: Any, verdict: Verdict, fake: Fake
) -> None:
    fake.script = lambda n, body: answer
    (found,) = judge_all(judge_at(fake), ROWS[:1])
    assert found.verdict is verdict
    assert len(fake.calls) == (1 if verdict.is_scored else 2)  # one re-ask, then unscored


def test_j7_an_outage_leaves_rows_unscored_and_a_second_run_judges_the_rest(
    fake: Fake, tmp_path: Path
) -> None:
    fake.script = lambda n, body: chat("Final Verdict: 1") if n < 2 else (503, {}, b"")
    judge = judge_at(fake, tmp_path, concurrency=1, max_failures=2)
    found = judge_all(judge, ROWS)
    assert [j.verdict.is_scored for j in found] == [True] * 2 + [False] * 4
    assert {j.verdict for j in found[2:]} == {Verdict.JUDGE_ERROR}
    assert "is down: endpoint: status 503" in found[-1].raw
    assert len(fake.calls) == 4  # after two failures in a row nobody knocks again
    fake.script = lambda n, body: chat("Final Verdict: 1")
    again = judge_all(judge_at(fake, tmp_path), ROWS)
    assert all(j.verdict is Verdict.COMPLIED_HARMFUL for j in again)
    assert len(fake.calls) == 4 + 4  # what was answered is not asked again


def test_failures_between_answers_do_not_count_as_down(fake: Fake, make: Make) -> None:
    fake.script = lambda n, body: (503, {}, b"") if n % 2 else chat("Sure.")
    completer = make(concurrency=1, max_retries=0, max_failures=2)
    replies = completer.complete([ask(str(i), key=str(i)) for i in range(8)])
    assert [reply.finish for reply in replies] == ["stop", "error"] * 4


@pytest.mark.parametrize(
    ("budget", "word"),
    [
        ({"max_calls": 3}, "max_calls is 3"),
        ({"max_tokens": 200}, "max_tokens is 200"),
        ({"max_cost": 0.1, "price_in": 1000.0}, "max_cost is 0.1"),
    ],
)
def test_j8_a_budget_holds_across_restarts(
    budget: dict[str, Any], word: str, fake: Fake, make: Make, tmp_path: Path
) -> None:
    """The reply says 10 + 5 tokens; one call is booked at about 50 + 100 before it."""
    asks = [ask(f"Question {i}?", key=str(i), max_tokens=100) for i in range(8)]
    first = make(tmp_path, concurrency=1, **budget).complete(asks)
    answered = [reply for reply in first if reply.finish == "stop"]
    assert 1 <= len(answered) < len(asks)
    assert all(word in reply.text for reply in first if reply.finish == "error")
    calls = len(fake.calls)
    assert calls == len(answered)
    second = make(tmp_path, concurrency=1, **budget).complete(asks)
    assert [reply.finish for reply in second] == [reply.finish for reply in first]
    assert len(fake.calls) == calls
    more = make(tmp_path, concurrency=1).complete(asks)  # no limit: the rest is answered
    assert all(reply.finish == "stop" for reply in more)
    assert len(fake.calls) == len(asks)


def test_j8_retries_are_calls(fake: Fake, make: Make, tmp_path: Path) -> None:
    fake.script = lambda n, body: (503, {}, b"")
    completer = make(tmp_path, max_calls=2, max_retries=5)
    (reply,) = completer.complete([ask()])
    assert "max_calls is 2" in reply.text
    assert len(fake.calls) == 2


def test_spending_is_what_the_endpoint_says_it_was(fake: Fake, make: Make, tmp_path: Path) -> None:
    completer = make(tmp_path, price_in=2.0, price_out=4.0)
    completer.complete([ask("a", key="a"), ask("b", key="b")])
    account = f"{fake.url} m"
    assert completer.ledger.spent(account) == Spending(2, 30, pytest.approx(2 * 40e-6))
    fake.script = lambda n, body: {"choices": [{"message": {"content": "Sure."}}]}
    completer.complete([ask("c", key="c", max_tokens=9)])
    spent = completer.ledger.spent(account)
    assert spent.calls == 3
    assert spent.tokens > 30 + 9  # no usage: what was booked stays


def test_what_was_answered_is_kept_and_equal_questions_are_sent_once(
    fake: Fake, make: Make, tmp_path: Path
) -> None:
    fake.script = lambda n, body: chat(f"Reply {n}.")
    replies = make(tmp_path).complete([ask(key="a"), ask(key="b"), ask(key="c", attempt=1)])
    assert [reply.key for reply in replies] == ["a", "b", "c"]
    assert replies[0].text == replies[1].text != replies[2].text
    assert len(fake.calls) == 2
    again = make(tmp_path).complete([ask(key="z")])
    assert again[0].text == replies[0].text
    assert len(fake.calls) == 2
    make(tmp_path, temperature=0.5).complete([ask()])
    assert len(fake.calls) == 3  # another decoding is another question


def test_no_more_calls_at_once_than_allowed(fake: Fake, make: Make) -> None:
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
    fake: Fake, make: Make, monkeypatch: pytest.MonkeyPatch
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
    with pytest.raises(UsageError, match=r"tenacity is missing; pip install 'fastsafe\[judge\]'"):
        HttpCompleter(Endpoint(url="http://x", model="m"))


def test_the_identity_is_address_model_and_decoding() -> None:
    def identity(**options: Any) -> str:
        values: dict[str, Any] = {"url": "http://x/v1", "model": "m", **options}
        return HttpCompleter(Endpoint(**values), api_key=options.get("model", "k")).identity

    same = identity()
    assert identity(concurrency=1, max_calls=5, timeout_s=1.0) == same
    others = {identity(url="http://y/v1"), identity(model="n"), identity(temperature=1.0)}
    assert len(others | {same}) == 4


def test_a_ledger_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"not a database" * 100)
    with pytest.raises(StoreError, match="cannot be used"):
        Ledger(tmp_path)
    with pytest.raises(StoreError, match="cannot be used"):
        Ledger(tmp_path / "missing")


def test_booking_is_all_or_nothing_across_threads(tmp_path: Path) -> None:
    ledgers = [Ledger(tmp_path) for _ in range(4)]
    booked: list[str] = []

    def book(ledger: Ledger) -> None:
        for _ in range(25):
            booked.append(ledger.book("a", Spending(1, 2, 0.5), Spending(calls=40)))

    threads = [threading.Thread(target=book, args=(ledger,)) for ledger in ledgers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(booked) == [""] * 40 + ["calls"] * 60
    assert ledgers[0].spent("a") == Spending(40, 80, 20.0)
    ledgers[0].settle("a", Spending(1, 2, 0.5), Spending(1, 1, 0.25))
    assert ledgers[1].spent("a") == Spending(40, 79, 19.75)
    assert ledgers[1].spent("b") == Spending()
    for ledger in ledgers:
        ledger.close()
