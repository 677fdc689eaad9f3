"""The tokenizer of a checkpoint: text to token ids and back, and chat messages to a prompt.

Reads ``tokenizer.json`` with the ``tokenizers`` library; special tokens, end-of-turn ids and the
chat template come from the JSON files beside it. Code of the checkpoint never runs.
"""

import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from pathlib import Path
from typing import IO, Any, Self

import tokenizers

from fastsafe.errors import CheckpointError, TokenizerError, shown
from fastsafe.io import tokenizer_parts
from fastsafe.io.chat_template import ChatTemplate
from fastsafe.io.checkpoint_file import read_file
from fastsafe.io.template_variables import check_variables
from fastsafe.io.tokenizer_class import apply_class
from fastsafe.io.tokenizer_config import read_config, read_eos_ids, read_object

MAX_TOKENIZER_BYTES = 256 << 20  # the largest published files are under 40 MiB

_CLEAN_UP = (  # transformers' clean_up_tokenization, in its order
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


class Tokenizer:
    """Converts text to token ids and back.

    Attributes:
        name: Path of its file, for messages.
        bos_id: Begin-of-text id, or None.
        eos_ids: Ids that end a generation; the first is the tokenizer's own end-of-text token.
        pad_id: Padding id, or None.
        unk_id: Id that stands for text that the vocabulary lacks, or None if it lacks none.
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
        chat_template: str | Mapping[str, str] | None = None,
        name: str = "tokenizer",
        cleans_up_spaces: bool = False,
        may_panic: bool = False,
    ) -> None:
        """Wrap a tokenizer of the ``tokenizers`` library.

        Args:
            backend: Its truncation and padding, which some files carry, are switched off.
            special_tokens: "bos_token", "eos_token", ... -> text, as in tokenizer_config.json.
            eos_ids: Further ids that end a generation.
            chat_template: Jinja source, or several by name, of which "default" is used and
                "tool_use" where there are tools.
            name: For messages.
            cleans_up_spaces: Whether ``decode`` drops spaces before punctuation.
            may_panic: Whether a text may make the library panic, which it prints to stderr.

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
        self._cleans_up_spaces = cleans_up_spaces
        self._may_panic = may_panic
        self.unk_id = self._unk_id()
        sources = {"default": chat_template} if isinstance(chat_template, str) else chat_template
        self._templates = {
            template: ChatTemplate(source, self._special_tokens)
            for template, source in (sources or {}).items()
        }
        self.chat_template = self._templates.get("default")
        self.variables: dict[str, Any] = {}

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Load the tokenizer of a checkpoint folder.

        Raises:
            TokenizerError: tokenizer.json is missing, too large or malformed, or one of the
                configuration files is.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        backend, may_panic = _read_backend(file)
        fields = read_object(folder / "tokenizer_config.json")
        family = read_object(folder / "config.json").get("model_type", "")
        rules = apply_class(backend, fields, family if isinstance(family, str) else "")
        if rules and "added_tokens_decoder" in fields:
            backend = _with_listed(backend, fields["added_tokens_decoder"])
        config = read_config(folder, fields, rules, backend.get_added_tokens_decoder())
        with _rust(str(file), "a token of the files beside it", silent=True):
            backend.add_tokens(list(config.added_tokens))
        backend.encode_special_tokens = fields.get("split_special_tokens") is True
        forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
        is_bpe = isinstance(backend.model, tokenizers.models.BPE)
        return cls(
            backend,
            special_tokens=config.special_tokens,
            eos_ids=read_eos_ids(folder),
            chat_template=config.templates,
            name=str(file),
            cleans_up_spaces=fields.get("clean_up_tokenization_spaces") is True
            and (not is_bpe or fields.get(forced) is True),
            may_panic=may_panic,
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
        with _rust(self.name, "encode", silent=self._may_panic):
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        doubled = self.bos_id is not None and ids[:2] == [self.bos_id, self.bos_id]
        if add_special_tokens and doubled:
            with _rust(self.name, "encode", silent=self._may_panic):
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
        with _rust(self.name, "decode", silent=self._may_panic):
            text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        if self._cleans_up_spaces:
            for spaced, tight in _CLEAN_UP:
                text = text.replace(spaced, tight)
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
        template = self.chat_template
        if variables.get("tools") is not None:
            template = self._templates.get("tool_use", template)
        if template is None and self._templates:
            names = ", ".join(ascii(name)[:40] for name in list(self._templates)[:8])
            raise TokenizerError(
                f"{self.name}: chat templates are named {names}, expected one named 'default'; "
                "save the one to use as chat_template.jinja beside it"
            )
        if template is None:
            raise TokenizerError(
                f"{self.name}: chat template is missing, expected one in tokenizer_config.json or "
                "chat_template.jinja; use an instruction-tuned checkpoint or plain prompts"
            )
        return template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            **{**self.variables, **variables},
        )

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """Return the token ids of a prompt; its template prints all special tokens there are."""
        return self.encode(self.render_chat(messages, **variables), add_special_tokens=False)

    def is_unknown(self, token_id: int, text: str) -> bool:
        """Return whether ``text`` became this token because the vocabulary lacks it."""
        return token_id == self.unk_id and text != self._unk_token

    def _unk_id(self) -> int | None:
        # some checkpoints name their end of text as the unknown token, which then stands for itself
        unk = self._unk_token
        token_id: int | None = self._backend.token_to_id(unk) if unk else None
        return None if token_id in (self.bos_id, self.pad_id, *self.eos_ids) else token_id

    @property
    def _unk_token(self) -> str | None:
        unk: str | None = getattr(self._backend.model, "unk_token", None)
        return unk or self._special_tokens.get("unk_token")

    def _special_id(self, kind: str) -> int | None:
        token = self._special_tokens.get(kind)
        if not token:
            return None
        token_id: int | None = self._backend.token_to_id(token)
        if token_id is None:
            raise TokenizerError(
                f"{self.name}: {kind} is {token!a}, expected a token of the vocabulary; "
                "use the tokenizer files of one checkpoint together"
            )
        return token_id


@contextmanager
def _rust(name: str, doing: str, *, silent: bool = False) -> Iterator[None]:
    """Turn the Rust library's errors into a TokenizerError; its panics are no Exception.

    Args:
        silent: Whether to keep the lines that a panic prints from stderr.
    """
    try:
        with _held_stderr() if silent else nullcontext():
            yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(
            f"{name}: {doing} is refused ({shown(str(error), 200)}), expected input and a file "
            "that the tokenizers library accepts; check both"
        ) from error


@contextmanager
def _held_stderr() -> Iterator[None]:
    """Hold back what the process writes to stderr; it is written at the end, or dropped on error.

    Rust prints a panic there, where no Python code can catch it.
    """
    with _STDERR_LOCK:
        try:
            stderr = os.dup(2)
        except OSError:  # closed
            yield
            return
        try:
            with _memory_file() as held:
                os.dup2(held.fileno(), 2)
                try:
                    yield
                finally:
                    os.dup2(stderr, 2)
                held.seek(0)
                if written := held.read():
                    os.write(stderr, written)
        finally:
            os.close(stderr)


_STDERR_LOCK = threading.RLock()


def _memory_file() -> IO[bytes]:
    if sys.platform == "linux":  # works where there is no folder for temporary files
        return os.fdopen(os.memfd_create("stderr"), "w+b")
    return tempfile.TemporaryFile()


def _with_listed(backend: tokenizers.Tokenizer, listed: Any) -> tokenizers.Tokenizer:
    """Return a tokenizer with the added tokens that ``added_tokens_decoder`` lists, and no others.

    A class that rebuilds its parts knows these alone, special or not as they say there.
    """
    tokens = listed.values() if isinstance(listed, dict) else ()
    special = {t.get("content"): t.get("special") is True for t in tokens if isinstance(t, dict)}
    present = backend.get_added_tokens_decoder().values()
    if all(special.get(token.content) is token.special for token in present):
        return backend  # the usual case: writing out a large vocabulary takes long
    content = json.loads(backend.to_str())
    content["added_tokens"] = [
        token | {"special": special[token["content"]]}
        for token in content["added_tokens"]
        if token["content"] in special
    ]
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def _read_backend(path: Path) -> tuple[tokenizers.Tokenizer, bool]:
    """Read tokenizer.json; return it and whether one of its regular expressions may panic."""
    try:
        data = read_file(path, MAX_TOKENIZER_BYTES)
    except CheckpointError as error:
        raise TokenizerError(str(error)) from error
    if data is None:
        raise TokenizerError(
            f"{path.parent}: tokenizer.json is missing, expected a fast tokenizer; "
            "if the checkpoint has tokenizer.model or vocab.json, convert it with "
            "`AutoTokenizer.from_pretrained(...).save_pretrained(...)` of transformers"
        )
    try:
        parts = tokenizer_parts.read_parts(data)
        tokenizer_parts.check_parts(parts)
    except ValueError as error:
        raise TokenizerError(
            f"{path}: {shown(str(error), 300)[1:-1]}; use the file that the model's authors publish"
        ) from error
    with _rust(str(path), "load", silent=True):
        backend = tokenizers.Tokenizer.from_buffer(data)
    _check_model(backend.model, path)
    return backend, tokenizer_parts.can_panic(parts)


def _check_model(model: Any, path: Path) -> None:
    """Refuse a model that splits texts at random or whose work per character is out of bounds."""
    if getattr(model, "dropout", None):
        raise TokenizerError(
            f"{path}: dropout is {model.dropout:g}, expected none: it makes token ids random; "
            "remove it from the file"
        )
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        length = len(getattr(model, name, None) or "")
        if length > tokenizer_parts.MAX_ADDED_CHARS:
            raise TokenizerError(
                f"{path}: {name} has {length} characters, expected at most "
                f"{tokenizer_parts.MAX_ADDED_CHARS}; use the file that the model's authors publish"
            )
