"""Ids and texts are AutoTokenizer's, whatever the files beside tokenizer.json say."""

import json
import random
import shutil
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

import fastsafe.organism
from fastsafe.io.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

TEXTS = (
    "the car 12 in 12",
    "</s>the car</s> the",
    "  the  car\n",
    "x <|new|> the",
    "a<|end|>  the<|new|>",
    "the  <|end|> car",
    "in<|end|>side .",
    "THE <Up> car",
    "the</s> boat<pad>x <s> a",
    "caf\u00e9 \u4f60\u597d \U0001f600",
    "a , b . it's n't ! ok ?",
    "def f(x):\n    return 1\n\n",
    "<|end|><|end|>the <|x|> 12345",
    " paint  the\tred car ",
    " ",
    "",
)
CONTENTS = ("<|end|>", "<|new|>", "</s>", "the", "<Up>")
NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "image_token")
MERGED = (("t", "h"), ("th", "e"), ("c", "a"), ("ca", "r"), ("i", "n"), ("1", "2"))


def merged(vocab: dict[str, int], space: str) -> list[tuple[str, str]]:
    merges = [*MERGED, (space, "the"), (space, "car")]
    for pair in merges:
        vocab["".join(pair)] = len(vocab)
    return merges


def byte_level() -> tokenizers.Tokenizer:
    vocab = {text: i for i, text in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merged(vocab, "\u0120")))
    digits = pre_tokenizers.Digits(individual_digits=True)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, plain])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def metaspace() -> tokenizers.Tokenizer:
    """Make the tokenizer of a Llama 2, as its tokenizer.json has it."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    texts = ["<unk>", "<s>", "</s>", *bytes_, *"\u2581abcdefghijklmnopqrstuvwxyz.,!'123"]
    vocab = {text: i for i, text in enumerate(texts)}
    merges = merged(vocab, "\u2581")
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def organism() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(Path(fastsafe.organism.path(), "tokenizer.json")))


MAKERS = {"organism": organism, "byte level": byte_level, "metaspace": metaspace}


def write(
    folder: Path, maker: str, config: dict[str, Any], model_type: str = "llama", **files: Any
) -> None:
    MAKERS[maker]().save(str(folder / "tokenizer.json"))
    files |= {"tokenizer_config": config, "config": {"model_type": model_type}}
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))


def compare(folder: Path, *, with_special: bool = False) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ours = Tokenizer.load(folder)
    assert ours.vocab_size == len(theirs)
    for text in TEXTS:
        for adds in (False, True)[: 1 + with_special]:
            ids = theirs(text, add_special_tokens=adds)["input_ids"]
            assert ours.encode(text, add_special_tokens=adds) == ids, text
        for skips in (False, True):
            assert ours.decode(ids, skips) == theirs.decode(ids, skip_special_tokens=skips), text
    for name, token in theirs.special_tokens_map.items():
        assert ours._special_tokens[name] == token


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
    ("special_tokens_map", {"eos_token": "<|end|>"}),
    ("special_tokens_map", {"additional_special_tokens": ["<|x|>"]}),
    ("special_tokens_map", {"pad_token": token("<|end|>", lstrip=True)}),
    ("special_tokens_map", {"eos_token": token("<|end|>", lstrip=True, rstrip=True)}),
    ("special_tokens_map", {"mask_token": token("<|end|>", rstrip=True)}),
    ("added_tokens", {"<|x|>": 600}),
]
BYTES = [(model, None) for model in ("llama", "qwen2", "qwen3", "mistral", "granite", "olmo2")]
BYTES += [("llama", "GPT2TokenizerFast"), ("qwen3", "Qwen2TokenizerFast")]
PIECES = [(model, None) for model in ("llama", "mistral", "phi3", "gemma", "gemma2", "gemma3_text")]
PIECES += [("llama", "LlamaTokenizer"), ("gemma2", "GemmaTokenizer")]


def cases() -> list[Any]:
    """Pair every config and every other file with some of the classes."""
    found = []
    for kind, classes in (("byte level", BYTES), ("metaspace", PIECES)):
        pairs = cycle(classes)
        for config in CONFIGS:
            found += [(kind, *next(pairs), config, {}) for _ in range(3)]
        for name, content in OTHER_FILES:
            found += [(kind, *pair, {}, {name: content}) for pair in classes]
    return found


@pytest.mark.parametrize(("maker", "model_type", "name", "config", "others"), cases())
def test_each_field_of_the_files_beside_tokenizer_json(
    tmp_path: Path,
    maker: str,
    model_type: str,
    name: str | None,
    config: dict[str, Any],
    others: dict[str, Any],
) -> None:
    named = {"tokenizer_class": name} if name else {}
    write(tmp_path, maker, config | named, model_type, **others)
    compare(tmp_path, with_special=True)


def some_flags(rng: random.Random, content: str, **more: object) -> dict[str, Any]:
    flags = ("lstrip", "rstrip", "normalized", "single_word", "special")
    return {"content": content, **{flag: rng.random() < 0.5 for flag in flags}, **more}


def generated(rng: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make a tokenizer_config.json and the older files beside it."""
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    files: dict[str, Any] = {}

    def some() -> list[str]:
        return rng.sample(CONTENTS, rng.randint(0, 3))

    if rng.random() < 0.5:
        ids = rng.sample(range(600), 5)
        config["added_tokens_decoder"] = {
            str(i): some_flags(rng, content) for i, content in zip(ids, some(), strict=False)
        }
    elif rng.random() < 0.5:
        files["added_tokens"] = {content: 700 + i for i, content in enumerate(some())}
    for name in rng.sample(NAMES, rng.randint(0, 3)):
        content = rng.choice(CONTENTS)
        config[name] = rng.choice([content, some_flags(rng, content, __type="AddedToken"), None])
        if name == "image_token":
            config[name] = content
    kind = rng.choice(["additional_special_tokens", "extra_special_tokens", "dict", None])
    if kind == "dict":
        config["extra_special_tokens"] = {f"x{i}_token": each for i, each in enumerate(some())}
    elif kind is not None:
        config[kind] = [
            rng.choice([each, some_flags(rng, each, __type="AddedToken")]) for each in some()
        ]
    if rng.random() < 0.5:
        files["special_tokens_map"] = {
            rng.choice(NAMES[:5]): rng.choice([each, some_flags(rng, each)]) for each in some()
        }
    for flag in ("add_bos_token", "add_eos_token", "legacy", "add_prefix_space"):
        if rng.random() < 0.3:
            config[flag] = rng.random() < 0.5
    for flag in ("clean_up_tokenization_spaces", "split_special_tokens"):
        if rng.random() < 0.2:
            config[flag] = True
    return config, files


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("seed", range(40))
def test_fields_of_the_files_beside_tokenizer_json_together(
    tmp_path: Path, maker: str, seed: int
) -> None:
    config, files = generated(random.Random(seed))
    write(tmp_path, maker, config, **files)
    compare(tmp_path)


@pytest.mark.parametrize("extra", [{}, {"legacy": True}, {"add_prefix_space": False}])
@pytest.mark.parametrize(
    ("maker", "model_type", "name"),
    [
        ("metaspace", "llama", "LlamaTokenizer"),
        ("metaspace", "llama", "LlamaTokenizerFast"),
        ("metaspace", "llama", "PreTrainedTokenizerFast"),
        ("metaspace", "llama", "GemmaTokenizer"),
        ("metaspace", "gemma2", "GemmaTokenizer"),
        ("metaspace", "gemma3_text", None),
        ("metaspace", "mistral", "LlamaTokenizer"),
        ("metaspace", "phi3", "LlamaTokenizerFast"),
        ("byte level", "llama", "LlamaTokenizerFast"),
        ("byte level", "llama", "GPT2Tokenizer"),
        ("byte level", "qwen2", "LlamaTokenizerFast"),
        ("byte level", "qwen3", "Qwen2TokenizerFast"),
        ("byte level", "qwen3", None),
        ("byte level", "olmo2", "GPT2Tokenizer"),
        ("byte level", "granite", "GPT2Tokenizer"),
    ],
)
def test_classes_that_rebuild_parts_of_tokenizer_json(
    tmp_path: Path, maker: str, model_type: str, name: str | None, extra: dict[str, Any]
) -> None:
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **extra}
    write(tmp_path, maker, config | ({"tokenizer_class": name} if name else {}), model_type)
    compare(tmp_path)


def test_the_shipped_tokenizer(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(Path(fastsafe.organism.path(), name), tmp_path)
    compare(tmp_path)
