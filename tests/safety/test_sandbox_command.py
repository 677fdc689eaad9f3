"""The sandbox on a machine that has none: its command, and what counts as passed."""

import os

import pytest

from fastsafe.safety.sandbox import Limits, Outcome, _bwrap, _run, run_tests


@pytest.mark.parametrize("user", [0, 1000])
def test_every_namespace_is_apart(monkeypatch: pytest.MonkeyPatch, user: int) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    words = _bwrap.command("probe", [], Limits())
    kinds = {"--unshare-net", "--unshare-pid", "--unshare-ipc", "--unshare-uts"}
    assert "--unshare-all" in words or kinds <= set(words)


@pytest.mark.parametrize(
    ("script", "outcome"),
    [
        ("printf 'ready\\n'; printf '\\n%s' \"$1\"", Outcome.PASSED),
        ("printf 'ready\\n'", Outcome.FAILED),
        ("printf 'ready\\n\\n0123'", Outcome.FAILED),
        ("printf 'ready\\n'; printf '\\n%s' \"$1\"; exit 1", Outcome.FAILED),
    ],
)
def test_only_the_nonce_passes_and_only_with_success(
    monkeypatch: pytest.MonkeyPatch, script: str, outcome: Outcome
) -> None:
    """A program in the tester's place that ends well has not run the tests."""

    def command(role: str, arguments: list[object], limits: Limits) -> list[str]:
        nonce = str(arguments[0]) if role == "tester" else ""
        return ["sh", "-c", script if role == "tester" else "true", "sh", nonce]

    monkeypatch.setattr(_run, "check_sandbox", lambda allow_code_exec: None)
    monkeypatch.setattr(_run, "command", command)
    assert run_tests("", "assert True", allow_code_exec=True).outcome is outcome
