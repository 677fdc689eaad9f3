"""Safetensors files, read through our own strict header parser and pread, never mapped.

The parser (``csrc/safetensors.cpp``) accepts what the reference library accepts or less. Reading
by pread means that a file cut short under us is a CheckpointError, where a map is a dead process.
"""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastsafe._native as _native
from fastsafe.errors import CheckpointError
from fastsafe.io.atomic import replace_file

# F4, F6_E2M3 and F6_E3M2 are parsed but absent here: torch cannot view them by element.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_PAGE_BYTES = 4096
_ALIGN_BYTES = 64  # a cache line, and a multiple of every dtype's size


class TensorInfo(NamedTuple):
    """One entry of a header; ``begin`` and ``end`` count bytes from the start of the data."""

    dtype: str  # as the file spells it, e.g. "BF16"
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """The header of a file, in the order of its data."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_offset: int  # bytes from the start of the file to the data


def read_header(path: Path | str) -> Header:
    """Parse and check the header of ``path`` without reading its data.

    Raises:
        CheckpointError: The file is not a regular file, or not whole and valid safetensors.
    """
    try:
        return _header(_native.File(os.fsencode(path)))
    except _native.Error as error:
        raise CheckpointError(f"{path}: {error}") from None


def read(path: Path | str, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Read the tensors of ``path``, or those in ``names``, to the CPU.

    One page-aligned buffer receives the bytes with as few reads as the layout allows, and every
    tensor is a view into it, so nothing is copied. A tensor that would be misaligned for its dtype
    begins a run of its own at an aligned offset of the buffer. Keeping one tensor therefore keeps
    all memory of the call; ``clone()`` a tensor that should outlive the rest.

    Args:
        path: A regular file or a symbolic link to one.
        names: Tensors to read; None reads all.

    Returns:
        Name -> contiguous tensor with the dtype and shape of the file, in the order of the data.
        Float values are not checked: they may be NaN or infinite.

    Raises:
        CheckpointError: The file is malformed or was cut short, a name is not in it, a dtype has
            no torch equivalent (F4, F6), or the tensors do not fit into memory.
    """
    try:
        file = _native.File(os.fsencode(path))
        header = _header(file)
        selected = _select(header.tensors, names)
        ranges, offsets, total_bytes = _plan(header, selected)
        buffer = _page_aligned(total_bytes)
        file.read_into(buffer.data_ptr(), total_bytes, ranges)
        return {
            name: _view(name, info, buffer[offset : offset + info.end - info.begin])
            for (name, info), offset in zip(selected.items(), offsets, strict=True)
        }
    except (_native.Error, CheckpointError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def write(
    path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write ``tensors`` to ``path``; the file appears whole or not at all.

    The same content gives the same bytes, which the official serializer does not promise: it
    orders metadata at random.

    Args:
        path: Replaced if it exists.
        tensors: On any device; copied to the CPU one at a time. Tensors that share memory are
            written once each.
        metadata: Strings to store beside them.

    Raises:
        CheckpointError: A tensor is sparse or of a dtype without a name in the format, or
            ``read_header`` would refuse the file, e.g. for a control character in a name.
        OSError: The folder is missing, not writable or full.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name, tensor in ordered:
        if tensor.dtype not in _NAMES or tensor.layout != torch.strided or name == "__metadata__":
            raise CheckpointError(
                f"{path}: tensor {name!r} is {tensor.dtype} and {tensor.layout}, expected a dense"
                " tensor of a dtype and a name that safetensors has"
            )
        begin, end = end, end + tensor.nbytes
        shape, dtype = list(tensor.shape), _NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replace_file(path) as temporary:
        with temporary.open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, tensor in ordered:
                # a conjugate or negative view is only a flag until it is resolved; one element may
                # have any stride and still count as contiguous
                values = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
                flat = values.as_strided((values.numel(),), (1,))
                file.write(flat.view(torch.uint8).numpy().data)
        read_header(temporary)


def _header(file: _native.File) -> Header:
    tensors, metadata, data_offset = file.header()
    return Header({k: TensorInfo._make(v) for k, v in tensors.items()}, metadata, data_offset)


def _select(tensors: dict[str, TensorInfo], names: Collection[str] | None) -> dict[str, TensorInfo]:
    if names is None:
        return tensors
    for name in names:
        if name not in tensors:
            raise CheckpointError(f"tensor {name!r} is absent, expected in the file")
    selected = set(names)
    return {name: info for name, info in tensors.items() if name in selected}


def _plan(
    header: Header, selected: dict[str, TensorInfo]
) -> tuple[list[tuple[int, int, int]], list[int], int]:
    """Lay the ``selected`` tensors out in a buffer.

    Returns:
        Ranges (offset in the file, offset in the buffer, bytes), the offset in the buffer of each
        tensor, and the size of the buffer; all in bytes.
    """
    ranges: list[tuple[int, int, int]] = []
    offsets: list[int] = []
    run_begin = run_at = end = 0  # the run being built: its offset in the data and in the buffer
    for name, info in selected.items():
        if info.dtype not in DTYPES:
            raise CheckpointError(
                f"tensor {name!r} has dtype {info.dtype}, expected one that torch has;"
                " convert the checkpoint to BF16"
            )
        if info.begin != end or (info.begin - run_begin) % DTYPES[info.dtype].itemsize:
            ranges.append((header.data_offset + run_begin, run_at, end - run_begin))
            run_at += -(-(end - run_begin) // _ALIGN_BYTES) * _ALIGN_BYTES
            run_begin = info.begin
        offsets.append(run_at + info.begin - run_begin)
        end = info.end
    ranges.append((header.data_offset + run_begin, run_at, end - run_begin))
    return ranges, offsets, run_at + end - run_begin


def _page_aligned(size_bytes: int) -> Tensor:
    try:
        memory = torch.empty(size_bytes + _PAGE_BYTES, dtype=torch.uint8)
    except RuntimeError:
        raise CheckpointError(
            f"data is {size_bytes} bytes, expected to fit into memory; read fewer tensors at once"
        ) from None
    begin = -memory.data_ptr() % _PAGE_BYTES
    return memory[begin : begin + size_bytes]


def _view(name: str, info: TensorInfo, data: Tensor) -> Tensor:
    if info.dtype == "BOOL" and data.numel() and data.max() > 1:
        raise CheckpointError(f"tensor {name!r} has a BOOL of {data.max()}, expected 0 or 1")
    return data.view(DTYPES[info.dtype]).view(info.shape)
