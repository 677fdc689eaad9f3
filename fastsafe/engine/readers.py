"""Step readers: turn the hidden states of one step into sampled tokens, continuation scores or
label log-probabilities.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

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


class StepReader(ABC):
    """Reads one kind of result off the kept states of each step; every lane has its own.

    Attributes:
        shared_tokens: Length of the prefix that all rows of an adapter share, where the caller
            says so.
    """

    shared_tokens = 0

    def add(self, handle: int, row: Row) -> None:  # noqa: B027
        """Register a row before it is admitted."""

    @abstractmethod
    def read(self, batch: _native.Batch, plan: _native.StepPlan, hidden: Tensor) -> list[int]:
        """Read the results of a step into the batch.

        Args:
            batch: Takes sampled tokens or log-probabilities.
            plan: The step, which keeps a token or more.
            hidden: [at least kept, E]; rows beyond the kept ones are copies of the last.

        Returns:
            Handles and endings of the rows that ended, as ``batch`` returns them.
        """

    @abstractmethod
    def result(self, batch: _native.Batch, handle: int) -> object:
        """Return the result of a row that ended."""


def padded(keep: NDArray[np.int64]) -> Tensor:
    """Repeat the last index until there are ``MIN_ROWS``: small products may differ in bits."""
    short = MIN_ROWS - len(keep)
    if short > 0:
        keep = np.concatenate([keep, np.full(short, keep[-1] if len(keep) else 0)])
    return torch.from_numpy(keep)


class Sampler(StepReader):
    """Samples the next token of each row.

    Args:
        model: Provides the head.
        params: Parameters of all rows of the call, by index.
        num_handles: Maximum number of rows at once.
        with_logprobs: Whether any row asks for log-probabilities.
    """

    def __init__(
        self, model: Transformer, params: RowParams, num_handles: int, with_logprobs: bool
    ) -> None:
        self.params = params
        self.with_logprobs = with_logprobs
        self._model = model
        self._index_of = np.zeros(num_handles, dtype=np.int64)

    def add(self, handle: int, row: Row) -> None:
        """Remember which parameters belong to the row."""
        self._index_of[handle] = row.index

    def params_of(self, handles: NDArray[np.int64]) -> RowParams:
        """Return the parameters of these rows."""
        index = torch.from_numpy(self._index_of[handles])
        return self.params.take(index.to(self.params.seeds.device))

    def read(self, batch: _native.Batch, plan: _native.StepPlan, hidden: Tensor) -> list[int]:
        """Sample a token for each row whose last token was computed; see ``StepReader``."""
        count = len(plan.keep)
        keep = padded(plan.keep).numpy()
        index = padded(self._index_of[plan.kept_handles])
        index[count:] = index[count - 1]
        positions = torch.from_numpy(plan.positions[keep] + 1)
        logits, params = self._model.logits(hidden), self.params.take(index)
        columns = sample(logits, params, positions, self.with_logprobs)
        ids, logprobs, finite, stops = (x[:count].numpy() for x in columns)
        return batch.append(
            plan.kept_handles,
            plan.kept_stamps,
            ids,
            logprobs if self.with_logprobs else None,
            finite,
            stops,
        )

    def result(self, batch: _native.Batch, handle: int) -> tuple[list[int], list[float]]:
        """Return all tokens of the row, its prompt included, and the sampled log-probabilities."""
        return batch.tokens(handle), batch.logprobs(handle)


class Scorer(StepReader):
    """Scores the token after each kept one.

    Args:
        model: Provides the head.
        with_greedy: Whether to tell if each token is the most likely one, which takes all logits.
        shared_tokens: See ``StepReader``.
    """

    def __init__(self, model: Transformer, *, with_greedy: bool, shared_tokens: int) -> None:
        self.shared_tokens = shared_tokens
        self._model = model
        self._with_greedy = with_greedy

    def read(self, batch: _native.Batch, plan: _native.StepPlan, hidden: Tensor) -> list[int]:
        """Score the successor of every kept token; see ``StepReader``."""
        count = len(plan.keep)
        targets = torch.from_numpy(plan.targets).to(hidden.device)
        if self._with_greedy or hidden.is_cpu:
            logprobs, greedy = self._from_logits(hidden, targets)
        else:  # without [kept, V] in memory
            config = self._model.config
            logprobs = linear_logprobs(
                hidden[:count],
                self._model.head,
                targets,
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

    def result(self, batch: _native.Batch, handle: int) -> Score:
        """Return the score of the row's targets."""
        logprobs = batch.logprobs(handle)
        return Score(
            logprob=sum(logprobs), token_logprobs=tuple(logprobs), is_greedy=batch.is_greedy(handle)
        )


class LabelScorer(StepReader):
    """Scores a few labels, of one token each, as the token after each row.

    Args:
        model: Provides the head.
        label_ids: Token ids of the labels.
        shared_tokens: See ``StepReader``.
    """

    def __init__(self, model: Transformer, label_ids: Sequence[int], shared_tokens: int) -> None:
        self.shared_tokens = shared_tokens
        self._model = model
        self._label_ids = torch.tensor(label_ids, device=model.device)
        self._logprobs: dict[int, tuple[float, ...]] = {}  # by handle

    def read(self, batch: _native.Batch, plan: _native.StepPlan, hidden: Tensor) -> list[int]:
        """Read the labels off the logits of each row's last token; see ``StepReader``."""
        count = len(plan.keep)
        all_logprobs = self._model.logits(hidden).log_softmax(-1)[:count]
        logprobs = all_logprobs.index_select(1, self._label_ids).tolist()
        for handle, row in zip(plan.kept_handles.tolist(), logprobs, strict=True):
            self._logprobs[handle] = tuple(row)
        flags = np.zeros(count, dtype=np.bool_)
        zeros = np.zeros(count, dtype=np.float32)
        return batch.record(plan.kept_handles, plan.kept_stamps, zeros, flags)

    def result(self, batch: _native.Batch, handle: int) -> tuple[float, ...]:
        """Return the log-probability of each label, in nats."""
        return self._logprobs.pop(handle)
