"""Open a backend by name."""

from typing import Literal

from fastsafe.audit.backend.on_engine import EngineBackend
from fastsafe.audit.backend.on_transformers import TransformersBackend
from fastsafe.errors import UsageError


def open_backend(
    name: str,
    model: str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    batch_size: int | Literal["auto"] = "auto",
    adapters: str | None = None,
    strict: bool = True,
    quantize: str | None = None,
) -> EngineBackend:
    """Check a checkpoint's files and return a backend over it; no weights are loaded.

    Args:
        name: ``"fastsafe"``, or ``"transformers"`` for architectures that the engine does not
            implement.
        model: A path, a hub id, or the name of a source that has a checkpoint.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: Type of the weights and activations.
        batch_size: Most rows computed together.
        adapters: How the engine applies adapters, ``"merged"`` or ``"mixed"``; None lets it choose.
        strict: Whether the engine gives a row the same bits in any batch.
        quantize: ``"nf4"`` makes the engine hold the base in 4 bits, for training and answers.

    Raises:
        UsageError: The backend does not exist, is not installed, or cannot quantize.
        CheckpointError: The checkpoint is missing, malformed or refused.
        TokenizerError: Its tokenizer or chat template is.
    """
    backends = {kind.name: kind for kind in (EngineBackend, TransformersBackend)}
    if name not in backends:
        raise UsageError(f"backend: it is {name!r}, expected 'fastsafe' or 'transformers'")
    if quantize and name != "fastsafe":
        raise UsageError(
            f"quantize: it is {quantize!r} with the backend {name}, expected none; use the"
            " backend fastsafe"
        )
    return backends[name](
        model,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        adapters=adapters,
        strict=strict,
        quantize=quantize,
    )
