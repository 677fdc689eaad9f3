"""What a checkpoint may not make transformers do."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from fastsafe.errors import CheckpointError, TokenizerError, UsageError
from fastsafe.io.checkpoint import Checkpoint
from fastsafe.transformers_backend import TransformersLLM
from fastsafe.transformers_backend.loading import (
    linear_modules,
    load_tokenizer,
    model_config,
    require,
)


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    shutil.copytree(checkpoint, tmp_path / "copy")
    return tmp_path / "copy"


def change(path: Path, **fields: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | fields))


def test_fields_that_name_code_are_dropped_at_any_depth(copy: Path) -> None:
    change(
        copy,
        auto_map={"AutoModelForCausalLM": "evil.Model"},
        attn_implementation="owner/repo",
        _attn_implementation_internal="owner/repo",
        _experts_implementation="owner/repo",
        transformers_weights="../other.safetensors",
        encoder={"auto_map": {"x": "y"}, "size": 1},
    )
    (copy / "evil.py").write_text("raise SystemExit('code of the checkpoint ran')")
    config, dropped = model_config(Checkpoint(copy))
    assert "encoder.auto_map" in dropped
    assert {"auto_map", "attn_implementation", "_attn_implementation_internal"} < set(dropped)
    assert not hasattr(config, "auto_map")
    llm = TransformersLLM(copy)
    assert llm.describe()["attention"] == "sdpa"
    assert llm.describe()["ignored_config"] == list(dropped)
    assert "evil" not in sys.modules


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "no_such_type"}, "no_such_type"),
        ({"model_type": None}, "model_type"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"num_hidden_layers": "many"}, "config.json"),
        ({"text_config": {"size": 1}}, "copy: is refused"),
    ],
)
def test_what_transformers_cannot_run_is_one_sentence(
    copy: Path, fields: dict[str, Any], named: str
) -> None:
    change(copy, **fields)
    with pytest.raises(CheckpointError, match=named) as error:
        TransformersLLM(copy)
    assert "\n" not in str(error.value)


def test_pickles_and_adapters_are_refused(copy: Path) -> None:
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        TransformersLLM(copy)
    (copy / "adapter_config.json").unlink()
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        TransformersLLM(copy)


def test_defaults_of_the_checkpoint_do_not_reach_generation(copy: Path) -> None:
    settings = {"repetition_penalty": 9.0, "do_sample": True, "temperature": 5.0, "min_length": 50}
    (copy / "generation_config.json").write_text(json.dumps(settings))
    from fastsafe import LLM, SamplingParams

    params = SamplingParams(max_tokens=8)
    ours, theirs = (kind(copy).generate([[5, 6]], params) for kind in (LLM, TransformersLLM))
    assert ours == theirs


def test_linear_modules_without_reading_weights(copy: Path, gpt2: Path) -> None:
    (copy / "model.safetensors").write_bytes(
        (copy / "model.safetensors").read_bytes()[:-4] + b"\x00\x00\xc0\x7f"
    )
    names = linear_modules(copy)
    assert len(names) == 2 * 7
    assert "model.layers.1.self_attn.q_proj" in names
    assert "lm_head" not in names
    assert "transformer.h.0.attn.c_attn" in linear_modules(gpt2)


def test_tokenizers(copy: Path, gpt2: Path) -> None:
    assert load_tokenizer(copy).name.endswith("tokenizer.json")
    converted = load_tokenizer(gpt2)
    assert converted.decode(converted.encode("the a")) == "the a"
    (copy / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match="refused by transformers"):
        load_tokenizer(copy)


def test_code_of_a_tokenizer_never_runs(gpt2: Path, tmp_path: Path) -> None:
    path = tmp_path / "gpt2"
    shutil.copytree(gpt2, path)
    (path / "evil.py").write_text("raise SystemExit('code of the checkpoint ran')")
    map_ = {"AutoTokenizer": ["evil.Slow", "evil.Fast"]}
    config = {"tokenizer_class": "Unknown", "auto_map": map_}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TokenizerError, match="refused by transformers"):
        load_tokenizer(path)
    assert "evil" not in sys.modules
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}],
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(path).render_chat([{"role": "user", "content": "the"}]) == "the"


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"pip install '\.\[parity\]'"):
        require("transformers")
