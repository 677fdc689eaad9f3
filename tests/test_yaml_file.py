"""YAML of settings is read strictly and within bounds: every fault is one sentence."""

import re
from pathlib import Path

import pytest

from fastsafe.errors import RecipeError
from fastsafe.yaml_file import MAX_BYTES, parse_yaml, read_yaml

LEVELS = ", ".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (f"{{a0: &a0 [x], {LEVELS}}}", "aliases make it over 1048576 characters"),
        ("a: &a [*a]", "an alias stands for something that holds it"),
        ("a: &a {b: [*a]}", "an alias stands for something that holds it"),
        (f"a: &a {'y' * 1000}\nb: [{'*a,' * 2000}]", "aliases make it over"),
        ("a: *b", "found undefined alias 'b'"),
        ("a: \0", "unacceptable character #x0000"),
        ("a: \x1b[31m", "unacceptable character #x001b"),
        ('a: "\\ud800"', "lone surrogate"),
        ("a: 1\nb: !!bool x", "line 2: tag 'tag:yaml.org,2002:bool' is not supported"),
        ("a: !!int ''", "is not supported"),
        ("a: !!timestamp x", "is not supported"),
        ("a: !!map [1]", "is not supported"),
        ("a: !!binary =", "is not supported"),
        ("a: !!set {a, b}", "is not supported"),
        ("a: !!omap [a: 1]", "is not supported"),
        ("a: !!python/name:os.system", "is not supported"),
        ("a: !own x", "tag '!own' is not supported"),
        ("b: 1\nb: 2", "line 2: key 'b' is written twice"),
        ("a: [{b: 1, b: 2}]", "key 'b' is written twice"),
        ("1: a", "a key is '1', expected a text"),
        ("no: a", "a key is 'no', expected a text; put it in quotes"),
        ("? [a]\n: b", "a key is a sequence, expected a text"),
        ("? {a: b}\n: c", "a key is a mapping, expected a text"),
        ("<<: 5", "<< takes one mapping that has no << in it"),
        ("a: {<<: [{b: 1}, {b: 2}]}", "<< takes one mapping"),
        ("a: 0x_", "invalid literal"),
        ("a: " + "9" * 5000, "4300 digits"),
        ("a: =", "could not determine a constructor"),
        ("[" * 2000, "is nested too deeply, expected 64 levels"),
        ("- " * 100, "is nested too deeply, expected 64 levels"),
        ("a: [1", "line 1: "),
        ("--- a\n--- b", "expected a single document"),
    ],
)
def test_what_no_settings_need_is_refused_in_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        parse_yaml(text)
    message = str(caught.value)
    assert len(message) < 300
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: &a [1, 2]\nb: *a", {"a": [1, 2], "b": [1, 2]}),
        ("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}", {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}}),
        ("a: 2024-01-31", {"a": "2024-01-31"}),
        ("a: 2024-13-45", {"a": "2024-13-45"}),
        ("a: !!str 5", {"a": "5"}),
        ("'no': 'yes'", {"no": "yes"}),
        ("", None),
    ],
)
def test_what_settings_may_use(text: str, value: object) -> None:
    assert parse_yaml(text) == value


def test_a_file_is_named_and_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(" " * (MAX_BYTES + 1))
    with pytest.raises(RecipeError, match=rf"{path}: the file is over {MAX_BYTES} bytes"):
        read_yaml(path)
    with pytest.raises(RecipeError, match=rf"{tmp_path}: is no regular file"):
        read_yaml(tmp_path)
    path.write_text("a: !own x")
    with pytest.raises(RecipeError, match="recipe x: is not valid YAML: line 1: tag '!own'"):
        read_yaml(path, "recipe x")
