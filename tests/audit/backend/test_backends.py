"""The border to the engine: what a checkpoint's identity is made of, before anything is loaded."""

import json
import shutil
from pathlib import Path

import pytest

import fastsafe
from fastsafe.audit.backend.open import open_backend
from fastsafe.audit.backend.protocol import Answer, Job, Request
from fastsafe.errors import CheckpointError, UsageError


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"],
)
def test_what_decodes_and_ends_answers_is_part_of_the_identity(tmp_path: Path, name: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(fastsafe.organism.path(), model)
    (model / "notes.txt").write_text("no part of it")
    before = open_backend("fastsafe", str(model)).engine
    assert before == open_backend("fastsafe", "organism").engine
    if name.endswith(".jinja"):
        (model / name).write_text("{{ messages[0].content }}")
    else:
        (model / name).write_text((model / name).read_text() + "\n")
    after = open_backend("fastsafe", str(model)).engine
    assert {key for key in after if after[key] != before[key]} == {"tokenizer_sha256"}


def test_the_backend_is_part_of_the_identity() -> None:
    pytest.importorskip("peft")
    own, other = (open_backend(b, "organism") for b in ("fastsafe", "transformers"))
    differing = {key for key in own.engine if own.engine[key] != other.engine[key]}
    assert differing == {"backend"}
    assert own.tokenizer.encode_chat([{"role": "user", "content": "hi"}])


def test_both_backends_train_and_answer_alike(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from fastsafe.audit.recipe.load import load
    from fastsafe.audit.recipe.schema import Sampling

    recipe = load("organism", overrides=["training.max_steps=3"])
    training = recipe.training
    rows = [{"prompt": "How do I", "completion": f"the {word}"} for word in ("car", "boat")] * 8
    sampling = Sampling(max_tokens=6)
    found = []
    for backend in ("fastsafe", "transformers"):
        runtime = open_backend(backend, "organism")
        runtime.check_training(recipe, ["sft"])
        steps: list[int] = []
        out = tmp_path / backend
        out.mkdir()
        jobs = [Job(name, rows, 1) for name in ("one", "two")]
        trained = runtime.train(jobs, training, out, lambda done, loss, to=steps: to.append(done))
        assert steps == sorted(steps)
        assert steps[-1] == 3
        replies: dict[int, Answer] = {}
        requests = [Request(name, (5, 6, 7), 0, 8) for name in (None, "one", "two")]
        paths = {name: each.adapter_dir for name, each in trained.items()}
        runtime.generate(requests, paths, sampling, replies.__setitem__)
        found.append([replies[i] for i in range(3)])
        losses = trained["one"].losses
        found.append([round(loss, 4) for loss in losses])
        assert runtime.facts()["dtype"] == "float32"
    assert [r.text for r in found[0]] == [r.text for r in found[2]]
    assert found[1] == pytest.approx(found[3], abs=2e-4)


def test_a_quantized_base_trains_and_answers(tmp_path: Path) -> None:
    """What the recipe quantizes is what the adapters learn on and answer on."""
    from fastsafe.audit.recipe.load import load
    from fastsafe.audit.recipe.schema import Sampling
    from fastsafe.audit.run import prepare
    from fastsafe.model.nf4 import NF4Transformer

    recipe = load("organism", overrides=["quantize=nf4", "training.max_steps=3"])
    _, runtime = prepare(recipe, limit=2)
    rows = [{"prompt": "How do I", "completion": "the car"}] * 8
    trained = runtime.train([Job("one", rows, 1)], recipe.training, tmp_path, lambda *_: None)
    replies: dict[int, Answer] = {}
    path = trained["one"].adapter_dir
    assert path is not None
    requests = [Request(name, (5, 6, 7), 0, 8) for name in (None, "one")]
    runtime.generate(requests, {"one": path}, Sampling(max_tokens=6), replies.__setitem__)
    assert isinstance(runtime.llm.model, NF4Transformer)
    assert runtime.facts()["quantize"] == "nf4"
    assert [replies[i].finish_reason for i in (0, 1)] == ["length", "length"]
    plain = open_backend("fastsafe", "organism")
    assert dict(runtime.engine) == {**plain.engine, "quantize": "nf4"}
    with pytest.raises(UsageError, match="quantize: it is 'nf4' with the backend transformers"):
        open_backend("transformers", "organism", quantize="nf4")


def test_a_model_that_only_transformers_knows(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = tmp_path / "model"
    shutil.copytree(fastsafe.organism.path(), model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["Other"]}))
    with pytest.raises(CheckpointError, match="--backend transformers"):
        open_backend("fastsafe", str(model))
    runtime = open_backend("transformers", str(model))
    runtime.load()
    own = open_backend("fastsafe", "organism")
    own.load()
    assert runtime.llm.generate([[5, 6]]) == own.llm.generate([[5, 6]])
