"""Is our header parser as fast as the reference's, and do we read data at the same speed?

    python benchmarks/load.py [--mib 1024] [--repeats 21] [--folder /tmp]

Prints one JSON row per question. Ours and the official library alternate, so that both meet the
same page cache and the same neighbours; times are medians. The file is in the page cache: this
measures parsing, system calls and copying, not a disk.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fastsafe.io import safetensors

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "norm")


def machine() -> dict[str, Any]:
    """What a number means without: commit, machine, versions."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    libraries = {name: version(name) for name in ("torch", "safetensors")}
    return {
        "commit": commit,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
    } | libraries


def names(count: int) -> list[str]:
    """``count`` tensor names as real checkpoints have them."""
    return [f"model.layers.{i // 8}.mlp.{NAMES[i % 8]}.weight" for i in range(count)]


def parse_official(path: Path) -> list[tuple[Any, Any]]:
    """Everything our header holds, asked of the official library."""
    with safe_open(path, "pt") as file:
        slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118, it is no dict
        return [(s.get_dtype(), s.get_shape()) for s in slices]


def open_official(path: Path) -> int:
    """Only open and list the names: the least the official library can do."""
    with safe_open(path, "pt") as file:
        return len(file.keys())


def use(tensors: dict[str, torch.Tensor]) -> int:
    """Read every byte once, as a model that converts or fuses its weights does."""
    return sum(int(t.view(torch.int64).sum()) for t in tensors.values())


def medians_s(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each side, one call of each in turn."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for name in list(sides) * (repeats + 1):
        begin = time.perf_counter()
        sides[name]()
        times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(found[1:]) for name, found in times.items()}  # first: warm-up


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    where = machine()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder, "model.safetensors")
        for count in (291, 5000):  # an 8B Llama; a mixture of experts
            safetensors.write(path, {name: torch.zeros(1) for name in names(count)})
            parse: dict[str, Callable[[], object]] = {
                "ours": lambda: safetensors.read_header(path),
                "official": lambda: parse_official(path),
                "official_open": lambda: open_official(path),
            }
            found = {k: round(v * 1e6, 1) for k, v in medians_s(parse, args.repeats * 5).items()}
            print(json.dumps({"question": "header_us", "tensors": count} | found | where))
        elements = args.mib * (1 << 20) // 2 // 64
        one = torch.ones(elements, dtype=torch.bfloat16)
        safetensors.write(path, dict.fromkeys(names(64), one))
        size = path.stat().st_size
        # the library maps the file, so its load alone moves no byte: hence two rows
        load: dict[str, Callable[[], object]] = {
            "ours": lambda: safetensors.read(path),
            "official": lambda: load_file(path),
        }
        used: dict[str, Callable[[], object]] = {
            "ours": lambda: use(safetensors.read(path)),
            "official": lambda: use(load_file(path)),
        }
        for question, sides in (("load_gb_per_s", load), ("load_and_use_gb_per_s", used)):
            rates = {k: round(size / v / 1e9, 2) for k, v in medians_s(sides, args.repeats).items()}
            print(json.dumps({"question": question, "mib": args.mib} | rates | where))


if __name__ == "__main__":
    main()
