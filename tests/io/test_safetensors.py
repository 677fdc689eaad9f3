"""Reading and writing of well-formed files; malformed ones are in tests/attacks."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import safetensors.torch as official
import torch

from fastsafe.errors import CheckpointError
from fastsafe.io import safetensors
from fastsafe.io.safetensors import TensorInfo

TENSORS = {
    "bytes": torch.arange(7, dtype=torch.uint8),
    "half": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(2, 0),
    "long": torch.tensor([-1, 2**62]),
    "flag": torch.tensor([[True], [False]]),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    safetensors.write(path, TENSORS, {"format": "pt", "é": "\U0001f600\n"})
    return path


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[k].dtype == wanted[k].dtype and torch.equal(found[k], wanted[k]) for k in wanted
    )


def test_round_trip_and_the_official_loader(path: Path) -> None:
    assert same(safetensors.read(path), TENSORS)
    assert same(safetensors.read(str(path)), TENSORS)
    assert same(official.load_file(path), TENSORS)


def test_official_writer_is_read(tmp_path: Path) -> None:
    official.save_file(TENSORS, tmp_path / "f", {"a": "b"})
    assert same(safetensors.read(tmp_path / "f"), TENSORS)
    assert safetensors.read_header(tmp_path / "f").metadata == {"a": "b"}


def test_header(path: Path) -> None:
    header = safetensors.read_header(path)
    assert header.metadata == {"format": "pt", "é": "\U0001f600\n"}
    assert header.data_offset % 8 == 0, "as the official writer aligns the data"
    assert header.tensors == {
        "long": TensorInfo("I64", (2,), 0, 16),
        "empty": TensorInfo("F32", (2, 0), 16, 16),
        "scalar": TensorInfo("F32", (), 16, 20),
        "half": TensorInfo("BF16", (2, 3), 20, 32),
        "bytes": TensorInfo("U8", (7,), 32, 39),
        "flag": TensorInfo("BOOL", (2, 1), 39, 41),
    }
    assert list(header.tensors)[-1] == "flag", "in the order of the data"


def test_names_select(path: Path) -> None:
    for names in (["half"], {"flag", "long"}, ("scalar", "empty", "half"), [], ["half", "half"]):
        assert same(safetensors.read(path, names), {n: TENSORS[n] for n in set(names)})
    with pytest.raises(CheckpointError, match="tensor 'absent' is absent"):
        safetensors.read(path, ["half", "absent"])


def test_tensors_are_views_into_one_page_aligned_buffer(path: Path) -> None:
    found = safetensors.read(path)
    assert len({t.untyped_storage().data_ptr() for t in found.values()}) == 1
    assert found["long"].data_ptr() % 4096 == 0
    found["long"][0] = 5
    assert found["scalar"].item() == 2.5
    assert safetensors.read(path)["long"][0] == -1, "the file does not change"


def test_any_layout_is_aligned_and_right(tmp_path: Path) -> None:
    """Tensors in an order that the official writer avoids: every second one is misaligned."""
    dtypes = {"U8": torch.uint8, "F64": torch.float64, "BF16": torch.bfloat16, "C64": torch.cfloat}
    header, data, wanted = {}, b"", {}
    for i in range(40):
        name = list(dtypes)[i * i % 4]
        tensor = torch.full((i % 3, 1), i).to(dtypes[name])
        raw = tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        offsets = [len(data), len(data) + len(raw)]
        header[f"t{i}"] = {"dtype": name, "shape": list(tensor.shape), "data_offsets": offsets}
        data, wanted[f"t{i}"] = data + raw, tensor
    text = json.dumps(header).encode()
    (tmp_path / "f").write_bytes(len(text).to_bytes(8, "little") + text + data)
    for names in (list(wanted), list(wanted)[::3], list(wanted)[1::2]):
        found = safetensors.read(tmp_path / "f", names)
        assert same(found, {name: wanted[name] for name in names})
        assert all(t.data_ptr() % t.element_size() == 0 for t in found.values())


def test_sub_byte_dtypes_are_listed_but_not_read(tmp_path: Path) -> None:
    header = {
        "four": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]},
        "whole": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "f").write_bytes(len(text).to_bytes(8, "little") + text + b"ab")
    assert safetensors.read_header(tmp_path / "f").tensors["four"].dtype == "F4"
    assert safetensors.read(tmp_path / "f", ["whole"])["whole"].item() == ord("b")
    with pytest.raises(CheckpointError, match="'four' has dtype F4, expected one that torch has"):
        safetensors.read(tmp_path / "f")


def test_write_is_deterministic(tmp_path: Path) -> None:
    metadata = {str(i): "x" for i in range(20)}
    digests = set()
    for i in range(4):
        items = list(TENSORS.items())
        shuffled = dict(items[i:] + items[:i])
        safetensors.write(tmp_path / "f", shuffled, dict(sorted(metadata.items(), reverse=i > 1)))
        digests.add(hashlib.sha256((tmp_path / "f").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_write_takes_any_layout(tmp_path: Path) -> None:
    base = torch.arange(12.0, requires_grad=True).view(3, 4)
    tensors = {
        "turned": base.T,
        "part": base[1:, 2:],
        "alias": base,
        "conj": torch.tensor([1j]).conj(),
        "negative": torch.tensor([1j]).conj().imag,
    }
    safetensors.write(tmp_path / "f", tensors)
    assert same(safetensors.read(tmp_path / "f"), {k: v.detach() for k, v in tensors.items()})


def test_write_nothing(tmp_path: Path) -> None:
    safetensors.write(tmp_path / "f", {})
    assert safetensors.read(tmp_path / "f") == {}
    assert official.load_file(tmp_path / "f") == {}


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"t": torch.zeros(1, dtype=torch.complex128)}, None, "'t' is torch.complex128 and"),
        (
            {"t": torch.zeros(1).to_sparse()},
            None,
            r"and torch\.sparse_coo, expected a dense tensor",
        ),
        ({"__metadata__": torch.zeros(1)}, None, "'__metadata__' is torch.float32 and"),
        ({"a\nb": torch.zeros(1)}, None, "has a control character in its name"),
        ({"": torch.zeros(1)}, None, "name of a tensor is empty"),
        ({"t": torch.zeros([1] * 9)}, None, "has too many dimensions"),
        ({}, {"k": "x" * 2**20}, "value in __metadata__ is too long"),
    ],
)
def test_write_refuses_what_read_would_refuse(
    tmp_path: Path,
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, str] | None,
    message: str,
) -> None:
    safetensors.write(tmp_path / "f", {"old": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=message):
        safetensors.write(tmp_path / "f", tensors, metadata)
    assert list(safetensors.read(tmp_path / "f")) == ["old"]
    assert os.listdir(tmp_path) == ["f"]
