"""Triton, or inert names in its place where it is not installed.

A machine without a GPU needs the references alone. Every kernel file imports ``triton`` and ``tl``
from here, so that it can be imported there too; ``runs_reference`` refuses to launch anything.
"""

from typing import Any

__all__ = ["INTERPRET", "IS_INSTALLED", "tl", "triton"]


class _Absent:
    """Stand-in for a missing module: a decorator returns its function, any other name is inert."""

    def __getattr__(self, name: str) -> "_Absent":
        return self

    def __call__(self, *args: Any, **options: Any) -> Any:
        return args[0] if args and callable(args[0]) else self


try:
    import triton
    import triton.language as tl
except ModuleNotFoundError as error:
    if error.name != "triton":  # there, but broken
        raise
    triton = tl = _Absent()
    IS_INSTALLED = False
    INTERPRET = False
else:
    IS_INSTALLED = True
    INTERPRET = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET, as Triton read it
