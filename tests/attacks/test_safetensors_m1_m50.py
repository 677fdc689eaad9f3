"""Hostile and broken safetensors files, M1 to M46, each built from bytes, each with its message.

The numbers are those of the threat table. M47 (shards) is in tests/io/test_checkpoint.py, M49
(config bombs) in tests/io/test_json_file.py and tests/model, M50 (bit flips and fuzzing) in
test_safetensors_differential.py.
"""

import json
import os
import resource
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors as reference
import torch

from fastsafe import _native
from fastsafe.errors import CheckpointError
from fastsafe.io import safetensors

FOUR = b"\x00\x00\x80\x3f"  # 1.0 in F32


def build(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header, as JSON unless it is bytes, and this claim about its length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def info(shape: Any = (1,), offsets: Any = (0, 4), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def one(**changes: Any) -> dict[str, Any]:
    return {"t": info(**changes)}


def raw(entry: str) -> bytes:
    """A header with one tensor whose fields are spelled out."""
    return b'{"t":{%s}}' % entry.encode()


VALID = build(one(), FOUR)
INFO = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
OFFSETS = '"dtype":"F32","shape":[1],"data_offsets":%s'
SHAPE = '"dtype":"F32","data_offsets":[0,4],"shape":%s'
ODD_JSON = [b"{", b"[]", b"null", b'"x"', b"1", b"{}garbage", b"{,}", b'{"t":1}', b"{}{}"]
NOT_UTF8 = [
    b"\xff",
    b"\xc0\x80",
    b"\xe0\x80\x80",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    b"\xc3",
    b"\xc3\x41",
    b"\xf5\x80\x80\x80",
    b"\xf0\x8f\xbf\xbf",
    b"\xf0\x9f\x98",
]
BAD_OFFSETS = [
    "[-1,4]",
    "[0.5,4]",
    "[0,4e0]",
    "[0,4E0]",
    '["0",4]',
    "[null,4]",
    "[0,4,8]",
    "[4]",
    "[]",
    "{}",
]
BAD_DIMS = ["[-1]", "[1.0]", '["1"]', "[+1]", "[01]", "[1e0]", "[true]", "[[1]]", "1", "[1,]"]

REFUSED: list[tuple[str, bytes, str]] = [
    ("M1", b"", "has 0 bytes, expected at least 8 for its header"),
    *[("M2", b"\x01" * n, f"has {n} bytes, expected at least 8") for n in range(1, 8)],
    ("M3", build(b"", length=60), "has 8 bytes, expected at least 68 for its header"),
    ("M4", build(b"{}", length=3), "has 10 bytes, expected at least 11"),
    ("M4", build(b"{}", length=10), "has 10 bytes, expected at least 18"),
    *[
        ("M6", build(b"{}", length=n), f"header length is {n}, expected at most 100000000")
        for n in (2**63, 2**64 - 1, 0xFFFFFF000000003C, 100_000_001)
    ],
    ("M7", build(b""), "header has its end at byte 8, expected '{'"),
    *[("M8", build(b'{"%s' % bad), "at byte 10, expected UTF-8") for bad in NOT_UTF8],
    ("M8", build(rb'{"\ud800":%s}' % INFO, FOUR), "a pair of surrogates"),
    ("M8", build(rb'{"\udc00\ud800":%s}' % INFO, FOUR), "a pair of surrogates"),
    ("M8", build(rb'{"\ud800\u0041":%s}' % INFO, FOUR), "a pair of surrogates"),
    ("M8", build(rb'{"\ud800\ue000":%s}' % INFO, FOUR), "a pair of surrogates"),
    ("M8", build(rb'{"\ud800\n\udc00":%s}' % INFO, FOUR), "a pair of surrogates"),
    ("M8", build(rb'{"\ud800'), "a pair of surrogates"),
    *[("M9", build(text), "header has .* at byte .*, expected ") for text in ODD_JSON],
    ("M9", build(b'{"__metadata__":{"a":"b",}}'), "expected a string"),
    ("M12", build(b" {}"), "header has ' ' at byte 8, expected '{'"),
    ("M13", build(b"{}\0\0"), "header has NUL at byte 10, .* padded with nothing but spaces"),
    ("M14", VALID + b"\0", "5 bytes of data, expected 4; something was appended"),
    ("M14", VALID + b"PK\x03\x04", "8 bytes of data, expected 4; something was appended"),
    *[
        ("M15", build(one(shape=[2048], offsets=[0, 8192]), bytes(8192 - short)), "incomplete")
        for short in (1, 2, 4096)
    ],
    ("M15", VALID[:-1], "3 bytes of data, expected 4; the download is incomplete"),
    (
        "M16",
        build({"a": info([4], [0, 16]), "b": info([4], [20, 36])}, bytes(36)),
        "tensor 'b' begins at byte 20 of the data after a hole, expected 16",
    ),
    (
        "M17",
        build({"a": info([4], [0, 16]), "b": info([4], [8, 24])}, bytes(24)),
        "tensor 'b' begins at byte 8 of the data in an overlap, expected 16",
    ),
    ("M17", build({f"w{i}": info() for i in range(10)}, FOUR), "begins at byte 0 .* an overlap"),
    ("M18", build(one(offsets=[4, 8]), bytes(8)), "begins at byte 4 of the data after a hole"),
    ("M19", build(one(offsets=[4, 0]), FOUR), "ends at byte 0, expected at least 4"),
    *[("M20", build(raw(OFFSETS % o), FOUR), "in tensor 't', expected") for o in BAD_OFFSETS],
    ("M20", build(raw(OFFSETS % f"[0,{2**64}]"), FOUR), "offset is .*, expected less than 2\\^64"),
    ("M21", build(one(shape=[2, 2], dtype="I32"), FOUR), r"4 bytes, expected 16 for I32 \[2, 2\]"),
    ("M22", build(one(shape=[2, 2**64 - 2])), "dimension of .*, expected at most 2\\^48"),
    ("M23", build(one(shape=[2, 2**63 - 1])), "dimension of .*, expected at most 2\\^48"),
    ("M24", build(one(shape=[2**48, 2**11])), r"F32 \[.*\], expected fewer than 2\^64 bits"),
    ("M24", build(one(shape=[2**48 + 1])), "expected at most 2\\^48"),
    ("M25", build(one(shape=[0, 2**63], offsets=[0, 0])), "expected at most 2\\^48"),
    ("M25", build(one(shape=[0, 2**48, 2**48], offsets=[0, 0])), "fewer than 2\\^64 bits"),
    ("M27", build(one(shape=[1] * 9), FOUR), "too many dimensions, expected at most 8"),
    ("M27", build(one(shape=[1] * 1_000_000), FOUR), "too many dimensions"),
    *[("M28", build(raw(SHAPE % dims), FOUR), "in tensor 't', expected") for dims in BAD_DIMS],
    *[("M29", build(one(dtype=d), FOUR), f"dtype '{d}', expected one") for d in ("F17", "f32", "")],
    ("M30", build(one(dtype="F4", shape=[3], offsets=[0, 2]), b"12"), "12 bits, expected whole"),
    ("M32", build(b'{"t":%s,"t":%s}' % (INFO, INFO), FOUR), "tensor 't' appears twice"),
    (
        "M33",
        build(b'{"t":%s,"t":%s}' % (INFO, INFO.replace(b"0,4", b"4,8")), bytes(8)),
        "tensor 't' appears twice",
    ),
    ("M34", build(b'{"__metadata__":{},"__metadata__":{}}'), "__metadata__ appears twice"),
    ("M34", build(b'{"__metadata__":nul}'), "header has 'n' at byte 24, expected '{'"),
    ("M34", build(b'{"__metadata__":null,"__metadata__":{}}'), "__metadata__ appears twice"),
    ("M34", build({"__metadata__": []}), r"header has '\[' at byte 25, expected '\{'"),
    ("M34", build({"__metadata__": {"a": 1}}), "expected a string, the value in __metadata__"),
    ("M34", build(b'{"__metadata__":{"a":"1","a":"2"}}'), "key 'a' appears twice"),
    ("M34", build({"__metadata__": {"a": "x" * 50_000_000}}), "value in __metadata__ is too long"),
    ("M34", build({"__metadata__": {"x" * 2**20: "y"}}), "value in __metadata__ is too long"),
    ("M35", build({"__metadata__": info()}, FOUR), r"header has '\[' .* the value in __metadata__"),
    ("M36", build({"": info()}, FOUR), "name of a tensor is empty"),
    ("M36", build({"x" * 1024: info([2])}, FOUR), r"tensor 'x{80}\.\.\.' has 4 bytes"),
    ("M36", build({"x" * 1025: info()}, FOUR), "name of a tensor is too long, expected at most"),
    *[
        ("M36", build({f"a{c}b": info()}, FOUR), "control character in its name")
        for c in "\0\n\x1b\x7f\x80\x9f\u200e\u200f\u202a\u202e\u2066\u2069"
    ],
    ("M36", build(b'{"a\nb":%s}' % INFO, FOUR), "expected a printable character"),
    ("M37", build({"t": info() | {"strides": [1]}}, FOUR), "unknown key or one twice, 'strides'"),
    *[
        ("M37", build(raw(f'"{k}":{v},"{k}":{v}'), FOUR), f"unknown key or one twice, '{k}'")
        for k, v in (("dtype", '"F32"'), ("shape", "[1]"), ("data_offsets", "[0,4]"))
    ],
    ("M38", build(raw('"shape":[1],"data_offsets":[0,4]'), FOUR), "has no dtype"),
    ("M38", build(raw('"dtype":"F32","data_offsets":[0,4]'), FOUR), "has no shape"),
    ("M38", build(raw('"dtype":"F32","shape":[1]'), FOUR), "has no data_offsets"),
    ("M38", build(b'{"t":{}}'), "has no dtype"),
    ("M40", build(raw('"x":' + "[" * 100_000)), "unknown key or one twice, 'x'"),
    ("M40", build(raw('"shape":' + "[" * 100_000)), "expected a whole number, the dimension"),
    ("M40", build(b'{"__metadata__":{"a":' + b'{"a":' * 100_000), "expected a string"),
    ("M41", build(rb'{"weight":%s,"\u0077eight":%s}' % (INFO, INFO), FOUR), "'weight' .* twice"),
    ("M41", build(rb'{"\x41":%s}' % INFO, FOUR), "expected a JSON escape"),
    ("M41", build(rb'{"\u00g0":%s}' % INFO, FOUR), "expected four hexadecimal digits"),
    ("M41", build(rb'{"\u00'), "expected four hexadecimal digits"),
    ("M43", build(one(dtype="BOOL", offsets=[0, 1]), b"\x02"), "BOOL of 2, expected 0 or 1"),
]


@pytest.mark.parametrize(("content", "message"), [pytest.param(*c[1:], id=c[0]) for c in REFUSED])
def test_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        safetensors.read(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: "), "the file must be named"
    assert text.isprintable()
    assert len(text) < len(str(path)) + 500, "a message must stay one sentence"


ACCEPTED = [
    ("M10", build({}), {}),
    ("M16", build({"b": info([2], [4, 12]), "a": info()}, FOUR * 3), {"a": [1], "b": [2]}),
    *[
        (
            "M36",
            build(json.dumps({f"a{c}": info()}, ensure_ascii=False).encode(), FOUR),
            {f"a{c}": [1]},
        )
        for c in "\xa0\u0800\u200d\u2010\u202f\u2065\u206a\ud7ff\ue000\uffff\U00010000\U0010ffff"
    ],
    *[
        ("M41", build({f"a{c}": info()}, FOUR), {f"a{c}": [1]})
        for c in "\xa0\u0800\ud7ff\ue000\uffff\U00010000\U0010ffff"
    ],
    ("M11", build(b"{} \r\t\n"), {}),
    (
        "M11",
        build(b'{ "t" :\n{"shape":[ 1 ],\t"data_offsets":[ 0 , 4 ] ,"dtype" : "F32"} }', FOUR),
        {"t": [1]},
    ),
    ("M26", build(one(shape=[]), FOUR), {"t": []}),
    ("M26", build(one(shape=[0], offsets=[0, 0])), {"t": [0]}),
    ("M26", build({"a": info([2, 0], [0, 0]), "b": info()}, FOUR), {"a": [2, 0], "b": [1]}),
    ("M36", build({"../../x": info()}, FOUR), {"../../x": [1]}),
    (
        "M36",
        build({"constructor": info(), "é\U0001f600": info([0], [4, 4])}, FOUR),
        {"constructor": [1], "é\U0001f600": [0]},
    ),
    ("M36", build({"x" * 1024: info()}, FOUR), {"x" * 1024: [1]}),
    ("M41", build(rb'{"\ud83d\ude00\/\u00E9":%s}' % INFO, FOUR), {"\U0001f600/é": [1]}),
    ("M34", build({"__metadata__": {"a": "b\n"}, "t": info()}, FOUR), {"t": [1]}),
    ("M34", build({"__metadata__": None, "t": info()}, FOUR), {"t": [1]}),
]


@pytest.mark.parametrize(("content", "shapes"), [pytest.param(*c[1:], id=c[0]) for c in ACCEPTED])
def test_accepted(tmp_path: Path, content: bytes, shapes: dict[str, list[int]]) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert {name: list(t.shape) for name, t in safetensors.read(path).items()} == shapes
    assert len(reference.deserialize(content)) == len(shapes)


@pytest.fixture
def no_memory() -> Iterator[None]:
    """Leave 32 MiB of address space: whoever allocates more gets a MemoryError."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (32 << 20), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize("length", [100_000_001, 2**63, 2**64 - 1])
def test_m5_m6_huge_header_is_refused_before_it_is_allocated(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(100_000_009)  # sparse
    with pytest.raises(CheckpointError, match=f"header length is {length}"):
        safetensors.read_header(path)


@pytest.mark.usefixtures("no_memory")
def test_m15_huge_claim_is_refused_before_it_is_allocated(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(build(one(shape=[2**40], offsets=[0, 2**42]), FOUR))
    with pytest.raises(CheckpointError, match=f"expected {2**42}; the download is incomplete"):
        safetensors.read(path)


@pytest.mark.usefixtures("no_memory")
def test_tensors_that_do_not_fit_into_memory_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(build(one(shape=[2**27], offsets=[0, 2**29])))
    os.truncate(path, path.stat().st_size + 2**29)  # sparse
    with pytest.raises(CheckpointError, match="expected to fit into memory"):
        safetensors.read(path)


def test_m39_too_many_tensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    entry = '"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    path.write_bytes(build(b"{%s}" % ",".join(entry % i for i in range(1_000_001)).encode()))
    with pytest.raises(CheckpointError, match="too many tensors, expected at most 1000000"):
        safetensors.read_header(path)


def test_m42_odd_header_length(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    text = json.dumps(one()).encode()
    for pad in range(9):
        path.write_bytes(build(text + b" " * pad, FOUR))
        assert safetensors.read(path)["t"].item() == 1.0


def test_m42_misaligned_tensor(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    header = {"a": info([3], [0, 3], "U8"), "b": info([1], [3, 7]), "c": info([1], [7, 15], "I64")}
    path.write_bytes(build(header, b"abc" + FOUR + (7).to_bytes(8, "little")))
    found = safetensors.read(path)
    assert [found["a"].tolist(), found["b"].item(), found["c"].item()] == [[97, 98, 99], 1.0, 7]
    assert all(t.data_ptr() % t.element_size() == 0 for t in found.values())


def test_m43_odd_floats_keep_their_bits(tmp_path: Path) -> None:
    bits = [0x7F800001, 0xFFC12345, 0x7F800000, 0x00000001, 0x80000000]  # NaNs, inf, denormal, -0
    data = b"".join(b.to_bytes(4, "little") for b in bits)
    path = tmp_path / "model.safetensors"
    path.write_bytes(build(one(shape=[5], offsets=[0, 20]), data))
    assert safetensors.read(path)["t"].view(torch.uint32).tolist() == bits


def test_m44_truncated_after_open(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(build(one(shape=[2**20], offsets=[0, 2**22]), bytes(2**22)))
    file = _native.File(os.fsencode(path))
    file.header()
    os.truncate(path, 5000)
    with pytest.raises(_native.Error, match=r"ends at byte 5000, .* truncated while being read"):
        file.read_bytes(0, file.size)


def test_m44_truncated_by_another_thread(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    content = build(one(shape=[2**20], offsets=[0, 2**22]), bytes(2**22))
    path.write_bytes(content)
    stop = threading.Event()

    def shrink_and_grow() -> None:
        while not stop.is_set():
            os.truncate(path, 5000)
            os.truncate(path, len(content))

    thread = threading.Thread(target=shrink_and_grow)
    messages = []
    thread.start()
    try:
        for _ in range(50):
            try:
                safetensors.read(path)
            except CheckpointError as error:
                messages.append(str(error))
    finally:
        stop.set()
        thread.join()
    assert all("while being read" in m or "incomplete" in m for m in messages), messages


def test_m45_replaced_while_open(tmp_path: Path) -> None:
    path, other = tmp_path / "model.safetensors", tmp_path / "other"
    path.write_bytes(VALID)
    other.write_bytes(bytes(len(VALID)))
    file = _native.File(os.fsencode(path))
    other.replace(path)
    assert file.read_bytes(0, file.size) == VALID


def test_m46_only_regular_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="expected a regular file"):
            safetensors.read(path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(tmp_path / "socket"))
        for name in ("socket", "loop", "absent"):
            with pytest.raises(CheckpointError, match="cannot be opened"):
                safetensors.read(tmp_path / name)


def test_m46_symbolic_link_is_followed_to_a_regular_file_only(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(VALID)
    link = tmp_path / "model.safetensors"
    link.symlink_to(tmp_path / "blob")  # as the hub's cache lays files out
    assert list(safetensors.read(link)) == ["t"]
    link.unlink()
    link.symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError):
        safetensors.read(link)
