"""Run independent tiles of work on all CPU cores, one thread per tile; detect lack of memory.

A tile is a set of whole sequences, of one adapter where adapters are merged or trained. Small
matrices gain little when one product is split over cores, independent tiles do; and because a
tile is always computed by one thread, its bits do not depend on how many cores there are or on
what runs beside it.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class TileRunner:
    """Maps a function over tiles; made by ``tile_runner``."""

    def __init__(self, pool: ThreadPoolExecutor | None) -> None:
        self._pool = pool

    def map(self, fn: Callable[[T], R], tiles: Sequence[T]) -> Iterator[R]:
        """Yield the results of ``fn`` in the order of ``tiles``; raise the first error."""
        if self._pool is None or len(tiles) == 1:
            return map(fn, tiles)
        return self._pool.map(fn, tiles)


class _SingleThreaded:
    """Holds torch at one thread while any runner lives; the setting is one for the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._threads = 1
        # an attribute, since at interpreter exit ``torch`` may be gone before the last ``leave``
        self._set = torch.set_num_threads

    def enter(self) -> int:
        """Set one thread; return the number of threads that the caller may start."""
        with self._lock:
            if self._depth == 0:
                self._threads = torch.get_num_threads()
            self._depth += 1
            self._set(1)
            return self._threads

    def leave(self) -> None:
        """Restore the setting when the last runner ends."""
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                self._set(self._threads)


_single_threaded = _SingleThreaded()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed, on a GPU or on the host.

    torch has a class for a GPU's; on a CPU it raises RuntimeError with its own allocator's text or
    with that of the operating system.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    texts = ("can't allocate memory", "Cannot allocate memory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


@contextmanager
def one_thread_each(device: torch.device) -> Iterator[int]:
    """Set torch to one thread on a CPU; yield the number of threads that the caller may start.

    On a GPU that number is one, since the device itself runs in parallel.
    """
    if device.type != "cpu":
        yield 1
        return
    held = _single_threaded  # a stream may end when this module's names are gone already
    threads = held.enter()
    try:
        yield threads
    finally:
        held.leave()


@contextmanager
def tile_runner(device: torch.device) -> Iterator[TileRunner]:
    """Yield a runner; on a CPU, torch is set to one thread while it lives."""
    with one_thread_each(device) as threads:
        if threads == 1:
            yield TileRunner(None)
        else:
            with ThreadPoolExecutor(threads, thread_name_prefix="tile") as pool:
                yield TileRunner(pool)
