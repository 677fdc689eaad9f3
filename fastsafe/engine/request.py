"""Requests and results: options of a model, sampling parameters, completions and scores."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import inf
from numbers import Integral, Real
from typing import Any, Literal

import torch

from fastsafe.errors import UsageError, names_its_fields
from fastsafe.model.device import check_device, choose_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_options(
    device: Any, dtype: Any, batch_size: Any, dtypes: Collection[str] = DTYPES
) -> str:
    """Check the options that the engine and the transformers backend share.

    Returns:
        The device, "auto" replaced by the one that is there.

    Raises:
        UsageError: The device is absent, or an option has an unknown value.
    """
    if dtype not in dtypes:
        raise UsageError(f"LLM: dtype is {dtype!r}, expected one of {', '.join(dtypes)}")
    chosen = choose_device(device)
    check_device(chosen)
    if batch_size != "auto" and not (type(batch_size) is int and batch_size >= 1):
        raise UsageError(
            f"LLM: batch_size is {batch_size!r}, expected a whole number from 1 or 'auto'"
        )
    return chosen


@names_its_fields
@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one completion.

    Attributes:
        max_tokens: Maximum number of tokens to generate, at least 1.
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens with at least this probability, in (0, 1].
        min_p: Drop tokens less likely than this fraction of the most likely one, in [0, 1).
        seed: Seed of this completion's noise, which depends on (seed, position, token id) alone,
            never on the batch.
        stop: Texts that end a completion; the text is cut before them.
        stop_token_ids: Token ids that end a completion, in addition to the checkpoint's own.
        logprobs: Whether to return a natural-log probability per generated token, under the
            distribution before temperature and filters.
        ignore_eos: Generate ``max_tokens`` tokens even past an end-of-sequence token; for
            benchmarks.

    The filters apply in the order temperature, top_k, top_p, min_p.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] | Sequence[str] | str = ()
    stop_token_ids: tuple[int, ...] | Sequence[int] = ()
    logprobs: bool = False
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        temp, stop = self.temperature, self.stop
        for name, is_ok, expected in (
            ("max_tokens", _is_whole(self.max_tokens, 1), "a whole number from 1"),
            ("temperature", isinstance(temp, Real) and 0 <= temp < inf, "a number from 0"),
            ("top_k", _is_whole(self.top_k, 0), "a whole number from 0 (0 means off)"),
            ("top_p", isinstance(self.top_p, Real) and 0 < self.top_p <= 1, "a number in (0, 1]"),
            ("min_p", isinstance(self.min_p, Real) and 0 <= self.min_p < 1, "a number in [0, 1)"),
            ("seed", _is_whole(self.seed, -(1 << 63), 1 << 64), "a whole number of 64 bits"),
            ("stop", isinstance(stop, str) or _is_list(stop, str), "a text or a list of texts"),
            ("stop_token_ids", _is_list(self.stop_token_ids, Integral), "a list of token ids"),
            ("logprobs", self.logprobs in (True, False), "True or False"),
            ("ignore_eos", self.ignore_eos in (True, False), "True or False"),
        ):
            if not is_ok:
                raise UsageError(
                    f"SamplingParams: {name} is {getattr(self, name)!r:.60}, expected {expected}"
                )
        if "" in self.stop_texts:
            raise UsageError("SamplingParams: stop has an empty string, expected visible text")

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """``stop`` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def _is_whole(value: Any, least: int, end: int = 1 << 63) -> bool:
    return isinstance(value, Integral) and least <= int(value) < end


def _is_list(values: Any, kind: type) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(value, kind) for value in values)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Completion of one prompt.

    Attributes:
        text: Decoded tokens without special tokens, but with the marks around a thought, cut before
            a stop text.
        token_ids: Generated tokens, the end-of-sequence token included.
        logprobs: Natural-log probability of each of ``token_ids``; None unless asked for.
        finish_reason: "stop" for an end token or stop text, "length" for the token limit,
            "error" when the model gave no finite logits (the tokens so far are kept).
        num_prompt_tokens: Length of the prompt in tokens.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finish_reason: Literal["stop", "length", "error"]
    num_prompt_tokens: int

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= 60 else f"{self.text[:57]}..."
        return f"Completion({text!r}, {len(self.token_ids)} tokens, {self.finish_reason!r})"


@dataclass(frozen=True, kw_only=True)
class Score:
    """Log-likelihood of a continuation given its prompt.

    Attributes:
        logprob: Sum over the continuation's tokens, in nats; NaN without finite logits.
        token_logprobs: One value per token of the continuation.
        is_greedy: Whether every token was the most likely one.
    """

    logprob: float
    token_logprobs: tuple[float, ...]
    is_greedy: bool
