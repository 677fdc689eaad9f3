"""Open a backend by name."""

from typing import Any

from fastsafe.audit.backend.on_engine import EngineBackend
from fastsafe.audit.backend.on_transformers import TransformersBackend
from fastsafe.errors import UsageError


def open_backend(name: str, model: str, **options: Any) -> EngineBackend:
    """Check a checkpoint's files and return a backend over it; no weights are loaded.

    Args:
        name: ``"fastsafe"``, or ``"transformers"`` for architectures that the engine does not
            implement.
        model: A path, a hub id, or the name of a source that has a checkpoint.
        options: Keyword arguments of `EngineBackend`.

    Raises:
        UsageError: The backend does not exist, is not installed, or cannot quantize.
        CheckpointError: The checkpoint is missing, malformed or refused.
        TokenizerError: Its tokenizer or chat template is.
    """
    backends = {kind.name: kind for kind in (EngineBackend, TransformersBackend)}
    if name not in backends:
        raise UsageError(f"backend: it is {name!r}, expected 'fastsafe' or 'transformers'")
    quantize = options.get("quantize")
    if quantize and name != "fastsafe":
        raise UsageError(
            f"quantize: it is {quantize!r} with the backend {name}, expected none; use the"
            " backend fastsafe"
        )
    return backends[name](model, **options)
