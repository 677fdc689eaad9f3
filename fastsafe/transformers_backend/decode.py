"""One batch through transformers' ``generate``, its tokens chosen by this project's rules.

``generate`` knows every architecture's cache, masks and positions; a logits processor takes the
choice of tokens from it, so that stops, seeds and log-probabilities mean the same as elsewhere.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastsafe.engine.prompts import EncodedRequest
from fastsafe.engine.sampling import RowParams, sample
from fastsafe.engine.scheduler import FinishReason
from fastsafe.io.tokenizer import Tokenizer
from fastsafe.transformers_backend.loading import require


@dataclass
class DecodeRow:
    """A prompt and the state of its completion."""

    request: EncodedRequest[str | None]
    has_stop_text: Callable[[Sequence[int]], bool] | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def max_tokens(self) -> int:
        """Length limit of the completion."""
        return self.request.max_tokens_total - len(self.request.tokens)


class _Chooser:
    """Logits processor that samples each row's token and masks all others for ``generate``."""

    def __init__(
        self, rows: Sequence[DecodeRow], tokenizer: Tokenizer, device: torch.device
    ) -> None:
        self._rows = rows
        params = [row.request.params for row in rows]
        ends = [
            frozenset(p.stop_token_ids) | frozenset(() if p.ignore_eos else tokenizer.eos_ids)
            for p in params
        ]
        self._params = RowParams.stack(params, device, ends)
        self._positions = torch.tensor([len(r.request.tokens) for r in rows], device=device)
        self._wants_logprobs = any(p.logprobs for p in params)
        self.done: list[DecodeRow] = []  # in order of finishing

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen, logprobs, finite, stops = sample(
            scores.float(), self._params, self._positions, self._wants_logprobs
        )
        self._positions = self._positions + 1
        columns = (x.tolist() for x in (chosen, logprobs, finite, stops))
        for row, token, logprob, is_finite, is_stop in zip(self._rows, *columns, strict=True):
            if row.finish_reason is None:
                self._append(row, token, logprob, is_finite, is_stop)
        return torch.full_like(scores, -float("inf")).scatter_(1, chosen[:, None], 0.0)

    def _append(
        self, row: DecodeRow, token: int, logprob: float, is_finite: bool, is_stop: bool
    ) -> None:
        if not is_finite:
            row.finish_reason = "error"
        else:
            row.token_ids.append(token)
            if row.request.params.logprobs:
                row.logprobs.append(min(0.0, logprob))
            if is_stop or (row.has_stop_text and row.has_stop_text(row.token_ids)):
                row.finish_reason = "stop"
            elif len(row.token_ids) >= row.max_tokens:
                row.finish_reason = "length"
        if row.finish_reason is not None:
            self.done.append(row)

    def are_done(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Return the rows that have ended, [B] bool, as a stopping criterion."""
        ended = [row.finish_reason is not None for row in self._rows]
        return torch.tensor(ended, device=input_ids.device)


def generate_batch(model: Any, rows: Sequence[DecodeRow], tokenizer: Tokenizer) -> list[DecodeRow]:
    """Generate the tokens of ``rows``; return the rows in the order in which they finished."""
    transformers = require("transformers")
    pad = tokenizer.pad_id or 0
    prompts = [row.request.tokens for row in rows]
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    chooser = _Chooser(rows, tokenizer, model.device)
    criterion: Callable[..., Tensor] = chooser.are_done
    with torch.inference_mode():
        model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=transformers.GenerationConfig(
                max_new_tokens=max(row.max_tokens for row in rows), pad_token_id=pad
            ),
            logits_processor=transformers.LogitsProcessorList([chooser]),
            stopping_criteria=transformers.StoppingCriteriaList([criterion]),
        )
    return chooser.done
