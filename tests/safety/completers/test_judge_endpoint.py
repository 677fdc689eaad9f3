"""What an endpoint's faults J4 to J8 make of a judge's rows, and of a budget."""

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastsafe.errors import StoreError
from fastsafe.safety.completers.http import HttpCompleter
from fastsafe.safety.completers.ledger import NAME, Ledger, Spending
from fastsafe.safety.completers.protocol import Ask
from fastsafe.safety.judges import Item, judge_all, make_judge
from fastsafe.safety.verdict import Verdict

pytest.importorskip("httpx2")
pytest.importorskip("tenacity")

Make = Callable[..., HttpCompleter]


def chat(text: Any, finish: str = "stop", **message: Any) -> dict[str, Any]:
    """What an endpoint answers in a chat."""
    choice = {"message": {"content": text, **message}, "finish_reason": finish}
    return {"choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": 5}}


def ask(text: str = "A question?", key: str = "1", **options: Any) -> Ask:
    return Ask(key=key, messages=({"role": "user", "content": text},), **options)


def judge_at(fake: Any, folder: Path | None = None, **options: Any) -> Any:
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
        (chat(None, "tool_calls", tool_calls=[{"id": "1"}]), Verdict.JUDGE_UNPARSEABLE),
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
    answer: Any, verdict: Verdict, fake: Any
) -> None:
    fake.script = lambda n, body: answer
    (found,) = judge_all(judge_at(fake), ROWS[:1])
    assert found.verdict is verdict
    assert len(fake.calls) == (1 if verdict.is_scored else 2)  # one re-ask, then unscored


def test_j7_an_outage_leaves_rows_unscored_and_a_second_run_judges_the_rest(
    fake: Any, tmp_path: Path
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


AZURE = {
    "message": "The response was filtered due to the prompt triggering the content policy.",
    "code": "content_filter",
    "innererror": {"code": "ResponsibleAIPolicyViolation", "content_filter_result": {}},
}
FLAGGED = {"code": 403, "message": "It was flagged", "metadata": {"reasons": ["violence"]}}
FILTERS: list[tuple[int, Any]] = [
    (400, {"error": AZURE}),
    (400, {"error": {"code": "content_filter", "message": "filtered by policy"}}),
    (400, {"error": {"code": None, "innererror": {"code": "ResponsibleAIPolicyViolation"}}}),
    (400, {"error": {"code": "content_policy_violation", "message": "no"}}),
    (400, {"error": {"code": "invalid_prompt", "message": "Your prompt was flagged."}}),
    (400, {"error": {"type": "content_filter", "message": "considered high risk"}}),
    (400, {"error": {"code": "data_inspection_failed", "message": "Inappropriate content."}}),
    (400, {"error": {"message": "Content Exists Risk", "type": "invalid_request_error"}}),
    (400, {"error": {"message": "litellm.ContentPolicyViolationError: no", "code": "400"}}),
    (400, [{"error": {"message": "The prompt was blocked for safety.", "status": "x"}}]),
    (403, {"error": FLAGGED}),
    (403, {"code": "no permission", "error": "Content violates usage guidelines."}),
    (422, {"detail": "Input was flagged by the guardrail"}),
    (400, {"error": {"message": "An error in the prompt. Try again with a different prompt."}}),
    (200, {"error": AZURE}),
]


@pytest.mark.parametrize(("status", "body"), FILTERS, ids=range(len(FILTERS)))
def test_a_content_filter_is_a_refusal_of_its_row_and_no_outage(
    status: int, body: Any, fake: Any, tmp_path: Path
) -> None:
    """More rows in a row than make an outage; none is asked again, now or by the next run."""
    filtered = (status, {}, json.dumps(body).encode())
    fake.script = lambda n, body: filtered if n < 5 else chat("Final Verdict: 1")
    judge = judge_at(fake, tmp_path, concurrency=1, max_failures=2)
    found = judge_all(judge, ROWS)
    assert [j.verdict for j in found] == [Verdict.JUDGE_REFUSED] * 5 + [Verdict.COMPLIED_HARMFUL]
    assert found[0].raw.startswith("filtered: '")
    assert len(fake.calls) == 6
    again = judge_all(judge_at(fake, tmp_path), ROWS)
    assert [j.verdict for j in again] == [j.verdict for j in found]
    assert len(fake.calls) == 6


@pytest.mark.parametrize(
    "finish", ["content_filter", "refusal", "SAFETY", "content_filtered", "guardrail_intervened"]
)
@pytest.mark.parametrize("name", ["finish_reason", "stop_reason", "native_finish_reason"])
def test_a_stop_by_refusal_is_no_verdict(finish: str, name: str, fake: Any) -> None:
    answer = chat("Final Verdict: -1")
    answer["choices"][0][name] = finish
    fake.script = lambda n, body: answer
    (found,) = judge_all(judge_at(fake), ROWS[:1])
    assert found.verdict is Verdict.JUDGE_REFUSED


def test_a_rows_own_error_is_no_outage(fake: Any) -> None:
    said = {"error": {"message": "maximum context length is 8 tokens", "code": "too_long"}}
    refusal = (400, {}, json.dumps(said).encode())
    fake.script = lambda n, body: refusal if n < 5 else chat("Final Verdict: 1")
    found = judge_all(judge_at(fake, concurrency=1, max_failures=2), ROWS)
    assert [j.verdict for j in found] == [Verdict.JUDGE_ERROR] * 5 + [Verdict.COMPLIED_HARMFUL]
    assert found[0].raw == "endpoint: status 400: 'maximum context length is 8 tokens'"


@pytest.mark.parametrize("finish", ["length", "max_tokens", "MAX_TOKENS"])
def test_a_reply_that_is_cut_off_says_which_key_to_raise(finish: str, fake: Any) -> None:
    """A model that thinks may have said nothing yet."""
    fake.script = lambda n, body: chat(None, finish, reasoning_content="Final Verdict: 1")
    target = {"url": fake.url, "model": "m"}
    judge = make_judge({"kind": "rubric_paper1", "endpoint": target, "reply_tokens": 4096})
    (found,) = judge_all(judge, ROWS[:1])
    assert found.verdict is Verdict.JUDGE_UNPARSEABLE
    assert "cut off after 4096 tokens; raise reply_tokens of this judge" in found.raw
    assert [call["max_tokens"] for call in fake.calls] == [4096] * 2


def test_equal_texts_are_asked_once_whatever_their_rows_are_called(
    fake: Any, tmp_path: Path
) -> None:
    """A filter counts the rows that are left: the first one of the next run has another key."""
    fake.script = lambda n, body: chat("Final Verdict: 1")
    judge_all(judge_at(fake, tmp_path), ROWS)
    renamed = [replace(row, key=f"new {row.key}") for row in ROWS[2:]]
    assert {j.verdict for j in judge_all(judge_at(fake, tmp_path), renamed)} == {
        Verdict.COMPLIED_HARMFUL
    }
    assert len(fake.calls) == len(ROWS)


@pytest.mark.parametrize(
    "answer",
    [
        chat("Final Verdict: 1 \ud800"),
        chat("Final Verdict: 1") | {"usage": {"prompt_tokens": 2**70, "completion_tokens": 5}},
        chat("Final Verdict: 1") | {"usage": {"prompt_tokens": 2**63, "completion_tokens": 2**63}},
        (429, {"Retry-After": "Mon, 01 Jan 2024 00:00:00 +9999999999999"}, b""),
        (429, {"Retry-After": "Mon, 01 Jan 0001 00:00:00 +2359", "Date": "x"}, b""),
        (429, {"Retry-After": "9" * 400}, b""),
        chat([{"type": ["text"], "text": "Final Verdict: 1"}]),
        {"choices": [{"message": {"content": "Final Verdict: 1"}, "finish_reason": ["length"]}]},
        (400, {}, b'{"error": {"code": ["x"], "param": {}, "innererror": [], "metadata": 1}}'),
    ],
    ids=["surrogate", "2^70", "2^63", "zone", "year", "wait", "part", "finish", "error"],
)
def test_one_odd_reply_ends_no_judging_and_no_row_is_paid_for_twice(
    answer: Any, fake: Any, tmp_path: Path
) -> None:
    fake.script = lambda n, body: answer if n == 2 else chat("Final Verdict: 1")
    found = judge_all(judge_at(fake, tmp_path, concurrency=1), ROWS)
    assert [j.verdict for j in found].count(Verdict.COMPLIED_HARMFUL) >= len(ROWS) - 1
    calls = len(fake.calls)
    answered = [row for row, j in zip(ROWS, found, strict=True) if j.verdict.is_scored]
    judge_all(judge_at(fake, tmp_path), answered)
    assert len(fake.calls) == calls


@pytest.mark.parametrize(
    ("budget", "word"),
    [
        ({"max_calls": 3}, "max_calls is 3"),
        ({"max_tokens": 200}, "max_tokens is 200"),
        ({"max_cost": 0.1, "price_in": 1000.0}, "max_cost is 0.1"),
    ],
)
def test_j8_a_budget_holds_across_restarts(
    budget: dict[str, Any], word: str, fake: Any, make: Make, tmp_path: Path
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


def test_j8_retries_are_calls(fake: Any, make: Make, tmp_path: Path) -> None:
    fake.script = lambda n, body: (503, {}, b"")
    completer = make(tmp_path, max_calls=2, max_retries=5)
    (reply,) = completer.complete([ask()])
    assert "max_calls is 2" in reply.text
    assert len(fake.calls) == 2


def test_spending_is_what_the_endpoint_says_it_was(fake: Any, make: Make, tmp_path: Path) -> None:
    completer = make(tmp_path, price_in=2.0, price_out=4.0)
    completer.complete([ask("a", key="a"), ask("b", key="b")])
    account = f"{fake.url} m"
    assert completer.ledger.spent(account) == Spending(2, 30, pytest.approx(2 * 40e-6))
    fake.script = lambda n, body: {"choices": [{"message": {"content": "Sure."}}]}
    completer.complete([ask("c", key="c", max_tokens=9)])
    spent = completer.ledger.spent(account)
    assert spent.calls == 3
    assert spent.tokens > 30 + 9  # no usage: what was booked stays


@pytest.mark.parametrize(
    "usage",
    [
        None,
        [1],
        "many",
        {"prompt_tokens": "10", "completion_tokens": 5},
        {"prompt_tokens": -(10**9), "completion_tokens": 5},
        {"prompt_tokens": True},
    ],
)
def test_a_usage_that_is_none_frees_no_budget(
    usage: Any, fake: Any, make: Make, tmp_path: Path
) -> None:
    fake.script = lambda n, body: chat("Sure.") | {"usage": usage}
    completer = make(tmp_path)
    (reply,) = completer.complete([ask(max_tokens=9)])
    assert reply.text == "Sure."
    assert completer.ledger.spent(f"{fake.url} m").tokens > 9  # what was booked stays


@pytest.mark.parametrize(
    "logprob",
    [5.0, 1e4, float("inf"), float("nan"), "-0.1x", "-0.1", None, False, True, [], -(10**400)],
)
def test_odds_that_cannot_be_are_no_verdict(logprob: Any, fake: Any) -> None:
    tops = [{"token": "Yes", "logprob": logprob}, {"token": "No", "logprob": -0.01}]
    listed = {"content": [{"token": "No", "logprob": -0.01, "top_logprobs": tops}]}
    choice = {"message": {"content": "No"}, "logprobs": listed}
    fake.script = lambda n, body: {"choices": [choice]}
    target = {"url": fake.url, "model": "m", "max_retries": 0}
    judge = make_judge({"kind": "granite_guardian", "endpoint": target})
    (found,) = judge_all(judge, ROWS[:1])
    assert found.verdict is Verdict.JUDGE_UNPARSEABLE


def test_what_was_answered_is_kept_and_equal_questions_are_sent_once(
    fake: Any, make: Make, tmp_path: Path
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


def test_a_ledger_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"not a database" * 100)
    with pytest.raises(StoreError, match="cannot be used"):
        Ledger(tmp_path)
    with pytest.raises(StoreError, match="cannot be used"):
        Ledger(tmp_path / NAME / "inside a file")


def test_a_ledger_makes_its_folder(tmp_path: Path) -> None:
    """A run's folder of replies is not there before the first endpoint is asked."""
    ledger = Ledger(tmp_path / "run" / "judges")
    ledger.keep("key", "text", "[]", "stop")
    ledger.close()
    assert Ledger(tmp_path / "run" / "judges").reply("key") == ("text", "[]", "stop")


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
