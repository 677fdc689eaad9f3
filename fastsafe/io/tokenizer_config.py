"""The JSON and Jinja files beside tokenizer.json: named and added tokens, templates, end ids.

What counts where files disagree is what counts in transformers 5: flags of tokens are those of
tokenizer_config.json, and a chat_template.jinja comes before templates in tokenizer_config.json.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from fastsafe.errors import CheckpointError, TokenizerError, shown
from fastsafe.io.chat_template import MAX_SOURCE_CHARS
from fastsafe.io.checkpoint_file import read_file
from fastsafe.io.json_file import read_optional_object
from fastsafe.io.tokenizer_class import ClassRules

MAX_CONFIG_BYTES = 16 << 20
MAX_ADDED_TOKENS = 1 << 16
MAX_TEMPLATES = 64

_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_OURS = "use the file that the model's authors publish"


@dataclass(frozen=True)
class TokenizerConfig:
    """What the files beside tokenizer.json say.

    Attributes:
        special_tokens: Text of "bos_token", "eos_token", ...; the variables of chat templates.
        added_tokens: Tokens to add to those of tokenizer.json, in this order.
        templates: Chat templates by name.
    """

    special_tokens: Mapping[str, str]
    added_tokens: tuple[tokenizers.AddedToken, ...]
    templates: Mapping[str, str]


def read_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in ``path``, or an empty one if there is no such file."""
    try:
        return read_optional_object(path, MAX_CONFIG_BYTES) or {}
    except CheckpointError as error:
        raise TokenizerError(str(error)) from error


def read_config(
    folder: Path,
    fields: Mapping[str, Any],
    rules: ClassRules | None,
    present: Mapping[int, tokenizers.AddedToken],
) -> TokenizerConfig:
    """Read tokens and templates.

    Args:
        folder: The checkpoint.
        fields: Its tokenizer_config.json.
        rules: Of the tokenizer's class, if it rebuilds its parts.
        present: Added tokens of tokenizer.json by id.

    Raises:
        TokenizerError: A file or a token in it is malformed.
    """
    path = folder / "tokenizer_config.json"
    mapped: Mapping[str, Any] = {}
    named, extra = _named_and_extra(fields)
    if "added_tokens_decoder" in fields:
        numbered = _decoder(fields["added_tokens_decoder"], path)
    else:  # the older files, which transformers ignores otherwise
        mapped = read_object(folder / "special_tokens_map.json")
        _merge_map(mapped, named, extra, has_flags=not rules or rules.map_has_flags)
        numbered = {**_added_file(folder / "added_tokens.json", named, extra), **present}
    defaults = rules.defaults if rules else {}
    values = {**dict.fromkeys(f"{name}_token" for name in _NAMED), **defaults, **named}
    special: dict[str, tokenizers.AddedToken] = {}
    added = [numbered[index] for index in sorted(numbered)]
    known = {token.content for token in (*present.values(), *added)}
    texts: set[str] = set()  # a text counts once, an object with flags each time
    for name, value in (*values.items(), *(("extra_special_tokens", each) for each in extra)):
        if value is None:
            continue
        token = _token(value, folder / "special_tokens_map.json" if name in mapped else path, name)
        if name in values:
            special[name] = token
        if token.content not in known and not (isinstance(value, str) and value in texts):
            added.append(token)
        if isinstance(value, str):
            texts.add(value)
    named_texts = {token.content for token in special.values()}
    for token in added:
        token.special = token.special or token.content in named_texts
    if len(added) > MAX_ADDED_TOKENS + len(present):
        raise TokenizerError(
            f"{path}: {len(added)} tokens are added, expected at most {MAX_ADDED_TOKENS}; {_OURS}"
        )
    return TokenizerConfig(
        {name: token.content for name, token in special.items()},
        tuple(added),
        _templates(folder, fields),
    )


def read_eos_ids(folder: Path) -> list[int]:
    """Read the end-of-turn ids of generation_config.json, or else of config.json."""
    try:
        path = folder / "generation_config.json"
        config = read_optional_object(path, MAX_CONFIG_BYTES)
        if config is None:
            path = folder / "config.json"
            config = read_optional_object(path, MAX_CONFIG_BYTES) or {}
    except CheckpointError as error:
        raise TokenizerError(str(error)) from error
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(each) is int and each >= 0 for each in ids):
        raise TokenizerError(
            f"{path}: eos_token_id is {shown(value, 80)}, expected an id or a list of ids; {_OURS}"
        )
    return ids


def _named_and_extra(fields: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """Return values by name ("bos_token", "image_token", ...) and those without a name."""
    extra = fields.get("extra_special_tokens") or fields.get("additional_special_tokens") or []
    named = {**fields, **(extra if isinstance(extra, dict) else {})}
    return _named_alone(named), list(extra) if isinstance(extra, list) else []


def _named_alone(fields: Mapping[str, Any]) -> dict[str, Any]:
    standard = {f"{name}_token" for name in _NAMED}
    return {
        name: value
        for name, value in fields.items()
        if name in standard or (name.endswith("_token") and isinstance(value, str | dict))
    }


def _merge_map(
    mapped: Mapping[str, Any], named: dict[str, Any], extra: list[Any], *, has_flags: bool
) -> None:
    """Add the tokens of special_tokens_map.json; its named tokens come before the config's.

    Without flags, a token is its text.
    """
    for name, value in _named_alone(mapped).items():
        if has_flags and isinstance(value, dict):
            named[name] = {**value, "special": True}
        else:
            named[name] = _text(value)
    more = mapped.get("extra_special_tokens")
    if isinstance(more, dict):
        named |= more
    elif isinstance(more, list):
        extra += more
    elif not extra and isinstance(mapped.get("additional_special_tokens"), list):
        extra += mapped["additional_special_tokens"]


def _decoder(value: Any, path: Path) -> dict[int, tokenizers.AddedToken]:
    """Read ``added_tokens_decoder``: an object of tokens by id."""
    if not isinstance(value, dict) or not all(key.isascii() and key.isdigit() for key in value):
        raise TokenizerError(
            f"{path}: added_tokens_decoder is {shown(value, 80)}, expected tokens by id; {_OURS}"
        )
    return {
        int(key[:10]): _token({"special": False, **token}, path, f"added_tokens_decoder {key[:10]}")
        if isinstance(token, dict)
        else _token(None, path, f"added_tokens_decoder {key[:10]}")
        for key, token in value.items()
    }


def _added_file(
    path: Path, named: Mapping[str, Any], extra: Iterable[Any]
) -> dict[int, tokenizers.AddedToken]:
    """Read added_tokens.json: an object of ids by token."""
    ids = read_object(path)
    if not all(type(index) is int for index in ids.values()):
        raise TokenizerError(f"{path}: an id is no integer, expected ids by token; {_OURS}")
    standard = [named.get(f"{name}_token") for name in _NAMED]
    special = [
        _text(value)
        for value in (*standard, *extra)
        if not (isinstance(value, dict) and "__type" in value)
    ]
    return {
        index: tokenizers.AddedToken(text, normalized=text not in special, special=text in special)
        for text, index in ids.items()
    }


def _text(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value


def _token(value: Any, path: Path, name: str) -> tokenizers.AddedToken:
    """Make a token of a text, or of an object with "content" and flags."""
    content = _text(value)
    flags = dict(value) if isinstance(value, dict) else {}
    flags = {flag: flags[flag] for flag in _FLAGS if flag in flags}
    if not isinstance(content, str) or not all(type(flag) is bool for flag in flags.values()):
        raise TokenizerError(
            f"{path}: {name} is {shown(value, 80)}, expected a text, or an object with content "
            f"and flags; {_OURS}"
        )
    default = not isinstance(value, dict) or "__type" not in value  # so transformers writes them
    return tokenizers.AddedToken(content, **{"special": default, **flags})


def _templates(folder: Path, fields: Mapping[str, Any]) -> dict[str, str]:
    """Read the chat templates; those in files of their own replace those of the config."""
    paths = {"default": folder / "chat_template.jinja"}
    more = folder / "additional_chat_templates"
    if more.is_dir():
        paths |= {path.stem: path for path in sorted(more.glob("*.jinja"))[:MAX_TEMPLATES]}
    texts = {name: _read_template(path) for name, path in paths.items()}
    found = {name: text for name, text in texts.items() if text is not None}
    return found or _config_templates(fields.get("chat_template"), folder)


def _read_template(path: Path) -> str | None:
    try:
        data = read_file(path, 4 * MAX_SOURCE_CHARS)
        return None if data is None else data.decode()
    except CheckpointError as error:
        raise TokenizerError(str(error)) from error
    except UnicodeDecodeError:
        raise TokenizerError(
            f"{path}: content is not UTF-8, expected a Jinja template; {_OURS}"
        ) from None


def _config_templates(value: Any, folder: Path) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    named = value
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        named = {entry.get("name"): entry.get("template") for entry in value}
    if not isinstance(named, dict) or not all(
        isinstance(text, str) for item in named.items() for text in item
    ):
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'}: chat_template is {shown(value, 80)}, expected "
            f"a text, a list of {{name, template}}, or an object of templates by name; {_OURS}"
        )
    return named
