"""Record what a launcher launches, and compile it without a GPU.

The launchers run on meta tensors, which have shapes and no data: what they would launch at the
benchmark points is recorded and compiled. Speed is no subject here; spilled registers, shared
memory and float atomics are.
"""

import re
import subprocess
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from fastsafe_kernels._spec import Kernel

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # of one program, by target
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.bool: "*i1",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Launch(NamedTuple):
    """One kernel as one launcher calls it: enough to compile it."""

    function: Any
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[int, Any], ...]
    aligned: tuple[int, ...]  # positions divisible by 16
    options: tuple[tuple[str, Any], ...]

    def is_16_bit(self) -> bool:
        """Whether a tensor of 16-bit floats is among the arguments."""
        return any(kind in ("*bf16", "*fp16") for _, kind in self.types)


def describe(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """Specialise arguments as Triton does: 1 is a constant, multiples of 16 are known to be."""
    names = function.arg_names
    values = dict(zip(names, args, strict=False)) | {k: kwargs.pop(k) for k in names if k in kwargs}
    types, constants, aligned = [], [], []
    for i, parameter in enumerate(function.params):
        value = values[parameter.name]
        if isinstance(value, float) and not parameter.is_constexpr:
            types.append((parameter.name, "fp32"))
            continue
        plain = isinstance(value, int) and not parameter.is_constexpr
        if parameter.is_constexpr or (plain and value == 1 and not parameter.do_not_specialize):
            types.append((parameter.name, "constexpr"))
            constants.append((i, value))
            continue
        if isinstance(value, torch.Tensor):
            types.append((parameter.name, POINTERS[value.dtype]))
            aligned.append(i)  # the allocator aligns to 512 bytes
        else:
            assert plain, f"{function.__name__}: {parameter.name} is {value!r}"
            types.append((parameter.name, "i64" if value >= 2**31 else "i32"))
            if value % 16 == 0 and not parameter.do_not_specialize:
                aligned.append(i)
    options = tuple(sorted(kwargs.items()))
    return Launch(function, tuple(types), tuple(constants), tuple(aligned), options)


def with_fp16(dtypes: tuple[torch.dtype, ...]) -> tuple[torch.dtype, ...]:
    """What takes bf16 takes fp16; their instructions differ."""
    return (*dtypes, torch.float16) if torch.bfloat16 in dtypes else dtypes


def launches(kernel: Kernel) -> list[Launch]:
    """What the launcher and its backward launch at the benchmark points, in every dtype."""
    found: dict[Launch, None] = {}

    def record(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found[describe(function, args, kwargs)] = None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", record)
        for dims, dtype in product(kernel.bench, with_fp16(kernel.dtypes)):
            args = kernel.make(dims, dtype, torch.device("meta"))
            for i in kernel.grads:
                args[i].requires_grad_()
            y = kernel.fn(*args)
            if kernel.grads:
                smooth = [t for t in (y if isinstance(y, tuple) else (y,)) if t.requires_grad]
                upstream = [torch.ones_like(t) for t in smooth]
                torch.autograd.grad(smooth, [args[i] for i in kernel.grads], upstream)
    return list(found)


def assert_compiles(kernel: Kernel, launch: Launch, capability: int, folder: Path) -> None:
    """Compile for a compute capability: no spill, no float atomic, shared memory that fits."""
    source = ASTSource(
        fn=launch.function,
        signature=dict(launch.types),
        constexprs={(i,): value for i, value in launch.constants},
        attrs={(i,): [["tt.divisibility", 16]] for i in launch.aligned},
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=dict(launch.options))
    assert compiled.metadata.shared <= SHARED_BYTES[capability]
    atomics = re.findall(r"\b(?:atom|red)\.\S*\.(?:f16|bf16|f32|f64)\S*", compiled.asm["ptx"])
    assert atomics == [], "a float atomic makes the sum depend on who comes first"
    if capability == 90 and launch.function.__name__ in kernel.wgmma and launch.is_16_bit():
        assert "wgmma.mma_async" in compiled.asm["ptx"], "Hopper's matrix units are not used"
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    assert cubin.stat().st_size > 0
    if CUOBJDUMP.exists():  # Triton's wheels bundle it; a distribution's build may not
        run = [CUOBJDUMP, "--dump-resource-usage", cubin]
        usage = subprocess.run(run, capture_output=True, text=True, check=True).stdout
        assert re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage) == ["0", "0"], f"spills: {usage}"
