"""Open a checkpoint with transformers so that nothing in the checkpoint runs or is fetched."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from fastsafe.errors import CheckpointError, TokenizerError, UsageError
from fastsafe.io.checkpoint import Checkpoint
from fastsafe.io.tokenizer import Tokenizer
from fastsafe.io.weight_folder import ADAPTER_CONFIG, is_adapter

# Fields that name code, kernels or files; so do fields that begin with an underscore.
_CODE_FIELDS = ("auto_map", "trust_remote_code", "custom_pipelines", "transformers_weights")
_IMPLEMENTATIONS = "_implementation"


def require(name: str) -> Any:
    """Import transformers or peft.

    Raises:
        UsageError: It is not installed.
    """
    try:
        return import_module(name)
    except ImportError:
        raise UsageError(
            f"{name} is not installed, expected it for this; run `pip install fastsafe[parity]`"
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
    where = checkpoint.path / "config.json"
    if raw.get("quantization_config") is not None:
        raise CheckpointError(
            f"{where}: quantization_config is set, expected plain weights; use the unquantized"
            " checkpoint"
        )
    dropped: list[str] = []
    fields = _without_code(raw, "", dropped)
    kind = fields.pop("model_type", None)
    try:
        return transformers.AutoConfig.for_model(str(kind), **fields), tuple(dropped)
    except Exception as error:  # whatever a config class makes of values it did not expect
        raise CheckpointError(
            f"{where}: model_type {str(kind)!a:.60} is refused by transformers"
            f" {transformers.__version__} ({_first_line(error)}), expected a type that it knows"
            " without code from the checkpoint"
        ) from None


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
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            generation_config=transformers.GenerationConfig(),
        )
    except Exception as error:  # whatever a model class makes of values it did not expect
        raise CheckpointError(
            f"{path}: is refused by transformers {transformers.__version__}"
            f" ({_first_line(error)}), expected a causal language model"
        ) from None
    # what generate takes for unset options
    model.generation_config = transformers.GenerationConfig()
    return model.to(device).eval().requires_grad_(False), dropped


def linear_modules(path: Path) -> list[str]:
    """List the linear modules that may carry an adapter; no weight is read."""
    transformers = require("transformers")
    config, _ = model_config(Checkpoint(path))
    with torch.device("meta"):
        try:
            model = transformers.AutoModelForCausalLM.from_config(config)
        except Exception as error:
            raise CheckpointError(
                f"{path}: is no causal language model of transformers ({_first_line(error)})"
            ) from None
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
    transformers = require("transformers")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
        backend = tokenizer.backend_tokenizer
    except Exception as error:  # missing files, missing libraries, malformed vocabularies
        raise TokenizerError(
            f"{path}: the tokenizer is refused by transformers ({_first_line(error)}), expected"
            " tokenizer.json or files that convert to it"
        ) from None
    checkpoint = Checkpoint(path)
    ends = checkpoint.generation_config() or checkpoint.config()
    ids = ends.get("eos_token_id")
    template = tokenizer.chat_template
    return Tokenizer(
        backend,
        special_tokens=tokenizer.special_tokens_map,
        eos_ids=ids if isinstance(ids, list) else [] if ids is None else [ids],
        chat_template=template.get("default") if isinstance(template, dict) else template,
        name=str(path),
    )


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


def _first_line(error: BaseException) -> str:
    return ascii(str(error).strip().partition("\n")[0][:200])[1:-1]
