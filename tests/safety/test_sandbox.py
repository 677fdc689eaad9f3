"""The sandbox: what code may do, and that nothing but right values makes it pass."""

import ast
import errno
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastsafe.errors import DataError, FastsafeError, UsageError
from fastsafe.safety.sandbox import (
    Limits,
    Outcome,
    Trial,
    _bwrap,
    _inside,
    _run,
    check_sandbox,
    run_tests,
)
from fastsafe.safety.tasks import load_rows, tasks
from fastsafe.safety.tasks.code import source_of

try:
    check_sandbox(True)
    WHY = ""
except UsageError as error:
    WHY = str(error)
needs_bwrap = pytest.mark.skipif(bool(WHY), reason=WHY)

LIMITS = Limits(cpu_seconds=1, wall_seconds=10, memory_bytes=256 << 20, processes=8)
DOUBLE = "assert double(2) == 4\nassert double(5) == 10"


def trial(code: str, tests: str = DOUBLE, limits: Limits = LIMITS) -> Trial:
    return run_tests(code, tests, allow_code_exec=True, limits=limits)


def told(body: str, limits: Limits = LIMITS) -> str:
    """What a function of this body returns inside, as text."""
    code = "def told():\n" + "".join(f"    {line}\n" for line in body.split("\n"))
    found = trial(code, "assert False, told()", limits)
    assert found.outcome is Outcome.FAILED
    return found.detail.removeprefix("AssertionError: ")


def test_off_unless_allowed() -> None:
    with pytest.raises(UsageError, match="allow_code_exec is off, expected --allow-code-exec"):
        run_tests("", "")


def test_refused_without_bubblewrap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(
        UsageError, match=r"bwrap is missing, expected bubblewrap .* no code is run"
    ):
        run_tests("", "", allow_code_exec=True)


def test_refused_where_no_sandbox_can_be_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho no namespaces >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    _bwrap._probe.cache_clear()
    try:
        with pytest.raises(UsageError, match=r"cannot make a sandbox here \(no namespaces\)"):
            run_tests("", "", allow_code_exec=True)
    finally:
        _bwrap._probe.cache_clear()


@needs_bwrap
def test_a_sandbox_that_does_not_start_is_no_failure_of_the_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho out of luck >&2\nexit 1\n")
    fake.chmod(0o755)
    check_sandbox(True)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(FastsafeError, match=r"did not start \(out of luck\), .*nothing was run"):
        run_tests("x = 1", "", allow_code_exec=True)


@needs_bwrap
def test_right_code_passes_whatever_it_prints() -> None:
    assert trial("print('ok')\ndef double(x):\n    print(x)\n    return 2 * x") == Trial(
        Outcome.PASSED
    )


@needs_bwrap
@pytest.mark.parametrize(
    ("code", "detail"),
    [
        ("def double(x):\n    return x + 2", "AssertionError"),
        ("def doubled(x):\n    return 2 * x", "KeyError: \"'double'\""),
        ("def double(x:\n", "SyntaxError"),
        ("", "KeyError"),
        ("raise ValueError('at once')", "ValueError: at once"),
        ("def double(x):\n    return object()", "SyntaxError"),
        ("def double(x):\n    return [0] * 2**20", "OverflowError: the result is too long"),
        ("\x00", "null bytes"),
        ("'\ud800'", "UnicodeError: 'utf-8' codec"),
        ("x" * 200_000, "the code is longer than"),
    ],
)
def test_wrong_code_fails(code: str, detail: str) -> None:
    found = trial(code)
    assert found.outcome is Outcome.FAILED
    assert detail in found.detail


CHEATS = {
    "exit 0": "import os\nos._exit(0)",
    "exit 0 when called": "import os\ndef double(x):\n    os._exit(0)",
    "SystemExit": "import sys\nsys.exit(0)",
    "SystemExit when called": "def double(x):\n    raise SystemExit(0)",
    "equal to all": (
        "class Any:\n    def __eq__(self, o): return True\ndef double(x):\n    return Any()\n"
    ),
    "an int whose text lies": (
        "class Lie(int):\n    def __repr__(self): return '4'\ndef double(x):\n    return Lie(7)\n"
    ),
    "patched builtins": "import builtins, ast\nbuiltins.repr = ast.literal_eval = lambda x: True\n",
    "patched assertion": "import builtins\nbuiltins.AssertionError = ValueError\n",
    "reads the tests": (
        "import os, glob, sys\ndef double(x):\n"
        "    return [open(p).read() for p in glob.glob('/tmp/*') + sys.argv] and 0\n"
    ),
    "prints a token": (
        "import os, secrets\nfor fd in range(64):\n    try:\n"
        "        os.write(fd, b'ready\\n\\n' + secrets.token_hex(16).encode() + b'\\n')\n"
        "    except OSError:\n        pass\n"
    ),
    "replies to everything": (
        "import os\nfor fd in range(64):\n    try:\n"
        "        os.write(fd, b\"('ok', True)\\n\" * 9)\n    except OSError:\n        pass\n"
    ),
    "signals its parents": "import os\nfor p in (1, os.getppid(), -1):\n    os.kill(p, 9)\n",
}


@needs_bwrap
@pytest.mark.parametrize("code", CHEATS.values(), ids=CHEATS)
def test_no_trick_passes(code: str) -> None:
    tests = "assert double(2) == 4\nassert double(5) == 10\nassert double(6) == 12"
    assert trial(code, tests).outcome is Outcome.FAILED


@needs_bwrap
def test_tests_may_expect_errors_and_use_everything_of_the_library() -> None:
    code = (
        "def half(x):\n    if x % 2: raise ValueError('odd')\n    return {'half': (x // 2, None)}"
    )
    tests = (
        "import math\n"
        "def check(n):\n    assert half(n)['half'] == (math.floor(n / 2), None)\n"
        "for n in [0, 2, 10]:\n    check(n)\n"
        "try:\n    half(3)\nexcept ValueError as error:\n    assert str(error) == 'odd'\n"
        "else:\n    raise AssertionError('no error')\n"
        "assert all(half(x=n) for n in (2, 4))\n"
    )
    assert trial(code, tests) == Trial(Outcome.PASSED)


def test_names_of_the_code_under_test() -> None:
    tests = (
        "import os.path as p\nfrom math import pi\n"
        "def check(a, *b, **c):\n    d = a\n    assert f(d, pi, p) == g\n"
        "try:\n    h.x()\nexcept ValueError as e:\n    print(e, [i for i in (1,)])\n"
        "class K: pass\nK()\n"
    )
    assert _run.called_names(tests) == ["f", "g", "h"]
    with pytest.raises(DataError, match="tests are not Python"):
        _run.called_names("assert (")
    with pytest.raises(DataError, match="tests are longer than 100000 bytes"):
        _run.called_names("x" * 100_001)


@needs_bwrap
def test_endless_loop_ends_by_processor_time() -> None:
    started = time.monotonic()
    found = trial("def double(x):\n    while True: pass", limits=Limits(cpu_seconds=1))
    assert found.outcome is Outcome.TIMED_OUT
    assert time.monotonic() - started < 25, "the wall clock is at 30 s"


@needs_bwrap
def test_what_sleeps_ends_by_the_wall_clock_and_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import os, time\ndef double(x):\n    if os.fork() == 0:\n        os.setsid()\n"
        "        if os.fork() == 0: time.sleep(1234.5)\n    time.sleep(1234.5)\n"
    )
    assert trial(code, limits=Limits(wall_seconds=1)).outcome is Outcome.TIMED_OUT
    assert processes_of_sandboxes() == 0


def processes_of_sandboxes() -> int:
    """How many of this machine's processes run the inner program, after a moment to end."""
    for _ in range(50):
        lines = [
            path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()
        ]
        found = sum(b"/inside.py" in line and b"1234.5" in line for line in lines)
        if not found:
            return 0
        time.sleep(0.1)
    return found


@needs_bwrap
def test_daemon_dies_with_a_passing_run() -> None:
    code = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(1234.5)\n"
        "def double(x):\n    return 2 * x\n"
    )
    assert trial(code).outcome is Outcome.PASSED
    assert processes_of_sandboxes() == 0


@needs_bwrap
def test_fork_bomb_meets_a_limit() -> None:
    body = (
        "import os, time\nn = 0\ntry:\n    while n < 500:\n"
        "        if os.fork() == 0:\n            time.sleep(60)\n        n += 1\n"
        "except OSError:\n    pass\nreturn n"
    )
    assert int(told(body)) < LIMITS.processes


@needs_bwrap
def test_memory_files_and_output_meet_limits() -> None:
    assert trial("def double(x):\n    return len(bytearray(2**30))").detail == "MemoryError"
    seen = told(
        "import signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nfound = []\n"
        "def fill():\n    for i in range(1000): open(str(i), 'wb').write(bytes(2**20 - 1))\n"
        "for each in (\n"
        "    lambda: open('a', 'wb').write(bytes(2**22)),\n"
        "    fill,\n"
        "    lambda: [open('/dev/null') for _ in range(1000)],\n"
        "):\n"
        "    try: found.append(each())\n"
        "    except OSError as e: found.append(e.strerror)\n"
        "return found"
    )
    assert seen == "['File too large', 'No space left on device', 'Too many open files']"
    noisy = (
        "import sys\ndef double(x):\n    for _ in range(200): print('y' * 10**6)\n    return 2 * x"
    )
    assert trial(noisy).outcome is Outcome.PASSED
    loud_tests = "while True: print('y' * 10**5)"
    assert trial("", loud_tests, Limits(cpu_seconds=2, wall_seconds=10)).outcome is Outcome.FAILED


@needs_bwrap
def test_nothing_of_the_host_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    monkeypatch.setenv("API_KEY", "s3cret")
    seen = told("import os\nreturn sorted(os.environ), sorted(os.listdir('/')), os.getuid()")
    assert "API_KEY" not in seen
    assert "'proc'" not in seen
    assert "'home'" not in seen
    assert "'root'" not in seen
    assert seen.endswith("65534)")
    assert "No such file" in told(
        f"import os\nos.symlink({str(secret)!r}, 'link')\n"
        "try: return open('link').read()\nexcept OSError as e: return str(e)"
    )


@needs_bwrap
def test_only_the_working_directory_can_be_written() -> None:
    seen = told(
        "found = []\n"
        "for p in '/usr/x /python/x /x /dev/x /inside.py /etc/passwd /tmp/x'.split():\n"
        "    try: found.append(open(p, 'w').write('y'))\n"
        "    except OSError as e: found.append(e.errno)\n"
        "return found"
    )
    *refused, written = map(int, seen.strip("[]").split(", "))
    assert set(refused) <= {errno.EROFS, errno.EACCES, errno.ENOENT, errno.EPERM}
    assert written == 1


@needs_bwrap
def test_no_network_and_no_more_privileges() -> None:
    seen = told(
        "import ctypes, os, resource, socket\n"
        "tried = (\n"
        "    lambda: socket.create_connection(('192.0.2.1', 80), 1),\n"
        "    lambda: os.setuid(0),\n"
        "    lambda: os.setgroups([0]),\n"
        "    lambda: resource.setrlimit(resource.RLIMIT_NPROC, (99, 99)),\n"
        "    lambda: os.kill(1, 0) and None,\n"
        "    lambda: os.mkfifo('/usr/x'),\n"
        ")\n"
        "found = [ctypes.CDLL(None).ptrace(16, 1, 0, 0)]\n"
        "for each in tried:\n"
        "    try: found.append(each())\n"
        "    except (OSError, ValueError) as e: found.append('refused')\n"
        "return found"
    )
    # process 1 is bubblewrap's own, of this sandbox: there is no other to signal
    assert seen in (
        "[-1, 'refused', 'refused', 'refused', 'refused', 'refused', 'refused']",
        "[-1, 'refused', 'refused', 'refused', 'refused', None, 'refused']",
    )


@needs_bwrap
def test_the_kernel_refuses_what_no_code_under_test_needs() -> None:
    seen = told(
        "import ctypes, errno, os, socket, threading\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "x86 = os.uname().machine == 'x86_64'\n"
        "numbers = [101, 272, 308, 321, 250] if x86 else [117, 97, 268, 280, 219]\n"
        "found = []\n"
        "for n in (*numbers, 425, 428):\n"
        "    libc.syscall(n, 0, 0, 0, 0, 0, 0)\n"
        "    found.append(ctypes.get_errno() == errno.EPERM)\n"
        "clone = 56 if x86 else 220\n"
        "found.append(libc.syscall(clone, 0x10000000 | 17, 0, 0, 0, 0) == -1)\n"
        "libc.syscall(435, 0, 0)\n"
        "found.append(ctypes.get_errno() == errno.ENOSYS)\n"
        "try: socket.socket(); found.append(False)\n"
        "except PermissionError: found.append(True)\n"
        "thread = threading.Thread(target=found.append, args=(True,))\n"
        "thread.start()\n"
        "thread.join()\n"
        "pid = os.fork()\n"
        "if pid == 0: os._exit(libc.syscall(numbers[1], 0x10000000) + 8)\n"
        "found.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7)\n"
        "return found"
    )
    assert seen == str([True] * 12)


def test_a_machine_whose_calls_are_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine="abacus"))
    with pytest.raises(OSError, match="no filter of system calls for abacus"):
        _inside.refuse_calls()


@needs_bwrap
def test_many_processes_that_each_take_all_they_may_meet_the_product() -> None:
    body = (
        "import os, time\nn = 0\ntry:\n    while True:\n        if os.fork() == 0:\n"
        "            kept = bytearray(2**26)\n            time.sleep(60)\n        n += 1\n"
        "except (OSError, MemoryError):\n    pass\nreturn n"
    )
    assert int(told(body, Limits(cpu_seconds=2, wall_seconds=10, processes=6))) < 6


@needs_bwrap
def test_a_user_who_is_not_root_gets_namespaces_of_his_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "--disable-userns" in _bwrap.command("probe", [], LIMITS)
    if (reason := _bwrap._probe.__wrapped__()) != "":
        pytest.skip(f"no user namespaces here: {reason}")
    assert trial("def double(x):\n    return 2 * x").outcome is Outcome.PASSED
    assert told("import os\nreturn os.getuid(), os.geteuid()") == "(65534, 65534)"


@needs_bwrap
def test_the_miniature_passes_its_own_tests() -> None:
    rows = [row for row in load_rows(tasks()["code"], split="all") if "tests" in row]
    assert len(rows) > 40
    for row in rows[:4]:
        assert trial(source_of(row["reference"]), row["tests"]).outcome is Outcome.PASSED


@needs_bwrap
def test_the_name_of_the_host_is_hidden() -> None:
    assert told("import os\nreturn os.uname().nodename") == "sandbox"


@needs_bwrap
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may limit the number of files")
def test_the_number_of_files_is_bounded() -> None:
    """Empty files cost no bytes of the working directory, and memory of the host."""
    body = (
        "n = 0\ntry:\n    while True:\n        open(str(n), 'w').close()\n        n += 1\n"
        "except OSError as error:\n    return n, error.errno"
    )
    count, reason = ast.literal_eval(told(body))
    assert reason == errno.ENOSPC
    assert 900 < count <= _inside.MAX_FILES
