"""Where a checkpoint is: a folder on this machine, or a hub id that is downloaded first."""

import re
from pathlib import Path

from fastsafe.errors import CheckpointError

# Weights, configuration and chat templates. Nothing that holds code or pickles is ever fetched,
# nor a second copy of the weights in another layout.
ALLOWED = ("*.safetensors", "*.json", "*.jinja")
IGNORED = ("*/*", "consolidated*")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def resolve(model: str | Path) -> Path:
    """Path of a checkpoint; a hub id ``owner/name`` is downloaded unless it is in the cache.

    Args:
        model: An existing path, or a hub id.

    Raises:
        CheckpointError: There is no such path or hub id, or the hub cannot be reached.
    """
    path = Path(model).expanduser()
    if str(model) and _exists(path):
        return path
    if not isinstance(model, str) or not _HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"checkpoint: {str(model)!a} does not exist, expected a folder or a hub id "
            "owner/name; check the path"
        )
    return _download(model)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or a NUL character
        return False


def _download(model: str) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise CheckpointError(
            f"checkpoint: there is no folder {model}, and fetching it as a hub id needs "
            "huggingface_hub; check the path or run `pip install fastsafe[hub]`"
        ) from None
    try:
        return Path(
            huggingface_hub.snapshot_download(
                model, allow_patterns=list(ALLOWED), ignore_patterns=list(IGNORED)
            )
        )
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"checkpoint: {model} is gated on the hub, expected an account with access; "
            "accept its licence there and run `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"checkpoint: there is no folder {model}, and fetching it as a hub id failed since no "
            "such model is on the hub; check the spelling, or log in if it is private"
        ) from error
    except Exception as error:  # the hub client's own, its HTTP library's and the system's
        raise CheckpointError(
            f"checkpoint: there is no folder {model}, and fetching it as a hub id failed "
            f"({type(error).__name__}); check the path, or go online once if it is on the hub"
        ) from error
