"""The lane of a GPU: steps in static buffers and graphs, results read one step late.

A step is prepared on the host, copied to the device in one piece, and computed without the host
looking at anything: drawn tokens stay on the device, where the next step finds them, and are read
back while it runs. A row that turns out to have ended has then been computed once too often.

Decoding runs at a fixed number of rows, the idle ones included, as a graph: one for each table
width, whatever adapters the rows have. In strict mode that is always the lane's whole number of
rows, and prompts are padded to the budget: cuBLAS chooses its algorithm by shape, and only at one
shape has a row the same bits beside any others (``invariance.py`` checks that it has). Without
graphs, on a CPU with Triton's interpreter, the same buffers run step by step.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsafe import _native
from fastsafe.engine.lane import Lane, OnEnd, is_out_of_memory
from fastsafe.engine.pages import DEVICE_PAGE, OpsAttention, PageStore
from fastsafe.engine.reading import Drawing, Reader
from fastsafe.engine.sampling import RowParams, sample
from fastsafe.engine.scheduler import Row, Scheduler, Work
from fastsafe.model.transformer import Project

_INTS = 6  # rows of the buffer of a step: handle, given, position, place, length, context


class Buffers:
    """What one decoding step reads and writes, at fixed addresses.

    Attributes:
        ints: [6, rows] int64: handle, told token or -1, position, place, attention length, length
            for the rotation, of each row; idle rows have the scratch handle and length 0.
        table: [rows, width] int32.
        ids, logprobs, finite, stops: [rows], what was drawn.
    """

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self.ints = torch.zeros(_INTS, rows, dtype=torch.int64, device=device)
        self.table = torch.zeros(rows, width, dtype=torch.int32, device=device)
        self.ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(rows, device=device)
        self.finite, self.stops = torch.zeros(2, rows, dtype=torch.bool, device=device)


@dataclass
class Launched:
    """A step on its way: which rows it draws for, and where its results arrive."""

    handles: NDArray[np.int64]
    stamps: NDArray[np.int64]
    results: tuple[Tensor, ...]  # on the host, filled when ``done``
    done: torch.cuda.Event | None

    def read(self) -> list[NDArray[np.generic]]:
        """Wait for the results of its rows."""
        if self.done is not None:
            self.done.synchronize()
        return [x[: len(self.handles)].numpy() for x in self.results]


class DeviceLane(Lane):
    """A lane of a GPU, or of Triton's interpreter; see ``Lane``.

    Args:
        strict: Fixed shapes, so that a row's bits are its own.
    """

    def __init__(self, *args: object, strict: bool, **options: int) -> None:
        self.strict = strict
        super().__init__(*args, **options)  # type: ignore[arg-type]
