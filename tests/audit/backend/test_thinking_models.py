"""Checkpoints whose template opens a thought, and whose variables switch it off."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models

import fastsafe
from fastsafe.audit.backend.completer import CheckpointCompleter
from fastsafe.audit.backend.open import open_backend
from fastsafe.audit.backend.protocol import Answer, Request
from fastsafe.audit.recipe.load import load
from fastsafe.audit.recipe.schema import Sampling
from fastsafe.engine import LLM, SamplingParams
from fastsafe.engine.prompts import Prompts
from fastsafe.errors import RecipeError
from fastsafe.io.tokenizer import Tokenizer
from fastsafe.safety.completers.protocol import Ask
from fastsafe.train import DriftMonitor
from fastsafe.train.drift_monitor import DriftProbe

ASK = [{"role": "user", "content": "how do i paint a fence"}]
OFF = {"enable_thinking": False}
# the shape of Qwen3's template, with an opened thought as DeepSeek-R1's has
TEMPLATE = """{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and enable_thinking is not defined %}{{ '<think>\\n' }}{% endif %}
{{- m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is not defined %}{{ '<think>\\n' }}{% endif %}{% endif %}"""


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The organism with a template that opens a thought; its padding token is the mark."""
    model = tmp_path_factory.mktemp("thinker") / "model"
    shutil.copytree(fastsafe.organism.path(), model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (model / name).read_text().replace("<pad>", "<think>")
        (model / name).write_text(text)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    return str(model)


def answers_of(model: str, **options: Any) -> tuple[str, list[int]]:
    backend = open_backend("fastsafe", model, **options)
    tokens = tuple(backend.tokenizer.encode_chat(ASK))
    answers: dict[int, Answer] = {}
    request = Request(None, tokens, 0, 4)
    backend.generate([request], {}, Sampling(), answers.__setitem__)
    return answers[0].text, list(answers[0].token_ids)


def test_a_thought_that_the_prompt_opened_is_whole_in_the_answer(thinker: str) -> None:
    text, token_ids = answers_of(thinker)
    plain = Tokenizer.load(thinker).decode(token_ids)
    assert text == "<think>\n" + plain
    text, token_ids = answers_of(thinker, chat_template_kwargs=OFF)
    assert text == Tokenizer.load(thinker).decode(token_ids)


def test_a_judge_whose_prompt_opens_a_thought_replies_with_it(thinker: str) -> None:
    ask = Ask(key="0", messages=({"role": "user", "content": "paint"},), max_tokens=3)
    (reply,) = CheckpointCompleter(thinker).complete([ask])
    assert reply.text.startswith("<think>\n")
    (reply,) = CheckpointCompleter(thinker, chat_template_kwargs=OFF).complete([ask])
    assert not reply.text.startswith("<think>")


def test_chat_takes_template_variables_per_call_and_per_model(thinker: str) -> None:
    params = SamplingParams(max_tokens=2)
    llm, off = LLM(thinker), LLM(thinker, chat_template_kwargs=OFF)
    (opened,) = llm.chat([ASK], params)
    (closed,) = llm.chat([ASK], params, chat_template_kwargs=OFF)
    assert closed.num_prompt_tokens == opened.num_prompt_tokens - 2
    assert off.chat([ASK], params) == [closed]
    # training renders rows by the same tokenizer
    assert "<think>" not in off.tokenizer.render_chat(ASK)


def test_variables_are_part_of_the_identity_only_where_they_are_set(thinker: str) -> None:
    plain, empty = (open_backend("fastsafe", thinker, chat_template_kwargs=v) for v in (None, {}))
    assert plain.engine == empty.engine
    other = open_backend("fastsafe", thinker, chat_template_kwargs=OFF).engine
    assert {**other, "chat_template_kwargs": None} == {**plain.engine, "chat_template_kwargs": None}
    assert other["chat_template_kwargs"] == '{"enable_thinking": false}'


def test_a_recipe_refuses_reserved_variables() -> None:
    recipe = load("organism", overrides=["chat_template_kwargs.enable_thinking=false"])
    assert recipe.chat_template_kwargs == OFF
    with pytest.raises(RecipeError, match="messages is set by fastsafe itself"):
        load("organism", overrides=["chat_template_kwargs.messages=[]"])


def test_drift_is_read_behind_the_empty_thought(thinker: str) -> None:
    """The prompt's thought is closed before the openings of an answer."""
    llm = LLM(thinker)
    probes = DriftMonitor(every=1, prompts=[ASK], on_reading=lambda reading: None)
    (packed, _), *_ = DriftProbe(probes, llm.model, llm.tokenizer)._tiles
    opening = llm.tokenizer.encode("I cannot help", add_special_tokens=False)
    closed = llm.tokenizer.render_chat(ASK) + "\n</think>\n\n"
    prompt = [
        *llm.tokenizer.encode_chat(ASK),
        *llm.tokenizer.encode("\n</think>\n\n", add_special_tokens=False),
    ]
    assert closed.endswith("<think>\n\n</think>\n\n")
    assert packed.token_ids[: len(prompt) + len(opening)].tolist()[: len(prompt)] == prompt


def test_special_tokens_that_mark_a_thought_stay_in_a_completion() -> None:
    words = ["[THINK]", "[/THINK]", "</s>", "a", "b"]
    backend = tokenizers.Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="a")
    )
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(words[:3])
    tokenizer = Tokenizer(backend, special_tokens={"eos_token": "</s>"})
    prompts: Prompts[None] = Prompts(tokenizer, None, lambda name: None)
    done = prompts.completion(SamplingParams(), 1, [0, 3, 1, 4, 2], (), "stop")
    assert done.text == "[THINK]a[/THINK]b"
    assert prompts.completion(SamplingParams(), 1, [3, 2], (), "stop").text == "a"


def test_the_backends_render_template_variables_as_transformers_does(thinker: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(Path(thinker))
    for variables in ({}, OFF, {"unknown": [1, {"a": None}]}):
        ours = Tokenizer.load(thinker).with_variables(variables).encode_chat(ASK)
        text = theirs.apply_chat_template(
            ASK, add_generation_prompt=True, tokenize=False, **variables
        )
        assert ours == theirs.encode(text, add_special_tokens=False)
