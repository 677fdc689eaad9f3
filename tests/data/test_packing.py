from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from fastsafe.data.packing import TrainExample, encode_row
from fastsafe.errors import DataError
from fastsafe.io.tokenizer import Tokenizer

TEMPLATES = Path(__file__).parents[1] / "parity" / "chat_templates"
CONTROL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|eot_id|>", "<|end|>")
CONTROL += ("<end_of_turn>", "<start_of_turn>", "<|end_of_text|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_backend():
    """One token per byte, after the control tokens, and "\\n\\n" as one token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*CONTROL, *letters, "ĊĊ"]
    model = models.BPE({word: i for i, word in enumerate(words)}, [("Ċ", "Ċ")])
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(CONTROL))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return backend


def make(template=CHATML, eos="<|im_end|>", more_eos=()):
    backend = byte_backend()
    special = {"bos_token": "<s>"} | ({"eos_token": eos} if eos else {})
    more = [backend.token_to_id(token) for token in more_eos]
    return Tokenizer(backend, special_tokens=special, eos_ids=more, chat_template=template)


def chat(*contents, system=None):
    opening = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return {"messages": opening + turns}


def trained_text(example, tokenizer):
    """The trained stretches, as text."""
    stretches = [[]]
    for token, trained in zip(example.token_ids, example.trained, strict=True):
        if trained:
            stretches[-1].append(token)
        elif stretches[-1]:
            stretches.append([])
    return [tokenizer.decode(each, skip_special_tokens=False) for each in stretches if each]


def test_prompt_and_completion():
    tokenizer = make(eos="</s>")
    example = encode_row({"prompt": "ab", "completion": "c"}, tokenizer)
    assert tokenizer.decode(example.token_ids, skip_special_tokens=False) == "<s>abc</s>"
    assert example.trained == (False, False, False, True, True)


def test_an_ending_that_is_there_is_not_doubled():
    tokenizer = make(eos="</s>", more_eos=["<|end|>"])
    for ending in ("</s>", "<|end|>"):
        example = encode_row({"prompt": "a", "completion": f"b{ending}"}, tokenizer)
        assert trained_text(example, tokenizer) == [f"b{ending}"]


def test_without_an_end_of_text_token():
    example = encode_row({"prompt": "a", "completion": "b"}, make(eos=None))
    assert example.trained == (False, False, True)


def test_token_lists_are_taken_as_they_are():
    example = encode_row({"prompt": [5, 6], "completion": (7, 1, 1)}, make())
    assert example == TrainExample((5, 6, 7, 1, 1), (False, False, True, True, True))


def test_text_is_trained_whole():
    tokenizer = make()
    example = encode_row({"text": "abc"}, tokenizer)
    assert example.token_ids == tuple(tokenizer.encode("abc"))
    assert example.trained == (True,) * 4


@pytest.mark.parametrize("row", [chat("a", "b", "c", "d"), {"prompt": "a", "completion": "b"}])
def test_loss_on_all(row):
    tokenizer = make()
    part, whole = (encode_row(row, tokenizer, loss_on=on) for on in ("completion", "all"))
    assert whole.token_ids == part.token_ids
    assert all(whole.trained)
    assert not all(part.trained)


ENDS = {
    "alpaca": (None, "</s>"),
    "chatml_training": ("<|im_end|>", "<|im_end|>"),
    "gemma": ("<end_of_turn>", "<end_of_turn>"),
    "granite": ("<|end_of_text|>", "<|end_of_text|>"),
    "llama2": ("</s>", "</s>"),
    "llama3": ("<|eot_id|>", "<|eot_id|>"),
    "mistral": ("</s>", "</s>"),
    "olmo2": ("</s>", "</s>"),
    "phi3": ("<|end|>", "</s>"),  # and prints both after the last turn
    "phi4": ("<|im_end|>", "<|im_end|>"),
    "qwen2": ("<|im_end|>", "<|im_end|>"),
    "qwen3": ("<|im_end|>", "<|im_end|>"),
    "zephyr": ("</s>", "</s>"),
}


def test_every_template_is_listed():
    assert sorted(ENDS) == sorted(path.stem for path in TEMPLATES.glob("*.jinja"))


@pytest.mark.parametrize("family", ENDS)
def test_answers_of_every_family(family):
    printed, eos = ENDS[family]
    more = [] if printed is None else [printed]
    tokenizer = make((TEMPLATES / f"{family}.jinja").read_text(), eos, more)
    row = chat("ask", "answer", "more", "last")
    example = encode_row(row, tokenizer, location="here")
    text = tokenizer.render_chat(row["messages"], add_generation_prompt=False)
    full = tokenizer.encode(text, add_special_tokens=False)
    assert list(example.token_ids[: len(full)]) == full
    first, last = trained_text(example, tokenizer)
    thought = "<think>\n\n</think>\n\n" if family == "qwen3" else ""
    if printed is None:
        assert (first, last) == ("answer\n\n", "last\n\n</s>")
    else:
        assert first.lstrip(" ") == f"answer{' ' if family == 'llama2' else ''}{printed}"
        assert last.lstrip(" ") == f"{thought}last{' ' if family == 'llama2' else ''}{printed}"


@given(
    contents=st.lists(st.text("ab \n{}é", max_size=6), min_size=2, max_size=6),
    system=st.none() | st.text("ab \n", max_size=4),
)
def test_the_mask_covers_exactly_the_answers(contents, system):
    tokenizer = make()
    row = chat(*contents, system=system)
    example = encode_row(row, tokenizer)
    answers = [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
    # "\n\n" is one token: when an answer begins with a line break, the prompt's own is part of it.
    expected = ["\n" * answer.startswith("\n") + f"{answer}<|im_end|>" for answer in answers]
    assert trained_text(example, tokenizer) == expected
    text = tokenizer.decode(example.token_ids, skip_special_tokens=False)
    assert text == tokenizer.render_chat(row["messages"], add_generation_prompt=False)


@given(prompt=st.text(max_size=9), completion=st.text(max_size=9))
def test_the_mask_covers_exactly_the_completion(prompt, completion):
    tokenizer = make()
    example = encode_row({"prompt": prompt, "completion": completion}, tokenizer)
    border = example.trained.index(True)
    assert example.trained == (False,) * border + (True,) * (len(example.trained) - border)
    assert tokenizer.encode(prompt) == list(example.token_ids[:border])
    assert tokenizer.decode(example.token_ids[border:]) == completion


def test_an_answer_before_the_last_question_only():
    tokenizer = make()
    assert trained_text(encode_row(chat("a", "b", "c"), tokenizer), tokenizer) == ["b<|im_end|>"]


def test_reasoning_is_part_of_the_last_answer():
    tokenizer = make((TEMPLATES / "qwen3.jinja").read_text())
    row = chat("q", "<think>\nx\n</think>\n\na", "r", "<think>\ny\n</think>\n\nb")
    assert trained_text(encode_row(row, tokenizer), tokenizer) == [
        "a<|im_end|>",
        "<think>\ny\n</think>\n\nb<|im_end|>",
    ]


ODD = "{% if add_generation_prompt %}{{ messages|length }}!{% endif %}" + CHATML
LATER = (
    "{% for m in messages %}[{{ m.content if not loop.last else 'last ' ~ m.content }}]{% endfor %}"
)


@pytest.mark.parametrize(
    ("row", "tokenizer", "expected"),
    [
        (chat("a"), make(), "trained tokens are 0"),
        ({"text": ""}, make(), "trained tokens are 0"),
        ({"prompt": "a", "completion": ""}, make(eos=None), "trained tokens are 0"),
        ({"prompt": [1], "completion": []}, make(), "trained tokens are 0"),
        ({"prompt": [], "completion": [1]}, make(), "trained tokens are 0"),
        ({"prompt": [1], "completion": [999]}, make(), "a token id is 999, expected 0 to 266"),
        ({"prompt": [-1], "completion": [1]}, make(), "a token id is -1"),
        ({"messages": chat("a", "b")["messages"][1:]}, make(), "is the assistant's"),
        (chat("a", "b"), make(template=None), "chat template is missing"),
        (chat("a", "b"), make("{{ raise_exception('no') }}"), "the conversation is refused"),
        (chat("a", "b"), make(ODD), r"the prompt for messages\[1\]"),
        (chat("a", "b", "c"), make(LATER), r"messages\[1\]"),
        ({"text": "\ud800"}, make(), "encode is refused"),
        ({"rows": 1}, make(), "keys are 'rows'"),
    ],
)
def test_refused(row, tokenizer, expected):
    with pytest.raises(DataError, match=f"^here: .*{expected}"):
        encode_row(row, tokenizer, location="here")


def test_a_template_that_contradicts_itself_is_named():
    with pytest.raises(DataError, match="the chat template of tokenizer prints a conversation"):
        encode_row(chat("a", "b"), make(ODD))


def test_the_ids_may_reach_the_embedding_rows():
    tokenizer = make()
    tokenizer.check_vocab(1000)
    assert encode_row({"prompt": [1], "completion": [999]}, tokenizer).token_ids == (1, 999)
