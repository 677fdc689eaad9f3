"""The device that a text names, and whether this machine has it."""

import re
from typing import Any

import torch

from fastsafe.errors import UsageError


def choose_device(device: Any) -> str:
    """Return the device that a caller names; "auto" is "cuda" if torch finds a GPU, else "cpu".

    A GPU that is named need not be there; see ``check_device``.

    Raises:
        UsageError: It is none of "auto", "cpu", "cuda" and "cuda:N".
    """
    if isinstance(device, str) and re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        if device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return device
    if isinstance(device, str) and device.startswith("mps"):
        raise UsageError(
            f"device is {device!r}, an Apple GPU, which fastsafe has no kernels for; use 'cpu'"
        )
    raise UsageError(f"device is {device!r}, expected 'auto', 'cpu', 'cuda' or 'cuda:N'")


def check_device(device: str) -> None:
    """Refuse a GPU that torch does not find.

    Args:
        device: "cpu", "cuda" or "cuda:N".

    Raises:
        UsageError: The GPU is absent.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device != "cpu" and int(device.partition(":")[2] or 0) >= count:
        found = f"{count} of them" if count else "no CUDA device"
        raise UsageError(f"device is {device!r}, but torch finds {found}; use cpu")
