"""Checks what callers ask, before anything runs: of the engine and of the transformers backend."""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fastsafe.data.conversation import Message
from fastsafe.engine.request import Completion, SamplingParams
from fastsafe.engine.scheduler import FinishReason
from fastsafe.errors import UsageError
from fastsafe.io.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Place = TypeVar("Place")  # what stands for an adapter


@dataclass(frozen=True)
class Asked(Generic[Place]):
    """One prompt to complete."""

    index: int
    place: Place
    tokens: list[int]
    params: SamplingParams
    limit: int  # tokens at which it ends, the prompt's included


class Prompts(Generic[Place]):
    """Turns prompts into token ids, or says in a sentence what is wrong with them.

    Args:
        tokenizer: Knows how many rows the embedding has.
        max_positions: Of the model; None where it has no limit.
        place_of: What stands for an adapter, by name, or for the base. Raises AdapterError.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_positions: int | None,
        place_of: Callable[[str | None], Place],
    ) -> None:
        self._tokenizer = tokenizer
        self._max_positions = max_positions
        self._place_of = place_of

    def encode(self, texts: Sequence[Prompt], what: str, *, special: bool) -> list[list[int]]:
        """Token ids of each; ``what`` names one of them in errors."""
        return [self._ids(text, f"{what} {i}", special) for i, text in _each(texts, f"{what}s")]

    def _ids(self, text: Prompt, what: str, special: bool) -> list[int]:
        if not isinstance(text, str):
            wanted = "a text or a list of token ids; a single prompt goes into a list of its own"
            return self.ids(text, what, wanted)
        ids = self._tokenizer.encode(text, add_special_tokens=special)
        self._check_ids(ids, what)
        return ids

    def ids(
        self, tokens: Iterable[Any], what: str, wanted: str = "a list of token ids"
    ) -> list[int]:
        """Token ids as a list, checked; ``what`` names them in errors."""
        try:
            if isinstance(tokens, str | bytes):
                raise TypeError
            ids = [operator.index(token) for token in tokens]
        except TypeError:
            raise UsageError(f"{what} is {tokens!r:.40}, expected {wanted}") from None
        self._check_ids(ids, what)
        return ids

    def prefixed(
        self, prompts: Sequence[Prompt], prefix: Prompt | None
    ) -> tuple[list[int], list[list[int]]]:
        """Token ids of what all prompts share, and of each; only the first has special tokens."""
        if prefix is None:
            return [], self.encode(prompts, "prompt", special=True)
        shared = self._ids(prefix, "shared_prefix", special=True)
        return shared, self.encode(prompts, "prompt", special=False)

    def chats(self, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
        """Token ids of each conversation through the chat template."""
        found = []
        for i, turns in _each(conversations, "conversations"):
            if isinstance(turns, str | Mapping):
                raise UsageError(
                    f"conversation {i} is a {type(turns).__name__}, expected a list of messages;"
                    " a single conversation goes into a list of its own"
                )
            found.append(self._tokenizer.encode_chat(list(turns)))
        return found

    def places(self, adapters: Sequence[str | None] | None, count: int) -> list[Place]:
        """What stands for the adapter of each row."""
        if adapters is None:
            return [self._place_of(None)] * count
        if not isinstance(adapters, list | tuple) or len(adapters) != count:
            got = len(adapters) if isinstance(adapters, list | tuple) else adapters
            raise UsageError(
                f"LLM: adapters is {got!r:.60}, expected {count} names, one per prompt"
            )
        for name in adapters:
            if not (name is None or isinstance(name, str)):
                raise UsageError(f"LLM: adapter is {name!r:.60}, expected a name or None")
        known = {name: self._place_of(name) for name in set(adapters)}
        return [known[name] for name in adapters]

    def labels(self, labels: Sequence[int | str]) -> list[int]:
        """Token id of each label; a text must be one token."""
        found: list[int] = []
        for i, label in _each(labels, "labels"):
            ids = [label]
            if isinstance(label, str):
                ids = self._tokenizer.encode(label, add_special_tokens=False)
                if len(ids) != 1:
                    raise UsageError(
                        f"label {i} is {label!r}, which is {len(ids)} tokens, expected one; "
                        "choose labels of a single token, or use score"
                    )
            found += self.ids(ids, f"label {i}", "a text or a token id")
        if not found:
            raise UsageError("label_logprobs: labels is empty, expected at least one")
        return found

    def asked(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        adapters: Sequence[str | None] | None,
    ) -> list[Asked[Place]]:
        """Everything about the rows that draw tokens."""
        encoded = self.encode(prompts, "prompt", special=True)
        count = len(encoded)
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * count
        if not isinstance(params, list | tuple) or len(params) != count:
            got = f"{len(params)} params" if isinstance(params, list | tuple) else f"{params!r:.60}"
            raise UsageError(f"generate: {got}, expected {count} SamplingParams, one per prompt")
        places = self.places(adapters, count)
        found = []
        for i, (prompt, p) in enumerate(zip(encoded, params, strict=True)):
            if not isinstance(p, SamplingParams):
                raise UsageError(f"generate: params {i} is {p!r:.60}, expected SamplingParams")
            if p.stop_token_ids:
                self._check_ids(p.stop_token_ids, f"generate: stop_token_ids of params {i}")
            self.check_context(f"generate: prompt {i}", len(prompt) + 1)
            limit = len(prompt) + int(p.max_tokens)
            if self._max_positions is not None:
                limit = min(limit, self._max_positions)
            found.append(Asked(i, places[i], prompt, p, limit))
        return found

    def stop_check(self, params: SamplingParams) -> Callable[[Sequence[int]], bool] | None:
        """Whether the drawn tokens decode to a text that ends the row; None to not ask."""
        stops = params.stop_texts
        if not stops:
            return None

        def has_stop_text(token_ids: Sequence[int]) -> bool:
            text = self._tokenizer.decode(list(token_ids))
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
        """What the caller gets for a row that drew these tokens."""
        assert params, "rows to complete have parameters"
        text = self._tokenizer.decode(list(token_ids))
        cuts = [at for at in (text.find(stop) for stop in params.stop_texts) if at >= 0]
        return Completion(
            text=text[: min(cuts)] if cuts else text,
            token_ids=tuple(token_ids),
            logprobs=tuple(logprobs) if params.logprobs else None,
            finish_reason=reason,
            num_prompt_tokens=num_prompt_tokens,
        )

    def check_context(self, what: str, num_tokens: int) -> None:
        """Refuse more tokens than the model has positions."""
        most = self._max_positions
        if most is not None and num_tokens > most:
            raise UsageError(
                f"{what} needs {num_tokens} positions, the model has {most}; shorten it"
            )

    def _check_ids(self, ids: Sequence[int], what: str) -> None:
        bound = self._tokenizer.id_bound
        if not ids:
            raise UsageError(f"{what} is empty, expected at least one token")
        if min(ids) < 0 or max(ids) >= bound:
            bad = next(t for t in ids if not 0 <= t < bound)
            raise UsageError(f"{what} has token id {bad}, expected ids in [0, {bound})")


def _each(items: Iterable[Any], what: str) -> Iterable[tuple[int, Any]]:
    """Number the items of a list; a text or a mapping is none, and neither is a single number."""
    if isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable):
        raise UsageError(f"LLM: {what} is a {type(items).__name__}, expected a list of {what}")
    return enumerate(items)
