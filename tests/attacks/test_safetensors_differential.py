"""What our parser accepts the official library accepts too, with the same bytes (M31, M50)."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors as reference
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fastsafe.errors import CheckpointError
from fastsafe.io import safetensors as ours

BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
FUZZ = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def encode(header: Any, data: bytes) -> bytes:
    text = json.dumps(header, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data


def agrees(path: Path, content: bytes) -> bool:
    """Whether we accept ``content``; checks that the reference then does, and sees the same."""
    path.write_bytes(content)
    try:
        header = ours.read_header(path)
    except CheckpointError:
        return False
    theirs = dict(reference.deserialize(content))  # raises where the reference refuses
    assert header.tensors.keys() == theirs.keys()
    for name, info in header.tensors.items():
        data = content[header.data_offset + info.begin : header.data_offset + info.end]
        assert (info.dtype, list(info.shape)) == (theirs[name]["dtype"], theirs[name]["shape"])
        assert data == theirs[name]["data"]
    if has_only_torch_values(header, theirs):
        for name, tensor in ours.read(path).items():
            assert tensor.view(-1).view(torch.uint8).numpy().tobytes() == theirs[name]["data"]
    return True


def has_only_torch_values(header: ours.Header, theirs: dict[str, Any]) -> bool:
    """Whether every dtype exists in torch and every BOOL is 0 or 1."""
    return all(
        info.dtype in ours.DTYPES and (info.dtype != "BOOL" or set(theirs[name]["data"]) <= {0, 1})
        for name, info in header.tensors.items()
    )


@st.composite
def valid_files(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """A header the format allows, within our limits, and its data."""
    header: dict[str, Any] = {}
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=4), st.text(max_size=4)))
    names = draw(st.lists(st.text(st.characters(codec="ascii", min_codepoint=33, max_codepoint=126),
                                  min_size=1, max_size=5), unique=True, max_size=4))  # fmt: skip
    end = 0
    for name in names:
        dtype = draw(st.sampled_from(sorted(BITS)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        bits = BITS[dtype] * torch.Size(shape).numel()
        if bits % 8:
            shape, bits = [8, *shape], bits * 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + bits // 8]}
        end += bits // 8
    shuffled = dict(draw(st.permutations(sorted(header.items()))))
    return shuffled, draw(st.binary(min_size=end, max_size=end))


ODD_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 2**65), st.floats(), st.text(max_size=3),
    st.just([]), st.just({}), st.lists(st.integers(0, 9), max_size=3),
)  # fmt: skip


@st.composite
def bent_files(draw: st.DrawFn) -> bytes:
    """A valid file with one or two fields of its header changed."""
    header, data = draw(valid_files())
    for _ in range(draw(st.integers(1, 2))):
        entries = [e for e in header.values() if isinstance(e, dict) and e]
        if not entries:
            break
        entry = draw(st.sampled_from(entries))
        key = draw(st.sampled_from(sorted(entry)))
        value = entry[key]
        if isinstance(value, list) and value and draw(st.booleans()):
            i = draw(st.integers(0, len(value) - 1))
            near = [value[i] + 1, value[i] - 1] if isinstance(value[i], int) else []
            value[i] = draw(st.sampled_from([*near, 0, 1, 2**48, 2**63, "1"]))
        elif draw(st.booleans()):
            entry[key] = draw(ODD_VALUES)
        else:
            del entry[key]
    return encode(header, data)


SNIPPETS = [
    b"", b" ", b'"', b"\\", b"0", b"9", b"-", b"{", b"}", b"[", b",", b"\0", b"\xff",
    b"\xed\xa0\x80", b"\\ud800", b"\\u0041", b'"a":1,', b"1e1",
]  # fmt: skip


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """A valid file with a few bytes changed, removed or added, its length field mended or not."""
    content = bytearray(encode(*draw(valid_files())))
    mended = draw(st.booleans())
    before = len(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(8 if mended else 0, len(content)))
        content[at : at + draw(st.integers(0, 2))] = draw(st.sampled_from(SNIPPETS))
    if mended:
        length = int.from_bytes(content[:8], "little") + len(content) - before
        content[:8] = max(0, length).to_bytes(8, "little")
    return bytes(content)


def accepted_share(path: Path, files: st.SearchStrategy[bytes], examples: int) -> float:
    """Share of ``examples`` drawn files that we accept, after the check of each."""
    verdicts: list[bool] = []

    @settings(FUZZ, max_examples=examples)
    @given(files)
    def check(content: bytes) -> None:
        verdicts.append(agrees(path, content))

    check()
    return sum(verdicts) / len(verdicts)


def test_valid_files_are_accepted_by_both(tmp_path: Path) -> None:
    files = valid_files().map(lambda file: encode(*file))
    assert accepted_share(tmp_path / "f", files, 500) == 1.0


@pytest.mark.parametrize("files", [bent_files(), damaged_files()], ids=["bent", "damaged"])
def test_bad_files_are_accepted_by_us_only_if_by_both(
    tmp_path: Path, files: st.SearchStrategy[bytes]
) -> None:
    share = accepted_share(tmp_path / "f", files, 1500)
    assert 0.01 < share < 0.9, "a generator that is all good or all bad proves nothing"


def test_m50_every_single_bit_flip(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"k": "v"},
        "a": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]},
        "b": {"dtype": "BF16", "shape": [], "data_offsets": [8, 10]},
    }
    content = encode(header, bytes(range(10)))
    accepted = 0
    for bit in range(len(content) * 8):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        accepted += agrees(tmp_path / "f", bytes(flipped))
    # flips in names, metadata and data make another valid file
    assert 80 < accepted < len(content) * 8 / 4


def test_m50_every_truncation_is_refused(tmp_path: Path) -> None:
    content = encode({"a": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}}, bytes(9))
    assert agrees(tmp_path / "f", content)
    assert not any(agrees(tmp_path / "f", content[:n]) for n in range(len(content)))


def test_m31_every_dtype(tmp_path: Path) -> None:
    for dtype, bits in BITS.items():
        entry = {"dtype": dtype, "shape": [2, 4], "data_offsets": [0, bits]}
        assert agrees(tmp_path / "f", encode({"t": entry}, bytes([1, 0] * (bits // 2)))), dtype
    assert {name for name in BITS if name not in ours.DTYPES} == {"F4", "F6_E2M3", "F6_E3M2"}


@pytest.mark.parametrize("dtype", ours.DTYPES.values(), ids=ours.DTYPES)
def test_m31_torch_dtypes_equal_the_official_loader(tmp_path: Path, dtype: torch.dtype) -> None:
    data = torch.arange(256, dtype=torch.uint8).repeat(8)
    tensor = (data % 2 if dtype == torch.bool else data).view(dtype).view(2, -1)
    ours.write(tmp_path / "ours", {"t": tensor})
    save_file({"t": tensor}, tmp_path / "theirs")
    for path in (tmp_path / "ours", tmp_path / "theirs"):
        mine, official = ours.read(path)["t"], load_file(path)["t"]
        assert mine.dtype == official.dtype == dtype
        assert mine.shape == official.shape
        assert torch.equal(mine.view(torch.uint8), official.view(torch.uint8))


STRICTER = {
    "M12 leading whitespace": b" {}",
    "M27 nine dimensions": b'{"t":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]}}',
    "M32 duplicate tensor": b'{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
    b'"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
    "M36 newline in a name": rb'{"a\nb":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
    "M36 empty name": b'{"":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
    "M37 unknown key": b'{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"strides":[1]}}',
    "info as a list": b'{"t":["U8",[1],[0,1]]}',
    "dtype as an object": b'{"t":{"dtype":{"U8":null},"shape":[1],"data_offsets":[0,1]}}',
}


@pytest.mark.parametrize("text", STRICTER.values(), ids=STRICTER)
def test_documented_differences_are_stricter(tmp_path: Path, text: bytes) -> None:
    content = len(text).to_bytes(8, "little") + text + b"\1" * (b"U8" in text)
    reference.deserialize(content)
    assert not agrees(tmp_path / "f", content)
