"""Run independent tiles of work on all CPU cores, one thread per tile; ask for free memory.

A tile is a set of whole sequences, of one adapter where adapters are merged or trained. Small
matrices gain little when one product is split over cores, independent tiles do; and because a
tile is computed by one thread, its bits do not depend on how many cores there are or on what runs
beside it. The products of a tile that is alone are shared by all cores, which changes no bit.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from fastsafe.model.cpu_ops import shared_products

T = TypeVar("T")
R = TypeVar("R")


class TileRunner:
    """Maps a function over tiles; made by ``tile_runner``."""

    def __init__(self, pool: ThreadPoolExecutor | None, threads: int) -> None:
        self._pool = pool
        self._threads = threads

    def map(self, fn: Callable[[T], R], tiles: Sequence[T]) -> Iterator[R]:
        """Yield the results of ``fn`` in the order of ``tiles``; raise the first error."""
        if self._pool is None or len(tiles) == 1:
            with shared_products(self._threads):
                yield from map(fn, tiles)
        else:
            yield from self._pool.map(fn, tiles)


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
            yield TileRunner(None, threads)
        else:
            with ThreadPoolExecutor(threads, thread_name_prefix="tile") as pool:
                yield TileRunner(pool, threads)


def available_bytes(device: str) -> int:
    """Return the bytes that this process can still allocate on a device.

    Args:
        device: "cpu", "cuda" or "cuda:N". On a CPU the limits of its control groups count, too.
    """
    if device != "cpu":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([_host_bytes(Path("/proc/meminfo")), *_group_bytes(Path("/sys/fs/cgroup"))])


def _host_bytes(meminfo: Path) -> int:
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # not Linux


def _group_bytes(root: Path, membership: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Return the bytes left under each limit of this process's control groups (version 2)."""
    path = ""
    if membership.exists():
        lines = membership.read_text().splitlines()
        path = next((line[3:] for line in lines if line.startswith("0::")), "")
    bytes_left = []
    folder = root / path.strip("/")
    for group in (folder, *folder.parents):
        limit, used = group / "memory.max", group / "memory.current"
        if group.is_relative_to(root) and limit.is_file() and used.is_file():
            text = limit.read_text().strip()
            if text != "max":
                bytes_left.append(int(text) - int(used.read_text()) + _inactive(group))
    return bytes_left


def _inactive(group: Path) -> int:
    """Return the bytes of page cache that the kernel frees on demand."""
    stat = group / "memory.stat"
    lines = stat.read_text().splitlines() if stat.is_file() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
