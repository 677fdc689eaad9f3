"""The model that a recipe names to word training rows: a checkpoint or an endpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastsafe.audit.recipe import Rewriter
from fastsafe.errors import UsageError
from fastsafe.safety.endpoint import endpoint
from fastsafe.safety.writer import Writer


def make_writer(
    spec: Rewriter,
    *,
    device: str = "cpu",
    api_keys: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Writer:
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
    if spec.checkpoint is not None:
        from fastsafe.audit.local_judge import CheckpointCompleter

        path = spec.checkpoint
        CheckpointCompleter(path, device=device)  # refuses what cannot be opened
        return Writer(
            lambda: CheckpointCompleter(path, device=device),
            max_tokens=spec.max_tokens,
            folder=folder,
        )
    from fastsafe.safety.http_completer import HttpCompleter

    target = endpoint(spec.endpoint, "rewrite")
    key = (api_keys or {}).get(target.api_key_env, "")
    if target.api_key_env and not key:
        raise UsageError(f"rewrite: {target.api_key_env} holds no key, expected the endpoint's")
    options: dict[str, Any] = {"api_key": key, "folder": folder}
    return Writer(
        lambda: HttpCompleter(target, **options), max_tokens=spec.max_tokens, folder=folder
    )
