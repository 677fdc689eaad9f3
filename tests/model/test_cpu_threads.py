"""Which errors count as memory that ran out."""

import pytest
import torch

from fastsafe.model.cpu_threads import is_out_of_memory


@pytest.mark.parametrize(
    ("error", "is_short"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), True),
        (RuntimeError("unable to mmap 64 bytes from file: Cannot allocate memory (12)"), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_errors_of_allocations(error: Exception, is_short: bool) -> None:
    assert is_out_of_memory(error) is is_short
