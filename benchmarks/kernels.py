"""Time every kernel beside its reference and its peers, or write the catalogue of kernels.

    python benchmarks/kernels.py [--only token_logprobs] [--check] [--out FILE]
    python benchmarks/kernels.py --catalogue

A kernel is timed only after its own test points pass here and now, a peer only after its result is
near the reference's on the very arguments it is timed with. Forward, and forward and backward of
what is differentiable, are one row of JSON each, with the commit, the machine, the versions and two
ceilings measured in the same run: a device copy and a large bf16 product. A GPU is needed for all
but ``--catalogue``, which writes kernels/README.md from the kernels' own words and the last rows.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastsafe_kernels._accuracy import accuracy_failures
from fastsafe_kernels._spec import Dims, Kernel, registry

cuda: Any = torch.cuda  # its events have no types
HERE = Path(__file__).parent
README = HERE.parent / "kernels" / "README.md"
RESULTS = HERE / "results" / "kernels.jsonl"

FLUSH_BYTES = 256 * 2**20  # more than the L2 of any GPU
COPY_NUMEL = 2**30  # bf16 values of the copy that measures bandwidth
CUBE = 8192  # side of the matrices that measure arithmetic
ROUNDS, BURST, ROUND_S = 5, 10, 0.1  # rounds; calls of one round, fewer of what takes longer


def first_line(*command: str) -> str:
    """Return the first line that a command prints, or "unknown" if it fails or is missing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else "unknown"


def machine() -> dict[str, str]:
    """Describe the machine, versions and commit of a measurement."""
    return {
        "commit": first_line(
            "git", "-C", str(HERE), "describe", "--always", "--abbrev=40", "--dirty"
        ),
        "gpu": torch.cuda.get_device_name(),
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
    }


def bench_dtype(kernel: Kernel) -> torch.dtype:
    """bf16 where the kernel is given it."""
    return torch.bfloat16 if torch.bfloat16 in kernel.dtypes else kernel.dtypes[0]


def ways(kernel: Kernel) -> tuple[str, ...]:
    """Return the passes to time."""
    return ("forward", "forward+backward") if kernel.grads else ("forward",)


def broken(kernel: Kernel, device: torch.device) -> list[str]:
    """List the kernel's failures at its test points; empty when it may be timed."""
    return [
        f"{dict(dims)} {dtype}: {failure}"
        for dims in kernel.tests
        for dtype in kernel.dtypes
        for failure in accuracy_failures(kernel, dims, dtype, device)
    ]


class Time(NamedTuple):
    """Times of one call, in ms."""

    median: float
    least: float
    most: float
    host_bound: bool  # the GPU waited for the host: this is not the time of the kernels


def burst(call: Callable[[], Any], count: int, host_s: float, cold: Tensor) -> list[Any]:
    """(ms, host was late) of ``count`` calls that wait in the stream behind a long sleep.

    Without a queue, events around a short kernel measure the Python that launches it.
    """
    cuda._sleep(int(3 * count * (host_s + 1e-4) * 2e9))  # in cycles, of at most 2 GHz
    pairs = []
    for _ in range(count):
        cold.zero_()
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        pairs.append((start, end, start.query()))
    cuda.synchronize()
    return [(start.elapsed_time(end), late) for start, end, late in pairs]


def measure(calls: Mapping[str, Callable[[], Any]], device: torch.device) -> dict[str, Time]:
    """Time of each call, in turns, so that all meet the same clocks and temperature."""
    cold = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    plans: dict[str, tuple[int, float]] = {}
    samples: dict[str, list[Any]] = {}
    for name, call in calls.items():
        call()  # compiles
        cuda.synchronize()
        begin = time.perf_counter()
        call()
        host_s = min(0.01, time.perf_counter() - begin)
        cuda.synchronize()
        whole_s = time.perf_counter() - begin
        plans[name] = (max(2, min(BURST, int(ROUND_S / max(whole_s, 1e-9)))), host_s)
        samples[name] = []
    for _ in range(ROUNDS):
        for name, call in calls.items():
            samples[name] += burst(call, *plans[name], cold)
    found = {}
    for name, taken in samples.items():
        ms = [t for t, late in taken if not late]
        host_bound = len(ms) < len(taken) / 2
        ms = [t for t, _ in taken] if host_bound else ms
        found[name] = Time(statistics.median(ms), min(ms), max(ms), host_bound)
    return found


def ceilings(device: torch.device) -> dict[str, float]:
    """What this machine reaches now: bytes per second of a copy, flops per second of a product."""
    source = torch.randn(COPY_NUMEL, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(CUBE, CUBE, dtype=torch.bfloat16, device=device) for _ in range(2))
    c = torch.empty_like(a)
    calls = {"copy": lambda: target.copy_(source), "matmul": lambda: torch.mm(a, b, out=c)}
    taken = measure(calls, device)
    return {
        "copy_bytes_per_s": 2 * source.nbytes / (taken["copy"].median * 1e-3),
        "matmul_flops_per_s": 2 * CUBE**3 / (taken["matmul"].median * 1e-3),
    }


def forward(fn: Callable[..., Any], args: tuple[Any, ...]) -> Callable[[], Any]:
    """One call of ``fn`` that keeps nothing for a backward."""
    return torch.no_grad()(lambda: fn(*args))


def backward(
    fn: Callable[..., Any], args: tuple[Any, ...], grads: Sequence[int]
) -> Callable[[], Any]:
    """One call of ``fn`` and its gradients for the positions ``grads``."""
    leaves = tuple(
        x.detach().requires_grad_(i in grads) if isinstance(x, Tensor) else x
        for i, x in enumerate(args)
    )

    def smooth() -> list[Tensor]:
        # a fresh alias of what may be written: autograd would chain it to the call before
        alive = (
            x.detach() if isinstance(x, Tensor) and i not in grads else x
            for i, x in enumerate(leaves)
        )
        y = fn(*alive)
        return [t for t in (y if isinstance(y, tuple) else (y,)) if t.requires_grad]

    upstream = [torch.randn_like(t) for t in smooth()]
    inputs = [leaves[i] for i in grads]
    return lambda: torch.autograd.grad(smooth(), inputs, upstream)


class Variant(NamedTuple):
    """What is timed: the kernel, its reference or a peer, with arguments of its own."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    grads: tuple[int, ...]


def variants(
    kernel: Kernel, args: tuple[Any, ...], peers: Mapping[str, Any]
) -> tuple[dict[str, Variant], dict[str, str]]:
    """What may be timed with these arguments, by name, and why the other peers may not."""

    def own() -> tuple[Any, ...]:  # a peer may write to what it is given
        return tuple(x.clone() if isinstance(x, Tensor) else x for x in args)

    found = {
        "kernel": Variant(kernel.fn, args, kernel.grads),
        "reference": Variant(kernel.reference, own(), kernel.grads),
    }
    refused = {}
    for name, peer in peers.items():
        try:
            reason = peer.disagreement(kernel, args)
        except Exception as error:  # whatever a peer raises is reported in its row
            reason = f"{type(error).__name__}: {error}"
        if reason:
            refused[name] = reason
        else:
            grads = kernel.grads if peer.grads is None else peer.grads
            found[name] = Variant(peer.fn, tuple(peer.prepare(*own())), grads)
    return found, refused


def timed(
    kernel: Kernel,
    dims: Dims,
    device: torch.device,
    peers: Mapping[str, Any],
    limits: Mapping[str, float],
) -> Iterator[dict[str, Any]]:
    """Rows of one kernel at one point: forward, then forward and backward if it has gradients."""
    dtype = bench_dtype(kernel)
    torch.manual_seed(0)
    args = kernel.make(dims, dtype, device)
    fitting = {name: peer for name, peer in peers.items() if peer.fits(dims)}
    found, refused = variants(kernel, args, fitting)
    for way in ways(kernel):
        calls = {}
        for name, (fn, own, grads) in found.items():
            try:
                call = forward(fn, own) if way == "forward" else backward(fn, own, grads)
                call()
                calls[name] = call
            except Exception as error:
                if name == "kernel":
                    raise
                refused[name] = f"{way}: {type(error).__name__}: {error}"
        taken = measure(calls, device)
        seconds = taken["kernel"].median * 1e-3
        # min_bytes and flops speak of the forward alone
        bytes_per_s = kernel.min_bytes(dims, dtype) / seconds if way == "forward" else None
        flops = kernel.flops if way == "forward" else None
        flops_per_s = flops(dims) / seconds if flops else None
        yield {
            "benchmark": "kernels",
            "kernel": kernel.name,
            "dims": dict(dims),
            "dtype": str(dtype).removeprefix("torch."),
            "pass": way,
            "ms": taken["kernel"].median,
            "ms_min": taken["kernel"].least,
            "ms_max": taken["kernel"].most,
            "reference_ms": taken["reference"].median if "reference" in taken else None,
            "peers_ms": {name: taken[name].median for name in peers if name in taken},
            "peers_refused": dict(refused),
            "host_bound": [name for name, t in taken.items() if t.host_bound],
            "bytes_per_s": bytes_per_s,
            "share_of_copy": bytes_per_s / limits["copy_bytes_per_s"] if bytes_per_s else None,
            "flops_per_s": flops_per_s,
            "share_of_matmul": flops_per_s / limits["matmul_flops_per_s"] if flops_per_s else None,
            **limits,
        }


def peers_module() -> Any:
    """peers.py by its path, as PYTHONSAFEPATH keeps this folder off sys.path."""
    spec = importlib.util.spec_from_file_location("kernel_peers", HERE / "peers.py")
    assert spec is not None, "peers.py lies beside this file"
    assert spec.loader is not None, "peers.py is Python"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def figure(value: float | None, scale: float = 1.0) -> str:
    """Four digits, blank for nothing."""
    return "" if value is None else f"{value * scale:.4g}"


def traffic(size: int) -> str:
    """Bytes in decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{figure(size, 1 / scale)} {unit}"
    return f"{size} B"


def maths(kernel: Kernel) -> tuple[str, str]:
    """First line of the file's docstring, and what stands between it and the dtypes."""
    module = importlib.import_module(kernel.fn.__module__)
    first, _, rest = (module.__doc__ or "").partition("\n")
    return first, rest.partition("\nDtypes")[0].strip("\n")


def cells(kernel: Kernel, dims: Dims, found: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Table row of one point from its last rows by pass; blank where there is none."""
    row = about = found.get("forward", {})

    def ms(name: str, value: float | None) -> str:
        return figure(value) + ("*" if name in row.get("host_bound", ()) else "")

    out = {
        "point": " ".join(f"{name}={size}" for name, size in dims.items()),
        "least traffic": traffic(kernel.min_bytes(dims, bench_dtype(kernel))),
    }
    for way in ways(kernel):
        row = found.get(way, {})
        if any(row.get(key) != about.get(key) for key in ("gpu", "commit")):
            row = {}  # a line is one machine and one commit
        out[way] = ms("kernel", row.get("ms"))
        if way == "forward":
            out["GB/s"] = figure(row.get("bytes_per_s"), 1e-9)
            out["of copy"] = f"{row['share_of_copy']:.0%}" if row else ""
            if kernel.flops:
                out["TFLOP/s"] = figure(row.get("flops_per_s"), 1e-12)
                out["of matmul"] = f"{row['share_of_matmul']:.0%}" if row else ""
        out[f"reference {way}"] = ms("reference", row.get("reference_ms"))
        peers = sorted(row.get("peers_ms", {}).items())
        out[f"peers {way}"] = ", ".join(f"{name}: {ms(name, value)}" for name, value in peers)
    digest, _, dirty = about.get("commit", "").partition("-")
    commit = digest[:10] + ("-dirty" if dirty else "")
    return out | {"gpu": about.get("gpu", ""), "commit": commit}


def catalogue(readme: str, kernels: Mapping[str, Kernel], rows: Sequence[Mapping[str, Any]]) -> str:
    """Text of kernels/README.md: what it says before the first op, then every op anew."""
    last: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        point = (row["kernel"], json.dumps(row["dims"], sort_keys=True))
        last.setdefault(point, {})[row["pass"]] = row
    text = readme.partition("\n## ")[0].rstrip() + "\n"
    for name, kernel in sorted(kernels.items()):
        first, block = maths(kernel)
        file = kernel.fn.__module__.replace(".", "/") + ".py"
        text += f"\n## [`{name}`]({file})\n\n{first}\n\n```text\n{block}\n```\n"
        table = [
            cells(kernel, dims, last.get((name, json.dumps(dict(dims), sort_keys=True)), {}))
            for dims in kernel.bench
        ]
        lines = [list(table[0]), ["---"] * len(table[0]), *(list(line.values()) for line in table)]
        text += "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text


def results(path: Path) -> list[dict[str, Any]]:
    """Rows of a results file, oldest first; none when there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def main() -> int:
    """Check and time; the exit status is 1 when a kernel is wrong or there is no GPU."""
    kernels = registry()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=sorted(kernels), help="one kernel instead of all")
    parser.add_argument("--check", action="store_true", help="check, but time nothing")
    parser.add_argument("--out", type=Path, help="append the rows to this file as well")
    parser.add_argument("--catalogue", action="store_true", help="write kernels/README.md")
    options = parser.parse_args()
    if options.catalogue:
        text = catalogue(README.read_text(encoding="utf-8"), kernels, results(RESULTS))
        README.write_text(text, encoding="utf-8")
        return 0
    if not torch.cuda.is_available():
        print("benchmarks/kernels.py needs a CUDA device, and torch sees none.", file=sys.stderr)
        return 1
    device, about, wrong = torch.device("cuda"), machine(), 0
    limits: dict[str, float] = {}
    for kernel in kernels.values():
        if options.only not in (None, kernel.name):
            continue
        if found := broken(kernel, device):
            wrong += 1
            print(f"{kernel.name}: not timed, it is wrong:", *found, sep="\n  ", file=sys.stderr)
            continue
        print(f"{kernel.name}: right at {len(kernel.tests)} points", file=sys.stderr)
        if options.check:
            continue
        limits = limits or ceilings(device)
        peers = peers_module().installed(kernel.name)
        for dims in kernel.bench:
            for row in timed(kernel, dims, device, peers, limits):
                for peer, reason in row["peers_refused"].items():
                    point = f"{kernel.name} {row['dims']}: {peer}"
                    print(f"{point} not timed: {reason}", file=sys.stderr)
                line = json.dumps(row | about)
                print(line, flush=True)
                if options.out:
                    with options.out.open("a", encoding="utf-8") as file:
                        file.write(line + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
