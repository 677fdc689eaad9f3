"""The spellings of completions and errors, and the settings of a call."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from fastsafe.errors import JudgeError, UsageError
from fastsafe.safety.completers import openai_reply
from fastsafe.safety.completers.endpoint import Endpoint
from fastsafe.safety.completers.http import HttpCompleter, open_endpoint
from fastsafe.safety.completers.protocol import Ask
from fastsafe.safety.completers.settings import from_mapping

pytest.importorskip("httpx2")
pytest.importorskip("tenacity")

Make = Callable[..., HttpCompleter]
TEXT = {"type": "text", "text": "Sure."}
THOUGHT = {"type": "thinking", "thinking": [{"type": "text", "text": "No."}]}


def ask(key: str = "1", **options: Any) -> Ask:
    return Ask(key=key, messages=({"role": "user", "content": "A question?"},), **options)


def error(status: int, body: Any) -> tuple[int, dict[str, str], bytes]:
    return status, {}, body if isinstance(body, bytes) else json.dumps(body).encode()


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": [TEXT]}, "Sure."),
        ({"content": [THOUGHT, TEXT]}, "Sure."),
        (
            {"content": [{"type": "text", "text": "Su"}, {"type": "output_text", "text": "re."}]},
            "Sure.",
        ),
        ({"content": ["Su", "re."]}, "Sure."),
        ({"content": [THOUGHT]}, ""),
        ({"content": [{"type": "text"}, {"type": ["text"], "text": "No."}, 1, None]}, ""),
        ({"content": "Sure.", "reasoning_content": "No."}, "Sure."),
        ({"content": "Sure.", "reasoning": "No."}, "Sure."),
        ({"content": None, "reasoning_content": "No."}, ""),
        ({"content": "", "reasoning": "No."}, ""),
        ({"content": 1}, ""),
        ({"content": {"text": "No."}}, ""),
        ({"content": "half \ud800 a pair"}, "half \ufffd a pair"),
    ],
)
def test_the_answer_of_a_message_is_its_text_alone(message: Any, text: str) -> None:
    reply = openai_reply.read({"message": message}, ask())
    assert (reply.text, reply.finish) == (text, "stop")


def test_a_choice_with_a_text_of_its_own() -> None:
    assert openai_reply.read({"text": "Sure."}, ask()).text == "Sure."
    assert openai_reply.read({"message": {"content": "Sure."}}, Ask(key="1", prompt="p")).text
    refusal = {"message": {"content": [{"type": "refusal", "refusal": "I can't."}]}}
    reply = openai_reply.read(refusal, ask())
    assert (reply.text, reply.finish) == ("I can't.", "refused")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"error": {"message": "no such size", "code": 1}}, "no such size"),
        ({"error": "no such size"}, "no such size"),
        ({"detail": "no such size"}, "no such size"),
        ({"detail": [{"loc": ["body"], "msg": "no such size", "input": "x"}]}, "no such size"),
        ({"message": "no such size"}, "no such size"),
        ({"object": "error", "message": "no such size"}, "no such size"),
        ({"errors": [{"message": "no such size"}]}, "no such size"),
        ([{"error": {"message": "no such size"}}], "no such size"),
        (
            {"error": {"message": "failed", "metadata": {"raw": "no such size"}}},
            "failed: no such size",
        ),
        (b"<html>no such\nsize</html>", "<html>no such size</html>"),
        ({"error": {"message": "\x1b[31m\u202eno"}}, r"\x1b[31m\u202eno"),
        ({"error": {"message": "no " * 1000}}, ("no " * 67)[:200] + "..."),
    ],
)
def test_the_endpoints_own_words_are_shown_short_and_escaped(
    body: Any, words: str, fake: Any, make: Make
) -> None:
    fake.script = lambda n, sent: error(400, body)
    (reply,) = make().complete([ask()])
    assert reply.text == f"endpoint: status 400: '{words}'"
    fake.script = lambda n, sent: error(200, body)
    (reply,) = make(max_retries=0).complete([ask()])
    assert reply.finish == "error"
    assert words in reply.text


@pytest.mark.parametrize(
    ("body", "advice"),
    [
        (
            {
                "error": {
                    "code": "unsupported_parameter",
                    "param": "max_tokens",
                    "message": "Use 'max_completion_tokens'.",
                }
            },
            "set max_tokens_name: max_completion_tokens at this endpoint",
        ),
        (
            {
                "error": {
                    "code": "unsupported_parameter",
                    "message": "max_tokens: not supported, use max_completion_tokens",
                }
            },
            "set max_tokens_name: max_completion_tokens at this endpoint",
        ),
        (
            {"error": {"code": "unsupported_value", "message": "temperature must be 1"}},
            "set temperature: null at this endpoint, which leaves it out",
        ),
        (
            {"detail": "Unknown key max_completion_tokens"},
            "set max_tokens_name: max_tokens at this endpoint",
        ),
        (
            {"message": "`temperature` is deprecated for this model."},
            "set temperature: null at this endpoint, which leaves it out",
        ),
        (
            {"error": "Unrecognized request argument: chat_template_kwargs"},
            "leave chat_template_kwargs out at this endpoint",
        ),
        ({"error": {"message": "max_tokens is too large: 512"}}, ""),
        ({"error": {"message": "unsupported media type"}}, ""),
    ],
)
def test_an_unsupported_key_names_the_setting_that_mends_it(
    body: Any, advice: str, fake: Any, make: Make
) -> None:
    fake.script = lambda n, sent: error(400, body)
    replies = make(concurrency=1).complete([ask(), ask("2", attempt=1)])
    assert {reply.finish for reply in replies} == {"error"}
    assert all(re.sub(".*['\"](; )?", "", reply.text) == advice for reply in replies)
    # every row would meet what the endpoint calls a fault of the settings: it is asked once
    is_certain = "unsupported_" in json.dumps(body)
    assert len(fake.calls) == (1 if is_certain else 2)


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        ({}, {"max_tokens": 7, "temperature": 0.0}),
        (
            {"max_tokens_name": "max_completion_tokens"},
            {"max_completion_tokens": 7, "temperature": 0.0},
        ),
        ({"max_tokens_name": None, "temperature": None}, {}),
        (
            {
                "extra_body": {"reasoning_effort": "low"},
                "chat_template_kwargs": {"enable_thinking": False},
            },
            {
                "max_tokens": 7,
                "temperature": 0.0,
                "reasoning_effort": "low",
                "chat_template_kwargs": {"enable_thinking": False},
            },
        ),
    ],
)
def test_what_a_call_holds(
    options: dict[str, Any], sent: dict[str, Any], fake: Any, make: Make
) -> None:
    completer = make(**options)
    completer.complete([ask(max_tokens=7)])
    (call,) = fake.calls
    assert {k: v for k, v in call.items() if k not in ("path", "model", "messages")} == sent


def test_variables_of_the_family_and_of_the_endpoint_are_sent_together(
    fake: Any, make: Make
) -> None:
    completer = make(chat_template_kwargs={"enable_thinking": False})
    completer.complete([ask(variables={"risk": "harm"}), Ask(key="2", prompt="p")])
    chat, raw = sorted(fake.calls, key=lambda call: call["path"])
    assert chat["chat_template_kwargs"] == {"enable_thinking": False, "risk": "harm"}
    assert "chat_template_kwargs" not in raw


def test_a_key_that_was_taken_once_is_no_fault_of_the_settings(fake: Any, make: Make) -> None:
    """Behind a router, one provider of several may not know it."""
    said = {"error": {"code": "unsupported_value", "message": "temperature must be 1"}}
    fake.script = lambda n, body: error(400, said) if n == 1 else {"choices": [{"text": "Sure."}]}
    completer = make(concurrency=1)
    replies = completer.complete([ask(str(i), attempt=i) for i in range(3)])
    assert [reply.finish for reply in replies] == ["stop", "error", "stop"]


def test_settings_that_change_a_reply_are_in_the_identity() -> None:
    def identity(**options: Any) -> str:
        return HttpCompleter(Endpoint(url="http://x/v1", model="m", **options)).identity

    same = identity()
    assert identity(max_tokens_name="max_completion_tokens") == same
    changes: list[dict[str, Any]] = [
        {"temperature": None},
        {"max_tokens_name": None},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"extra_body": {"reasoning_effort": "low"}},
    ]
    assert len({identity(**change) for change in changes} | {same}) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"url": "http://"}, "expected a host"),
        ({"url": "http://host:port"}, "expected a host and, behind a colon, a port"),
        ({"url": "http://[::1/v1"}, "expected a host"),
        ({"extra_body": {"stream": True, "model": "x"}}, "extra_body sets model, stream, expected"),
        ({"extra_body": {"x": object()}}, "not a valid JSON value"),
        ({"max_tokens_name": "max_new_tokens"}, "expected 'max_tokens' or"),
    ],
)
def test_settings_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        from_mapping(Endpoint, {"url": "http://x/v1", "model": "m"} | change, "judge x: endpoint")


@pytest.mark.parametrize("key", ["sk-cl\u00e9", "sk two", "sk\x00", "sk\n-two", "\u201csk\u201d"])
def test_a_key_that_no_header_can_hold_is_one_sentence_without_it(key: str) -> None:
    spec = {"url": "http://x/v1", "model": "m", "api_key_env": "JUDGE_KEY"}
    with pytest.raises(UsageError, match="the key in JUDGE_KEY has a character") as caught:
        open_endpoint(spec, "judge x", {"JUDGE_KEY": key}, None)
    assert not set(caught.value.args[0].split()) & set(key.split())
    assert "\u00e9" not in str(caught.value)


def test_a_key_from_a_file_may_end_its_line(fake: Any, make: Make) -> None:
    make(api_key="sk-secret\n").complete([ask()])
    assert fake.headers[0]["Authorization"] == "Bearer sk-secret"


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (401, "check the key in JUDGE_KEY"),
        (402, "the account there has no credit"),
        (403, "check what the key may do there"),
        (404, "check the address and the model's name"),
        (405, "check the address, which ends before /chat/completions"),
        (307, "name the address that it redirects to"),
    ],
)
def test_what_concerns_every_row_is_one_sentence_without_the_key(
    status: int, advice: str, fake: Any, make: Make
) -> None:
    fake.script = lambda n, body: error(status, {"error": {"message": "not for sk-secret"}})
    with pytest.raises(JudgeError) as caught:
        make(api_key="sk-secret", api_key_env="JUDGE_KEY").complete([ask()])
    said = "" if status == 401 else ": 'not for [key]'"
    assert str(caught.value) == (
        f"endpoint {fake.url}: status is {status} for model 'm'{said}, expected 200; {advice}"
    )


def test_an_endpoint_that_wants_a_key(fake: Any, make: Make) -> None:
    fake.script = lambda n, body: error(401, {})
    with pytest.raises(JudgeError, match="name the environment variable of its key as api_key_env"):
        make().complete([ask()])


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (404, "The model `example/content-safety-8b` does not exist."),
        (404, "The requested model 'example/content-safety-8b' is not available"),
        (400, "Invalid request: unknown parameter 'safety_settings'"),
        (400, "Unsupported parameter: content_filter"),
        (400, "Request body violates the schema: messages must be an array"),
        (400, "Input contains invalid tokens, see the tokenizer's filter"),
        (403, "Your request violates the rate limit of this key"),
        (403, "Request from an address outside of your network policy"),
    ],
)
def test_an_error_of_the_call_is_no_content_filter(
    status: int, said: str, fake: Any, make: Make
) -> None:
    """It would pass for the judge's refusal of every row, which no run asks about again."""
    fake.script = lambda n, body: error(status, {"error": {"message": said}})
    completer = make(model="example/content-safety-8b")
    if status == 400:
        assert [reply.finish for reply in completer.complete([ask()])] == ["error"]
    else:
        with pytest.raises(JudgeError, match=f"status is {status}"):
            completer.complete([ask()])


@pytest.mark.parametrize(
    "finish", ["content_filter: RECITATION", "content_filter: OTHER", "BLOCKLIST", "SPII"]
)
def test_a_finish_reason_may_say_which_filter_it_was(finish: str) -> None:
    choice = {"message": {"content": "Sure, the"}, "finish_reason": finish}
    assert openai_reply.read(choice, ask()).finish == "refused"


def test_a_reply_that_an_error_ended_is_none(fake: Any, make: Make) -> None:
    """A router's provider failed half-way: the text is a part, and is asked for again."""
    cut = {"choices": [{"message": {"content": "No"}, "finish_reason": "error"}]}
    whole = {"choices": [{"message": {"content": "No: it answers."}, "finish_reason": "stop"}]}
    fake.script = lambda n, body: whole if n else cut
    (reply,) = make(max_retries=1).complete([ask()])
    assert (reply.text, reply.finish, len(fake.calls)) == ("No: it answers.", "stop", 2)
