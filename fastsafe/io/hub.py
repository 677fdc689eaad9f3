"""Resolve a checkpoint or data set: a local path, or a hub id that is downloaded first."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from fastsafe.errors import CheckpointError

# Weights, configuration and chat templates, also those of additional_chat_templates. Nothing that
# holds code or pickles is ever fetched, nor a second copy of the weights in another layout.
ALLOWED = ("*.safetensors", "*.json", "*.jinja")
IGNORED = ("*/*.safetensors", "*/*.json", "consolidated*")
DATA_SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".csv", ".json")  # the first there is wins

_WEIGHT_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors", re.ASCII)
_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.)", re.ASCII)
_SUBJECTS = {"model": "checkpoint", "data set": "data"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def resolve(model: str | Path) -> Path:
    """Return the folder of a checkpoint; a hub id is downloaded unless it is in the cache.

    Args:
        model: An existing folder, a weight file in it, a hub id, or a name of the entry
            points ``fastsafe.checkpoints``, such as "organism"; what a name stands for may be
            made at its first use.

    Raises:
        CheckpointError: There is no such path or hub id, it is another file, a name is that of a
            folder, too, or the hub cannot be reached.
    """
    path = Path(model).expanduser()
    named = _named(model) if isinstance(model, str) else None
    if str(model) and _exists(path):
        if named:
            raise CheckpointError(
                f"checkpoint: {model!a} is a folder here and the name of a known checkpoint, "
                f"expected one of them; write './{model}' for the folder, or run this elsewhere "
                "for the other"
            )
        if not path.is_file():
            return path
        if path.name == "model.safetensors" or _WEIGHT_SHARD.fullmatch(path.name):
            return path.parent  # which has the config and the tokenizer, too
        raise CheckpointError(
            f"checkpoint: {path} is a file of another name than model.safetensors, expected a "
            "folder with config.json, tokenizer and weights; give the folder"
        )
    if named:
        checkpoint: Path = named.load()()
        return checkpoint
    if not isinstance(model, str) or not _HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"checkpoint: {str(model)!a} does not exist, expected a folder or a hub id "
            "owner/name; check the path"
        ) from FileNotFoundError(str(model))
    return _download(model)


def resolve_data(source: str | Path) -> list[Path]:
    """Return the files of a data set; those of a hub id ``owner/name[:file]`` are downloaded.

    Without ``:file`` the files of the training split are taken: those that have "train" in their
    path, or the only one there is; parquet before JSON lines before CSV.

    Args:
        source: An existing path, or a hub id.

    Raises:
        CheckpointError: There is no such path or hub id, the hub cannot be reached, or the files
            to take are not clear.
    """
    path = Path(source).expanduser()
    name, _, file = str(source).partition(":")
    if (
        (str(source) and _exists(path))
        or not isinstance(source, str)
        or not _HUB_ID.fullmatch(name)
    ):
        return [path]
    with _explained(name, "file", "data set"):
        import huggingface_hub

        # listing its files instead would retry for half a minute where there is no network
        siblings = huggingface_hub.HfApi().dataset_info(name).siblings or ()
        present = [sibling.rfilename for sibling in siblings]
        return [
            Path(huggingface_hub.hf_hub_download(name, path, repo_type="dataset"))
            for path in _data_files(name, file, present)
        ]


def _data_files(name: str, file: str, present: Sequence[str]) -> list[str]:
    metadata = "dataset_infos.json"  # many repositories have it beside their data
    paths = [path for path in map(Path, present) if path.name != metadata]
    readable = [str(path) for path in paths if path.suffix in DATA_SUFFIXES]
    if file:
        chosen = [path for path in readable if path == file]
    else:
        train = [path for path in readable if "train" in path] or readable
        first = min((DATA_SUFFIXES.index(Path(path).suffix) for path in train), default=0)
        chosen = sorted(path for path in train if path.endswith(DATA_SUFFIXES[first]))
    shards = {_SHARD.sub("", path) for path in chosen}
    if len(shards) != 1:
        problem = f"no file {file}" if file else f"{len(chosen)} files to train on"
        some = ", ".join(readable[:8]) or "none that can be read"
        raise CheckpointError(
            f"data: hub id {name} has {problem}, expected one or the parts of one; write"
            f" {name}:FILE with one of: {some}"
        )
    return chosen


def _named(name: str) -> EntryPoint | None:
    """Return the entry point of a checkpoint that an installed package names, if one does."""
    return next(iter(entry_points(group="fastsafe.checkpoints", name=name)), None)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or a NUL character
        return False


def _download(model: str) -> Path:
    with _explained(model, "folder", "model"):
        import huggingface_hub

        return Path(
            huggingface_hub.snapshot_download(
                model, allow_patterns=list(ALLOWED), ignore_patterns=list(IGNORED)
            )
        )


@contextmanager
def _explained(name: str, path: str, thing: str) -> Iterator[None]:
    """Turn an error of the download into one sentence."""
    failed = f"{_SUBJECTS[thing]}: there is no {path} {name}, and fetching it as a hub id"
    try:
        from huggingface_hub import errors
    except ImportError:
        raise CheckpointError(
            f"{failed} needs huggingface_hub; check the path or run `pip install '.[hub]'` in the "
            "clone of fastsafe"
        ) from FileNotFoundError(name)
    try:
        yield
    except CheckpointError:
        raise
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{_SUBJECTS[thing]}: {name} is gated on the hub, expected an account with access; "
            "accept its licence there and run `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{failed} failed since no such {thing} is on the hub; check the spelling, or log in "
            "if it is private"
        ) from error
    except Exception as error:  # the hub client's own, its HTTP library's and the system's
        missing = FileNotFoundError(name)
        missing.__cause__ = error
        raise CheckpointError(
            f"{failed} failed ({type(error).__name__}); check the path, or go online once if it is "
            "on the hub"
        ) from missing
