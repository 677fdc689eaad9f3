"""LLMInterface: the calls that ``LLM`` and ``TransformersLLM`` share.

A backend provides ``_stream``, two scoring passes and ``_logits``; the class checks and encodes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Generic

from torch import Tensor

from fastsafe.engine.prompts import (
    AdapterKey,
    Conversation,
    EncodedRequest,
    Prompt,
    Prompts,
    ScoringRequest,
)
from fastsafe.engine.request import Completion, SamplingParams, Score
from fastsafe.errors import UsageError


class LLMInterface(ABC, Generic[AdapterKey]):
    """A base model with adapters: generate, chat, score, label_logprobs, logits."""

    _prompts: Prompts[AdapterKey]

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapters: Sequence[str | None] | None = None,
        on_result: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Complete every prompt.

        Args:
            prompts: Texts, encoded with the tokenizer's special tokens, or token lists.
            params: One for all prompts or one per prompt; defaults when None.
            adapters: Adapter name per prompt, None for the base; all base when None.
            on_result: Called with (index, completion) as each finishes, in the order of
                finishing. An exception that it raises ends the call.

        Returns:
            One completion per prompt, in order.

        Raises:
            UsageError: Lists differ in length, or a prompt is empty, too long or out of range.
            AdapterError: An adapter is not loaded.
        """
        completions: dict[int, Completion] = {}
        stream = self.stream(prompts, params, adapters)
        try:
            for index, completion in stream:
                completions[index] = completion
                if on_result:
                    on_result(index, completion)
        finally:
            stream.close()
        return [completions[i] for i in range(len(completions))]

    def stream(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapters: Sequence[str | None] | None = None,
    ) -> Generator[tuple[int, Completion]]:
        """Complete every prompt; yield (index, completion) in the order of finishing.

        Nothing is computed before the first is asked for. Closing the iterator cancels the rest.
        See ``generate``.
        """
        return self._stream(self._prompts.requests(prompts, params, adapters))

    def chat(
        self,
        conversations: Sequence[Conversation],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapters: Sequence[str | None] | None = None,
        on_result: Callable[[int, Completion], None] | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[Completion]:
        """Answer conversations through the checkpoint's chat template; see ``generate``.

        Args:
            conversations: One list of messages per completion.
            params: As in ``generate``.
            adapters: As in ``generate``.
            on_result: As in ``generate``.
            chat_template_kwargs: Variables of the template, such as ``{"enable_thinking": False}``,
                beside those that the model was loaded with; a template ignores unknown ones.

        Raises:
            DataError: A message has an unknown role or no text.
            TokenizerError: There is no chat template, or it does not render.
            UsageError: As for ``generate``, or a variable is reserved or no JSON.
        """
        prompts = self._prompts.chats(conversations, chat_template_kwargs)
        return self.generate(prompts, params, adapters, on_result)

    def score(
        self,
        prompts: Sequence[Prompt],
        continuations: Sequence[Prompt],
        adapters: Sequence[str | None] | None = None,
        shared_prefix: Prompt | None = None,
    ) -> list[Score]:
        """Compute the log-likelihood of each continuation given its prompt, by prefill alone.

        Args:
            prompts: Texts or token lists, at least one token each.
            continuations: Texts, encoded without special tokens, or token lists; not empty.
            adapters: As in ``generate``.
            shared_prefix: Text or token list in front of every prompt, computed once per adapter;
                the texts of the prompts are then encoded without special tokens.
        """
        prefix, encoded = self._prompts.prefixed(prompts, shared_prefix)
        targets = self._prompts.encode(continuations, "continuation", special=False)
        if len(encoded) != len(targets):
            raise UsageError(
                f"score: {len(targets)} continuations, expected {len(encoded)}, one per prompt"
            )
        rows = [prefix + prompt + target for prompt, target in zip(encoded, targets, strict=True)]
        starts = [len(prefix) + len(prompt) - 1 for prompt in encoded]
        requests = self._prompts.scoring_requests("score: row", rows, starts, adapters)
        scores = self._score_tokens(requests, with_greedy=True, shared_tokens=len(prefix))
        return [scores[i] for i in range(len(rows))]

    def prompt_logprobs(
        self, prompts: Sequence[Prompt], adapters: Sequence[str | None] | None = None
    ) -> list[tuple[float | None, ...]]:
        """Compute the log-probability of every prompt token given those before it.

        Args:
            prompts: Texts, encoded with special tokens, or token lists.
            adapters: As in ``generate``.

        Returns:
            For each prompt, one value per token, in nats; None for the first.
        """
        rows = self._prompts.encode(prompts, "prompt", special=True)
        starts = [0] * len(rows)
        requests = self._prompts.scoring_requests("prompt_logprobs: row", rows, starts, adapters)
        scores = self._score_tokens(requests, with_greedy=False, shared_tokens=0)
        return [
            (None, *(scores[i].token_logprobs if i in scores else ())) for i in range(len(rows))
        ]

    def label_logprobs(
        self,
        prompts: Sequence[Prompt],
        labels: Sequence[int | str],
        adapters: Sequence[str | None] | None = None,
        shared_prefix: Prompt | None = None,
    ) -> list[tuple[float, ...]]:
        """Compute the log-probability of each label as the next token, by prefill alone.

        Args:
            prompts: Texts, encoded with special tokens, or token lists.
            labels: Token ids, or texts of one known token each, encoded without special tokens;
                no two are the same token.
            adapters: As in ``generate``.
            shared_prefix: As in ``score``.

        Returns:
            For each prompt, one value per label, in nats.

        Raises:
            UsageError: A label is not one token, is unknown or the token of another label, or as
                for ``generate``.
        """
        label_ids = self._prompts.labels(labels)
        prefix, encoded = self._prompts.prefixed(prompts, shared_prefix)
        rows = [prefix + prompt for prompt in encoded]
        starts = [len(row) - 1 for row in rows]
        requests = self._prompts.scoring_requests("label_logprobs: prompt", rows, starts, adapters)
        logprobs = self._score_labels(requests, label_ids, shared_tokens=len(prefix))
        return [logprobs[i] for i in range(len(rows))]

    def logits(self, token_ids: Sequence[int] | Tensor, adapter: str | None = None) -> Tensor:
        """Compute the logits after every token of one sequence.

        Args:
            token_ids: [N] token ids.
            adapter: Name of a loaded adapter, None for the base.

        Returns:
            [N, V] fp32 on the model's device.
        """
        row = self._prompts.ids(token_ids, "logits: token_ids")
        self._prompts.check_context("logits: token_ids", len(row))
        (key,) = self._prompts.adapter_keys([adapter], 1)
        return self._logits(row, key)

    @abstractmethod
    def _stream(
        self, requests: Sequence[EncodedRequest[AdapterKey]]
    ) -> Generator[tuple[int, Completion]]:
        """Complete requests; yield (index, completion) in the order of finishing."""

    @abstractmethod
    def _score_tokens(
        self,
        requests: Sequence[ScoringRequest[AdapterKey]],
        *,
        with_greedy: bool,
        shared_tokens: int,
    ) -> Mapping[int, Score]:
        """Score each request that has tokens to score, by index.

        Args:
            requests: Sequences.
            with_greedy: Whether ``is_greedy`` is needed.
            shared_tokens: Length of the prefix that all sequences share.
        """

    @abstractmethod
    def _score_labels(
        self,
        requests: Sequence[ScoringRequest[AdapterKey]],
        label_ids: Sequence[int],
        *,
        shared_tokens: int,
    ) -> Mapping[int, tuple[float, ...]]:
        """Compute the log-probability of each label after the last token of each request."""

    @abstractmethod
    def _logits(self, row: list[int], adapter: AdapterKey) -> Tensor:
        """Compute ``logits`` of a row that is checked."""
