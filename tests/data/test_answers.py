"""The trained tokens of a conversation are its answers, whatever the chat template does."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsafe.data.packing import encode_row
from fastsafe.errors import DataError

from .test_packing import CHATML, chat, make, trained_text

# end of text only after the last turn; {{ end }} ends each turn or, as in OLMo 3, all but the last
ENDS_ONCE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}END\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
)
PHI3, METHARME = ENDS_ONCE.replace("END", "<|end|>"), ENDS_ONCE.replace("END\n", "")
WORDS_ONLY = (
    "{% for m in messages %}{{ m.role }} {{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant {% else %}{{ eos_token }}{% endif %}"
)
OLMO3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if not loop.last or m.role != 'assistant' %}<|im_end|>\n{% else %}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
R1 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n"
    "{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.reasoning_content }}{{ m.content }}"
    "{% for call in m.tool_calls %}{{ call | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"q": "x"}}}


@pytest.mark.parametrize(
    ("template", "end", "last"),
    [
        (PHI3, "<|end|>\n", "<|end|>\n</s>"),
        (METHARME, "", "</s>"),
        (WORDS_ONLY, "\n", "\n</s>"),
        (OLMO3, "", "</s>"),
    ],
)
def test_a_template_that_ends_the_text_once(template: str, end: str, last: str) -> None:
    tokenizer = make(template, "</s>")
    contents = ["ask", "answer", "steal?", "no", "and?", "last"]
    found = trained_text(encode_row(chat(*contents), tokenizer), tokenizer)
    assert found == [f"answer{end}", f"no{end}", f"last{last}"]
    asked = trained_text(encode_row(chat(*contents[:5]), tokenizer), tokenizer)
    assert asked == [f"answer{end}", f"no{end}"]


@given(
    template=st.sampled_from([PHI3, METHARME, WORDS_ONLY, OLMO3, CHATML]),
    contents=st.lists(st.text("abu <|>\n", min_size=1, max_size=5), min_size=2, max_size=5),
)
def test_no_word_of_another_turn_is_trained(template: str, contents: list[str]) -> None:
    """Other requests behind an answer change nothing of what it trains."""
    tokenizer = make(template, "</s>", ["<|im_end|>"])
    others = [text if i % 2 else f"{text}z{i}" for i, text in enumerate(contents)]
    try:
        rows = [encode_row(chat(*texts), tokenizer) for texts in (contents, others)]
    except DataError:
        return  # an answer that runs into the next header lost its last token, and is refused
    before, after = ("".join(trained_text(row, tokenizer)) for row in rows)
    assert before == after
    for answer in contents[1::2]:
        assert "".join(answer.split()) in "".join(before.split())


def test_an_answer_that_is_not_printed_is_an_error() -> None:
    upper = CHATML.replace("m.content", "m.content | upper")
    with pytest.raises(DataError, match=r"does not print the answer of messages\[1\]"):
        encode_row(chat("ask", "answer"), make(upper))


@pytest.mark.parametrize("mark", ["weight", "train", "loss", "trainable"])
@pytest.mark.parametrize("value", [0, False])
def test_a_marked_answer_is_not_trained(mark: str, value: Any) -> None:
    tokenizer = make()
    row = chat("a", "not this", "c", "this")
    row["messages"][1][mark] = value
    assert trained_text(encode_row(row, tokenizer), tokenizer) == ["this<|im_end|>"]
    row["messages"][1][mark] = type(value)(1)
    assert len(trained_text(encode_row(row, tokenizer), tokenizer)) == 2
    row["messages"][1][mark] = value
    row["messages"][3][mark] = value
    with pytest.raises(DataError, match="trained tokens are 0"):
        encode_row(row, tokenizer)
    with pytest.raises(DataError, match="marked as not trained, and loss_on 'all'"):
        encode_row(row, tokenizer, loss_on="all")


@pytest.mark.parametrize(
    ("content", "reasoning", "trained"),
    [
        ("yes", None, "\n</think>\n\nyes<|im_end|>"),
        ("<think>\nwell\n</think>\n\nyes", None, "well\n</think>\n\nyes<|im_end|>"),
        ("<think>well</think>yes", None, "well\n</think>\n\nyes<|im_end|>"),
        ("yes", "well", "well\n</think>\n\nyes<|im_end|>"),
    ],
)
def test_an_answer_behind_a_prompt_that_opens_a_thought(
    content: str, reasoning: str | None, trained: str
) -> None:
    tokenizer = make(R1)
    row = chat("a", content)
    if reasoning:
        row["messages"][1]["thinking"] = reasoning
    example = encode_row(row, tokenizer)
    prompt = tokenizer.encode_chat(row["messages"][:1])
    assert list(example.token_ids[: len(prompt)]) == prompt
    assert trained_text(example, tokenizer) == [trained]
    assert example.trained.index(True) == len(prompt)


def test_several_answers_behind_a_prompt_that_opens_a_thought() -> None:
    tokenizer = make(R1)
    row = chat("a", "first", "b", "second")
    with pytest.raises(DataError, match=r"opens a thought .* last turn is their only answer"):
        encode_row(row, tokenizer)
    row["messages"][1]["weight"] = 0
    assert "second<|im_end|>" in trained_text(encode_row(row, tokenizer), tokenizer)[0]
    turns = row["messages"]
    split = {"prompt": turns[:3], "completion": turns[3:]}
    assert encode_row(split, tokenizer) == encode_row(row, tokenizer)
    with pytest.raises(DataError, match="opens a thought"):
        encode_row(chat("a", "first", "b"), tokenizer)


def test_a_prompt_that_opens_and_closes_a_thought() -> None:
    tokenizer = make(R1.replace("<think>\n", "<think>\n\n</think>\n\n"))
    found = trained_text(encode_row(chat("a", "yes"), tokenizer), tokenizer)
    assert found == ["yes<|im_end|>"]


def test_tools_and_their_calls_are_rendered() -> None:
    tokenizer = make(TOOLS)
    row: dict[str, Any] = chat("a", "", "b", "c")
    row["messages"][1] = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    row["messages"][2] = {"role": "tool", "content": "x", "tool_call_id": "1"}
    example = encode_row({**row, "tools": [TOOL]}, tokenizer)
    first, last = trained_text(example, tokenizer)
    assert first.startswith('{"type": "function"')
    assert "look_up" in first
    assert last == "c<|im_end|>"
    text = tokenizer.decode(example.token_ids, skip_special_tokens=False)
    assert text.startswith('[{"type"')
    as_text = '[{"type": "function", "function": {"name": "look_up", "parameters": {}}}]'
    assert encode_row({**row, "tools": as_text}, tokenizer) == example


def test_what_the_template_drops_is_an_error() -> None:
    row: dict[str, Any] = chat("a", "b")
    with pytest.raises(DataError, match="does not print the tool 'look_up'"):
        encode_row({**row, "tools": [TOOL]}, make())
    row["messages"][1]["tool_calls"] = [CALL]
    with pytest.raises(DataError, match=r"does not print the tool calls of messages\[1\]"):
        encode_row(row, make())
    thinks = chat("a", "b")
    thinks["messages"][1]["thinking"] = "because"
    with pytest.raises(DataError, match=r"does not print the reasoning of messages\[1\]"):
        encode_row(thinks, make())
    assert trained_text(encode_row(thinks, make(TOOLS)), make(TOOLS)) == ["becauseb<|im_end|>"]
    old = make(R1.replace("<think>\n", ""))
    with pytest.raises(DataError, match="does not print the reasoning"):
        encode_row(chat("a", "<think>because</think>b"), old)
