"""Build the C++ extension. Everything else is in pyproject.toml."""

from glob import glob

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

setup(
    ext_modules=[Pybind11Extension("fastsafe._native", sorted(glob("csrc/*.cpp")), cxx_std=17)],
    cmdclass={"build_ext": build_ext},
)
