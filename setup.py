"""Build the C++ extension. Everything else is in pyproject.toml."""

import shutil
import sys
from glob import glob

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup


class BuildNative(build_ext):
    """Says in one sentence that there is no compiler, where setuptools gives a traceback."""

    def build_extensions(self) -> None:
        """Build, or exit with status 1 when the compiler is not an executable."""
        compiler = getattr(self.compiler, "compiler_cxx", [])[:1]
        if compiler and not shutil.which(compiler[0]):
            sys.exit(
                f"fastsafe: C++ compiler {compiler[0]!r} is missing, expected one with C++17;"
                " install g++ or clang++, or set CXX to yours"
            )
        super().build_extensions()


NATIVE = Pybind11Extension(
    "fastsafe._native",
    sorted(glob("csrc/*.cpp")),
    depends=sorted(glob("csrc/*.hpp")),
    # fused multiply-adds; vectors are never passed between differently compiled functions
    extra_compile_args=["-O3", "-ffp-contract=fast", "-Wno-psabi"],
    cxx_std=17,
)

setup(
    ext_modules=[NATIVE],
    cmdclass={"build_ext": BuildNative},
)
