"""What is read off the states that a step computed: drawn tokens, scores, or labels."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import fastsafe._native as _native
from fastsafe.engine.request import Score
from fastsafe.engine.sampling import RowParams, sample
from fastsafe.engine.scheduler import Row
from fastsafe.model.layers import MIN_ROWS
from fastsafe.model.transformer import Transformer
from fastsafe_kernels import linear_logprobs, token_logprobs

# Most logits in memory at once: 64 MiB in fp32.
_LOGIT_ELEMENTS = 1 << 24


class Reader(Protocol):
    """Reads one kind of result; one per lane.

    Attributes:
        shared_tokens: Tokens that all rows of an adapter begin with, where the caller says so.
    """

    shared_tokens: int

    def add(self, handle: int, row: Row) -> None:
        """Hear of a row before it runs."""

    def read(self, batch: _native.Batch, plan: _native.Plan, hidden: Tensor) -> list[int]:
        """Take the kept states of a step.

        Args:
            batch: Takes what was read.
            plan: The step.
            hidden: [at least kept, E]; rows beyond the kept ones are copies of the last.

        Returns:
            Handles and endings of the rows that ended, as ``batch`` returns them.
        """

    def take(self, batch: _native.Batch, handle: int) -> object:
        """Result of a row that ended, besides its tokens."""


def padded(keep: NDArray[np.int64]) -> Tensor:
    """Indices of kept rows, the last one repeated: torch's reductions tell few rows apart."""
    short = MIN_ROWS - len(keep)
    if short > 0:
        keep = np.concatenate([keep, np.full(short, keep[-1] if len(keep) else 0)])
    return torch.from_numpy(keep)


class Drawing:
    """Draws the next token of each row.

    Args:
        model: Has the head.
        params: Of all rows of the call, by index.
        num_handles: Most rows at once.
        with_logprobs: Whether some row wants them.
    """

    shared_tokens = 0

    def __init__(
        self, model: Transformer, params: RowParams, num_handles: int, with_logprobs: bool
    ) -> None:
        self.params = params
        self.with_logprobs = with_logprobs
        self._model = model
        self._index_of = np.zeros(num_handles, dtype=np.int64)

    def add(self, handle: int, row: Row) -> None:
        """Remember which parameters are the row's."""
        self._index_of[handle] = row.index

    def params_of(self, handles: NDArray[np.int64]) -> RowParams:
        """Parameters of these rows."""
        index = torch.from_numpy(self._index_of[handles])
        return self.params.take(index.to(self.params.seeds.device))

    def read(self, batch: _native.Batch, plan: _native.Plan, hidden: Tensor) -> list[int]:
        """Draw for the rows whose last token was computed."""
        count = len(plan.keep)
        if not count:
            return []
        keep = padded(plan.keep).numpy()
        index = padded(self._index_of[plan.kept_handles])
        index[count:] = index[count - 1]
        positions = torch.from_numpy(plan.positions[keep] + 1)
        ids, logprobs, finite, stops = (
            x[:count].numpy()
            for x in sample(
                self._model.logits(hidden),
                self.params.take(index),
                positions,
                self.with_logprobs,
            )
        )
        return batch.append(
            plan.kept_handles,
            plan.kept_stamps,
            ids,
            logprobs if self.with_logprobs else None,
            finite,
            stops,
        )

    def take(self, batch: _native.Batch, handle: int) -> tuple[list[int], list[float]]:
        """All tokens of the row, its prompt's included, and the log-probabilities of the drawn."""
        return batch.tokens(handle), batch.logprobs(handle)


class Scoring:
    """Log-probability of the token after each kept one."""

    def __init__(self, model: Transformer, *, with_greedy: bool, shared_tokens: int = 0) -> None:
        self.shared_tokens = shared_tokens
        self._model = model
        self._with_greedy = with_greedy

    def add(self, handle: int, row: Row) -> None:
        """Nothing to remember."""

    def read(self, batch: _native.Batch, plan: _native.Plan, hidden: Tensor) -> list[int]:
        """Score every kept token's successor."""
        count = len(plan.keep)
        if not count:
            return []
        targets = torch.from_numpy(plan.targets).to(hidden.device)
        if self._with_greedy or hidden.is_cpu:
            logprobs, greedy = self._from_logits(hidden, targets)
        else:  # never [kept, V] in memory
            config = self._model.config
            logprobs = linear_logprobs(
                *(hidden[:count], self._model.head, targets),
                config.logits_scale,
                config.logits_softcap or 0.0,
            )
            greedy = torch.zeros_like(targets, dtype=torch.bool)
        return batch.record(
            plan.kept_handles, plan.kept_stamps, logprobs.cpu().numpy(), greedy.cpu().numpy()
        )

    def _from_logits(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logprobs, greedy = [], []
        rows = max(MIN_ROWS, _LOGIT_ELEMENTS // self._model.config.vocab_size)
        for begin in range(0, len(targets), rows):
            chunk, target = hidden[begin : begin + rows], targets[begin : begin + rows]
            short = max(0, MIN_ROWS - len(chunk))
            logits = self._model.logits(torch.cat([chunk, chunk[-1:].expand(short, -1)]))
            target = torch.cat([target, target[-1:].expand(len(logits) - len(target))])
            count = min(len(chunk), len(targets) - begin)
            logprobs.append(token_logprobs(logits, target)[:count])
            greedy.append((logits.argmax(-1) == target)[:count])
        return torch.cat(logprobs), torch.cat(greedy)

    def take(self, batch: _native.Batch, handle: int) -> Score:
        """Score of the row's targets."""
        logprobs = batch.logprobs(handle)
        return Score(
            logprob=sum(logprobs),
            token_logprobs=tuple(logprobs),
            is_greedy=batch.is_greedy(handle),
        )


class Labels:
    """Log-probabilities of a few tokens after a row's last."""

    def __init__(
        self, model: Transformer, label_ids: Sequence[int], shared_tokens: int = 0
    ) -> None:
        self.shared_tokens = shared_tokens
        self._model = model
        self._ids = torch.tensor(label_ids, device=model.device)
        self._found: dict[int, tuple[float, ...]] = {}

    def add(self, handle: int, row: Row) -> None:
        """Nothing to remember."""

    def read(self, batch: _native.Batch, plan: _native.Plan, hidden: Tensor) -> list[int]:
        """Read the labels off the last token's logits."""
        count = len(plan.keep)
        if not count:
            return []
        logprobs = self._model.logits(hidden).log_softmax(-1)[:count].index_select(1, self._ids)
        for handle, row in zip(plan.kept_handles.tolist(), logprobs.tolist(), strict=True):
            self._found[handle] = tuple(row)
        flags = np.zeros(count, dtype=np.bool_)
        zeros = np.zeros(count, dtype=np.float32)
        return batch.record(plan.kept_handles, plan.kept_stamps, zeros, flags)

    def take(self, batch: _native.Batch, handle: int) -> tuple[float, ...]:
        """Log-probability of each label, in nats."""
        return self._found.pop(handle)
