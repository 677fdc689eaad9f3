"""Runs one call's rows on as many lanes as there are cores, and hands out results as they end."""

import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch

from fastsafe.engine.lane import MERGED_SLOTS, Lane
from fastsafe.engine.paged_cache import cache_dtype, page_tokens
from fastsafe.engine.planner import MemoryPlan, available_bytes, plan_memory, weight_bytes
from fastsafe.engine.readers import Reader
from fastsafe.engine.scheduler import FinishReason, Row, Work
from fastsafe.model.cpu_threads import one_thread_each
from fastsafe.model.transformer import Transformer

# Rows that make a second lane worth its start.
_ROWS_PER_LANE = 8


# Prompt tokens of a step, at most. On a CPU they stay near the L2 cache; in strict mode a GPU
# computes as many whether they are there or not.
_PROMPT_TOKENS = {"cpu": 512, "cuda": 4096}
# Of the host's free memory, the part that caches may take.
_HOST_SHARE = 0.5


class Ended(NamedTuple):
    """A row that ended, why (None where it was only read), and what its reader found."""

    row: Row
    reason: FinishReason | None
    found: Any


class LanePool:
    """Lanes that no call uses, kept for the next; calls may overlap, each with lanes of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[Lane] = []

    def take(self, fits: Callable[[Lane], bool], make: Callable[[], Lane]) -> Lane:
        """Take an idle lane that fits or make one; idle lanes that do not fit are let go of."""
        with self._lock:
            self._idle = [lane for lane in self._idle if fits(lane)]
            if self._idle:
                return self._idle.pop()
        return make()

    def give(self, lane: Lane) -> None:
        """Keep a lane for the next call."""
        with self._lock:
            self._idle.append(lane)


def plan_lane(model: Transformer, merged: bool, batch_size: int, longest: int) -> MemoryPlan:
    """Plan the memory of one lane: a core of a CPU, or the GPU.

    Args:
        model: The base; its weights are there already.
        merged: Whether the lane holds merged copies of them.
        batch_size: Most rows of a step.
        longest: Tokens of the longest row, which has to fit.

    Raises:
        UsageError: There is no room for a single row.
    """
    device, own = model.device, weight_bytes(model.config, model.dtype.itemsize)
    budget = available_bytes(str(device))
    if device.type == "cpu":
        budget = int(budget * _HOST_SHARE / (os.cpu_count() or 1))
    plan = plan_memory(
        model.config,
        itemsize=model.dtype.itemsize,
        page_tokens=page_tokens(device),
        cache_itemsize=cache_dtype(device, model.dtype).itemsize,
        budget_bytes=own + budget,
        device_kind=device.type,
        adapter_bytes=MERGED_SLOTS * own if merged else 0,
        batch_size=batch_size,
        context=longest,
    )
    most = min(plan.prefill_tokens, _PROMPT_TOKENS[device.type])
    return dataclasses.replace(plan, prefill_tokens=most)


def run(
    rows: Sequence[Row],
    device: torch.device,
    take: Callable[[], Lane],
    give: Callable[[Lane], None],
    reader: Callable[[Lane], Reader],
) -> Iterator[Ended]:
    """Compute rows; yields each as it ends, in the order of ending.

    Closing the iterator cancels the rest: lanes stop at their next step and give back all pages.

    Args:
        rows: What to compute.
        device: Where.
        take: Gives a lane.
        give: Takes it back.
        reader: Makes the reader of a lane.

    Raises:
        Exception: The first that a lane raised; the other lanes are stopped before.
    """
    if not rows:
        return
    work = Work(rows)
    queue: SimpleQueue[Ended | BaseException | None] = SimpleQueue()  # None: a lane stopped

    def run_lane(number: int) -> None:
        try:
            lane = take()
            with torch.inference_mode():
                lane.run(work, number, reader(lane), lambda *ended: queue.put(Ended(*ended)))
            give(lane)
        except BaseException as error:  # handed to the caller; a thread must not die in silence
            work.cancel()
            queue.put(error)
        finally:
            queue.put(None)

    with one_thread_each(device) as most:
        count = min(most, -(-len(rows) // _ROWS_PER_LANE))
        threads = [
            threading.Thread(target=run_lane, args=(number,), name=f"lane {number}")
            for number in range(count)
        ]
        try:
            for thread in threads:
                thread.start()
            error = None
            while count:
                item = queue.get()
                if item is None:
                    count -= 1
                elif isinstance(item, BaseException):
                    error = error or item
                elif not error:
                    yield item
            if error:
                raise error
        finally:
            work.cancel()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
