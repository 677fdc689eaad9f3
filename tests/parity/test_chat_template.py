"""Rendered text and token ids equal transformers' over families x conversations."""

import datetime
import json
from pathlib import Path

import jinja2
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from fastsafe.errors import TokenizerError
from fastsafe.io.chat_template import FROZEN_CLOCK, ChatTemplate
from fastsafe.io.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

TEMPLATES = sorted(Path(__file__).with_name("chat_templates").glob("*.jinja"))
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
CONTROL = (
    *("<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|eot_id|>", "<|end|>", "<end_of_turn>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<|end_of_text|>"),
)


def turns(*contents, system=None):
    """Alternating turns, the user's first."""
    roles = ("user", "assistant")
    opening = [] if system is None else [{"role": "system", "content": system}]
    return opening + [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


CODE = 'def f(x):\n\treturn {"a": x}  # {{ not jinja }} {% if %}\n\n\nprint(f"<b>{f(1)}</b>")\n'
CONVERSATIONS = {
    "one turn": turns("How do I paint a car?"),
    "three turns": turns("Hi", "Hello!", "And now?", "Later.", "When?", system="Be brief."),
    "assistant last": turns("Hi", "Hello!", "Bye", "See you."),
    "empty user": turns(""),
    "empty system": turns("Hi", system=""),
    "empty assistant": turns("Hi", "", "So?"),
    "unicode": turns("Grüße, 世界 🎉 e\u0301 \u202e\u200d", "naïve ½ ﷽", "ok\u2028?", system="Ünï"),
    "code": turns(CODE, CODE, "Again", system="You write code.\n"),
    "spaces": turns("  lead and trail  \n", " \t", "\n\nx\n\n", "  y  "),
    "control words": turns("<s>[INST] <|im_end|> </s>", "<|eot_id|>", "<end_of_turn>"),
    "thoughts": turns("q", "<think>\nhm\n</think>\n\nfirst", "r", "<think>\nso\n</think>\n\nlast"),
    "reasoning": [*turns("q"), {"role": "assistant", "content": "a", "reasoning_content": "why"}],
    "old reasoning": [*turns("q"), {"role": "assistant", "content": "a", "thinking": "why"}],
    "unset keys": [{"role": "user", "content": "q", "name": None, "tool_calls": None}],
    "two users": [*turns("a"), *turns("b")],
    "assistant first": turns("a", "b")[1:],
    "tool": [*turns("a", "b"), {"role": "tool", "content": "42"}],
    "stop": turns("stop here", "never printed by one of them"),
}
TOOL = {"type": "function", "function": {"name": "grüß", "parameters": {"b": [1, 2.5], "a": None}}}


@pytest.fixture(scope="module", params=["byte level", "sentencepiece"])
def backend(request):
    """A BPE with every control token, trained on the test's own words, in either layout."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if request.param == "byte level":  # as Llama 3, Qwen, OLMo 2
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        special = [*SPECIAL.values(), *CONTROL]
    else:  # as Llama 2, Phi-3, Zephyr
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        alphabet = list("abcdefghijklmnopqrstuvwxyz▁")
        special = [*SPECIAL.values(), *CONTROL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=special,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    words = [word for rows in CONVERSATIONS.values() for turn in rows for word in split(turn)]
    words += [word for path in TEMPLATES for word in split({"content": path.read_text()})]
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    plain = json.loads(tokenizer.to_str())
    plain["added_tokens"] = [
        token for token in plain["added_tokens"] if not token["content"].startswith("<0x")
    ]
    return tokenizers.Tokenizer.from_str(json.dumps(plain))


def split(turn):
    return [f" {word}" for word in turn["content"].split()]


@pytest.fixture(scope="module", params=TEMPLATES, ids=lambda path: path.stem)
def pair(request, backend, tmp_path_factory):
    """The oracle and ours, loaded from the files that the oracle saves."""
    oracle = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=request.param.read_text(), **SPECIAL
    )
    folder = tmp_path_factory.mktemp(request.param.stem)
    oracle.save_pretrained(folder)
    return oracle, Tokenizer.load(folder)


@pytest.fixture(autouse=True)
def frozen(monkeypatch):
    class Frozen(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return FROZEN_CLOCK

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Frozen)


def expect_same(oracle, ours, messages, **options):
    try:
        text = oracle.apply_chat_template(messages, tokenize=False, **options)
    except jinja2.TemplateError:
        with pytest.raises(TokenizerError):
            ours.render_chat(messages, **options)
        return False
    assert ours.render_chat(messages, **options) == text
    ids = oracle.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    assert ours.encode(text, add_special_tokens=False) == ids
    return True


@pytest.mark.parametrize("prompted", [False, True])
def test_conversations(pair, prompted):
    oracle, ours = pair
    rendered = [
        expect_same(oracle, ours, messages, add_generation_prompt=prompted)
        for messages in CONVERSATIONS.values()
    ]
    assert sum(rendered) >= len(rendered) // 2


@pytest.mark.parametrize(
    "variables",
    [
        {"tools": [TOOL]},
        {"tools": None, "documents": None},
        {"documents": [{"title": "t", "text": "x"}]},
        {"enable_thinking": False},
        {"date_string": "1 Jan 2000"},
        {"controls": {"length": "short", "n": 1}},
    ],
    ids=lambda variables: next(iter(variables)),
)
def test_variables(pair, variables):
    oracle, ours = pair
    for name in ("one turn", "assistant last"):
        messages = CONVERSATIONS[name]
        assert expect_same(oracle, ours, messages, add_generation_prompt=True, **variables)


def test_special_tokens_and_plain_text(pair):
    oracle, ours = pair
    assert ours.bos_id == oracle.bos_token_id
    assert ours.pad_id == oracle.pad_token_id
    assert ours.eos_ids == (oracle.eos_token_id,)
    assert ours.vocab_size == len(oracle)
    for text in ("", "Hi  there\n", "世界 🎉", CODE):
        ids = oracle(text)["input_ids"]
        assert oracle.unk_token_id not in ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == oracle.decode(ids)


def test_one_bos(pair):
    oracle, ours = pair
    messages = CONVERSATIONS["one turn"]
    ids = ours.encode_chat(messages)
    text = ours.render_chat(messages)
    printed = text.startswith(oracle.bos_token)
    assert ids.count(ours.bos_id) == int(printed)
    assert ours.encode(text).count(ours.bos_id) == 1


def test_clock_is_the_frozen_one():
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {})
    messages = CONVERSATIONS["one turn"]
    assert template.render(messages) == "26 Jul 2024"


def test_generation_tag_keeps_its_whitespace_control_and_scope():
    source = (
        "{% set x = 1 %}a  {%- generation -%}\n  b{% set x = 2 %}  {%+ endgeneration %}\nc{{ x }}"
    )
    oracle = transformers.utils.chat_template_utils.render_jinja_template(
        [CONVERSATIONS["one turn"]], chat_template=source
    )[0][0]
    assert ChatTemplate(source, {}).render(CONVERSATIONS["one turn"]) == oracle
