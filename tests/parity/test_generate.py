"""LLM.generate and score against transformers, ragged batches and adapters included."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from fastsafe import LLM, SamplingParams

peft = pytest.importorskip("peft")

PROMPTS = [[5, 6, 7], [9], list(range(20, 61)), [3, 1, 4, 1, 5, 9, 2, 6], [100] * 17]


def add_tokenizer(path: Path) -> None:
    """Give a checkpoint of 128 tokens a tokenizer of words w0 to w127."""
    model = tokenizers.models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({}))


@pytest.fixture
def load(build: Callable[..., Any]) -> Callable[..., tuple[Any, LLM]]:
    def make(family: str, **options: Any) -> tuple[Any, LLM]:
        pair = build(family)
        add_tokenizer(pair.path)
        return pair, LLM(pair.path, **options)

    return make


def theirs(reference: Any, prompt: list[int], count: int) -> list[int]:
    with torch.no_grad():
        ids = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=count,
            do_sample=False,
        )
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen3", "gemma2", "gemma3", "phi3"])
def test_greedy_tokens_equal_transformers(load: Callable[..., Any], family: str) -> None:
    pair, llm = load(family)
    params = SamplingParams(max_tokens=64, ignore_eos=True)
    for prompt, got in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
        assert list(got.token_ids) == theirs(pair.reference, prompt, 64)
        assert got.finish_reason == "length"


@pytest.mark.parametrize("length", [10, 30, 47, 48, 49, 60])
def test_longrope_before_across_and_beyond_its_original_context(
    load: Callable[..., Any], length: int
) -> None:
    pair, llm = load("phi3-longrope")  # its original context is 48
    prompts = [list(range(60, 60 + length)), [5, 6, 7]]
    outs = llm.generate(prompts, SamplingParams(max_tokens=24, ignore_eos=True))
    for prompt, out in zip(prompts, outs, strict=True):
        assert list(out.token_ids) == theirs(pair.reference, prompt, 24)


@pytest.mark.parametrize("plan", ["merged", "mixed"])
def test_rows_of_different_adapters(load: Callable[..., Any], tmp_path: Path, plan: str) -> None:
    pair, llm = load("llama2", adapters=plan)
    wanted = {None: [theirs(pair.reference, p, 24) for p in PROMPTS]}
    model = pair.reference
    for i, name in enumerate(["one", "two"]):
        config = peft.LoraConfig(r=4 + i, lora_alpha=8, target_modules="all-linear")
        torch.manual_seed(i)
        model = peft.get_peft_model(model, config)
        for key, weight in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(weight, std=0.1)
        model.eval().save_pretrained(tmp_path / name)
        llm.load_adapter(tmp_path / name, name=name)
        wanted[name] = [theirs(model, p, 24) for p in PROMPTS]
        model = model.unload()
    names = [None, "one", "two"]
    outs = llm.generate(
        [p for p in PROMPTS for _ in names],
        SamplingParams(max_tokens=24, ignore_eos=True),
        adapters=names * len(PROMPTS),
    )
    for i, out in enumerate(outs):
        assert list(out.token_ids) == wanted[names[i % 3]][i // 3]
    assert wanted["one"] != wanted["two"] != wanted[None]


def test_logprobs_and_score_equal_transformers(load: Callable[..., Any]) -> None:
    pair, llm = load("gemma2")
    params = SamplingParams(max_tokens=9, ignore_eos=True, logprobs=True)
    outs = llm.generate(PROMPTS, params)
    scores = llm.score(PROMPTS, [list(out.token_ids) for out in outs])
    for prompt, out, score in zip(PROMPTS, outs, scores, strict=True):
        ids = torch.tensor([prompt + list(out.token_ids)])
        with torch.no_grad():
            want = pair.reference(ids).logits[0].log_softmax(-1)
        rows = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
        chosen = want[rows, ids[0, len(prompt) :]]
        assert torch.tensor(out.logprobs) == pytest.approx(chosen.tolist(), abs=2e-5)
        assert torch.tensor(score.token_logprobs) == pytest.approx(chosen.tolist(), abs=2e-5)
        assert score.is_greedy
        assert score.logprob == pytest.approx(chosen.sum().item(), abs=1e-4)
    other = [[(t + 1) % 128 for t in out.token_ids] for out in outs]
    assert not any(score.is_greedy for score in llm.score(PROMPTS, other))


def test_logits_equal_transformers(load: Callable[..., Any]) -> None:
    pair, llm = load("qwen2")
    with torch.no_grad():
        want = pair.reference(torch.tensor([PROMPTS[2]])).logits[0]
    got = llm.logits(PROMPTS[2])
    assert got.shape == want.shape
    assert ((got - want).abs().max() / want.abs().max()).item() < 1e-5
