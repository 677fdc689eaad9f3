"""The lane of a GPU: steps in static buffers and graphs, results read one step late.

A step is prepared on the host, copied to the device in one piece, and computed without the host
looking at anything: drawn tokens stay on the device, where the next step finds them, and are read
back while it runs. A row that turns out to have ended has then been computed once too often.

Decoding runs at a fixed number of rows, the idle ones included, as a graph: one for each table
width, whatever adapters the rows have. In strict mode that is always the lane's whole number of
rows, and prompts are padded to the budget, or to a part of it that gives the same bits: cuBLAS
chooses its algorithm by shape, and only at one shape has a row the same bits beside any others
(``invariance.py`` checks both at the start). Without graphs, on a CPU with Triton's interpreter,
the same buffers run step by step.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

import fastsafe._native as _native
from fastsafe.engine.adapters import Merged
from fastsafe.engine.invariance import agreeing_rows, uneven_products
from fastsafe.engine.lane import Lane, OnEnd
from fastsafe.engine.paged_cache import DEVICE_PAGE, OpsAttention, SharedPrefix
from fastsafe.engine.readers import Drawing, Reader
from fastsafe.engine.request import SamplingParams
from fastsafe.engine.sampling import RowParams, sample
from fastsafe.engine.scheduler import Row, Scheduler, Work
from fastsafe.model.cpu_threads import is_out_of_memory
from fastsafe.model.grouped import FixedRows
from fastsafe.model.layers import MIN_ROWS
from fastsafe.model.lora import AdapterBank
from fastsafe.model.transformer import Project

_INTS = 6  # rows of the buffer of a step: handle, given, position, place, length, context


class Buffers:
    """What one decoding step reads and writes, at fixed addresses.

    Attributes:
        ints: [6, rows] int64: handle, told token or -1, position, place, attention length, length
            for the rotation, of each row; idle rows have the scratch handle and length 0.
        table: [rows, width] int32.
        drawn: Ids, log-probabilities, is_finite and is_stop, [rows] each, as ``sample`` gives them.
    """

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self.ints = torch.zeros(_INTS, rows, dtype=torch.int64, device=device)
        self.table = torch.zeros(rows, width, dtype=torch.int32, device=device)
        self.drawn = (
            torch.zeros(rows, dtype=torch.int64, device=device),
            torch.zeros(rows, device=device),
            *torch.zeros(2, rows, dtype=torch.bool, device=device),
        )


class Launched(NamedTuple):
    """A step on its way: which rows it draws for, and where its results arrive."""

    handles: NDArray[np.int64]
    stamps: NDArray[np.int64]
    places: NDArray[np.int64]  # of these rows among the results
    results: Sequence[Tensor]  # on the host, filled when ``done``
    done: torch.cuda.Event | None

    def read(self, with_logprobs: bool) -> tuple[Any, ...]:
        """Wait for the results; the arguments of ``_native.Batch.append``."""
        if self.done is not None:
            self.done.synchronize()
        ids, logprobs, finite, stops = (x.numpy()[self.places] for x in self.results)
        return self.handles, self.stamps, ids, logprobs if with_logprobs else None, finite, stops


class DeviceLane(Lane):
    """A lane of a GPU, or of Triton's interpreter; see ``Lane``.

    Args:
        strict: Fixed shapes, so that a row's bits are its own.
        options: Of ``Lane``.
    """

    def __init__(
        self, bank: AdapterBank, merged: Merged | None, *, strict: bool, **options: Any
    ) -> None:
        super().__init__(bank, merged, **options)
        self._strict = strict
        self._graphs: dict[tuple[int, ...], torch.cuda.CUDAGraph] = {}
        self._buffers: dict[tuple[int, int], Buffers] = {}
        self._fixed: dict[int, FixedRows | None] = {}  # by number of rows
        self._scratch = self.max_rows  # handle of idle rows
        count, device = self.max_rows + 1, self.model.device
        self._last = torch.zeros(count, dtype=torch.int64, device=device)
        self._params = RowParams.stack([SamplingParams()] * count, device, [{-1}] * count)
        self._prompt_sizes: list[int] = []  # tokens of a step of prompts, rising
        self._keep_size = self.max_rows
        self._shared_pages = 0  # that all rows of an adapter begin with, in this call
        if strict:
            shapes = (self.max_rows, self._budget)
            self.model.invariant_products = uneven_products(self.model, shapes)
            smaller = [self._budget >> i for i in (4, 3, 2, 1) if self._budget >> i >= MIN_ROWS]
            self._prompt_sizes = agreeing_rows(self.model, self._budget, smaller)
            self._prompt_sizes.append(self._budget)

    @property
    def splits(self) -> bool:
        """Prompts and drawn tokens are computed by steps of different shapes."""
        return True

    def run(self, work: Work, lane: int, reader: Reader, on_end: OnEnd) -> None:
        """Compute rows until no work is left or it is cancelled; ``on_end`` sees each once."""
        self._keep_size = self.max_rows if isinstance(reader, Drawing) else self._budget
        self._shared_pages = reader.shared_tokens // DEVICE_PAGE
        if not isinstance(reader, Drawing):
            return super().run(work, lane, reader, on_end)
        fresh: list[int] = []  # handles that were given to new rows

        def on_add(handle: int, row: Row) -> None:
            reader.add(handle, row)
            fresh.append(handle)

        self._widen(reader.params)
        scheduler = self.scheduler(work, lane, on_add)
        pending: deque[Launched] = deque()
        try:
            while scheduler.fill() or pending:
                try:
                    launched = self._launch(scheduler, reader, fresh)
                except (MemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):
                        raise
                    pending.clear()
                    self.back_off(scheduler, on_end)
                    continue
                pending.extend(launched)
                # the step before is read while this one runs
                while len(pending) > len(launched):
                    pairs = self.batch.append(*pending.popleft().read(reader.with_logprobs))
                    self.end(scheduler, reader, pairs, on_end)
        finally:
            scheduler.clear()
            self._projections.clear()

    def _launch(self, scheduler: Scheduler, reader: Drawing, fresh: list[int]) -> list[Launched]:
        """Queue the next prompts and the next token of all rows that have drawn one."""
        launched = []
        plan = scheduler.plan(self._budget, decodes=False)
        if fresh:
            self._take_params(reader, fresh)
            fresh.clear()
        if len(plan.positions):
            hidden = self.compute(plan)
            if len(plan.keep):
                handles = self._send(_pad(plan.kept_handles, len(hidden), self._scratch))
                positions = self._send(_pad(plan.positions[plan.keep], len(hidden), 0))
                drawn = self._draw(hidden, handles, positions, reader.with_logprobs)
                launched.append(self._launched(plan, np.arange(len(plan.keep)), drawn))
        plan = scheduler.plan(0, prompts=False)
        if len(plan.positions):
            drawn = self._decode(plan, reader.with_logprobs)
            launched.append(self._launched(plan, plan.keep, drawn))
        return launched

    def compute(self, plan: _native.Plan) -> Tensor:
        """Final states of the kept tokens of prompts: [at least kept, E]."""
        self._store.copy(torch.from_numpy(plan.copies))
        count, kept = len(plan.positions), len(plan.keep)
        size, keep_size = max(count, MIN_ROWS), max(kept, MIN_ROWS)
        if self._strict:
            size = next(size for size in self._prompt_sizes if size >= count)
            keep_size = self._keep_size
        scratch = self._store.num_pages * DEVICE_PAGE
        rows = np.repeat(np.arange(len(plan.handles)), np.diff(plan.starts))
        ints = [
            _pad(plan.token_ids, size, 0),
            _pad(plan.positions, size, 0),
            _pad(plan.places, size, scratch),
            _pad(plan.positions + 1, size, 0),
            _pad(plan.context_lens, size, 1),
            _pad(rows, size, 0),
        ]
        ids, positions, places, lengths, context, owner = self._send(np.stack(ints))
        table = self._send(plan.table).index_select(0, owner)
        keep = self._send(_pad(plan.keep, keep_size, 0))
        shared = self._shared(plan, size) if self._shared_pages else None
        attend = OpsAttention(self._store, table, places, lengths, shared)
        project = self._projections.of(_stretched(plan.segments, size, keep_size), keep_size)
        return self.model.forward(ids, positions, attend, project, keep, context)

    def _shared(self, plan: _native.Plan, size: int) -> SharedPrefix:
        """Tokens behind the shared pages, by adapter; any of its rows holds pages of the prefix."""
        behind = _pad(plan.positions, size, 0) >= self._shared_pages * DEVICE_PAGE
        groups, begin = [], 0
        for _, end, _ in plan.segments.tolist():
            tokens = begin + np.flatnonzero(behind[begin:end])
            if len(tokens):
                row = np.searchsorted(plan.starts, tokens[0], side="right") - 1
                pages = plan.table[row, : self._shared_pages].astype(np.int64)
                groups.append((self._send(tokens), self._send(pages)))
            begin = end
        inside = self._send(np.flatnonzero(~behind))
        return SharedPrefix(self._shared_pages, inside, tuple(groups))

    def _decode(self, plan: _native.Plan, with_logprobs: bool) -> tuple[Tensor, ...]:
        """Draw the next token of every row, by a graph where there are graphs."""
        count = len(plan.positions)
        rows = self.max_rows if self._strict else min(self.max_rows, _power_of_two(count))
        width = _power_of_two(plan.table.shape[1])
        b = self._buffers.get((rows, width))
        if b is None:
            b = self._buffers[rows, width] = Buffers(rows, width, self.model.device)
        ints = [
            _pad(plan.handles, rows, self._scratch),
            _pad(plan.token_ids, rows, 0),
            _pad(plan.positions, rows, 0),
            _pad(plan.places, rows, self._store.num_pages * DEVICE_PAGE),
            _pad(plan.positions + 1, rows, 0),
            _pad(plan.context_lens, rows, 1),
        ]
        b.ints.copy_(self._send(np.stack(ints)))
        b.table[:count, : plan.table.shape[1]].copy_(self._send(plan.table))
        segments = _stretched(plan.segments, rows, rows)
        if self._merged is not None:  # every adapter has weights of its own: no graph fits all
            self._step(b, self._projections.of(segments, rows), with_logprobs)
            return b.drawn
        fixed = self._fixed.get(rows)
        if rows not in self._fixed or not self._bank.is_current(fixed):
            self._graphs.clear()
            fixed = self._fixed[rows] = self._bank.fixed(rows)
        if fixed is not None:
            counts = np.diff([0, *(end for _, end, _ in segments)])
            fixed.update(np.repeat([slot for slot, _, _ in segments], counts).tolist())
        if not self._last.is_cuda:
            self._step(b, fixed, with_logprobs)
            return b.drawn
        key = (rows, width, self._params.stop_ids.shape[1], with_logprobs)
        if key not in self._graphs:
            self._graphs[key] = self._capture(b, fixed, with_logprobs)
        self._graphs[key].replay()
        return b.drawn

    def _capture(
        self, b: Buffers, project: Project | None, with_logprobs: bool
    ) -> torch.cuda.CUDAGraph:
        """Record one step; nothing that it draws while warming up counts."""
        last = self._last.clone()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # libraries choose algorithms and kernels are compiled
                self._step(b, project, with_logprobs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._step(b, project, with_logprobs)
        self._last.copy_(last)
        return graph

    def _step(self, b: Buffers, project: Project | None, with_logprobs: bool) -> None:
        """Compute one token of every row of the buffers and draw the next."""
        handles, told, positions, places, lengths, context = b.ints
        ids = torch.where(told >= 0, told, self._last.index_select(0, handles))
        attend = OpsAttention(self._store, b.table, places, lengths)
        hidden = self.model.forward(ids, positions, attend, project, None, context)
        drawn = self._draw(hidden, handles, positions, with_logprobs)
        for to, value in zip(b.drawn, drawn, strict=True):
            to.copy_(value)

    def _draw(
        self, hidden: Tensor, handles: Tensor, positions: Tensor, with_logprobs: bool
    ) -> tuple[Tensor, ...]:
        params = self._params.take(handles)
        drawn = sample(self.model.logits(hidden), params, positions + 1, with_logprobs)
        self._last.index_copy_(0, handles, drawn[0])
        return drawn

    def _widen(self, params: RowParams) -> None:
        """Make room for as many stop ids as the call's rows have."""
        short = params.stop_ids.shape[1] - self._params.stop_ids.shape[1]
        if short > 0:
            stops = F.pad(self._params.stop_ids, (0, short), value=-1)
            self._params = self._params._replace(stop_ids=stops)
            self._graphs.clear()

    def _take_params(self, reader: Drawing, handles: list[int]) -> None:
        """Put the parameters of new rows at their handles."""
        own = reader.params_of(np.array(handles))
        short = self._params.stop_ids.shape[1] - own.stop_ids.shape[1]
        own = own._replace(stop_ids=F.pad(own.stop_ids, (0, short), value=-1))
        at = self._send(np.array(handles))
        for ours, theirs in zip(self._params, own, strict=True):
            ours.index_copy_(0, at, theirs)

    def _launched(
        self, plan: _native.Plan, places: NDArray[np.int64], drawn: Sequence[Tensor]
    ) -> Launched:
        """Have what was drawn copied to the host when it is there; kept rows are at ``places``."""
        is_cuda = self._last.is_cuda
        results = []
        for x in drawn:
            host = torch.empty(x.shape, dtype=x.dtype, pin_memory=is_cuda)
            results.append(host.copy_(x, non_blocking=True))
        done = None
        if is_cuda:
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        return Launched(plan.kept_handles, plan.kept_stamps, places, results, done)

    def _send(self, values: NDArray[Any]) -> Tensor:
        """Copy to the device without waiting for it."""
        tensor = torch.from_numpy(values)
        if not self._last.is_cuda:
            return tensor
        return tensor.pin_memory().to(self.model.device, non_blocking=True)


def _pad(values: NDArray[np.int64], size: int, fill: int) -> NDArray[np.int64]:
    return np.concatenate([values, np.full(size - len(values), fill, dtype=np.int64)])


def _power_of_two(count: int) -> int:
    return max(MIN_ROWS, 1 << (count - 1).bit_length())


def _stretched(segments: NDArray[np.int64], size: int, kept: int) -> list[list[int]]:
    """Segments whose last one holds the idle rows, too."""
    found: list[list[int]] = segments.tolist()
    found[-1][1:] = size, kept
    return found
