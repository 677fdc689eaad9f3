"""Open a checkpoint with transformers so that nothing in the checkpoint runs or is fetched."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from fastsafe.errors import CheckpointError, FastsafeError, TokenizerError, UsageError
from fastsafe.io.checkpoint import Checkpoint
from fastsafe.io.tokenizer import Tokenizer
from fastsafe.io.weight_folder import ADAPTER_CONFIG, is_adapter

# Fields that name code, kernels or files; so do fields that begin with an underscore.
_CODE_FIELDS = ("auto_map", "trust_remote_code", "custom_pipelines", "transformers_weights")
_IMPLEMENTATIONS = "_implementation"
_TOKENIZER_FILES = "tokenizer.json or files that convert to it"


def require(name: str) -> Any:
    """Import transformers or peft.

    Raises:
        UsageError: It is not installed.
    """
    try:
        return import_module(name)
    except ImportError:
        raise UsageError(
            f"{name} is not installed, expected it for this; run `pip install '.[parity]'` in the "
            "clone of fastsafe"
        ) from None


def model_config(checkpoint: Checkpoint) -> tuple[Any, tuple[str, ...]]:
    """Make the transformers config of a checkpoint; return it and the fields left out of it.

    The file is read by our own bounded reader; fields that could name code, at any depth, are
    dropped before transformers sees one.

    Raises:
        CheckpointError: transformers does not know the model type, or the weights are quantized.
    """
    transformers = require("transformers")
    raw = checkpoint.config()
    location = checkpoint.path / "config.json"
    if raw.get("quantization_config") is not None:
        raise CheckpointError(
            f"{location}: quantization_config is set, expected plain weights; use the unquantized"
            " checkpoint"
        )
    dropped: list[str] = []
    fields = _without_code(raw, "", dropped)
    kind = fields.pop("model_type", None)
    expected = "a type that it knows without code from the checkpoint"
    with _refusals(f"{location}: model_type {str(kind)!a:.60}", expected):
        return transformers.AutoConfig.for_model(str(kind), **fields), tuple(dropped)


def load_model(path: Path, device: str, dtype: torch.dtype) -> tuple[Any, tuple[str, ...]]:
    """Load the transformers model in eval mode; return it and the config fields left out.

    Args:
        path: A folder; its safetensors headers have passed our own parser by then.
        device: Where the weights go.
        dtype: Of the weights.

    Raises:
        CheckpointError: The checkpoint is malformed, or not a causal model of transformers.
    """
    transformers = require("transformers")
    transformers.utils.logging.disable_progress_bar()
    if is_adapter(path):
        raise CheckpointError(
            f"{path}: {ADAPTER_CONFIG} is there, expected a base model alone; give the base"
            " and load the adapter beside it"
        )
    config, dropped = model_config(Checkpoint(path))
    with _refusals(path, "a causal language model"):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            generation_config=transformers.GenerationConfig(),
        )
    # what generate takes for unset options
    model.generation_config = transformers.GenerationConfig()
    return model.to(device).eval().requires_grad_(False), dropped


def linear_modules(path: Path) -> list[str]:
    """List the linear modules that may carry an adapter; no weight is read."""
    transformers = require("transformers")
    config, _ = model_config(Checkpoint(path))
    with torch.device("meta"), _refusals(path, "a causal language model"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    return [n for n, m in model.named_modules() if isinstance(m, kinds) and m is not head]


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a checkpoint's tokenizer, converting it if there is no tokenizer.json.

    Raises:
        TokenizerError: There is no tokenizer, or it cannot be converted.
    """
    if (path / "tokenizer.json").exists():
        return Tokenizer.load(path)
    tokenizer = transformers_tokenizer(path)
    with _refusals(f"{path}: the tokenizer", _TOKENIZER_FILES, TokenizerError):
        backend = tokenizer.backend_tokenizer
    checkpoint = Checkpoint(path)
    ends = checkpoint.generation_config() or checkpoint.config()
    ids = ends.get("eos_token_id")
    return Tokenizer(
        backend,
        special_tokens=tokenizer.special_tokens_map,
        eos_ids=ids if isinstance(ids, list) else [] if ids is None else [ids],
        chat_template=tokenizer.chat_template,
        name=str(path),
    )


def transformers_tokenizer(path: Path) -> Any:
    """Load a checkpoint's tokenizer as transformers itself does, without code or network.

    Raises:
        TokenizerError: There is no tokenizer, or transformers cannot convert it.
    """
    with _refusals(f"{path}: the tokenizer", _TOKENIZER_FILES, TokenizerError):
        return require("transformers").AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )


@contextmanager
def _refusals(
    subject: object, expected: str, kind: type[FastsafeError] = CheckpointError
) -> Iterator[None]:
    """Turn any exception of transformers, for values it did not expect, into a sentence."""
    version = require("transformers").__version__
    try:
        yield
    except Exception as error:
        line = ascii(str(error).strip().partition("\n")[0][:200])[1:-1]
        raise kind(
            f"{subject}: is refused by transformers {version} ({line}), expected {expected}"
        ) from None


def _without_code(fields: Mapping[str, Any], prefix: str, dropped: list[str]) -> dict[str, Any]:
    safe = {}
    for key, value in fields.items():
        is_code = key in _CODE_FIELDS or key.startswith("_") or key.endswith(_IMPLEMENTATIONS)
        if is_code:
            dropped.append(prefix + key)
        elif isinstance(value, Mapping):
            safe[key] = _without_code(value, f"{prefix}{key}.", dropped)
        else:
            safe[key] = value
    return safe
