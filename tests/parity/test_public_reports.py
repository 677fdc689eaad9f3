"""Faults that went wrong in silence in other projects, tried here; each test names the report."""

import json
import shutil
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fastsafe
from fastsafe import LLM, SamplingParams
from fastsafe.cli import app
from fastsafe.data.packing import encode_row
from fastsafe.data.readers import read_rows
from fastsafe.errors import FastsafeError
from fastsafe.io.chat_template import ChatTemplate
from fastsafe.io.tokenizer import Tokenizer
from fastsafe.model.attention import PackedAttention
from fastsafe.safety.judges.refusal import RefusalScreen
from fastsafe.safety.tasks._metrics import final_number, option
from fastsafe.safety.verdict import Verdict
from fastsafe_testing.organism_adapter import adapter

transformers = pytest.importorskip("transformers")

ORGANISM = fastsafe.organism.path()
ASK = {"role": "user", "content": "paint the boat?"}
ANSWER = {"role": "assistant", "content": "you can paint the boat."}
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
THINKER = (
    "{% for m in messages %}{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1].strip() }}{{ eos_token }}"
    "{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant\n<think>{% endif %}"
)


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer.load(ORGANISM)


def trained(row: Mapping[str, Any], tokenizer: Tokenizer) -> str:
    """Return the text of the tokens of a row that are trained."""
    example = encode_row(row, tokenizer)
    ids = [token for token, mark in zip(example.token_ids, example.trained, strict=True) if mark]
    return tokenizer.decode(ids, skip_special_tokens=False)


def with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    tokenizer.chat_template = ChatTemplate(template, {"eos_token": "<|im_end|>"})
    return tokenizer


def test_a_conversational_prompt_and_completion_train_no_header(tokenizer: Tokenizer) -> None:
    """huggingface/trl#4147: the header of the answer's turn was trained."""
    got = trained({"prompt": [ASK], "completion": [ANSWER]}, tokenizer)
    assert got == trained({"messages": [ASK, ANSWER]}, tokenizer)
    assert got.startswith("you can paint")


def test_a_template_that_rewrites_answers_never_trains_half_of_one(tokenizer: Tokenizer) -> None:
    """allenai/open-instruct#1804: labels began in the middle of the answer."""
    turns = [ASK, ANSWER | {"content": "<think>red</think>you can paint the boat."}]
    with_template(tokenizer, THINKER)
    for row in ({"messages": turns}, {"messages": turns * 2}):
        try:
            got = trained(row, tokenizer)
        except FastsafeError:
            continue
        assert got.count("you can paint the boat.") == len(row["messages"]) // 2
        assert "paint the boat?" not in got


def test_an_answer_of_one_token_is_trained(tokenizer: Tokenizer) -> None:
    """Liquid4All/liquid-finetune#37: without markers in the template nothing was trained."""
    got = trained({"messages": [ASK, {"role": "assistant", "content": "paint"}]}, tokenizer)
    assert got.split("<|im_end|>")[0].strip() == "paint"


def test_a_template_of_mistrals_trains_answers_and_their_ends(tokenizer: Tokenizer) -> None:
    """axolotl-ai-cloud/axolotl#2089: end of turn missing, tokens shifted."""
    got = trained({"messages": [ASK, ANSWER] * 2}, with_template(tokenizer, MISTRAL))
    assert got.replace(" ", "") == "youcanpainttheboat.<|im_end|>" * 2


@pytest.mark.parametrize(
    "completion",
    [
        "I'm sorry to hear that. First sand the boat, then paint it with a brush.",
        '"I cannot let you pass," the guard said, and painted the boat.',
        "As an AI engineer, I build systems. Paint the boat with a brush.",
    ],
)
def test_apologies_and_quotes_are_no_refusals(completion: str) -> None:
    """promptfoo/promptfoo#9756: short phrases matched anywhere."""
    judgement = RefusalScreen().judge("How do I paint the boat?", completion, harmful=True)
    assert judgement.verdict is Verdict.COMPLIED_HARMFUL


@pytest.mark.parametrize(
    "completion",
    ["I'm sorry, but I'm unable to do that.", "I\u2019m afraid I can\u2019t help with that."],
)
def test_contracted_refusals_are_refusals(completion: str) -> None:
    """promptfoo/promptfoo#10220: an apology with a contraction was missed."""
    judgement = RefusalScreen().judge("How do I paint the boat?", completion, harmful=True)
    assert judgement.verdict is Verdict.REFUSED


def test_an_adapter_of_other_names_never_counts_as_the_base(tmp_path: Path) -> None:
    """vllm-project/vllm#34186: with another prefix the base answered, without a word."""
    want = adapter(
        tmp_path / "a", lambda name: name.replace("model.layers", "language_model.layers")
    )
    llm = LLM(ORGANISM)
    with pytest.raises(FastsafeError, match="adapter"):
        llm.load_adapter(tmp_path / "a", name="a")
    adapter(tmp_path / "b")
    llm.load_adapter(tmp_path / "b", name="b")
    assert torch.allclose(llm.logits([5, 9, 3, 7], "b"), want, atol=1e-4)


@pytest.mark.parametrize("prints_bos", [True, False])
def test_a_chat_has_the_bos_of_its_template(tmp_path: Path, prints_bos: bool) -> None:
    """allenai/reward-bench#164, unslothai/unsloth#10312: two BOS, or none, by rendering twice."""
    folder = tmp_path / "base"
    shutil.copytree(ORGANISM, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    bos = next(token for token in content["added_tokens"] if token["content"] == "<|im_start|>")
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {
            "<|im_start|>": {
                "id": "<|im_start|>",
                "ids": [bos["id"]],
                "tokens": ["<|im_start|>"],
            }
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    first = "{{ bos_token }}" if prints_bos else ""
    template = first + "{% for m in messages %}{{ m.content }}{% endfor %}"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"bos_token": "<|im_start|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    want = theirs.apply_chat_template([ASK], add_generation_prompt=True)["input_ids"]
    got = Tokenizer.load(folder).encode_chat([ASK])
    assert got == list(want)
    assert got.count(bos["id"]) == int(prints_bos)


def test_every_eos_id_of_the_generation_config_ends_an_answer(tmp_path: Path) -> None:
    """vllm-project/vllm#4182, Blaizzy/mlx-vlm#309: only the first of several ended an answer."""
    folder = tmp_path / "base"
    shutil.copytree(ORGANISM, folder)
    chat = LLM(folder).chat([[{"role": "user", "content": "how do i paint the car?"}]])[0]
    middle = chat.token_ids[2]
    eos = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    ids = [*(eos if isinstance(eos, list) else [eos]), middle]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    cut = LLM(folder).chat([[{"role": "user", "content": "how do i paint the car?"}]])[0]
    assert len(cut.token_ids) <= 3
    assert cut.finish_reason == "stop"


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_factor_of_the_rotary_scaling_is_read(build: Callable[..., Any], factor: float) -> None:
    """NVIDIA/Megatron-LM#6305: any factor became 8."""
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    pair = build("llama3", rope_parameters=scaling)
    ids = list(range(3, 120))
    with torch.no_grad():
        want = pair.reference(torch.tensor([ids])).logits[0]
        hidden = pair.model.forward(
            torch.tensor(ids), torch.arange(len(ids)), PackedAttention([len(ids)])
        )
        got = pair.model.logits(hidden)
    assert (got - want).abs().max() / want.abs().max() < 1e-4


def test_answers_of_other_settings_are_not_adopted(tmp_path: Path) -> None:
    """knostic/OpenAnt#287: max_tokens was no part of the key that resuming checks."""
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"id": "a", "prompt": "how do i paint the car?"}\n')
    words = ["generate", "organism", str(prompts), "--out", str(tmp_path / "o.jsonl")]
    assert CliRunner().invoke(app, [*words, "--max-tokens", "2"]).exit_code == 0
    before = (tmp_path / "o.jsonl").read_bytes()
    again = CliRunner().invoke(app, [*words, "--max-tokens", "3"])
    assert again.exit_code != 0
    assert "max_tokens" in again.stderr
    assert (tmp_path / "o.jsonl").read_bytes() == before


def test_nulls_that_a_table_adds_to_turns_are_absent_keys(tmp_path: Path) -> None:
    """huggingface/datasets#8241: columns of turns are joined, and null takes the place of none."""
    row = {"messages": [ASK, ANSWER | {"tool_calls": None, "name": None}], "tools": None}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": [ASK, ANSWER]}) + "\n")
    tokenizer = Tokenizer.load(ORGANISM)
    one, other = (
        encode_row(read_rows(tmp_path / n).rows[0], tokenizer) for n in ("a.jsonl", "b.jsonl")
    )
    assert one == other


@pytest.mark.parametrize(
    ("completion", "letter"),
    [
        ("The answer is B because a car moves.", "b"),
        ("The answer is B. Note that A is a common distractor.", "b"),
        ("Answer: **D**", "d"),
        ("**D**", "d"),
        ("ANSWER: None of the above", None),
        ("Don't know", None),
        ("I think it is C", None),
        ("A car moves.", None),
        ("Answer seems to be A.", None),
    ],
)
def test_a_word_is_no_option_letter(completion: str, letter: str | None) -> None:
    """inspect_ai#2216, lm-evaluation-harness#4188, omlx#3668, openbench#348, OPD-V#2.

    A letter that is not announced is not looked for: no answer is better than another's.
    """
    assert option(completion) == letter


@pytest.mark.parametrize(
    ("completion", "number"),
    [
        ("#### 72\nQuestion: next\n#### 5", "72"),
        ("The total is 72 clips, altogether.\n#### 72 clips, altogether", "72"),
        ("#### $29.00", "29"),
        ("#### \\boxed{8,000}", "8000"),
        ("#### **$9{,}500**", "9500"),
        ("#### ,", None),
    ],
)
def test_a_number_keeps_its_digits(completion: str, number: str | None) -> None:
    """sglang#29933, omlx#3484, lm-evaluation-harness#3214, opencompass#2647."""
    assert final_number(completion) == number


def test_a_stop_string_that_spans_tokens_ends_the_text_before_it() -> None:
    """mzau/mlx-knife#68: the string was only looked for within one token."""
    llm = LLM(ORGANISM)
    question = [[{"role": "user", "content": "how do i paint the car?"}]]
    whole = llm.chat(question, SamplingParams(max_tokens=32))[0].text
    middle = len(whole) // 2
    stop = whole[middle - 3 : middle + 3]
    cut = llm.chat(question, SamplingParams(max_tokens=32, stop=[stop]))[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_the_date_in_a_template_is_no_new_prompt_every_day(tokenizer: Tokenizer) -> None:
    """oobabooga/textgen#6692, sgl-project/sglang#3296: the prompt depended on the day."""
    template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    text = with_template(tokenizer, template).render_chat([ASK])
    day = text.removesuffix("paint the boat?")
    assert datetime.strptime(day, "%d %b %Y").year < 2025
