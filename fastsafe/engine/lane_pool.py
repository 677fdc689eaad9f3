"""Lane pool: runs the rows of one call on a lane per core, or on one for all; streams results."""

import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from queue import SimpleQueue
from typing import Any

import torch

from fastsafe.engine.lane import MERGED_SLOTS, Lane
from fastsafe.engine.paged_cache import cache_dtype, page_tokens
from fastsafe.engine.planner import LaneMemory, plan_memory, weight_bytes
from fastsafe.engine.readers import StepReader
from fastsafe.engine.scheduler import FinishReason, Row, RowQueue
from fastsafe.model.cpu_threads import available_bytes, one_thread_each
from fastsafe.model.transformer import Transformer

# Rows that make it worth starting another lane.
_ROWS_PER_LANE = 8
# Weights that no cache holds: cores that compute steps of their own would each read all of them
# from memory, so they share the steps of one lane instead.
_SHARED_BYTES = 1 << 25
# Most prompt tokens of a step. On a CPU their activations stay near the L2 cache; a GPU in strict
# mode computes a step of this size even if it holds fewer tokens.
_PROMPT_TOKENS = {"cpu": 512, "cuda": 4096}
# Share of the host's free memory that the lanes may take.
_HOST_SHARE = 0.5


# A row that ended, its finish reason (None if it was scored), and its result.
EndedRow = tuple[Row, FinishReason | None, Any]


class LanePool:
    """Idle lanes, kept for the next call; calls may overlap, each on lanes of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[Lane] = []

    def _take(self, fits: Callable[[Lane], bool], make: Callable[[], Lane]) -> Lane:
        with self._lock:
            self._idle = [lane for lane in self._idle if fits(lane)]
            if self._idle:
                return self._idle.pop()
        return make()

    def run(
        self,
        rows: Sequence[Row],
        device: torch.device,
        fits: Callable[[Lane], bool],
        make: Callable[[], Lane],
        reader: Callable[[Lane], StepReader],
        *,
        weights: int,
    ) -> Iterator[EndedRow]:
        """Compute rows and yield each as it ends.

        Closing the iterator cancels the rest: lanes stop at their next step and release all pages.

        Args:
            rows: Rows to compute.
            device: Device of the lanes.
            fits: Returns whether an idle lane can compute the rows; one that cannot is dropped.
            make: Makes a lane that can.
            reader: Makes the reader of a lane.
            weights: Bytes that a step reads.

        Raises:
            Exception: The first error in a lane, once the other lanes have stopped.
        """
        if not rows:
            return
        row_queue = RowQueue(rows)
        # None: a lane has stopped
        results: SimpleQueue[EndedRow | BaseException | None] = SimpleQueue()

        def on_end(row: Row, reason: FinishReason | None, result: object) -> None:
            results.put((row, reason, result))

        def run_lane(number: int) -> None:
            try:
                lane = self._take(fits, make)
                with torch.inference_mode():
                    lane.run(row_queue, number, reader(lane), on_end)
                with self._lock:
                    self._idle.append(lane)
            except BaseException as error:  # raised again in the caller's thread
                row_queue.cancel()
                results.put(error)
            finally:
                results.put(None)

        one_lane = nullcontext(1)
        with one_lane if shares_steps(weights) else one_thread_each(device) as num_lanes:
            running = min(num_lanes, -(-len(rows) // _ROWS_PER_LANE))
            threads = [
                threading.Thread(target=run_lane, args=(number,), name=f"lane {number}")
                for number in range(running)
            ]
            try:
                for thread in threads:
                    thread.start()
                error = None
                while running:
                    item = results.get()
                    if item is None:
                        running -= 1
                    elif isinstance(item, BaseException):
                        error = error or item
                    elif not error:
                        yield item
                if error:
                    raise error
            finally:
                row_queue.cancel()
                for thread in threads:
                    if thread.ident is not None:
                        thread.join()


def shares_steps(weights: int) -> bool:
    """Return whether a CPU's cores share the steps of one lane, by the bytes of the weights."""
    return weights > _SHARED_BYTES


def plan_lane(model: Transformer, merged: bool, batch_size: int, longest: int) -> LaneMemory:
    """Plan the memory of one lane: a core of a CPU, all of them, or the GPU.

    Args:
        model: The base, whose weights are in memory already.
        merged: Whether the lane holds merged copies of them.
        batch_size: Maximum number of rows of a step.
        longest: Tokens of the longest row.

    Raises:
        UsageError: The longest row does not fit.
    """
    device, weights = model.device, weight_bytes(model.config, model.dtype.itemsize)
    budget = available_bytes(str(device))
    if device.type == "cpu":
        lanes = 1 if shares_steps(weights) else os.cpu_count() or 1
        budget = int(budget * _HOST_SHARE / lanes)
    memory = plan_memory(
        model.config,
        itemsize=model.dtype.itemsize,
        page_tokens=page_tokens(device),
        cache_itemsize=cache_dtype(device, model.dtype).itemsize,
        budget_bytes=weights + budget,
        device_kind=device.type,
        adapter_bytes=MERGED_SLOTS * weights if merged else 0,
        batch_size=batch_size,
        context=longest,
    )
    prefill_tokens = min(memory.prefill_tokens, _PROMPT_TOKENS[device.type])
    return dataclasses.replace(memory, prefill_tokens=prefill_tokens)
