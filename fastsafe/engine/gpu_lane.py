"""A lane on a GPU: steps in static buffers and CUDA graphs, results read one step late.

The host prepares a step, copies it to the device in one piece, and launches it without waiting.
Sampled tokens stay on the device, where the next step finds them; the host reads them back while
that step runs. A row that has ended by then has been computed one step too far.

A decode step has a fixed number of rows, padding included, and is replayed as a graph: one graph
per width of the page table, for rows of any adapters. In strict mode the number of rows is always
the lane's maximum, and prefill is padded to the budget, or to a part of it that gives the same
bits: cuBLAS chooses its algorithm by shape, and only at one shape does a row have the same bits
beside any other rows (``invariance.py`` tests both when the lane is made). On a CPU with Triton's
interpreter the same buffers run step by step, without graphs.
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
from fastsafe.engine.adapters import MergedCopies
from fastsafe.engine.invariance import agreeing_rows, uneven_products
from fastsafe.engine.lane import Lane, OnEnd
from fastsafe.engine.paged_cache import DEVICE_PAGE, OpsAttention, SharedPrefix
from fastsafe.engine.planner import LaneMemory
from fastsafe.engine.readers import Sampler, StepReader
from fastsafe.engine.request import SamplingParams
from fastsafe.engine.sampling import RowParams, sample
from fastsafe.engine.scheduler import Row, RowQueue, Scheduler
from fastsafe.model.cpu_threads import is_out_of_memory
from fastsafe.model.grouped import FixedRows
from fastsafe.model.layers import MIN_ROWS
from fastsafe.model.lora import AdapterBank
from fastsafe.model.transformer import Project

# The six int64 inputs per row: handle, known token (or -1), position, cache slot, attention length,
# context length.
_NUM_INPUTS = 6


class StepBuffers:
    """Inputs and outputs of a decode step, at fixed addresses.

    Attributes:
        inputs: [6, rows] int64; padding rows have the scratch handle and attention length 0.
        table: [rows, width] int32, the pages of each row.
        sampled: Ids, log-probabilities, is_finite and is_stop, [rows] each; see ``sample``.
    """

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self.inputs = torch.zeros(_NUM_INPUTS, rows, dtype=torch.int64, device=device)
        self.table = torch.zeros(rows, width, dtype=torch.int32, device=device)
        self.sampled = (
            torch.zeros(rows, dtype=torch.int64, device=device),
            torch.zeros(rows, device=device),
            *torch.zeros(2, rows, dtype=torch.bool, device=device),
        )


class LaunchedStep(NamedTuple):
    """A step that the device may still be computing, and the host memory for its results."""

    handles: NDArray[np.int64]
    stamps: NDArray[np.int64]
    rows: NDArray[np.int64]  # index of these rows in the results
    results: Sequence[Tensor]  # on the host, filled when ``done``
    done: torch.cuda.Event | None

    def append_to(self, batch: _native.Batch, with_logprobs: bool) -> list[int]:
        """Wait for the results and append them; returns what ``batch.append`` returns."""
        if self.done is not None:
            self.done.synchronize()
        ids, logprobs, finite, stops = (x.numpy()[self.rows] for x in self.results)
        return batch.append(
            self.handles, self.stamps, ids, logprobs if with_logprobs else None, finite, stops
        )


class DeviceLane(Lane):
    """A lane on a GPU, or on Triton's interpreter; see ``Lane``.

    Args:
        strict: Compute steps of fixed shapes, so that a row's bits do not depend on other rows.
    """

    separate_decode_step = True

    def __init__(
        self,
        bank: AdapterBank,
        merged: MergedCopies | None,
        memory: LaneMemory,
        *,
        prefix_cache: bool,
        strict: bool,
    ) -> None:
        model, budget = bank.model, memory.prefill_tokens
        if strict:
            model = model.with_invariant(uneven_products(model, (memory.batch_size, budget)))
        super().__init__(bank, merged, memory, prefix_cache=prefix_cache, model=model)
        self._strict = strict
        self._graphs: dict[tuple[int, ...], torch.cuda.CUDAGraph] = {}
        self._buffers: dict[tuple[int, int], StepBuffers] = {}
        self._fixed: dict[int, FixedRows | None] = {}  # by number of rows
        self._scratch = self.max_rows  # handle of padding rows
        count, device = self.max_rows + 1, model.device
        # by handle: the last sampled token, and the sampling parameters
        self._last_sampled = torch.zeros(count, dtype=torch.int64, device=device)
        self._params = RowParams.stack([SamplingParams()] * count, device, [{-1}] * count)
        self._prefill_sizes: list[int] = []  # sizes of a prefill step in strict mode, rising
        self._keep_size = self.max_rows
        self._shared_pages = 0  # pages that all rows of an adapter begin with, in this call
        if strict:
            smaller = [budget >> i for i in (4, 3, 2, 1) if budget >> i >= MIN_ROWS]
            self._prefill_sizes = [*agreeing_rows(model, budget, smaller), budget]

    def run(self, queue: RowQueue, lane: int, reader: StepReader, on_end: OnEnd) -> None:
        """Compute rows until the queue is empty or cancelled; call ``on_end`` once for each."""
        self._shared_pages = reader.shared_tokens // DEVICE_PAGE
        if isinstance(reader, Sampler):
            self._keep_size = self.max_rows
            self._run_ahead(queue, lane, reader, on_end)
        else:
            self._keep_size = self._budget
            super().run(queue, lane, reader, on_end)

    def _run_ahead(self, queue: RowQueue, lane: int, sampler: Sampler, on_end: OnEnd) -> None:
        """Sample with one step in flight: its results are read after the next one is launched."""
        new_handles: list[int] = []

        def on_add(handle: int, row: Row) -> None:
            sampler.add(handle, row)
            new_handles.append(handle)

        self._widen_stop_ids(sampler.params)
        scheduler = self.scheduler(queue, lane, on_add)
        in_flight: deque[LaunchedStep] = deque()
        try:
            while scheduler.fill() or in_flight:
                try:
                    launched = self._launch(scheduler, sampler, new_handles)
                except (MemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):
                        raise
                    in_flight.clear()
                    self.back_off(scheduler, on_end)
                    continue
                in_flight.extend(launched)
                while len(in_flight) > len(launched):
                    step = in_flight.popleft()
                    pairs = step.append_to(self.batch, sampler.with_logprobs)
                    self.finish(scheduler, sampler, pairs, on_end)
        finally:
            scheduler.clear()
            self._adapters.clear()

    def _launch(
        self, scheduler: Scheduler, sampler: Sampler, new_handles: list[int]
    ) -> list[LaunchedStep]:
        """Launch the next prefill step, and the next decode step."""
        launched = []
        plan = scheduler.plan(self._budget, decode=False)
        if new_handles:
            self._set_params(sampler, new_handles)
            new_handles.clear()
        if len(plan.positions):
            hidden = self.compute(plan)
            if len(plan.keep):
                handles = self._send(_pad(plan.kept_handles, len(hidden), self._scratch))
                positions = self._send(_pad(plan.positions[plan.keep], len(hidden), 0))
                sampled = self._sample(hidden, handles, positions, sampler.with_logprobs)
                launched.append(self._read_back(plan, np.arange(len(plan.keep)), sampled))
        plan = scheduler.plan(0, prefill=False)
        if len(plan.positions):
            sampled = self._decode(plan, sampler.with_logprobs)
            launched.append(self._read_back(plan, plan.keep, sampled))
        return launched

    def compute(self, plan: _native.StepPlan) -> Tensor:
        """Compute the final states of the kept tokens of a prefill step: [at least kept, E]."""
        self._store.copy(torch.from_numpy(plan.copies))
        num_tokens, num_kept = len(plan.positions), len(plan.keep)
        size, keep_size = max(num_tokens, MIN_ROWS), max(num_kept, MIN_ROWS)
        if self._strict:
            size = next(size for size in self._prefill_sizes if size >= num_tokens)
            keep_size = self._keep_size
        row_of_token = np.repeat(np.arange(len(plan.handles)), np.diff(plan.starts))
        inputs = self._inputs(plan, row_of_token, 0, size)
        rows, ids, positions, cache_slots, lengths, context_lens = inputs
        table = self._send(plan.table).index_select(0, rows)
        keep = self._send(_pad(plan.keep, keep_size, 0))
        shared = self._shared_prefix(plan, size) if self._shared_pages else None
        attend = OpsAttention(self._store, table, cache_slots, lengths, shared)
        segments = _with_padding(plan.segments, size, keep_size)
        project = self._adapters.project(segments)
        return self.model.forward(ids, positions, attend, project, keep, context_lens)

    def _inputs(
        self, plan: _native.StepPlan, owners: NDArray[np.int64], padding_owner: int, size: int
    ) -> Tensor:
        """Send the inputs of a step, padded to ``size`` tokens: [6, size], owners first."""
        scratch_slot = self._store.num_pages * DEVICE_PAGE  # on the page that no row has
        inputs = [
            _pad(owners, size, padding_owner),
            _pad(plan.token_ids, size, 0),
            _pad(plan.positions, size, 0),
            _pad(plan.cache_slots, size, scratch_slot),
            _pad(plan.positions + 1, size, 0),
            _pad(plan.context_lens, size, 1),
        ]
        return self._send(np.stack(inputs))

    def _shared_prefix(self, plan: _native.StepPlan, size: int) -> SharedPrefix:
        """Find the tokens after the shared pages, by adapter; any of its rows has these pages."""
        is_after = _pad(plan.positions, size, 0) >= self._shared_pages * DEVICE_PAGE
        groups, begin = [], 0
        for _, end, _ in plan.segments.tolist():
            tokens = begin + np.flatnonzero(is_after[begin:end])
            if len(tokens):
                row = np.searchsorted(plan.starts, tokens[0], side="right") - 1
                pages = plan.table[row, : self._shared_pages].astype(np.int64)
                groups.append((self._send(tokens), self._send(pages)))
            begin = end
        inside = self._send(np.flatnonzero(~is_after))
        return SharedPrefix(self._shared_pages, inside, tuple(groups))

    def _decode(self, plan: _native.StepPlan, with_logprobs: bool) -> tuple[Tensor, ...]:
        """Sample the next token of every row, by a graph if the device has graphs."""
        count = len(plan.positions)
        rows = self.max_rows if self._strict else min(self.max_rows, _power_of_two(count))
        width = _power_of_two(plan.table.shape[1])
        b = self._buffers.get((rows, width))
        if b is None:
            b = self._buffers[rows, width] = StepBuffers(rows, width, self.model.device)
        b.inputs.copy_(self._inputs(plan, plan.handles, self._scratch, rows))
        b.table[:count, : plan.table.shape[1]].copy_(self._send(plan.table))
        segments = _with_padding(plan.segments, rows, rows)
        if self.merges:  # every adapter has its own weights, so no graph fits all steps
            self._step(b, self._adapters.project(segments), with_logprobs)
            return b.sampled
        fixed = self._fixed.get(rows)
        if rows not in self._fixed or not self._bank.is_current(fixed):
            self._graphs.clear()
            fixed = self._fixed[rows] = self._bank.fixed(rows, self.model)
        if fixed is not None:
            counts = np.diff([0, *(end for _, end, _ in segments)])
            fixed.update(np.repeat([slot for slot, _, _ in segments], counts).tolist())
        if not self._last_sampled.is_cuda:
            self._step(b, fixed, with_logprobs)
            return b.sampled
        key = (rows, width, self._params.stop_ids.shape[1], with_logprobs)
        if key not in self._graphs:
            self._graphs[key] = self._capture(b, fixed, with_logprobs)
        self._graphs[key].replay()
        return b.sampled

    def _capture(
        self, b: StepBuffers, project: Project | None, with_logprobs: bool
    ) -> torch.cuda.CUDAGraph:
        """Capture one decode step; the tokens that the warm-up samples are discarded."""
        last_sampled = self._last_sampled.clone()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # libraries choose algorithms and kernels are compiled
                self._step(b, project, with_logprobs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._step(b, project, with_logprobs)
        self._last_sampled.copy_(last_sampled)
        return graph

    def _step(self, b: StepBuffers, project: Project | None, with_logprobs: bool) -> None:
        """Compute one token of every row of the buffers and sample the next."""
        handles, known_ids, positions, cache_slots, lengths, context_lens = b.inputs
        last_sampled = self._last_sampled.index_select(0, handles)
        ids = torch.where(known_ids >= 0, known_ids, last_sampled)
        attend = OpsAttention(self._store, b.table, cache_slots, lengths)
        hidden = self.model.forward(ids, positions, attend, project, None, context_lens)
        sampled = self._sample(hidden, handles, positions, with_logprobs)
        for buffer, value in zip(b.sampled, sampled, strict=True):
            buffer.copy_(value)

    def _sample(
        self, hidden: Tensor, handles: Tensor, positions: Tensor, with_logprobs: bool
    ) -> tuple[Tensor, ...]:
        params = self._params.take(handles)
        sampled = sample(self.model.logits(hidden), params, positions + 1, with_logprobs)
        self._last_sampled.index_copy_(0, handles, sampled[0])
        return sampled

    def _widen_stop_ids(self, params: RowParams) -> None:
        """Make room for as many stop ids as the rows of the call have."""
        missing = params.stop_ids.shape[1] - self._params.stop_ids.shape[1]
        if missing > 0:
            stop_ids = F.pad(self._params.stop_ids, (0, missing), value=-1)
            self._params = self._params._replace(stop_ids=stop_ids)
            self._graphs.clear()

    def _set_params(self, sampler: Sampler, handles: list[int]) -> None:
        """Write the sampling parameters of new rows at their handles."""
        params = sampler.params_of(np.array(handles))
        missing = self._params.stop_ids.shape[1] - params.stop_ids.shape[1]
        params = params._replace(stop_ids=F.pad(params.stop_ids, (0, missing), value=-1))
        index = self._send(np.array(handles))
        for column, values in zip(self._params, params, strict=True):
            column.index_copy_(0, index, values)

    def _read_back(
        self, plan: _native.StepPlan, rows: NDArray[np.int64], sampled: Sequence[Tensor]
    ) -> LaunchedStep:
        """Queue the copy of a step's results to the host, for the kept rows at index ``rows``."""
        is_cuda = self._last_sampled.is_cuda
        results = []
        for x in sampled:
            host = torch.empty(x.shape, dtype=x.dtype, pin_memory=is_cuda)
            results.append(host.copy_(x, non_blocking=True))
        done = None
        if is_cuda:
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        return LaunchedStep(plan.kept_handles, plan.kept_stamps, rows, results, done)

    def _send(self, values: NDArray[Any]) -> Tensor:
        """Queue a copy to the device."""
        tensor = torch.from_numpy(values)
        if not self._last_sampled.is_cuda:
            return tensor
        return tensor.pin_memory().to(self.model.device, non_blocking=True)


def _pad(values: NDArray[np.int64], size: int, fill: int) -> NDArray[np.int64]:
    return np.concatenate([values, np.full(size - len(values), fill, dtype=np.int64)])


def _power_of_two(count: int) -> int:
    return max(MIN_ROWS, 1 << (count - 1).bit_length())


def _with_padding(segments: NDArray[np.int64], size: int, kept: int) -> list[list[int]]:
    """Extend the last segment over the padding rows."""
    extended: list[list[int]] = segments.tolist()
    extended[-1][1:] = size, kept
    return extended
