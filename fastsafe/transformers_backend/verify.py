"""Compare our runtime with transformers on the user's own checkpoint.

Three things are compared over a few harmless prompts: token ids of texts and chat templates,
logits, and greedy tokens. Nobody types a tolerance: transformers in a wider dtype stands for the
truth, and on every prompt our logits may be off by twice what transformers in the same dtype is,
plus one rounding, as root mean squares: the largest of few differences is left to chance. Where
greedy tokens part, the truth must hold the two for as likely within the errors of both sides.
"""

import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastsafe.engine import LLM, SamplingParams
from fastsafe.engine.planner import weight_bytes
from fastsafe.errors import UsageError
from fastsafe.io import hub
from fastsafe.io.chat_template import FROZEN_CLOCK
from fastsafe.io.tokenizer import Tokenizer
from fastsafe.model.config import ModelConfig
from fastsafe.model.cpu_threads import available_bytes
from fastsafe.model.device import choose_device
from fastsafe.transformers_backend.loading import transformers_tokenizer
from fastsafe.transformers_backend.transformers_llm import TransformersLLM

GREEDY_TOKENS = 16
_ADAPTER = "adapter"  # its name in both runtimes
_WIDER = {"float32": "float64", "bfloat16": "float32", "float16": "float32"}
# A tolerance above this share of the logits would let anything pass.
_VACUOUS = 0.2


@dataclass(frozen=True, kw_only=True)
class VerifyResult:
    """Result of the comparison.

    Attributes:
        differences: One sentence per kind of difference; empty when both are equal.
        num_prompts: Prompts compared.
        logits_difference: Largest difference from transformers, as a share of the largest logit.
        error: Root mean square of the difference from transformers in the wider dtype, as a share
            of the logits' own, on the prompt where it is largest against its tolerance.
        reference_error: The same for transformers in the same dtype, on that prompt.
        tolerance: Largest accepted ``error`` on that prompt.
        parted_rows: Prompts whose greedy tokens differ, near-ties included.
        has_template: Whether the checkpoint has a chat template.
    """

    differences: tuple[str, ...]
    num_prompts: int
    logits_difference: float
    error: float
    reference_error: float
    tolerance: float
    parted_rows: int
    has_template: bool

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs by more than the tolerance."""
        return not self.differences


class _Side(NamedTuple):
    logits: list[Tensor]  # [N, V] of each prompt, fp64 on the CPU
    tokens: list[tuple[int, ...]]


def prompts() -> list[str]:
    """Return the prompts of the package: short, harmless, awkward in places."""
    text = files(__package__).joinpath("prompts.txt").read_text(encoding="utf-8")
    return text.rstrip("\n").split("\n")


def verify(
    model: str | Path,
    *,
    adapter: str | Path | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    num_prompts: int | None = None,
) -> VerifyResult:
    """Compare our runtime with transformers on a checkpoint.

    Args:
        model: Folder or hub id.
        adapter: PEFT directory that both load.
        device: "cpu", "cuda", "cuda:N", or "auto" for a GPU if there is one.
        dtype: Of both; transformers is loaded a second time in the wider one.
        num_prompts: Number of built-in prompts to compare; None = all.

    Raises:
        UsageError: transformers is not installed, or the wider copy does not fit into memory.
        FastsafeError: Either side refuses the checkpoint or the adapter.
    """
    if dtype not in _WIDER:
        raise UsageError(f"verify: dtype is {dtype!r}, expected one of {', '.join(_WIDER)}")
    device = choose_device(device)
    path = hub.resolve(str(model))
    texts = prompts()[:num_prompts]
    ours_llm = LLM(path, device=device, dtype=dtype)
    _check_room(ours_llm.model.config, device, _WIDER[dtype])
    tokenizer = ours_llm.tokenizer
    differences = _compare_tokens(path, tokenizer, texts)
    has_template = tokenizer.chat_template is not None
    rows = [
        tokenizer.encode_chat(_question(text)) if has_template else tokenizer.encode(text)
        for text in texts
    ]
    ours = _run(ours_llm, rows, adapter)
    del ours_llm
    with _loaded(path, device, dtype) as llm:
        theirs = _run(llm, rows, adapter)
    parted = {
        i: _common(a, b)
        for i, (a, b) in enumerate(zip(ours.tokens, theirs.tokens, strict=True))
        if a != b
    }
    with _loaded(path, device, _WIDER[dtype]) as llm:
        if adapter is not None:
            llm.load_adapter(adapter, _ADAPTER)
            llm.model.to(llm.model.dtype)  # the adapter, too
        with _Widened() if _WIDER[dtype] == "float64" else nullcontext():
            exact = [_logits(llm, row, adapter) for row in rows]
            at_parting = {
                i: _logits(llm, [*rows[i], *ours.tokens[i][:n]], adapter)[-1]
                for i, n in parted.items()
            }
    rounding = torch.finfo(getattr(torch, dtype)).eps
    checks = []
    for mine, other, truth in zip(ours.logits, theirs.logits, exact, strict=True):
        reference_error = _relative(other, truth)
        checks.append((_relative(mine, truth), reference_error, 2 * (reference_error + rounding)))
    # a NaN is the worst of all
    error, reference_error, tolerance = max(
        checks, key=lambda c: float("inf") if math.isnan(c[0]) else c[0] / c[2]
    )
    if not error <= tolerance:
        differences.append(f"logits: the error is {error:.2g}, expected at most {tolerance:.2g}")
    if math.isnan(tolerance):
        differences.append("logits: those of transformers are not finite; look at the weights")
    elif not tolerance <= _VACUOUS:
        differences.append(
            f"logits: the tolerance is {tolerance:.2g}, which proves nothing; compare in float32"
        )
    tie = 2 * (_largest(ours.logits, exact) + _largest(theirs.logits, exact))
    for i, n in parted.items():
        left, right = (side.tokens[i][n : n + 1] for side in (ours, theirs))
        gap = float("inf")
        if left and right:
            gap = abs((at_parting[i][left[0]] - at_parting[i][right[0]]).item())
        if not gap <= tie:
            differences.append(
                f"greedy tokens: prompt {i} parts at token {n}, where the logits are {gap:.2g}"
                f" apart, expected at most {tie:.2g}"
            )
    scale = max(x.abs().max().item() for x in exact)
    return VerifyResult(
        differences=tuple(differences),
        num_prompts=len(rows),
        logits_difference=_largest(ours.logits, theirs.logits) / scale,
        error=error,
        reference_error=reference_error,
        tolerance=tolerance,
        parted_rows=len(parted),
        has_template=has_template,
    )


@contextmanager
def _loaded(path: Path, device: str, dtype: str) -> Iterator[TransformersLLM]:
    """Load a model and free it afterwards, so that only one is in memory at a time."""
    llm = TransformersLLM(path, device, dtype)
    try:
        yield llm
    finally:
        del llm.model
        gc.collect()


def _run(llm: Any, rows: Sequence[Sequence[int]], adapter: str | Path | None) -> _Side:
    if adapter is not None:
        llm.load_adapter(adapter, _ADAPTER)
    params = SamplingParams(max_tokens=GREEDY_TOKENS)
    outs = llm.generate(rows, params, [adapter and _ADAPTER] * len(rows))
    return _Side([_logits(llm, row, adapter) for row in rows], [out.token_ids for out in outs])


def _logits(llm: Any, row: Sequence[int], adapter: str | Path | None) -> Tensor:
    logits: Tensor = llm.logits(row, adapter and _ADAPTER)
    return logits.double().cpu()


def _compare_tokens(path: Path, ours: Tokenizer, texts: Sequence[str]) -> list[str]:
    """Return a sentence if token ids of texts differ, and one if those of templates do."""
    theirs = transformers_tokenizer(path)
    differences = []
    differing = [i for i, t in enumerate(texts) if theirs(t)["input_ids"] != ours.encode(t)]
    if differing:
        differences.append(f"token ids: prompts {differing} differ")
    if ours.chat_template is not None:
        differing = []
        for i, text in enumerate(texts):
            ids = theirs.apply_chat_template(
                _question(text),
                add_generation_prompt=True,
                return_dict=False,
                strftime_now=FROZEN_CLOCK.strftime,
            )
            if ids != ours.encode_chat(_question(text)):
                differing.append(i)
        if differing:
            differences.append(f"chat template: token ids of prompts {differing} differ")
    return differences


def _question(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _check_room(config: ModelConfig, device: str, dtype: str) -> None:
    need = weight_bytes(config, getattr(torch, dtype).itemsize)
    free = available_bytes(device)
    if need > free:
        raise UsageError(
            f"verify: the weights in {dtype}, used as reference, take {need / 2**30:.1f}"
            f" GiB, expected at most the {free / 2**30:.1f} GiB that are free on {device}; use a"
            " smaller dtype or a larger machine"
        )


class _Widened(TorchFunctionMode):
    """Turns every cast to fp32 into one to fp64.

    Norms and softmax of transformers compute in fp32 even where all else is wider.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        def widen(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(widen, args), **{k: widen(v) for k, v in (kwargs or {}).items()})


def _relative(x: Tensor, truth: Tensor) -> float:
    return float((x - truth).norm() / truth.norm())


def _largest(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return torch.stack([(a - b).abs().max() for a, b in zip(left, right, strict=True)]).max().item()


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))
