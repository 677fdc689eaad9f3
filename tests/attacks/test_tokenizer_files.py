"""Hostile tokenizer files: one sentence each, whatever the Rust library does with them."""

import copy
import json
import os
import time

import pytest

from fastsafe.errors import TokenizerError
from fastsafe.io import chat_template, tokenizer, tokenizer_config, tokenizer_parts
from fastsafe.io.tokenizer import Tokenizer

GOOD = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "[UNK]": 2}, "unk_token": "[UNK]"},
}
BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 0}, "merges": [["a", "b"]]}
NESTED = '{"type":"Sequence","normalizers":[' * 200 + "]}" * 200

LOAD = {
    "duplicate id": {"model": {**GOOD["model"], "vocab": {"a": 0, "b": 0, "[UNK]": 1}}},
    "duplicate id of a merge": {"model": BPE},
    "negative id": {"model": {**GOOD["model"], "vocab": {"a": -1, "[UNK]": 1}}},
    "id above 32 bits": {"model": {**GOOD["model"], "vocab": {"a": 2**32, "[UNK]": 1}}},
    "fractional id": {"model": {**GOOD["model"], "vocab": {"a": 0.5, "[UNK]": 1}}},
    "merge of unknown tokens (panic)": {"model": {**BPE, "vocab": {"a": 0, "b": 1}}},
    "unigram without its unknown": {
        "model": {"type": "Unigram", "unk_id": 5, "vocab": [["a", 0.0]]},
    },
    "broken character map (panic)": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    },
    "broken regular expression": {
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "(a"},
            "behavior": "Isolated",
            "invert": False,
        },
    },
    "nested normalizers": {"normalizer": json.loads(NESTED)},
    "unknown part": {"decoder": {"type": "Shell", "command": "touch x"}},
    "no model": {"model": None},
    "post-processor names nothing (panic)": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        },
    },
    "pieces of no length (panic)": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "decoder that panics": {
        "decoder": {"type": "Strip", "content": "a", "start": 9**9, "stop": 9**9},
    },
    "model that drops merges at random": {
        "model": {**BPE, "vocab": {"a": 0}, "merges": [], "dropout": 0.5}
    },
    "long prefix of every piece": {
        "model": {**BPE, "vocab": {"a": 0}, "merges": [], "continuing_subword_prefix": "#" * 9999},
    },
}

# These load; the text that needs the broken part is refused.
ENCODE = {
    "no unknown token": {"model": {**GOOD["model"], "unk_token": "[MISSING]"}},
    "post-processor adds an id that is no token": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [777], "tokens": ["<s>"]}},
        },
    },
    "exponential regular expression (panic)": {
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "(a+)+$"},
            "behavior": "Isolated",
            "invert": False,
        },
    },
}


def write(folder, changes):
    (folder / "tokenizer.json").write_text(json.dumps(copy.deepcopy(GOOD) | changes))
    return folder


def sentence(caught):
    text = str(caught.value)
    assert "expected" in text
    assert "\n" not in text
    assert len(text) < 700


def test_the_good_file_is_good(tmp_path):
    assert Tokenizer.load(write(tmp_path, {})).encode("a b c") == [0, 1, 2]


@pytest.mark.parametrize("name", LOAD)
def test_refused_at_load(name, tmp_path):
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.load(write(tmp_path, LOAD[name]))
    sentence(caught)


@pytest.mark.parametrize("name", ENCODE)
def test_refused_at_encode(name, tmp_path):
    loaded = Tokenizer.load(write(tmp_path, ENCODE[name]))
    with pytest.raises(TokenizerError) as caught:
        loaded.encode("a" * 60 + "b c")
    sentence(caught)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe{}",
        b"\x00" * 64,
        b"[" * 100_000,
        json.dumps(GOOD).encode()[:-9],
        json.dumps(GOOD).encode() + b"x",
        b'{"version": "9.9"}',
    ],
    ids=["empty", "no keys", "list", "null", "utf-16", "zeros", "deep", "cut", "tail", "version"],
)
def test_malformed_file(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.load(tmp_path)
    sentence(caught)


def test_huge_file_is_refused_unread(tmp_path):
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(500 << 20)  # sparse: takes no space
    with pytest.raises(TokenizerError, match="has 524288000 bytes, expected at most"):
        Tokenizer.load(tmp_path)


def test_ids_above_the_embedding(tmp_path):
    vocabulary = {"a": 0, "b": 2**32 - 1, "[UNK]": 2}
    loaded = Tokenizer.load(write(tmp_path, {"model": {**GOOD["model"], "vocab": vocabulary}}))
    with pytest.raises(TokenizerError, match="largest id is 4294967295, expected below the 128"):
        loaded.check_vocab(128)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[1]"),
        ("tokenizer_config.json", b'{"bos_token": "a", "bos_token": "b"}'),
        ("tokenizer_config.json", b'{"x": ' + b"[" * 5000 + b"]" * 5000 + b"}"),
        ("tokenizer_config.json", b'{"chat_template": 5}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}'),
        ("tokenizer_config.json", b'{"chat_template": ["x"]}'),
        ("tokenizer_config.json", b'{"bos_token": {"content": 5, "flag": "\\u001b[31m"}}'),
        ("tokenizer_config.json", b" " * (tokenizer_config.MAX_CONFIG_BYTES + 1)),
        ("special_tokens_map.json", b"nonsense"),
        ("generation_config.json", b'{"eos_token_id": NaN}'),
        ("config.json", b"\xff"),
        ("chat_template.jinja", b"\xff\xfe"),
        ("chat_template.jinja", b"x" * (chat_template.MAX_SOURCE_CHARS + 1)),
    ],
)
def test_malformed_neighbour(file, content, tmp_path):
    write(tmp_path, {})
    (tmp_path / file).write_bytes(content)
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.load(tmp_path)
    assert "\x1b" not in str(caught.value)


def replace(content, pattern="a"):
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def regex(pattern):
    pattern = {"Regex": pattern}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def steps(kind, *parts):
    return {"type": "Sequence", kind: list(parts)}


COPIES = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2,
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {},
}
NORMALIZED = [
    {"id": 3, "content": "aaaa", "normalized": True, "special": False, "lstrip": False}
    | {"rstrip": False, "single_word": False}
]

BOMBS = {
    "normalizers": {"normalizer": steps("normalizers", *[replace("a" * 100)] * 6)},
    "normalizers and a token that they read at load": {
        "normalizer": steps("normalizers", *[replace("a" * 100)] * 6),
        "added_tokens": NORMALIZED,
    },
    "one long replacement": {"normalizer": replace("b" * 9999)},
    "replacement of nothing": {
        "normalizer": steps("normalizers", *[replace("aaa", "")] * 9),
    },
    "ligatures taken apart again": {
        "normalizer": steps("normalizers", *[replace("\ufdfa" * 9), {"type": "NFKD"}] * 3),
    },
    "long prefix": {"normalizer": {"type": "Prepend", "prepend": "a" * 9999}},
    "decoders": {"decoder": steps("decoders", *[replace("a" * 100)] * 6)},
    "nested decoders": {"decoder": steps("decoders", steps("decoders", *[replace("aa")] * 40))},
    "many steps": {"pre_tokenizer": steps("pretokenizers", *[{"type": "Whitespace"}] * 999)},
    "copies of the text": {"post_processor": steps("processors", *[COPIES] * 30)},
    "an id of no token": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": {"0x10": 1}, "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
    "counts of counts": {"pre_tokenizer": regex("((a{999}){999}){999}")},
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_at_load(name, tmp_path):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: ") as caught:
        Tokenizer.load(write(tmp_path, BOMBS[name]))
    sentence(caught)


@pytest.mark.parametrize("key", ["normalizer", "norm\\u0061lizer"])
@pytest.mark.parametrize("space", ["", " " * 99])
def test_a_bomb_behind_the_model_is_found(key, space, tmp_path):
    text = json.dumps(GOOD)
    bomb = json.dumps(BOMBS["normalizers"]["normalizer"])
    path = tmp_path / "tokenizer.json"
    path.write_text(f'{text[:-1]}, "{key}"{space}:{space}{bomb}}}')
    with pytest.raises(TokenizerError, match="expected"):
        Tokenizer.load(tmp_path)


def test_normalizers_of_published_files_are_in_bounds(tmp_path):
    quotes = [replace('"', "``"), replace('"', "''")]
    albert = [*quotes, {"type": "NFKD"}, {"type": "StripAccents"}, {"type": "Lowercase"}]
    llama = [{"type": "Prepend", "prepend": "\u2581"}, replace("\u2581", " ")]
    for parts in (albert, llama):
        folder = write(tmp_path, {"normalizer": steps("normalizers", *parts)})
        assert Tokenizer.load(folder).encode("b") in ([1], [2, 1])


@pytest.mark.parametrize(
    "changes",
    [
        LOAD["merge of unknown tokens (panic)"],
        LOAD["broken character map (panic)"],
        ENCODE["exponential regular expression (panic)"],
    ],
)
def test_panics_print_nothing(changes, tmp_path, capfd):
    with pytest.raises(TokenizerError):
        Tokenizer.load(write(tmp_path, changes)).encode("a" * 60 + "b c")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("pattern", ["a{" + "1" * 100_000, "[" * 100_000, "[a" * 50_000])
def test_a_long_pattern_is_checked_in_linear_time(pattern):
    """A quadratic search takes a minute or longer here."""
    parts = {"normalizer": replace("x", "y") | {"pattern": {"Regex": pattern}}}
    begin = time.process_time()
    tokenizer_parts.check_parts(parts)
    assert not tokenizer_parts.can_panic(parts)
    assert time.process_time() - begin < 5


def test_what_others_print_meanwhile_is_kept(capfd):
    with tokenizer._held_stderr():
        os.write(2, b"progress")
    assert capfd.readouterr().err == "progress"


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"]
)
@pytest.mark.parametrize("kind", ["fifo", "folder", "dangling link", "device"])
def test_a_file_that_cannot_be_read_is_not_taken_as_absent(name, kind, tmp_path):
    path = write(tmp_path, {}) / name
    path.unlink(missing_ok=True)
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case _:
            path.symlink_to("gone")
    with pytest.raises(TokenizerError, match=name):
        Tokenizer.load(tmp_path)
