"""TransformersLLM equals LLM where both can, and runs what LLM refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsafe import LLM, SamplingParams
from fastsafe.errors import AdapterError, CheckpointError, TokenizerError, UsageError
from fastsafe.transformers_backend import TransformersLLM

PROMPTS = [[5, 6, 7], [9], list(range(20, 61)), [3, 1, 4, 1, 5, 9, 2, 6], [90] * 17]
SAMPLED = [
    SamplingParams(max_tokens=12, temperature=0.9, seed=1, logprobs=True),
    SamplingParams(max_tokens=9, temperature=0.7, top_k=5, seed=2, logprobs=True),
    SamplingParams(max_tokens=20, temperature=1.3, top_p=0.8, seed=3, logprobs=True),
    SamplingParams(max_tokens=7, temperature=1.0, min_p=0.1, seed=-4, logprobs=True),
    SamplingParams(max_tokens=1, logprobs=True),
]


def assert_same(ours: Any, theirs: Any) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a.token_ids, a.text) == (b.token_ids, b.text)
        assert (a.finish_reason, a.num_prompt_tokens) == (b.finish_reason, b.num_prompt_tokens)
        assert (a.logprobs is None) == (b.logprobs is None)
        if a.logprobs is not None:
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=40),
        SamplingParams(max_tokens=40, ignore_eos=True, logprobs=True),
        SamplingParams(max_tokens=40, stop_token_ids=(7, 30, 55), ignore_eos=True),
        SamplingParams(max_tokens=40, stop=("w3", "w5"), ignore_eos=True),
        SAMPLED,
    ],
    ids=["greedy", "ignore eos", "stop tokens", "stop texts", "sampled"],
)
def test_completions_equal_ours(llm: LLM, theirs: TransformersLLM, params: Any) -> None:
    ours = llm.generate(PROMPTS, params)
    assert_same(ours, theirs.generate(PROMPTS, params))
    if isinstance(params, SamplingParams) and (params.stop or params.stop_token_ids):
        assert "stop" in {out.finish_reason for out in ours}


def test_rows_of_different_adapters(
    llm: LLM, theirs: TransformersLLM, adapters: dict[str, Path]
) -> None:
    for name, path in adapters.items():
        llm.load_adapter(path, name)
        theirs.load_adapter(path, name)
    names = [None, *adapters]
    rows = [p for p in PROMPTS for _ in names]
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    ours = llm.generate(rows, params, names * len(PROMPTS))
    assert_same(ours, theirs.generate(rows, params, names * len(PROMPTS)))
    assert len({out.token_ids for out in ours[:3]}) == 3, "the adapters must change the answer"
    with pytest.raises(AdapterError, match="'one' is loaded already"):
        theirs.load_adapter(adapters["one"], "one")
    theirs.unload_adapter("one")
    with pytest.raises(AdapterError, match="'one' is not loaded"):
        theirs.generate([[1]], adapters=["one"])
    assert_same([ours[2]], theirs.generate(rows[2:3], params, ["two.0"]))
    theirs.unload_adapter("two.0")
    with pytest.raises(AdapterError, match="not loaded"):
        theirs.unload_adapter("two.0")
    assert_same(ours[::3], theirs.generate(PROMPTS, params))


def test_logits_and_scores_equal_ours(llm: LLM, theirs: TransformersLLM) -> None:
    want, got = llm.logits(PROMPTS[2]), theirs.logits(PROMPTS[2])
    assert got.dtype == torch.float32
    assert ((got - want).abs().max() / want.abs().max()).item() < 1e-5
    greedy = [list(out.token_ids) for out in llm.generate(PROMPTS, SamplingParams(max_tokens=5))]
    for targets in (greedy, ["w3 w9", "w1", [5], [6, 7, 8], "w80"]):
        ours, scores = llm.score(PROMPTS, targets), theirs.score(PROMPTS, targets)
        for a, b in zip(ours, scores, strict=True):
            assert a.token_logprobs == pytest.approx(b.token_logprobs, abs=1e-4)
            assert a.logprob == pytest.approx(b.logprob, abs=1e-3)
            assert a.is_greedy == b.is_greedy


def test_logprobs_of_labels_and_prompts(theirs: TransformersLLM) -> None:
    rows = theirs.prompt_logprobs(PROMPTS)
    labels = theirs.label_logprobs(PROMPTS, ["w3", 40])
    for prompt, row, label in zip(PROMPTS, rows, labels, strict=True):
        logprobs = theirs.logits(prompt).log_softmax(-1)
        assert row[0] is None
        known = [logprobs[i, token].item() for i, token in enumerate(prompt[1:])]
        assert list(row[1:]) == pytest.approx(known, abs=1e-4)
        assert label == pytest.approx(logprobs[-1, [3, 40]].tolist(), abs=1e-4)
    whole = [[8, 9, *prompt] for prompt in PROMPTS]
    shared = theirs.label_logprobs(PROMPTS, [40], shared_prefix=[8, 9])
    for one, other in zip(shared, theirs.label_logprobs(whole, [40]), strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    targets = [[5]] * len(PROMPTS)
    assert [s.logprob for s in theirs.score(PROMPTS, targets, shared_prefix="w8 w9")] == (
        pytest.approx([s.logprob for s in theirs.score(whole, targets)], abs=1e-5)
    )
    with pytest.raises(UsageError, match="label 0 is 'w1 w2', which is 2 tokens"):
        theirs.label_logprobs([[1]], ["w1 w2"])


def test_a_stream_yields_every_row_once_and_may_be_left(theirs: TransformersLLM) -> None:
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (9, 2, 5, 1, 3)]
    found = dict(theirs.stream(PROMPTS, params))
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert [len(found[i].token_ids) for i in range(5)] == [9, 2, 5, 1, 3]
    rows = theirs.stream(PROMPTS, params)
    index, first = next(rows)
    assert first == found[index]
    rows.close()
    assert theirs.generate(PROMPTS, params) == [found[i] for i in range(5)]


def test_a_row_without_finite_logits_is_an_error_and_the_others_go_on(
    theirs: TransformersLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(max_tokens=4, ignore_eos=True, logprobs=True)
    whole = theirs.generate(PROMPTS[:2], params)
    forward = type(theirs.model).forward

    def broken(self: Any, *args: Any, **options: Any) -> Any:
        out = forward(self, *args, **options)
        out.logits[0] = float("nan")
        return out

    monkeypatch.setattr(type(theirs.model), "forward", broken)
    outs = theirs.generate(PROMPTS[:2], params)
    by_reason = {out.finish_reason: out for out in outs}
    assert by_reason["error"].token_ids == ()
    assert by_reason["length"] in whole


def test_chat_uses_our_template(tmp_path: Path, checkpoint: Path) -> None:
    path = tmp_path / "chat"
    shutil.copytree(checkpoint, path)
    config = {"eos_token": "w1", "chat_template": "{{ messages[0].content }} w7"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    asked = [[{"role": "user", "content": "w5 w6"}], [{"role": "user", "content": "w9"}]]
    params = SamplingParams(max_tokens=6)
    assert_same(LLM(path).chat(asked, params), TransformersLLM(path).chat(asked, params))


def test_an_unknown_architecture_with_an_old_tokenizer(gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="--backend transformers"):
        LLM(gpt2)
    llm = TransformersLLM(gpt2, batch_size=2)
    prompts = ["the a", "abc", "the a b the a b the"]
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    outs = llm.generate(prompts, params)
    for prompt, out in zip(prompts, outs, strict=True):
        ids = torch.tensor([llm.tokenizer.encode(prompt)])
        known = llm.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, pad_token_id=0
        )
        assert list(out.token_ids) == known[0, ids.shape[1] :].tolist()
    assert llm.tokenizer.eos_ids == (27,)
    assert llm.generate([[0] * 60], params)[0].finish_reason == "length", "64 positions in all"
    with pytest.raises(UsageError, match=r"needs 65 positions, config.json gives the model 64"):
        llm.generate([[0] * 64], params)


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda llm: llm.generate("text"), UsageError, "prompts is a str"),
        (lambda llm: llm.generate([[]]), UsageError, "prompt 0 is empty"),
        (lambda llm: llm.generate([[96]]), UsageError, "token id 96"),
        (lambda llm: llm.generate([5]), UsageError, "prompt 0 is 5"),
        (lambda llm: llm.generate([[1]], [SamplingParams()] * 2), UsageError, "2 params"),
        (lambda llm: llm.generate([[1]], adapters=[None] * 2), UsageError, "adapters is 2"),
        (lambda llm: llm.generate([[1]], adapters=["no"]), AdapterError, "'no' is not loaded"),
        (lambda llm: llm.generate([[1] * 128]), UsageError, "needs 129 positions"),
        (lambda llm: llm.generate([[1]], {}), UsageError, "expected 1 SamplingParams"),
        (lambda llm: llm.chat([{"role": "user"}]), UsageError, "conversation 0 is a dict"),
        (lambda llm: llm.label_logprobs([[1]], []), UsageError, "labels is empty"),
        (lambda llm: llm.unload_adapter("no"), AdapterError, "'no' is not loaded; loaded: none"),
        (lambda llm: llm.score([[1]], []), UsageError, "0 continuations"),
        (lambda llm: llm.logits([1] * 129), UsageError, "needs 129 positions"),
        (lambda llm: llm.chat([[{"role": "user", "content": "w1"}]]), TokenizerError, "template"),
    ],
)
def test_wrong_calls_are_refused(
    theirs: TransformersLLM, call: Any, error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        call(theirs)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"dtype": "int8"}, "dtype"),
        ({"device": "tpu"}, "device"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_wrong_options_are_refused(checkpoint: Path, options: Any, named: str) -> None:
    with pytest.raises(UsageError, match=f"{named} is"):
        TransformersLLM(checkpoint, **options)


def test_adapters_that_do_not_fit_leave_nothing_behind(
    theirs: TransformersLLM, adapters: dict[str, Path], tmp_path: Path
) -> None:
    from fastsafe.io import safetensors

    before = theirs.logits([1, 2, 3])
    path = tmp_path / "bad"
    shutil.copytree(adapters["one"], path)
    tensors = safetensors.read(path / "adapter_model.safetensors")
    name = next(iter(tensors))
    for broken in (
        {k: t for k, t in tensors.items() if k != name},
        tensors | {name: tensors[name][:, :-1].contiguous()},
        tensors | {name.replace("layers.0", "layers.7"): tensors[name]},
    ):
        safetensors.write(path / "adapter_model.safetensors", broken)
        with pytest.raises(AdapterError, match="bad"):
            theirs.load_adapter(path)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["nowhere"]}))
    with pytest.raises(AdapterError, match="match no module"):
        theirs.load_adapter(path)
    assert torch.equal(theirs.logits([1, 2, 3]), before)
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="refused"):
        theirs.load_adapter(path)


def test_describe_names_the_backend(theirs: TransformersLLM) -> None:
    facts = theirs.describe()
    assert facts["backend"] == "transformers"
    assert facts["dtype"] == "float32"
    assert json.dumps(facts)
