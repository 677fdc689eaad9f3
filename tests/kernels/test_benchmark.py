"""The kernel benchmark times nothing that is wrong, and nothing without a GPU."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsafe_kernels._spec import Kernel, registry

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels.py"
CPU = torch.device("cpu")


@pytest.fixture
def script() -> Any:
    spec = importlib.util.spec_from_file_location("kernels_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_there_is_one_sentence_and_no_figure() -> None:
    run = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr == "benchmarks/kernels.py needs a CUDA device, and torch sees none.\n"


def test_a_wrong_kernel_is_not_timed(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def half(*args: Any) -> torch.Tensor:
        return 0.5 * right.fn(*args)

    right = registry()["token_logprobs"]
    wrong = Kernel(**{**vars(right), "fn": half})
    assert script.broken(right, CPU) == []
    assert script.broken(wrong, CPU)
    monkeypatch.setattr(script, "registry", lambda: {"half": wrong})
    monkeypatch.setattr(script, "broken", lambda kernel, device: ["output: error"])
    monkeypatch.setattr(script, "machine", dict)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["kernels.py"])
    assert script.main() == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "half: not timed, it is wrong:\n  output: error" in printed.err
