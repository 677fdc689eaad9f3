"""The declaration of a kernel file, and the check that every launcher runs first."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _triton

Dims = Mapping[str, int]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTERPRET = _triton.INTERPRET


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One op: what to call, what it must equal, and where to try it."""

    fn: Callable[..., Any]  # the launcher, the file's public name; a tensor, a tuple or None
    reference: Callable[..., Any]  # plain torch, same arguments and results; the definition
    make: Callable[[Dims, torch.dtype, torch.device], tuple[Any, ...]]  # arguments for a point
    tests: tuple[Dims, ...]  # awkward on purpose: 1, a prime, one past a block
    bench: tuple[Dims, ...]  # sizes of real models
    min_bytes: Callable[[Dims, torch.dtype], int]  # HBM traffic no implementation can avoid
    flops: Callable[[Dims], int] | None = None  # where arithmetic may be the limit, forward
    grads: tuple[int, ...] = ()  # positions of arguments that receive a gradient
    mutates: tuple[int, ...] = ()  # positions of arguments that are written in place
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)  # that ``make`` is given
    wgmma: tuple[str, ...] = ()  # @triton.jit functions that must use it on sm_90 in 16 bits

    @property
    def name(self) -> str:
        """Name of the launcher, which is also the name of the file."""
        return self.fn.__name__


def registry() -> dict[str, Kernel]:
    """Return every op of this package by name, found by listing its modules."""
    package = importlib.import_module(__name__.rpartition(".")[0])
    kernels = {}
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            kernel = importlib.import_module(f"{package.__name__}.{module.name}").KERNEL
            kernels[kernel.name] = kernel
    return kernels


def runs_reference(x: Tensor) -> bool:
    """Return whether ``x`` takes the reference: it is on the CPU and Triton is not interpreting.

    Raises:
        ImportError: ``x`` needs a kernel, and triton is not installed.
    """
    if x.device.type == "cpu" and not INTERPRET:
        return True
    if not _triton.IS_INSTALLED:
        raise ImportError(
            f"triton is not installed, expected it for a tensor on {x.device}; run `pip install"
            " triton` or use device='cpu'"
        )
    return False


def match(op: str, **args: tuple[Tensor, str, tuple[torch.dtype, ...]]) -> dict[str, int]:
    """Bind dimension names to sizes across tensors, or say which tensor disagrees.

    Args:
        op: Name of the caller, for the message.
        **args: name -> (tensor, "N V", allowed dtypes). A name seen twice must have one size.

    Returns:
        Size of each dimension, by name.

    Raises:
        ValueError: A rank, a size or a device disagrees.
        TypeError: A dtype is not allowed.

    Example:
        >>> x, i = torch.zeros(2, 5), torch.zeros(3, dtype=torch.int64)
        >>> match("pick", x=(x, "N V", FLOATS), i=(i, "N", (torch.int64,)))
        Traceback (most recent call last):
        ValueError: pick: i is [3], expected [N] with N=2 from x
    """
    size: dict[str, int] = {}
    origin: dict[str, str] = {}
    first, device = next((name, t.device) for name, (t, _, _) in args.items())
    for arg, (t, shape, dtypes) in args.items():
        names = shape.split()
        expected = f"[{', '.join(names)}]"
        if t.dtype not in dtypes:
            allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise TypeError(f"{op}: {arg} is {t.dtype}, expected {allowed}")
        if t.device != device:
            raise ValueError(f"{op}: {arg} is on {t.device}, expected {device} like {first}")
        if t.ndim != len(names):
            raise ValueError(f"{op}: {arg} is {list(t.shape)}, expected {expected}")
        for name, n in zip(names, t.shape, strict=True):
            if size.setdefault(name, n) != n:
                bound = f"{name}={size[name]} from {origin[name]}"
                raise ValueError(
                    f"{op}: {arg} is {list(t.shape)}, expected {expected} with {bound}"
                )
            origin.setdefault(name, arg)
    return size
