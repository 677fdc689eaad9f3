"""The native reader: exact bytes into memory of the caller, whatever the ranges and threads."""

import itertools
import os
import random
import threading
from pathlib import Path

import pytest
import torch

from fastsafe import _native

PIECE = 8 << 20


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reader") / "big"
    path.write_bytes(random.Random(0).randbytes(3 * PIECE + 12345))
    return path


def read(path: Path, ranges: list[tuple[int, int, int]], capacity: int, threads: int = 0) -> bytes:
    memory = torch.zeros(capacity, dtype=torch.uint8)
    _native.File(os.fsencode(path)).read_into(memory.data_ptr(), capacity, ranges, threads)
    return memory.numpy().tobytes()


@pytest.mark.parametrize("threads", [0, 1, 2, 8, 1000])
def test_whole_file(big: Path, threads: int) -> None:
    size = big.stat().st_size
    assert read(big, [(0, 0, size)], size, threads) == big.read_bytes()


def test_ranges_land_where_they_should(big: Path) -> None:
    content = big.read_bytes()
    rng = random.Random(1)
    cuts = sorted(rng.sample(range(len(content)), 40))
    ranges, at = [], 0
    wanted = bytearray(len(content) + 40 * 64)
    for begin, end in itertools.pairwise(cuts):
        ranges.append((begin, at, end - begin))
        wanted[at : at + end - begin] = content[begin:end]
        at += end - begin + 64
    rng.shuffle(ranges)
    assert read(big, ranges, len(wanted)) == wanted


@pytest.mark.parametrize(
    "size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE], ids=lambda n: f"{n} bytes"
)
def test_sizes_around_a_piece(big: Path, size: int) -> None:
    assert read(big, [(3, 0, size)], size) == big.read_bytes()[3 : 3 + size]
    assert _native.File(os.fsencode(big)).read_bytes(3, size) == big.read_bytes()[3 : 3 + size]


def test_large_buffer(tmp_path: Path) -> None:
    """A buffer large enough for huge pages, from an address that is no multiple of one."""
    path, size = tmp_path / "f", (36 << 20) + 5
    path.write_bytes(b"ab")
    os.truncate(path, size)  # sparse
    with path.open("r+b") as file:
        file.seek(size - 2)
        file.write(b"yz")
    memory = torch.full((size + 2,), 7, dtype=torch.uint8)
    reader = _native.File(os.fsencode(path))
    reader.read_into(memory.data_ptr() + 1, size, [(0, 0, size)])
    assert bytes(memory[:4].tolist() + memory[-4:].tolist()) == b"\7ab\0\0yz\7"
    assert memory.sum(dtype=torch.int64) == sum(b"\7abyz\7")


@pytest.mark.parametrize(
    ("ranges", "capacity"),
    [
        ([(0, 0, 11)], 100),
        ([(10, 0, 1)], 100),
        ([(2**64 - 1, 0, 2)], 100),
        ([(0, 0, 2**64 - 1)], 2**64 - 1),
        ([(0, 0, 9)], 8),
        ([(0, 8, 1)], 8),
        ([(0, 2**64 - 1, 2)], 8),
        ([(0, 0, 4), (8, 4, 4)], 8),
    ],
)
def test_ranges_outside_are_refused(
    tmp_path: Path, ranges: list[tuple[int, int, int]], capacity: int
) -> None:
    path = tmp_path / "ten"
    path.write_bytes(b"0123456789")
    memory = torch.zeros(128, dtype=torch.uint8)
    with pytest.raises(_native.Error, match="is outside the file or the buffer"):
        _native.File(os.fsencode(path)).read_into(memory.data_ptr(), capacity, ranges)
    assert not memory.any(), "nothing may be read before all ranges are checked"


@pytest.mark.parametrize("bad", [-1, 2**64, 1.5, "0", None])
def test_numbers_that_do_not_fit_are_a_type_error(tmp_path: Path, bad: object) -> None:
    (tmp_path / "f").write_bytes(b"0123456789")
    file = _native.File(os.fsencode(tmp_path / "f"))
    with pytest.raises(TypeError):
        file.read_bytes(bad, 1)  # type: ignore[arg-type]


def test_changed_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"0123456789")
    file = _native.File(os.fsencode(path))
    os.utime(path, ns=(0, 0))
    with pytest.raises(_native.Error, match="changed by another process while being read"):
        file.read_bytes(0, 10)


def test_many_readers_of_one_file(big: Path) -> None:
    file, content = _native.File(os.fsencode(big)), big.read_bytes()
    found: list[bool] = []

    def check(begin: int) -> None:
        found.append(file.read_bytes(begin, PIECE + 1) == content[begin : begin + PIECE + 1])

    threads = [threading.Thread(target=check, args=(i * 1000,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8


def test_descriptor_is_closed_with_the_object_and_not_inherited(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x")

    def held() -> list[int]:
        links = {int(fd): Path(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}
        return [fd for fd, link in links.items() if link.exists() and link.resolve() == path]

    file = _native.File(os.fsencode(path))
    assert [os.get_inheritable(fd) for fd in held()] == [False]
    del file
    assert held() == []
    for _ in range(3):
        with pytest.raises(_native.Error):
            _native.File(os.fsencode(tmp_path))
    assert len(os.listdir("/proc/self/fd")) < 100
