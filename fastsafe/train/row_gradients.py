"""What each row alone would change."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from fastsafe.train.batches import cut
from fastsafe.train.config import FinetuneJob, TrainConfig
from fastsafe.train.job import FrozenBase, JobRun, Thrift


def row_gradients(
    llm: FrozenBase, rows: Sequence[Mapping[str, Any]], config: TrainConfig
) -> Iterator[Tensor]:
    """Yield the gradient [P] of each row's mean loss in a fresh adapter's weights, in order.

    An adapter starts with B = 0, so the gradient of A is 0 and that of B is the full weight's
    gradient through a random A.

    Raises:
        DataError: A row is malformed or has nothing to train on.
        UsageError: A row is too long.
    """
    job = JobRun(llm, FinetuneJob("rows", list(rows), config), {})
    job.enter()
    for example in job.rows["all"]:
        (tile,) = cut([example], "all", len(example.token_ids), config.seed)
        yield job.gradient(tile, Thrift())[1]
