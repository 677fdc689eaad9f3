"""Prompts: checks and encodes what callers pass, for the engine and the transformers backend."""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fastsafe.data.conversation import kind_of
from fastsafe.data.thoughts import special_marks
from fastsafe.engine.request import Completion, SamplingParams
from fastsafe.engine.scheduler import FinishReason
from fastsafe.errors import UsageError
from fastsafe.io.template_variables import check_variables
from fastsafe.io.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Conversation = Sequence[Mapping[str, object]]  # messages; see `fastsafe.data.conversation.Message`
AdapterKey = TypeVar("AdapterKey")  # how a backend addresses an adapter: by slot, or by name


@dataclass(frozen=True)
class EncodedRequest(Generic[AdapterKey]):
    """One prompt to complete."""

    index: int
    adapter: AdapterKey
    tokens: list[int]
    params: SamplingParams
    max_tokens_total: int  # length at which it ends, the prompt included


@dataclass(frozen=True)
class ScoringRequest(Generic[AdapterKey]):
    """One sequence whose tokens after position ``logits_from`` are scored."""

    adapter: AdapterKey
    tokens: list[int]
    logits_from: int


class Prompts(Generic[AdapterKey]):
    """Encodes prompts to token ids; what is wrong with one is a UsageError of one sentence.

    Args:
        tokenizer: Encodes texts, and bounds token ids.
        max_positions: Context length of the model; None for no limit.
        adapter_key: Returns the key of an adapter by name, or of the base for None. Raises
            AdapterError.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_positions: int | None,
        adapter_key: Callable[[str | None], AdapterKey],
    ) -> None:
        self._tokenizer = tokenizer
        self._max_positions = max_positions
        self._adapter_key = adapter_key
        special_tokens = tokenizer.special_tokens()
        marks = special_marks(special_tokens.values())
        self._marks = {token: text for token, text in special_tokens.items() if text in marks}

    def encode(self, texts: Sequence[Prompt], noun: str, *, special: bool) -> list[list[int]]:
        """Encode each text; errors call one of them ``noun``."""
        return [
            self._encode_one(text, f"{noun} {i}", special)
            for i, text in _enumerate(texts, f"{noun}s")
        ]

    def _encode_one(self, text: Prompt, noun: str, special: bool) -> list[int]:
        if not isinstance(text, str):
            expected = "a text or a list of token ids; a single prompt goes into a list of its own"
            return self.ids(text, noun, expected)
        ids = self._tokenizer.encode(text, add_special_tokens=special)
        self._check_ids(ids, noun)
        return ids

    def ids(
        self, tokens: Iterable[Any], noun: str, expected: str = "a list of token ids"
    ) -> list[int]:
        """Check token ids and return them as a list; errors call them ``noun``."""
        try:
            if isinstance(tokens, str | bytes):
                raise TypeError
            ids = [operator.index(token) for token in tokens]
        except TypeError:
            raise UsageError(f"{noun} is {tokens!r:.40}, expected {expected}") from None
        self._check_ids(ids, noun)
        return ids

    def prefixed(
        self, prompts: Sequence[Prompt], prefix: Prompt | None
    ) -> tuple[list[int], list[list[int]]]:
        """Encode a shared prefix, with special tokens, and the prompts that follow it, without."""
        if prefix is None:
            return [], self.encode(prompts, "prompt", special=True)
        shared = self._encode_one(prefix, "shared_prefix", special=True)
        return shared, self.encode(prompts, "prompt", special=False)

    def chats(
        self,
        conversations: Sequence[Conversation],
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[list[int]]:
        """Encode each conversation through the chat template, with variables of the template."""
        variables = check_variables(chat_template_kwargs, "chat: chat_template_kwargs")
        encoded = []
        for i, messages in _enumerate(conversations, "conversations"):
            if isinstance(messages, str | Mapping):
                raise UsageError(
                    f"conversation {i} is a {type(messages).__name__}, expected a list of messages;"
                    " a single conversation goes into a list of its own"
                )
            kind_of({"messages": list(messages)}, f"conversation {i}")
            encoded.append(self._tokenizer.encode_chat(list(messages), **variables))
        return encoded

    def adapter_keys(self, adapters: Sequence[str | None] | None, count: int) -> list[AdapterKey]:
        """Look up the adapter of each of ``count`` rows; None takes the base for all."""
        if adapters is None:
            return [self._adapter_key(None)] * count
        if not isinstance(adapters, list | tuple) or len(adapters) != count:
            got = len(adapters) if isinstance(adapters, list | tuple) else adapters
            raise UsageError(
                f"LLM: adapters is {got!r:.60}, expected {count} names, one per prompt"
            )
        for name in adapters:
            if not (name is None or isinstance(name, str)):
                raise UsageError(f"LLM: adapter is {name!r:.60}, expected a name or None")
        keys = {name: self._adapter_key(name) for name in set(adapters)}
        return [keys[name] for name in adapters]

    def labels(self, labels: Sequence[int | str]) -> list[int]:
        """Return the token id of each label; a text must be one token, known, and no other's."""
        label_ids: list[int] = []
        for i, label in _enumerate(labels, "labels"):
            ids = [label]
            if isinstance(label, str):
                ids = self._tokenizer.encode(label, add_special_tokens=False)
                if len(ids) != 1:
                    raise UsageError(
                        f"label {i} is {label!r}, which is {len(ids)} tokens, expected one; "
                        "choose labels of a single token, or use score"
                    )
                if self._tokenizer.is_unknown(ids[0], label):
                    raise UsageError(
                        f"label {i} is {label!r}, which the tokenizer does not know, expected a "
                        "token of its vocabulary; many begin with a space"
                    )
            label_ids += self.ids(ids, f"label {i}", "a text or a token id")
        if not label_ids:
            raise UsageError("label_logprobs: labels is empty, expected at least one")
        for i, token in enumerate(label_ids):
            first = label_ids.index(token)
            if first != i:
                raise UsageError(
                    f"labels {first} and {i}, {labels[first]!r} and {labels[i]!r}, are both token "
                    f"{token}, expected different tokens; drop one, or use score"
                )
        return label_ids

    def requests(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        adapters: Sequence[str | None] | None,
    ) -> list[EncodedRequest[AdapterKey]]:
        """Check the arguments of ``generate`` and encode its prompts."""
        encoded = self.encode(prompts, "prompt", special=True)
        count = len(encoded)
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * count
        if not isinstance(params, list | tuple) or len(params) != count:
            got = f"{len(params)} params" if isinstance(params, list | tuple) else f"{params!r:.60}"
            raise UsageError(f"generate: {got}, expected {count} SamplingParams, one per prompt")
        keys = self.adapter_keys(adapters, count)
        requests = []
        for i, (prompt, p) in enumerate(zip(encoded, params, strict=True)):
            if not isinstance(p, SamplingParams):
                raise UsageError(f"generate: params {i} is {p!r:.60}, expected SamplingParams")
            if p.stop_token_ids:
                self._check_ids(p.stop_token_ids, f"generate: stop_token_ids of params {i}")
            self.check_context(f"generate: prompt {i}", len(prompt) + 1)
            max_tokens_total = len(prompt) + int(p.max_tokens)
            if self._max_positions is not None:
                max_tokens_total = min(max_tokens_total, self._max_positions)
            requests.append(EncodedRequest(i, keys[i], prompt, p, max_tokens_total))
        return requests

    def scoring_requests(
        self,
        noun: str,
        rows: Sequence[list[int]],
        starts: Sequence[int],
        adapters: Sequence[str | None] | None,
    ) -> list[ScoringRequest[AdapterKey]]:
        """Check the lengths and adapters of rows that are scored after ``starts``."""
        keys = self.adapter_keys(adapters, len(rows))
        for i, row in enumerate(rows):
            self.check_context(f"{noun} {i}", len(row))
        return [ScoringRequest(*request) for request in zip(keys, rows, starts, strict=True)]

    def stop_check(self, params: SamplingParams) -> Callable[[Sequence[int]], bool] | None:
        """Return a test whether sampled tokens decode to a stop text; None without stop texts."""
        stops = params.stop_texts
        if not stops:
            return None

        def has_stop_text(token_ids: Sequence[int]) -> bool:
            text = self._decode(token_ids)
            return any(stop in text for stop in stops)

        return has_stop_text

    def completion(
        self,
        params: SamplingParams | None,
        num_prompt_tokens: int,
        token_ids: Sequence[int],
        logprobs: Sequence[float],
        reason: FinishReason,
    ) -> Completion:
        """Decode the sampled tokens of a row and cut its text before a stop text."""
        assert params, "rows to complete have parameters"
        text = self._decode(token_ids)
        cuts = [at for at in (text.find(stop) for stop in params.stop_texts) if at >= 0]
        return Completion(
            text=text[: min(cuts)] if cuts else text,
            token_ids=tuple(token_ids),
            logprobs=tuple(logprobs) if params.logprobs else None,
            finish_reason=reason,
            num_prompt_tokens=num_prompt_tokens,
        )

    def _decode(self, token_ids: Sequence[int]) -> str:
        """Decode sampled tokens; of the special ones, those that mark a thought stay."""
        ids = list(token_ids)
        if self._marks.keys().isdisjoint(ids):
            return self._tokenizer.decode(ids)
        parts = []
        begin = 0
        for at, token in enumerate(ids):
            if token in self._marks:
                parts += [self._tokenizer.decode(ids[begin:at]), self._marks[token]]
                begin = at + 1
        return "".join([*parts, self._tokenizer.decode(ids[begin:])])

    def check_context(self, noun: str, num_tokens: int) -> None:
        """Refuse more tokens than the model has positions."""
        limit = self._max_positions
        if limit is not None and num_tokens > limit:
            raise UsageError(
                f"{noun} needs {num_tokens} positions, config.json gives the model {limit}; "
                "shorten it"
            )

    def _check_ids(self, ids: Sequence[int], noun: str) -> None:
        bound = self._tokenizer.id_bound
        if not ids:
            raise UsageError(f"{noun} is empty, expected at least one token")
        if min(ids) < 0 or max(ids) >= bound:
            bad = next(t for t in ids if not 0 <= t < bound)
            raise UsageError(f"{noun} has token id {bad}, expected ids in [0, {bound})")


def _enumerate(items: Iterable[Any], nouns: str) -> Iterable[tuple[int, Any]]:
    """Enumerate a list argument; reject a bare string, mapping or number with a UsageError."""
    if isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable):
        raise UsageError(f"LLM: {nouns} is a {type(items).__name__}, expected a list of {nouns}")
    return enumerate(items)
