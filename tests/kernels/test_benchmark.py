"""The kernel benchmark times nothing that is wrong, and nothing without a GPU."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsafe_kernels._spec import Kernel, registry
from fastsafe_testing.scripts import benchmark

FOLDER = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")
LIMITS = {"copy_bytes_per_s": 4e12, "matmul_flops_per_s": 8e14}


@pytest.fixture
def script() -> Any:
    return benchmark("kernels")


@pytest.fixture
def peers() -> Any:
    return benchmark("peers")


def double(x: Tensor) -> Tensor:
    return 2 * x


def toy(**other: Any) -> Kernel:
    """An op that doubles a vector, as a kernel: 8 N bytes and N flops in fp32."""
    given: dict[str, Any] = {
        "fn": double,
        "reference": double,
        "make": lambda dims, dtype, device: (torch.randn(dims["N"], dtype=dtype, device=device),),
        "tests": ({"N": 3},),
        "bench": ({"N": 1000},),
        "min_bytes": lambda d, dtype: 2 * d["N"] * dtype.itemsize,
        "flops": lambda d: d["N"],
        "dtypes": (torch.float32,),
    }
    return Kernel(**given | other)


def fake_times(script: Any, monkeypatch: pytest.MonkeyPatch, **ms: float) -> list[list[str]]:
    """Run every call once and give it a time; return the names of each round of measuring."""
    asked: list[list[str]] = []

    def measure(calls: Mapping[str, Callable[[], Any]], device: torch.device) -> dict[str, Any]:
        asked.append(list(calls))
        for call in calls.values():
            call()
        times = {name: ms.get(name, 1.0) for name in calls}
        return {n: script.Time(t, t / 2, 2 * t, n == "late") for n, t in times.items()}

    monkeypatch.setattr(script, "measure", measure)
    return asked


def rows(script: Any, kernel: Kernel, peers: Mapping[str, Any] | None = None) -> list[Any]:
    return list(script.timed(kernel, kernel.bench[0], CPU, peers or {}, LIMITS))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_there_is_one_sentence_and_no_figure() -> None:
    command = [sys.executable, str(FOLDER / "kernels.py")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr == "benchmarks/kernels.py needs a CUDA device, and torch sees none.\n"


@pytest.fixture
def on_a_gpu(script: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Everything of ``main`` but the GPU: the toy op runs on the CPU, times are made up."""
    monkeypatch.setattr(script, "registry", lambda: {"double": toy()})
    monkeypatch.setattr(script, "machine", lambda: {"commit": "abc", "gpu": "none"})
    monkeypatch.setattr(script, "ceilings", lambda device: LIMITS)
    monkeypatch.setattr(script, "broken", lambda kernel, device: [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["kernels.py"])
    timed = script.timed
    monkeypatch.setattr(script, "timed", lambda k, d, _, *rest: timed(k, d, CPU, *rest))
    fake_times(script, monkeypatch)
    return script


def test_a_wrong_kernel_is_not_timed(
    on_a_gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def timed(*_: Any) -> Any:
        raise AssertionError("a wrong kernel was timed")

    monkeypatch.setattr(on_a_gpu, "broken", lambda kernel, device: ["output: error"])
    monkeypatch.setattr(on_a_gpu, "timed", timed)
    assert on_a_gpu.main() == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "double: not timed, it is wrong:\n  output: error\n"


def test_the_gate_of_the_benchmark_sees_a_wrong_kernel(script: Any) -> None:
    right = registry()["token_logprobs"]
    wrong = Kernel(**{**vars(right), "fn": lambda *args: 0.5 * right.fn(*args)})
    assert script.broken(right, CPU) == []
    assert script.broken(wrong, CPU)


def test_rows_are_printed_and_appended(
    on_a_gpu: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_text("{}\n")
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--out", str(out)])
    assert on_a_gpu.main() == 0
    printed = capsys.readouterr()
    assert printed.err == "double: right at 1 points\n"
    assert out.read_text() == "{}\n" + printed.out
    row = json.loads(printed.out)
    assert (row["kernel"], row["dims"], row["commit"]) == ("double", {"N": 1000}, "abc")


def test_checking_times_nothing(
    on_a_gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--check"])
    assert on_a_gpu.main() == 0
    assert capsys.readouterr().out == ""


def test_the_arithmetic_of_a_row(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_times(script, monkeypatch, kernel=0.5, reference=4.0)
    (row,) = rows(script, toy())
    assert (row["ms"], row["ms_min"], row["ms_max"], row["reference_ms"]) == (0.5, 0.25, 1.0, 4.0)
    assert row["bytes_per_s"] == pytest.approx(8000 / 0.5e-3)
    assert row["share_of_copy"] == pytest.approx(8000 / 0.5e-3 / 4e12)
    assert row["flops_per_s"] == pytest.approx(1000 / 0.5e-3)
    assert row["share_of_matmul"] == pytest.approx(1000 / 0.5e-3 / 8e14)
    assert row["copy_bytes_per_s"] == 4e12
    assert row["matmul_flops_per_s"] == 8e14
    assert (row["pass"], row["dtype"], row["peers_ms"]) == ("forward", "float32", {})
    assert "flops_per_s" in row
    (row,) = rows(script, toy(flops=None))
    assert row["flops_per_s"] is row["share_of_matmul"] is None


def test_gradients_are_a_row_of_their_own(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What bytes and flops are declared for is the forward: the other row has no rate."""
    passes = []

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            passes.append("forward")
            return 2 * x

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            passes.append("backward")
            return 2 * grads[0]

    fake_times(script, monkeypatch)
    doubled: Any = Doubled
    kernel = toy(fn=lambda x: doubled.apply(x), grads=(0,))
    way = script.timed(kernel, kernel.bench[0], CPU, {}, LIMITS)
    forward = next(way)
    assert set(passes) == {"forward"}
    both = next(way)
    assert passes.count("backward") == 2  # tried, then measured
    assert (forward["pass"], both["pass"]) == ("forward", "forward+backward")
    assert forward["bytes_per_s"] > 0
    assert both["bytes_per_s"] is both["share_of_copy"] is both["flops_per_s"] is None
    assert both["ms"] == 1.0


def test_the_backward_that_is_timed_runs_again_and_again(script: Any) -> None:
    """Also where the op writes to an argument, which autograd would chain to the last call."""
    seen: list[Tensor] = []

    def add(y: Tensor, x: Tensor) -> Tensor:
        y += 3 * x
        seen.append(y)
        return y

    y, x = torch.zeros(4), torch.ones(4)
    call = script.backward(add, (y, x), (1,))
    for _ in range(2):
        (gradient,) = call()
    assert y.tolist() == [9.0] * 4  # in the same buffer: one call finds the shapes
    assert gradient.shape == (4,)
    assert x.requires_grad is y.requires_grad is False
    assert len(seen) == 3


def test_a_wrong_peer_is_reported_and_not_timed(
    script: Any, peers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("no such kernel")

    def overwrites(x: Tensor) -> Tensor:
        return x.mul_(2)

    made = {
        "right": peers.Peer(library="torch", fn=lambda x: 2.01 * x),
        "late": peers.Peer(library="torch", fn=overwrites),
        "wrong": peers.Peer(library="torch", fn=lambda x: 3 * x),
        "short": peers.Peer(library="torch", fn=lambda x: 2 * x[1:]),
        "nan": peers.Peer(library="torch", fn=lambda x: x * float("nan")),
        "fails": peers.Peer(library="torch", fn=fails),
        "elsewhere": peers.Peer(library="torch", fn=double, fits=lambda d: d["N"] < 10),
    }
    asked = fake_times(script, monkeypatch, right=0.75)
    (row,) = rows(script, toy(), made)
    assert asked == [["kernel", "reference", "right", "late"]]
    assert row["peers_ms"] == {"right": 0.75, "late": 1.0}
    assert row["host_bound"] == ["late"]
    refused = row["peers_refused"]
    assert set(refused) == {"wrong", "short", "nan", "fails"}
    assert refused["wrong"].startswith("output 0 is off by ")
    assert refused["short"] == "output 0 is [999], expected [1000]"
    assert refused["fails"] == "RuntimeError: no such kernel"


def test_a_peer_with_wrong_gradients_is_not_timed(
    script: Any, peers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def detached(x: Tensor) -> Tensor:
        return x + x.detach()

    fake_times(script, monkeypatch)
    made = {"wrong": peers.Peer(library="torch", fn=detached)}
    for row in rows(script, toy(grads=(0,)), made):
        assert row["peers_ms"] == {}
        assert row["peers_refused"]["wrong"].startswith("d0 is off by ")


def test_a_peer_is_timed_with_what_it_prepared(
    script: Any, peers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with what the op takes; positions of its gradients are its own."""
    prepared = []

    def halves(x: Tensor) -> tuple[Tensor, Tensor]:
        prepared.append(1)
        return x[:500].clone(), x[500:].clone()

    def fn(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat((2 * a, 2 * b))

    made = {"split": peers.Peer(library="torch", fn=fn, prepare=halves, grads=(0, 1))}
    fake_times(script, monkeypatch)
    for row in rows(script, toy(grads=(0,)), made):
        assert row["peers_ms"] == {"split": 1.0}
    assert len(prepared) == 2  # once to be checked, once to be timed


def test_a_reference_that_does_not_fit_leaves_a_gap(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def huge(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no")

    fake_times(script, monkeypatch)
    (row,) = rows(script, toy(reference=huge))
    assert row["reference_ms"] is None
    assert row["peers_refused"] == {"reference": "forward: OutOfMemoryError: no"}
    with pytest.raises(torch.OutOfMemoryError):
        rows(script, toy(fn=huge))


class Machine:
    """A host that launches and a GPU that works, in seconds; stands in for ``torch.cuda``."""

    def __init__(self) -> None:
        self.now = 0.0  # of the host
        self.done = 0.0  # when the GPU will have worked off its queue

    def work(self, host_s: float, gpu_s: float) -> None:
        self.now += host_s
        self.done = max(self.done, self.now) + gpu_s

    def _sleep(self, cycles: int) -> None:
        self.work(1e-6, cycles / 2e9)

    def synchronize(self) -> None:
        self.now = max(self.now, self.done)

    def Event(self, enable_timing: bool) -> Any:
        event = SimpleNamespace(at=None)

        def record() -> None:
            self.work(1e-6, 0.0)
            event.at = self.done

        event.record = record
        event.query = lambda: event.at <= self.now
        event.elapsed_time = lambda end: 1e3 * (end.at - event.at)
        return event


@pytest.fixture
def gpu(script: Any, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(script, "cuda", machine)
    monkeypatch.setattr(script, "time", SimpleNamespace(perf_counter=lambda: machine.now))
    monkeypatch.setattr(script, "FLUSH_BYTES", 16)
    return machine


def test_a_short_kernel_is_not_timed_by_its_launch(script: Any, gpu: Machine) -> None:
    """100 us of Python around 5 us of work; events on an empty queue would say 100 us."""
    calls = {"short": lambda: gpu.work(1e-4, 5e-6), "long": lambda: gpu.work(1e-4, 3e-3)}
    taken = script.measure(calls, CPU)
    for name, ms in (("short", 5e-3), ("long", 3.0)):
        assert taken[name].median == pytest.approx(ms, abs=2e-3)
        assert taken[name].least <= taken[name].median <= taken[name].most
        assert not taken[name].host_bound


def test_a_call_that_waits_for_the_gpu_is_marked(script: Any, gpu: Machine) -> None:
    def call() -> None:
        gpu.work(1e-5, 1e-5)
        gpu.synchronize()
        gpu.work(1e-4, 1e-5)

    taken = script.measure({"waits": call}, CPU)["waits"]
    assert taken.host_bound
    assert taken.median > 0.1


def test_slow_calls_are_repeated_less(script: Any, gpu: Machine) -> None:
    count = {"fast": 0, "slow": 0}

    def call(name: str, gpu_s: float) -> Callable[[], None]:
        def run() -> None:
            count[name] += 1
            gpu.work(1e-5, gpu_s)

        return run

    script.measure({"fast": call("fast", 1e-5), "slow": call("slow", 10.0)}, CPU)
    assert count == {"fast": 2 + 5 * 10, "slow": 2 + 5 * 2}


def test_ceilings_count_reading_and_writing(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "COPY_NUMEL", 64)
    monkeypatch.setattr(script, "CUBE", 8)
    fake_times(script, monkeypatch, copy=2.0, matmul=4.0)
    found = script.ceilings(CPU)
    assert found["copy_bytes_per_s"] == pytest.approx(2 * 64 * 2 / 2e-3)
    assert found["matmul_flops_per_s"] == pytest.approx(2 * 8**3 / 4e-3)
