"""Generate and score one tile: rows that run together from prefill to their last token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fastsafe.engine.kv_cache import Prefill, make_cache
from fastsafe.engine.request import SamplingParams
from fastsafe.engine.sampling import RowParams, sample
from fastsafe.model.attention import PackedAttention
from fastsafe.model.lora import MIN_ROWS
from fastsafe.model.transformer import Project, Transformer
from fastsafe_kernels import token_logprobs

# Rows are dropped from the cache in batches: copying it each time one row ends costs more than
# computing a few dead rows.
_COMPACT_SHARE = 0.25

# Most logits of scored tokens in memory at once: 64 MiB in fp32.
_LOGIT_ELEMENTS = 1 << 24

ProjectFor = Callable[[Tensor], Project | None]  # slots [M] of the packed rows -> projection


@dataclass
class Row:
    """One prompt on its way to a completion."""

    index: int
    slot: int
    prompt: tuple[int, ...]
    params: SamplingParams
    end_ids: frozenset[int]
    has_stop_text: Callable[[Sequence[int]], bool] | None
    max_tokens: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "error"] | None = None

    def append(self, token_id: int, is_stop: bool) -> None:
        """Take a generated token and decide whether the row ends with it."""
        self.token_ids.append(token_id)
        if is_stop or (self.has_stop_text and self.has_stop_text(self.token_ids)):
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.max_tokens:
            self.finish_reason = "length"


def generate_tile(
    model: Transformer,
    rows: Sequence[Row],
    project_for: ProjectFor,
    on_done: Callable[[Row], None],
) -> None:
    """Fill ``rows`` with tokens until each has a finish reason; ``on_done`` sees each once."""
    with torch.inference_mode():
        _Tile(model, rows, project_for, on_done).run()


class _Tile:
    def __init__(
        self,
        model: Transformer,
        rows: Sequence[Row],
        project_for: ProjectFor,
        on_done: Callable[[Row], None],
    ) -> None:
        self.model = model
        self.project_for = project_for
        self.on_done = on_done
        self.rows: list[Row | None] = list(rows) + [None] * max(0, MIN_ROWS - len(rows))
        last = rows[-1]
        # the padding rows of None are never read; one token each is enough
        self.prompts = [row.prompt if row else last.prompt[:1] for row in self.rows]
        self.slots = torch.tensor([(row or last).slot for row in self.rows])
        own = [row or last for row in self.rows]
        self.params = RowParams.stack(
            [row.params for row in own], model.device, [row.end_ids for row in own]
        )
        self.wants_logprobs = any(row.params.logprobs for row in rows)
        self.lengths = torch.tensor([len(p) for p in self.prompts], device=model.device)
        self.longest = max(len(p) for p in self.prompts)
        # a finished row idles at the last position until it is dropped
        self.last_position = max(len(row.prompt) + row.max_tokens for row in rows) - 1
        capacity = self.last_position + 1
        self.cache = make_cache(model.config, len(self.rows), capacity, model.device, model.dtype)

    def run(self) -> None:
        next_ids = self._choose(self._prefill())
        project = self.project_for(self.slots)
        while any(row is not None for row in self.rows):
            kept = self._compact()
            if kept is not None:
                next_ids = next_ids[kept]
                project = self.project_for(self.slots)
            self._rotate_anew()
            attend = self.cache.decode(self.lengths, self.longest)
            hidden = self.model.forward(
                next_ids, self.lengths, attend, project, context_lens=self.lengths + 1
            )
            self.lengths = (self.lengths + 1).clamp(max=self.last_position)
            self.longest = min(self.longest + 1, self.last_position)
            next_ids = self._choose(hidden)

    def _prefill(self) -> Tensor:
        rows = range(len(self.prompts))
        prefill = Prefill(self.cache, rows, [len(p) for p in self.prompts])
        tokens = torch.tensor([t for p in self.prompts for t in p], device=self.model.device)
        project = self.project_for(self.slots[prefill.rows.cpu()])
        return self.model.forward(tokens, prefill.positions, prefill, project, prefill.last)

    def _rotate_anew(self) -> None:
        """Write the keys of rows again whose rotation changes with their next token.

        Longrope has one set of factors up to the original context and another beyond it, for all
        positions of a sequence; transformers drops its cache there, too.
        """
        for rope in self.model.config.ropes:
            limit = rope.original_max_positions
            if rope.kind != "longrope" or self.longest < limit:
                continue
            for i, row in enumerate(self.rows):
                ids = [*row.prompt, *row.token_ids[:-1]] if row else []
                if len(ids) != limit:
                    continue
                prefill = Prefill(self.cache, [i], [limit])
                self.model.forward(
                    torch.tensor(ids, device=self.model.device),
                    prefill.positions,
                    prefill,
                    self.project_for(self.slots[[i] * limit]),
                    context_lens=torch.full_like(prefill.positions, limit + 1),
                )

    def _compact(self) -> Tensor | None:
        """Drop finished rows once they are a good share; the rows kept, or None for all."""
        alive = [i for i, row in enumerate(self.rows) if row is not None]
        dead = len(self.rows) - len(alive)
        if len(self.rows) <= MIN_ROWS or dead <= _COMPACT_SHARE * len(self.rows):
            return None
        keep = alive + [alive[-1]] * max(0, MIN_ROWS - len(alive))
        index = torch.tensor(keep, device=self.model.device)
        self.rows = [self.rows[i] for i in alive] + [None] * (len(keep) - len(alive))
        self.slots = self.slots[index.cpu()]
        self.params = self.params.take(index)
        self.lengths = self.lengths[index]
        self.longest = int(self.lengths.max())
        self.cache.keep(index)
        return index

    def _choose(self, hidden: Tensor) -> Tensor:
        """Draw a token for every row, hand it to the row, and let finished rows go."""
        logits = self.model.logits(hidden)
        chosen, chosen_logprobs, finite, stops = sample(
            logits, self.params, self.lengths, self.wants_logprobs
        )
        # a NaN or all -inf row must end as a row error, not as an arbitrary token
        is_finite, is_stop = finite.tolist(), stops.tolist()
        logprobs = chosen_logprobs.tolist() if self.wants_logprobs else []
        for i, token_id in enumerate(chosen.tolist()):
            row = self.rows[i]
            if row is None:
                continue
            if not is_finite[i]:
                row.finish_reason = "error"
            else:
                if row.params.logprobs:
                    row.logprobs.append(min(0.0, logprobs[i]))
                row.append(token_id, is_stop[i])
            if row.finish_reason is not None:
                self.rows[i] = None
                self.on_done(row)
        return chosen


def score_tile(
    model: Transformer,
    token_ids: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    slots: Tensor,
    project_for: ProjectFor,
) -> list[tuple[list[float], bool]]:
    """Log-probability of every token after each prompt, and whether all were greedy.

    Args:
        model: The base.
        token_ids: Prompt and continuation of each row, at least two tokens.
        prompt_lengths: Tokens of each row that are given, at least one.
        slots: [B] adapter slot of each row.
        project_for: Projection of a batch of packed rows.
    """
    with torch.inference_mode():
        # the last token predicts nothing that is asked for
        lengths = [len(ids) - 1 for ids in token_ids]
        pad = max(0, MIN_ROWS - sum(lengths))
        packed = [t for ids in token_ids for t in ids[:-1]] + [0] * pad
        all_lengths = lengths + ([pad] if pad else [])
        device = model.device
        positions = torch.cat([torch.arange(n) for n in all_lengths]).to(device)
        owner = torch.cat(
            [torch.full((n,), s) for n, s in zip(lengths, slots.tolist(), strict=True)]
        )
        owner = torch.cat([owner, owner.new_full((pad,), int(slots[-1]))])
        starts = torch.tensor(all_lengths).cumsum(0) - torch.tensor(all_lengths)
        keep: list[int] = []
        targets: list[int] = []
        for row, (ids, given) in enumerate(zip(token_ids, prompt_lengths, strict=True)):
            start = int(starts[row])
            keep += range(start + given - 1, start + len(ids) - 1)
            targets += ids[given:]
        count = len(keep)
        keep += [keep[-1]] * max(0, MIN_ROWS - count)
        hidden = model.forward(
            torch.tensor(packed, device=device),
            positions,
            PackedAttention(all_lengths),
            project_for(owner),
            torch.tensor(keep, device=device),
        )
        target_ids = torch.tensor(targets, device=device)
        logprobs: list[float] = []
        greedy: list[bool] = []
        # in chunks: the logits of a whole tile of a large vocabulary do not fit
        rows = max(MIN_ROWS, _LOGIT_ELEMENTS // model.config.vocab_size)
        for begin in range(0, count, rows):
            t = target_ids[begin : begin + rows]
            chunk = hidden[begin : begin + rows]
            short = max(0, MIN_ROWS - len(chunk))
            logits = model.logits(torch.cat([chunk, chunk[-1:].expand(short, -1)]))[: len(t)]
            logprobs += token_logprobs(logits, t).clamp(max=0).tolist()
            greedy += (logits.argmax(-1) == t).tolist()
        results, at = [], 0
        for ids, given in zip(token_ids, prompt_lengths, strict=True):
            n = len(ids) - given
            results.append((logprobs[at : at + n], all(greedy[at : at + n])))
            at += n
        return results
