"""What the first call of a process must not leave to threads."""

import subprocess
import sys

import pytest

# MKL's vector functions ask this one for the CPU. It begins by loading the variable that holds it,
# -1 before the first call; the variable itself has no name to find it by.
PROBE = """
import ctypes, os, torch

name = "mkl_vml_serv_cpu_detect"
library = os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so")
detect = getattr(ctypes.CDLL(library), name, None) if os.path.exists(library) else None
start = ctypes.cast(detect, ctypes.c_void_p).value if detect else None
code = ctypes.string_at(start, 6) if start else b""
if code[:2] != bytes([0x8B, 0x05]):  # mov eax, [rip + offset]
    print("unknown", "unknown")
else:
    offset = int.from_bytes(code[2:], "little", signed=True)
    cpu = ctypes.c_int.from_address(start + len(code) + offset)
    before = cpu.value
    import fastsafe.model

    print(before, cpu.value)
"""


def test_mkl_knows_the_cpu_before_there_are_threads() -> None:
    """Two threads that made the first call together trained on cosines of half the digits."""
    run = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    before, after = run.stdout.split()
    if before != "-1":
        pytest.skip("this torch has no such variable, or knows the CPU once it is imported")
    assert after != "-1"
