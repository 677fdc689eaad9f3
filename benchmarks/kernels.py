"""Time every kernel against its reference: achieved bytes per second and share of the peak.

    python benchmarks/kernels.py [--only token_logprobs] [--check] [--out FILE]

A kernel is timed only after its own test points pass here and now. Times are medians over CUDA
events with the L2 cache flushed between launches, inputs prepared before the clock starts. Each
row is one line of JSON with the commit, the machine and the versions it was taken with.
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.testing import do_bench

from fastsafe_kernels._gate import failures
from fastsafe_kernels._spec import Dims, Kernel, registry

# Data sheets, in bytes per second; a GPU that is not listed gets no share.
PEAK_BYTES_PER_S = {"NVIDIA H200": 4.8e12, "NVIDIA H100 80GB HBM3": 3.35e12}


def commit() -> str:
    """Hash of the checkout, with ``-dirty`` when it has changes; "unknown" outside of one."""
    git = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--abbrev=40",
        "--dirty",
    ]
    try:
        done = subprocess.run(git, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def machine() -> dict[str, str]:
    """What a figure depends on besides the code."""
    return {
        "commit": commit(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
    }


def broken(kernel: Kernel, device: torch.device) -> list[str]:
    """What is wrong with the kernel at its test points; empty when it may be timed."""
    return [
        f"{dict(dims)} {dtype}: {failure}"
        for dims in kernel.tests
        for dtype in kernel.dtypes
        for failure in failures(kernel, dims, dtype, device)
    ]


def median_ms(fn: Callable[..., Any], args: tuple[Any, ...]) -> float:
    """Median time of one call in milliseconds."""
    return float(do_bench(lambda: fn(*args), return_mode="median"))


def timed(kernel: Kernel, dims: Dims, device: torch.device) -> dict[str, Any]:
    """One row: a kernel at one benchmark point, in bf16, forward only."""
    torch.manual_seed(0)
    args = kernel.make(dims, torch.bfloat16, device)
    ms, reference_ms = median_ms(kernel.fn, args), median_ms(kernel.reference, args)
    bytes_per_s = kernel.min_bytes(dims, torch.bfloat16) / (ms * 1e-3)
    peak = PEAK_BYTES_PER_S.get(torch.cuda.get_device_name(device))
    return {
        "benchmark": "kernels",
        "kernel": kernel.name,
        "dims": dict(dims),
        "dtype": "bfloat16",
        "ms": ms,
        "reference_ms": reference_ms,
        "bytes_per_s": bytes_per_s,
        "share_of_peak": bytes_per_s / peak if peak else None,
    }


def main() -> int:
    """Check and time; the exit status is 1 when a kernel is wrong or there is no GPU."""
    kernels = registry()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=sorted(kernels), help="one kernel instead of all")
    parser.add_argument("--check", action="store_true", help="check, but time nothing")
    parser.add_argument("--out", type=Path, help="append the rows to this file as well")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/kernels.py needs a CUDA device, and torch sees none.", file=sys.stderr)
        return 1
    device, about = torch.device("cuda"), machine()
    wrong = 0
    for kernel in kernels.values():
        if options.only not in (None, kernel.name):
            continue
        if found := broken(kernel, device):
            wrong += 1
            print(f"{kernel.name}: not timed, it is wrong:", *found, sep="\n  ", file=sys.stderr)
            continue
        print(f"{kernel.name}: right at {len(kernel.tests)} points", file=sys.stderr)
        for dims in () if options.check else kernel.bench:
            row = json.dumps(timed(kernel, dims, device) | about)
            print(row, flush=True)
            if options.out:
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(row + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
