"""Checks what callers ask, before anything runs, and makes rows of it."""

import operator
from collections.abc import Callable, Mapping, Sequence

from fastsafe.engine.request import Completion, SamplingParams
from fastsafe.engine.scheduler import FinishReason, Row
from fastsafe.errors import UsageError
from fastsafe.io.tokenizer import Tokenizer
from fastsafe.model.config import ModelConfig
from fastsafe.model.lora import AdapterBank

Prompt = str | Sequence[int]


class Prompts:
    """Turns prompts into token ids and rows, or says in a sentence what is wrong with them."""

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig, bank: AdapterBank) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._bank = bank

    def encode(self, texts: Sequence[Prompt], what: str, *, special: bool) -> list[list[int]]:
        """Token ids of each; ``what`` names one of them in errors."""
        if isinstance(texts, str | Mapping):
            raise UsageError(
                f"LLM: {what}s is a {type(texts).__name__}, expected a list of {what}s"
            )
        encoded = []
        for i, text in enumerate(texts):
            if isinstance(text, str):
                ids = self._tokenizer.encode(text, add_special_tokens=special)
            else:
                try:
                    ids = [operator.index(token) for token in text]
                except TypeError:
                    raise UsageError(
                        f"{what} {i} is {text!r:.40}, expected a text or a list of token ids; "
                        f"a single {what} goes into a list of its own"
                    ) from None
            self.check_ids(f"{what} {i}", ids)
            encoded.append(ids)
        return encoded

    def prefixed(
        self, prompts: Sequence[Prompt], prefix: Prompt | None
    ) -> tuple[list[int], list[list[int]]]:
        """Token ids of what all prompts share, and of each; only the first has special tokens."""
        if prefix is None:
            return [], self.encode(prompts, "prompt", special=True)
        shared = self.encode([prefix], "shared_prefix", special=True)[0]
        return shared, self.encode(prompts, "prompt", special=False)

    def slots(self, adapters: Sequence[str | None] | None, count: int) -> list[int]:
        """Slot of each row's adapter."""
        if adapters is None:
            return [self._bank.slot(None)] * count
        if isinstance(adapters, str) or len(adapters) != count:
            got = adapters if isinstance(adapters, str) else len(adapters)
            raise UsageError(f"LLM: adapters is {got!r}, expected {count} names, one per prompt")
        known = {name: self._bank.slot(name) for name in set(adapters)}
        return [known[name] for name in adapters]

    def labels(self, labels: Sequence[int | str]) -> list[int]:
        """Token id of each label; a text must be one token."""
        found: list[int] = []
        for i, label in enumerate(labels):
            if isinstance(label, int):
                ids = [label]
            else:
                ids = self._tokenizer.encode(label, add_special_tokens=False)
                if len(ids) != 1:
                    raise UsageError(
                        f"label {i} is {label!r}, which is {len(ids)} tokens, expected one; "
                        "choose labels of a single token, or use score"
                    )
            self.check_ids(f"label {i}", ids)
            found.append(ids[0])
        if not found:
            raise UsageError("label_logprobs: labels is empty, expected at least one")
        return found

    def to_complete(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        adapters: Sequence[str | None] | None,
    ) -> list[Row]:
        """Rows that draw tokens."""
        encoded = self.encode(prompts, "prompt", special=True)
        count = len(encoded)
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * count
        if len(params) != count:
            raise UsageError(f"generate: {len(params)} params, expected {count}, one per prompt")
        slots = self.slots(adapters, count)
        rows = []
        for i, (prompt, p) in enumerate(zip(encoded, params, strict=True)):
            self.check_context(f"generate: prompt {i}", len(prompt) + 1)
            limit = min(len(prompt) + p.max_tokens, self._config.max_position_embeddings)
            row = Row(
                index=i,
                slot=slots[i],
                tokens=tuple(prompt),
                limit=limit,
                params=p,
                has_stop_text=self._stop_check(p),
            )
            rows.append(row)
        return rows

    def _stop_check(self, params: SamplingParams) -> Callable[[Sequence[int]], bool] | None:
        stops = params.stop_texts
        if not stops:
            return None

        def has_stop_text(token_ids: Sequence[int]) -> bool:
            text = self._tokenizer.decode(list(token_ids))
            return any(stop in text for stop in stops)

        return has_stop_text

    def completion(
        self, row: Row, reason: FinishReason, token_ids: Sequence[int], logprobs: Sequence[float]
    ) -> Completion:
        """What the caller gets for a row that drew these tokens."""
        params = row.params
        assert params is not None
        text = self._tokenizer.decode(list(token_ids))
        cuts = [at for at in (text.find(stop) for stop in params.stop_texts) if at >= 0]
        return Completion(
            text=text[: min(cuts)] if cuts else text,
            token_ids=tuple(token_ids),
            logprobs=tuple(logprobs) if params.logprobs else None,
            finish_reason=reason,
            num_prompt_tokens=len(row.tokens),
        )

    def check_ids(self, what: str, ids: Sequence[int]) -> None:
        """Refuse an empty list, and ids outside of the vocabulary."""
        vocab = self._config.vocab_size
        if not ids:
            raise UsageError(f"{what} is empty, expected at least one token")
        if min(ids) < 0 or max(ids) >= vocab:
            bad = next(t for t in ids if not 0 <= t < vocab)
            raise UsageError(f"{what} has token id {bad}, expected ids in [0, {vocab})")

    def check_context(self, what: str, num_tokens: int) -> None:
        """Refuse more tokens than the model has positions."""
        most = self._config.max_position_embeddings
        if num_tokens > most:
            raise UsageError(
                f"{what} needs {num_tokens} positions, the model has {most}; shorten it"
            )
