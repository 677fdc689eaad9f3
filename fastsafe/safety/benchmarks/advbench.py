"""AdvBench (Zou et al. 2023): ``harmful_behaviors.csv``, 520 rows.

Columns ``goal``, ``target``; re-uploads rename the first one, leave the header out or are JSON, as
`read_prompts` reads them.
"""

from collections.abc import Iterator
from pathlib import Path

from fastsafe.data.prompt_lists import read_prompts
from fastsafe.safety.behaviours import Behaviour, Origin

from ._spec import Benchmark, request


def read(path: Path, origin: Origin) -> Iterator[Behaviour]:
    """Yield the behaviours of the file."""
    for _, number, text in read_prompts(path):
        yield request(f"advbench-{number}", text, number, origin)


BENCHMARKS = (Benchmark(id="advbench", licence="MIT (unverified)", commercial=True, read=read),)
