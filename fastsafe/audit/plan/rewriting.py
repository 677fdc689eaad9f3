"""The model that a recipe names to word training rows: a checkpoint or an endpoint."""

from collections.abc import Mapping
from pathlib import Path

from fastsafe.audit.recipe.schema import RewriterSettings
from fastsafe.safety.completers.protocol import Completer
from fastsafe.safety.mixing.rewriter import Rewriter


def make_writer(
    spec: RewriterSettings,
    *,
    device: str = "cpu",
    api_keys: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Rewriter:
    """Build the writer that a recipe names; nothing is loaded and nobody is called.

    Args:
        spec: The model: a checkpoint or an endpoint.
        device: Where a checkpoint runs.
        api_keys: Keys of endpoints by the name of their environment variable.
        folder: Where replies and spending are kept between runs.

    Raises:
        UsageError: A setting of the endpoint is wrong.
        CheckpointError: The checkpoint is missing, malformed or refused.
    """
    from fastsafe.audit.backend.completer import CheckpointCompleter
    from fastsafe.safety.completers.http import open_endpoint

    def opened() -> Completer:
        if spec.checkpoint is None:
            return open_endpoint(spec.endpoint, "rewrite", api_keys, folder)
        return CheckpointCompleter(spec.checkpoint, device=device)

    opened()  # refuses what cannot be opened
    return Rewriter(opened, max_tokens=spec.max_tokens, folder=folder)
