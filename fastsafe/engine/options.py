"""Options that the engine and the transformers backend share: where a model runs, and in what."""

import re
from collections.abc import Collection
from typing import Any

import torch

from fastsafe.errors import UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check(device: Any, dtype: Any, batch_size: Any, dtypes: Collection[str] = DTYPES) -> None:
    """Refuse a device, dtype or batch size that there is not.

    Raises:
        UsageError: Says which, and what was expected.
    """
    if dtype not in dtypes:
        raise UsageError(f"LLM: dtype is {dtype!r}, expected one of {', '.join(dtypes)}")
    if not isinstance(device, str) or not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UsageError(f"LLM: device is {device!r}, expected 'cpu', 'cuda' or 'cuda:N'")
    found = torch.cuda.device_count()
    if device != "cpu" and int(device.partition(":")[2] or 0) >= found:
        raise UsageError(f"LLM: device is {device!r}, but torch finds {found} of them; use 'cpu'")
    if batch_size != "auto" and not (type(batch_size) is int and batch_size >= 1):
        raise UsageError(
            f"LLM: batch_size is {batch_size!r}, expected a whole number from 1 or 'auto'"
        )
