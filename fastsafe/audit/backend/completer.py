"""Ask a checkpoint as a judge, translator or rewriter, on the engine or on transformers.

Where a single token decides, nothing is generated: one prefill gives the log-probabilities of the
labels. The checkpoint is loaded for the first row, so that a plan can hash the judge's identity
without loading it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from fastsafe.audit.backend.open import open_backend
from fastsafe.data.thoughts import opened_thought
from fastsafe.errors import UsageError
from fastsafe.safety.completers.protocol import Ask, Reply

# A label is tokenized after the end of its prompt, which decides its token.
_TAIL_CHARS = 24


class CheckpointCompleter:
    """Completes prompts with a checkpoint's own chat template and greedy decoding."""

    def __init__(
        self,
        path: str,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        backend: str = "fastsafe",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Check the checkpoint's files; no weights are loaded yet.

        Args:
            path: Directory or hub id.
            device: As for ``EngineBackend``.
            dtype: Type of the weights and activations.
            backend: ``"fastsafe"``, or ``"transformers"`` for architectures that it does not know.
            chat_template_kwargs: Variables of the chat template, beside those of an ask.

        Raises:
            CheckpointError: The checkpoint is missing, malformed or refused.
            TokenizerError: Its tokenizer is.
        """
        self._backend = open_backend(
            backend, path, device=device, dtype=dtype, chat_template_kwargs=chat_template_kwargs
        )

    @cached_property
    def identity(self) -> str:
        """sha256 over weights, tokenizer, chat template, device and dtype."""
        parts = json.dumps(dict(self._backend.engine), sort_keys=True)
        return hashlib.sha256(f"checkpoint {parts}".encode()).hexdigest()

    @cached_property
    def _llm(self) -> Any:
        self._backend.load()
        return self._backend.llm

    def complete(self, asks: Sequence[Ask]) -> list[Reply]:
        """Return one reply per ask; a prompt longer than the context is an error of its row.

        Raises:
            UsageError: A label is not one token of this tokenizer.
            TokenizerError: The checkpoint has no chat template, and an ask has turns.
        """
        texts = [self._text(ask) for ask in asks]
        ids = [
            self._llm.tokenizer.encode(text, add_special_tokens=not ask.messages)
            for ask, text in zip(asks, texts, strict=True)
        ]
        context = self._backend.context
        replies: dict[int, Reply] = {}
        fitting: dict[bool, list[int]] = {True: [], False: []}
        for i, ask in enumerate(asks):
            needed = len(ids[i]) + (1 if ask.labels else ask.max_tokens)
            if context is not None and needed > context:
                cause = f"needs {needed} tokens, the judge has {context}"
                replies[i] = Reply(key=ask.key, text=cause, finish="error")
            else:
                fitting[bool(ask.labels)].append(i)
        replies |= self._odds(asks, texts, ids, fitting[True])
        if fitting[False]:
            replies |= self._texts(asks, texts, ids, fitting[False])
        return [replies[i] for i in range(len(asks))]

    def _text(self, ask: Ask) -> str:
        if not ask.messages:
            return ask.prompt
        turns = self._llm.tokenizer.render_chat(list(ask.messages), **ask.variables)
        return f"{turns}{ask.prompt}"

    def _texts(
        self,
        asks: Sequence[Ask],
        texts: Sequence[str],
        ids: Sequence[list[int]],
        rows: Sequence[int],
    ) -> dict[int, Reply]:
        """Generate replies; where a prompt opens a thought, its mark is part of the reply."""
        from fastsafe.engine import SamplingParams

        params = [SamplingParams(max_tokens=asks[i].max_tokens) for i in rows]
        answers = self._llm.generate([ids[i] for i in rows], params)
        return {
            i: Reply(
                key=asks[i].key,
                text=opened_thought(texts[i]) + answer.text,
                finish=answer.finish_reason,
            )
            for i, answer in zip(rows, answers, strict=True)
        }

    def _odds(
        self,
        asks: Sequence[Ask],
        texts: Sequence[str],
        ids: Sequence[list[int]],
        rows: Sequence[int],
    ) -> dict[int, Reply]:
        """Score rows with the same label tokens in one batch; equal prefixes are computed once."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i in rows:
            labels = tuple(self._label_id(texts[i], label) for label in asks[i].labels)
            groups.setdefault(labels, []).append(i)
        replies = {}
        for labels, group in groups.items():
            odds = self._llm.label_logprobs([ids[i] for i in group], labels)
            for i, logprobs in zip(group, odds, strict=True):
                replies[i] = Reply(key=asks[i].key, logprobs=logprobs)
        return replies

    def _label_id(self, text: str, label: str) -> int:
        """Return the token id of ``label`` right after ``text``."""
        tail = text[-_TAIL_CHARS:]
        tokenizer = self._llm.tokenizer
        before = tokenizer.encode(tail, add_special_tokens=False) if tail else []
        after = tokenizer.encode(tail + label, add_special_tokens=False)
        if after[:-1] != before or tokenizer.is_unknown(after[-1], label):
            raise UsageError(
                f"judge {self._backend.path}: label {label!r} is not one token after {tail!r}, "
                "expected one that the tokenizer knows; this family does not fit this checkpoint"
            )
        return int(after[-1])
