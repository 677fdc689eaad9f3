"""Ids and texts are AutoTokenizer's, whatever the files beside tokenizer.json say."""

import json
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from fastsafe.io.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

CORPUS = [
    "paint the boat, the car's red <|end|> and 12 doors\n  with spaces",
    "def f(x):\n    return x + 1",
    "caf\u00e9 \u4f60\u597d \U0001f600 the boat",
] * 3
TEXTS = [
    "the boat <|end|> car",
    " paint  the\tred car ",
    "the</s> boat<pad>x <s> a",
    "caf\u00e9 \u4f60\u597d \U0001f600",
    "a , b . it's n't ! ok ?",
    "def f(x):\n    return 1\n\n",
    "<|end|><|end|>the <|x|> 12345",
    "The BOAT",
    " ",
    "",
]


def token(content: str, **flags: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return {"content": content, **plain, **flags}


def listed(index: int, content: str, **flags: bool) -> dict[str, Any]:
    return {"added_tokens_decoder": {str(index): {"special": True, **token(content, **flags)}}}


CONFIGS: list[dict[str, Any]] = [
    {},
    {"eos_token": "</s>", "bos_token": "<s>"},
    {"bos_token": {"__type": "AddedToken", **token("<s>", rstrip=True)}},
    {"pad_token": "<|end|>"},
    {"additional_special_tokens": ["<|end|>", "<|x|>"]},
    {"extra_special_tokens": ["<|x|>"]},
    {"extra_special_tokens": {"image_token": "<|x|>"}},
    listed(500, "<|end|>", lstrip=True, rstrip=True),
    listed(500, "boat", special=False, normalized=True, single_word=True),
    listed(1, "<s>", special=False, rstrip=True),
    {"clean_up_tokenization_spaces": True},
    {"add_bos_token": True, "bos_token": "<s>"},
    {"add_bos_token": False, "bos_token": "<s>"},
    {"add_bos_token": True, "add_eos_token": True, "bos_token": "<s>", "eos_token": "</s>"},
    {"add_prefix_space": True},
    {"add_prefix_space": False},
    {"legacy": True},
    {"legacy": False},
    {"unk_token": None, "pad_token": None},
    {"sep_token": "<|x|>", "cls_token": "<|end|>"},
    {"mask_token": {"__type": "AddedToken", **token("<|m|>", lstrip=True)}},
    {"split_special_tokens": True},
    {"do_lower_case": True},
]
OTHER_FILES: list[tuple[str, dict[str, Any]]] = [
    ("special_tokens_map.json", {"eos_token": "<|end|>"}),
    ("special_tokens_map.json", {"additional_special_tokens": ["<|x|>"]}),
    ("special_tokens_map.json", {"pad_token": token("<|end|>", lstrip=True)}),
    ("special_tokens_map.json", {"eos_token": token("<|end|>", lstrip=True, rstrip=True)}),
    ("special_tokens_map.json", {"mask_token": token("<|end|>", rstrip=True)}),
    ("added_tokens.json", {"<|x|>": 600}),
]
BYTES = [(model, None) for model in ("llama", "qwen2", "qwen3", "mistral", "granite", "olmo2")]
BYTES += [("llama", "GPT2TokenizerFast"), ("qwen3", "Qwen2TokenizerFast")]
PIECES = [(model, None) for model in ("llama", "mistral", "phi3", "gemma", "gemma2", "gemma3_text")]
PIECES += [("llama", "LlamaTokenizer"), ("gemma2", "GemmaTokenizer")]


@pytest.fixture(scope="module")
def backends() -> dict[str, str]:
    """tokenizer.json of bytes, as of Qwen and Llama 3, and of pieces, as of Llama 2 and Gemma."""
    of_bytes = tokenizers.Tokenizer(models.BPE())
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    of_bytes.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    of_bytes.train_from_iterator(CORPUS, trainer)
    of_pieces = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    of_pieces.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    of_pieces.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    of_pieces.train_from_iterator(CORPUS, trainer)
    of_pieces.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    content = json.loads(of_pieces.to_str())
    added = content["added_tokens"]
    content["added_tokens"] = [t for t in added if not t["content"].startswith("<0x")]
    return {"bytes": of_bytes.to_str(), "pieces": json.dumps(content)}


def cases() -> list[Any]:
    """Pair every config and every other file with some of the classes."""
    found = []
    for kind, classes in (("bytes", BYTES), ("pieces", PIECES)):
        pairs = cycle(classes)
        for config in CONFIGS:
            found += [(kind, *next(pairs), config, {}) for _ in range(3)]
        for name, content in OTHER_FILES:
            found += [(kind, *pair, {}, {name: content}) for pair in classes]
    return found


@pytest.mark.parametrize(("kind", "model", "class_name", "config", "others"), cases())
def test_ids_and_texts_are_those_of_transformers(
    backends: dict[str, str],
    tmp_path: Path,
    kind: str,
    model: str,
    class_name: str | None,
    config: dict[str, Any],
    others: dict[str, Any],
) -> None:
    named = {"tokenizer_class": class_name} if class_name else {}
    files: dict[str, Any] = {
        "tokenizer_config.json": config | named,
        "config.json": {"model_type": model},
        **others,
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "tokenizer.json").write_text(backends[kind])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.load(tmp_path)
    for text in TEXTS:
        for adds in (True, False):
            ids = theirs(text, add_special_tokens=adds)["input_ids"]
            assert ours.encode(text, add_special_tokens=adds) == ids
        for skips in (True, False):
            assert ours.decode(ids, skips) == theirs.decode(ids, skip_special_tokens=skips)
