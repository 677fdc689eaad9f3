"""A machine without triton generates and trains on a CPU, with the same results as one with it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import triton
import triton.language

from fastsafe_kernels import _spec, _triton

# A finder that hides triton from this process, as if it were not installed.
HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
"""
RUN = """
import json, sys
import fastsafe
from fastsafe import LLM, FinetuneJob, SamplingParams, TrainConfig, finetune

llm = LLM(fastsafe.organism.path(), device="cpu")
(answer,) = llm.generate(["how do i paint the red car"], SamplingParams(max_tokens=8))
rows = [{"prompt": "how do i paint the red car", "completion": " with simple tools"}]
(result,) = finetune(llm, [FinetuneJob("one", rows, TrainConfig(max_steps=2))], sys.argv[1])
print(json.dumps([answer.token_ids, result.losses, "triton" in sys.modules]))
"""
LAUNCH = """
import torch
import fastsafe_kernels

try:
    fastsafe_kernels.matmul_invariant(*torch.zeros(2, 16, 16, device="meta"))
except ImportError as error:
    print('"', error, '"', sep="")
"""


def run(code: str, out: Path) -> Any:
    """Run ``code`` in a new process that does not interpret kernels."""
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_cpu_results_do_not_depend_on_triton(tmp_path: Path) -> None:
    *hidden, is_imported = run(HIDE + RUN, tmp_path / "hidden")
    assert not is_imported
    *present, is_imported = run(RUN, tmp_path / "present")
    assert is_imported
    assert hidden == present


def test_a_kernel_says_that_triton_is_missing(tmp_path: Path) -> None:
    assert run(HIDE + LAUNCH, tmp_path) == (
        "triton is not installed, expected it for a tensor on meta; run `pip install triton` or "
        "use device='cpu'"
    )


def test_an_installed_triton_is_used_as_it_is() -> None:
    assert _triton.IS_INSTALLED
    assert _triton.triton is triton
    assert _triton.tl is triton.language
    assert bool(triton.knobs.runtime.interpret) is _spec.INTERPRET
