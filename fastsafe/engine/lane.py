"""One lane: its rows, its pages, and the loop that computes them step by step."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import fastsafe._native as _native
from fastsafe.engine.adapters import Changes, Merged, Projections
from fastsafe.engine.paged_cache import NativeAttention, PageStore, page_tokens, paged_of
from fastsafe.engine.readers import Reader, padded
from fastsafe.engine.scheduler import FinishReason, Row, Scheduler, Work
from fastsafe.model.cpu_decoder import NativeDecoder, runs_natively
from fastsafe.model.cpu_threads import is_out_of_memory
from fastsafe.model.lora import AdapterBank

OnEnd = Callable[[Row, FinishReason | None, object], None]

# Adapters whose merged weights one lane holds: of the rows that end, and of those that follow.
MERGED_SLOTS = 2
_MANY = 1 << 30


class Lane:
    """Pages and the loop over steps, on a CPU; reused from call to call.

    Args:
        bank: Adapters, and the base.
        merged: Merged weights, or None to mix adapters.
        num_pages: Pages of keys and values.
        wanted_rows: Rows at once that were asked for.
        max_rows: Those that there is memory for.
        budget: Most prompt tokens of a step.
        prefix_cache: Whether rows with equal beginnings share pages.
    """

    def __init__(
        self,
        bank: AdapterBank,
        merged: Merged | None,
        *,
        num_pages: int,
        wanted_rows: int,
        max_rows: int,
        budget: int,
        prefix_cache: bool,
    ) -> None:
        model = bank.model
        config = model.config
        self.model = model
        self.wanted_rows = wanted_rows
        self.max_rows = max_rows
        self.num_pages = num_pages
        self._bank = bank
        self._merged = merged
        self._budget = budget
        self._store = PageStore(config, num_pages, model.device, model.dtype)
        turns = [r.original_max_positions for r in config.ropes if r.kind == "longrope"]
        self.batch = _native.Batch(
            num_pages,
            page_tokens(model.device),
            max_rows,
            prefix_cache and not config.depends_on_length,
            self.splits,
            min(turns, default=0),
        )
        self._projections = Projections(bank, merged)
        self._changes = Changes(bank, merged)
        self._decoder = NativeDecoder(model) if runs_natively(model) else None

    @property
    def splits(self) -> bool:
        """Whether prompts and drawn tokens are computed by different steps."""
        return False

    def scheduler(self, work: Work, lane: int, on_add: Callable[[int, Row], None]) -> Scheduler:
        """Scheduler of one call's rows."""
        return Scheduler(
            self.batch,
            work,
            lane=lane,
            max_rows=self.max_rows,
            max_slots=MERGED_SLOTS if self._merged else _MANY,
            space_of=lambda slot: slot + 1,
            on_add=on_add,
        )

    def run(self, work: Work, lane: int, reader: Reader, on_end: OnEnd) -> None:
        """Compute rows until no work is left or it is cancelled; ``on_end`` sees each once."""
        scheduler = self.scheduler(work, lane, reader.add)
        try:
            while scheduler.fill():
                plan = scheduler.plan(self._budget)
                try:
                    pairs = reader.read(self.batch, plan, self.compute(plan))
                except (MemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):
                        raise
                    self.back_off(scheduler, on_end)
                else:
                    self.end(scheduler, reader, pairs, on_end)
        finally:
            scheduler.clear()
            self._projections.clear()
            self._changes.clear()

    def back_off(self, scheduler: Scheduler, on_end: OnEnd) -> None:
        """Go on with half the rows after a step that memory did not suffice for."""
        failed = scheduler.halve()
        if failed is not None:
            on_end(scheduler.remove(failed), "error", None)

    def end(
        self, scheduler: Scheduler, reader: Reader, pairs: Sequence[int], on_end: OnEnd
    ) -> None:
        """Hand out the rows that ended; ``pairs`` as ``_native.Batch`` returns them."""
        for handle, reason in scheduler.ended(pairs):
            found = reader.take(self.batch, handle)
            on_end(scheduler.remove(handle), reason, found)

    def compute(self, plan: _native.Plan) -> Tensor:
        """Final states of the kept tokens of a step: [at least kept, E]."""
        self._store.copy(torch.from_numpy(plan.copies))
        token_ids, keep = torch.from_numpy(plan.token_ids), padded(plan.keep)
        context_lens, segments = torch.from_numpy(plan.context_lens), plan.segments.tolist()
        if self._decoder is not None:
            paged, store = paged_of(self._store, plan), self._store
            spans = self._changes.of(segments, len(keep))
            pages = store.keys, store.values
            return self._decoder.forward(token_ids, paged, *pages, spans, keep, context_lens)
        return self.model.forward(
            token_ids,
            torch.from_numpy(plan.positions),
            NativeAttention(self._store, plan),
            self._projections.of(segments, len(keep)),
            keep,
            context_lens,
        )
