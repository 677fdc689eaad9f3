"""The tokenizer of a checkpoint: text to token ids and back, and chat messages to a prompt.

Reads ``tokenizer.json`` with the ``tokenizers`` library; special tokens, end-of-turn ids and the
chat template come from the JSON files beside it. Code of the checkpoint never runs.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any, Self

import tokenizers

from fastsafe.errors import CheckpointError, TokenizerError
from fastsafe.io.chat_template import MAX_SOURCE_CHARS, ChatTemplate, quote
from fastsafe.io.json_file import read_object
from fastsafe.io.template_variables import check_variables

MAX_TOKENIZER_BYTES = 256 << 20  # the largest published files are under 40 MiB
MAX_CONFIG_BYTES = 16 << 20


class Tokenizer:
    """Converts text to token ids and back.

    Attributes:
        name: Path of its file, for messages.
        bos_id: Begin-of-text id, or None.
        eos_ids: Ids that end a generation; the first is the tokenizer's own end-of-text token.
        pad_id: Padding id, or None.
        vocab_size: The largest id plus 1, added tokens included.
        id_bound: Exclusive bound of the ids; the number of embedding rows after ``check_vocab``.
        chat_template: The checkpoint's default chat template, or None.
        variables: Template variables of every conversation that it renders.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        eos_ids: Sequence[int] = (),
        chat_template: str | None = None,
        name: str = "tokenizer",
    ) -> None:
        """Wrap a tokenizer of the ``tokenizers`` library.

        Args:
            backend: Its truncation and padding, which some files carry, are switched off.
            special_tokens: "bos_token", "eos_token", ... -> text, as in tokenizer_config.json.
            eos_ids: Further ids that end a generation.
            chat_template: Jinja source.
            name: For messages.

        Raises:
            TokenizerError: Two tokens have one id, or bos or eos is not a token.
        """
        backend.no_truncation()
        backend.no_padding()
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.name = name
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self._backend = backend
        self.id_bound = self.vocab_size
        self._special_tokens = dict(special_tokens or {})
        if len(set(vocabulary.values())) != len(vocabulary):
            raise TokenizerError(
                f"{name}: two tokens are the same id, expected one id each; "
                "use the file that the model's authors publish"
            )
        self.bos_id = self._special_id("bos_token")
        self.pad_id = vocabulary.get(self._special_tokens.get("pad_token", ""))
        eos_id = self._special_id("eos_token")
        self.eos_ids = tuple(dict.fromkeys([*([] if eos_id is None else [eos_id]), *eos_ids]))
        self.variables: dict[str, Any] = {}
        self.chat_template = (
            None if chat_template is None else ChatTemplate(chat_template, self._special_tokens)
        )

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Load the tokenizer of a checkpoint folder.

        Raises:
            TokenizerError: tokenizer.json is missing, too large or malformed, or one of the
                configuration files is.
        """
        folder = Path(path)
        special_tokens, chat_template = _read_config(folder)
        return cls(
            _read_backend(folder / "tokenizer.json"),
            special_tokens=special_tokens,
            eos_ids=_read_eos_ids(folder),
            chat_template=chat_template,
            name=str(folder / "tokenizer.json"),
        )

    def with_variables(self, variables: Mapping[str, Any] | None) -> Self:
        """Return a copy that renders every conversation with these template variables.

        Raises:
            UsageError: A name is reserved, or a value is no JSON.
        """
        other = copy(self)
        other.variables = check_variables(variables)
        return other

    def special_tokens(self) -> dict[int, str]:
        """Return the tokens, by id, that ``decode`` skips."""
        added = self._backend.get_added_tokens_decoder().items()
        return {token_id: token.content for token_id, token in added if token.special}

    def check_vocab(self, rows: int) -> None:
        """Check the ids against the ``rows`` of the embedding; ``encode`` then refuses ids above.

        Added tokens above the rows are allowed as long as no text holds them: Gemma 3's text models
        ship the image token of their larger siblings.

        Raises:
            TokenizerError: A token of the vocabulary proper, bos or eos has no embedding row.
        """
        vocabulary = self._backend.get_vocab(with_added_tokens=False)
        needed = [*vocabulary.values(), *self.eos_ids]
        largest = max(needed if self.bos_id is None else [*needed, self.bos_id], default=0)
        if largest >= rows:
            raise TokenizerError(
                f"{self.name}: the largest id is {largest}, expected below the {rows} embedding "
                "rows; use the tokenizer that belongs to this checkpoint"
            )
        self.id_bound = rows

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of ``text``.

        Args:
            text: Special tokens written out in it become their ids.
            add_special_tokens: Whether to add what tokenizer.json adds, usually BOS in front; a
                text that already starts with BOS gets no second one.

        Raises:
            TokenizerError: The text cannot be encoded, or a token has no embedding row.
        """
        with _rust(self.name, "encode"):
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        doubled = self.bos_id is not None and ids[:2] == [self.bos_id, self.bos_id]
        if add_special_tokens and doubled:
            with _rust(self.name, "encode"):
                plain: list[int] = self._backend.encode(text, add_special_tokens=False).ids
            if len(plain) < len(ids) and plain[0] == self.bos_id:
                ids = ids[1:]
        if max(ids, default=0) >= self.id_bound:
            bad = max(ids)
            raise TokenizerError(
                f"{self.name}: token {self._backend.id_to_token(bad)!a} is id {bad}, expected "
                f"below {self.id_bound}; the model has no embedding for it: remove it"
            )
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ``ids``; an id without a token, as in a padded embedding, is skipped.

        Raises:
            TokenizerError: An id is negative or not an integer.
        """
        with _rust(self.name, "decode"):
            text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Render a conversation to a prompt; the arguments are those of ``ChatTemplate.render``.

        Raises:
            TokenizerError: There is no chat template, or it does not render.
        """
        if self.chat_template is None:
            raise TokenizerError(
                f"{self.name}: chat template is missing, expected one in tokenizer_config.json or "
                "chat_template.jinja; use an instruction-tuned checkpoint or plain prompts"
            )
        return self.chat_template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            **{**self.variables, **variables},
        )

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """Return the token ids of a prompt; its template prints all special tokens there are."""
        return self.encode(self.render_chat(messages, **variables), add_special_tokens=False)

    def _special_id(self, kind: str) -> int | None:
        token = self._special_tokens.get(kind)
        if token is None:
            return None
        token_id: int | None = self._backend.token_to_id(token)
        if token_id is None:
            raise TokenizerError(
                f"{self.name}: {kind} is {token!a}, expected a token of the vocabulary; "
                "use the tokenizer files of one checkpoint together"
            )
        return token_id


@contextmanager
def _rust(name: str, doing: str) -> Iterator[None]:
    """Turn the Rust library's errors into a TokenizerError; its panics are no Exception."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(
            f"{name}: {doing} is refused ({quote(str(error))}), expected input and a file that "
            "the tokenizers library accepts; check both"
        ) from error


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise TokenizerError(
            f"{path.parent}: tokenizer.json is missing, expected a fast tokenizer; "
            "if the checkpoint has tokenizer.model or vocab.json, convert it with "
            "`AutoTokenizer.from_pretrained(...).save_pretrained(...)` of transformers"
        )
    size = path.stat().st_size
    if size > MAX_TOKENIZER_BYTES:
        raise TokenizerError(
            f"{path}: size is {size} bytes, expected at most {MAX_TOKENIZER_BYTES}; "
            "use the file that the model's authors publish"
        )
    with _rust(str(path), "load"):
        return tokenizers.Tokenizer.from_buffer(path.read_bytes())


def _read_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in ``path``, or an empty one if there is no such file."""
    if not path.is_file():
        return {}
    try:
        return read_object(path, MAX_CONFIG_BYTES)
    except CheckpointError as error:
        raise TokenizerError(str(error)) from error


def _read_config(folder: Path) -> tuple[dict[str, str], str | None]:
    """Read the special tokens by name, and the source of the default chat template."""
    path = folder / "tokenizer_config.json"
    config = _read_object(path)
    special = _special_tokens(config)
    if "added_tokens_decoder" not in config:  # transformers ignores the older file otherwise
        special |= _special_tokens(_read_object(folder / "special_tokens_map.json"))
    template = folder / "chat_template.jinja"
    if template.is_file():
        return special, _read_template(template)
    return special, _default_template(config.get("chat_template"), path)


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    extra = config.get("extra_special_tokens")
    named = {**config, **(extra if isinstance(extra, dict) else {})}
    texts = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in named.items()
        if name.endswith("_token")
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _read_template(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(4 * MAX_SOURCE_CHARS + 1)
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise TokenizerError(
            f"{path}: content is not UTF-8 or too large, expected at most {MAX_SOURCE_CHARS} "
            "characters; use the file that the model's authors publish"
        ) from None


def _default_template(value: Any, path: Path) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("template"), str)
        for entry in value
    ):
        return {entry["name"]: entry["template"] for entry in value}.get("default")
    raise TokenizerError(
        f"{path}: chat_template is {type(value).__name__}, expected a string or a list of "
        "{name, template}; use the file that the model's authors publish"
    )


def _read_eos_ids(folder: Path) -> list[int]:
    """Read the end-of-turn ids of generation_config.json, or else of config.json."""
    path = folder / "generation_config.json"
    if not path.is_file():
        path = folder / "config.json"
    value = _read_object(path).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(each) is int and each >= 0 for each in ids):
        raise TokenizerError(
            f"{path}: eos_token_id is {ascii(value)[:80]}, expected an id or a list of ids; "
            "use the file that the model's authors publish"
        )
    return ids
