"""A lane on a CPU: rows, pages, and the loop that computes them step by step."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import fastsafe._native as _native
from fastsafe.engine.adapters import MergedCopies, StepAdapters
from fastsafe.engine.paged_cache import NativeAttention, PageStore, page_tokens, paged_of
from fastsafe.engine.planner import LaneMemory
from fastsafe.engine.readers import StepReader, padded
from fastsafe.engine.scheduler import FinishReason, Row, RowQueue, Scheduler
from fastsafe.model.cpu_decoder import NativeDecoder, runs_natively
from fastsafe.model.cpu_threads import is_out_of_memory
from fastsafe.model.lora import AdapterBank
from fastsafe.model.transformer import Transformer

OnEnd = Callable[[Row, FinishReason | None, object], None]

# Adapters whose merged weights a lane holds at once: the last rows of one beside the first of the
# next.
MERGED_SLOTS = 2
_NO_LIMIT = 1 << 30


class Lane:
    """Pages and the loop over steps, on one core of a CPU; kept from call to call.

    Args:
        bank: The base and its adapters.
        merged: Merged weights of the adapters; None mixes adapters.
        memory: Number of rows, pages and prompt tokens that fit.
        prefix_cache: Whether rows with equal prefixes share pages.
        model: The base with the lane's ``invariant_products``; None: the bank's own.
    """

    separate_decode_step = False

    def __init__(
        self,
        bank: AdapterBank,
        merged: MergedCopies | None,
        memory: LaneMemory,
        *,
        prefix_cache: bool,
        model: Transformer | None = None,
    ) -> None:
        self.model = model or bank.model
        self.memory = memory
        self.max_rows = memory.batch_size
        self.num_pages = memory.num_pages
        self.merges = merged is not None
        self._bank = bank
        self._budget = memory.prefill_tokens
        config, device = self.model.config, self.model.device
        self._store = PageStore(config, self.num_pages, device, self.model.dtype)
        longrope = [r.original_max_positions for r in config.ropes if r.kind == "longrope"]
        self.batch = _native.Batch(
            self.num_pages,
            page_tokens(device),
            self.max_rows,
            prefix_cache and not config.depends_on_length,
            self.separate_decode_step,
            min(longrope, default=0),
        )
        self._adapters = StepAdapters(bank, merged, self.model)
        self._decoder = NativeDecoder(self.model) if runs_natively(self.model) else None

    def scheduler(
        self, queue: RowQueue, lane: int, on_add: Callable[[int, Row], None]
    ) -> Scheduler:
        """Return a scheduler for the rows of one call."""
        return Scheduler(
            self.batch,
            queue,
            lane=lane,
            max_rows=self.max_rows,
            max_slots=MERGED_SLOTS if self.merges else _NO_LIMIT,
            on_add=on_add,
        )

    def run(self, queue: RowQueue, lane: int, reader: StepReader, on_end: OnEnd) -> None:
        """Compute rows until the queue is empty or cancelled; call ``on_end`` once for each."""
        scheduler = self.scheduler(queue, lane, reader.add)
        try:
            while scheduler.fill():
                plan = scheduler.plan(self._budget)
                try:
                    hidden = self.compute(plan)
                    pairs = reader.read(self.batch, plan, hidden) if len(plan.keep) else []
                except (MemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):
                        raise
                    self.back_off(scheduler, on_end)
                else:
                    self.finish(scheduler, reader, pairs, on_end)
        finally:
            scheduler.clear()
            self._adapters.clear()

    def back_off(self, scheduler: Scheduler, on_end: OnEnd) -> None:
        """Halve the batch after an out-of-memory error; a row that ran alone ends in an error."""
        failed = scheduler.halve_batch()
        if failed is not None:
            on_end(scheduler.remove(failed), "error", None)

    def finish(
        self, scheduler: Scheduler, reader: StepReader, pairs: Sequence[int], on_end: OnEnd
    ) -> None:
        """Remove the rows that ended and pass on their results.

        Args:
            scheduler: Has the rows.
            reader: Has their results.
            pairs: Handles and endings, as ``_native.Batch`` returns them.
            on_end: Called with each row, its finish reason and its result.
        """
        for handle, reason in scheduler.ended(pairs):
            result = reader.result(self.batch, handle)
            on_end(scheduler.remove(handle), reason, result)

    def compute(self, plan: _native.StepPlan) -> Tensor:
        """Compute the final states of the kept tokens of a step: [at least kept, E]."""
        self._store.copy(torch.from_numpy(plan.copies))
        token_ids, keep = torch.from_numpy(plan.token_ids), padded(plan.keep)
        context_lens, segments = torch.from_numpy(plan.context_lens), plan.segments.tolist()
        segments[-1][2] = len(keep)  # with the copies of the last kept token
        if self._decoder is not None:
            keys, values, paged = self._store.keys, self._store.values, paged_of(self._store, plan)
            spans = self._adapters.spans(segments)
            return self._decoder.forward(token_ids, paged, keys, values, spans, keep, context_lens)
        return self.model.forward(
            token_ids,
            torch.from_numpy(plan.positions),
            NativeAttention(self._store, plan),
            self._adapters.project(segments),
            keep,
            context_lens,
        )
