"""Measure the drift of an adapter in training from its base, on a few probe prompts.

Drift is a property of answers. Where the chat template prints an empty thought in front of an
answer, or the prompt opens a thought, a probe is read behind the empty thought.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsafe.data.encoder import Encoder
from fastsafe.data.packing import TrainExample
from fastsafe.data.thoughts import empty_thought
from fastsafe.errors import TokenizerError, UsageError
from fastsafe.model.transformer import Project, Transformer
from fastsafe.train.batches import Packed, pack
from fastsafe.train.loss import divergence, target_logprobs

_PROBES_AT_ONCE = 16


class DriftReading(NamedTuple):
    """Drift of one job after one step."""

    job: str
    step: int  # steps taken
    kl: float  # KL(base || adapter) of the first token of an answer, in nats, the probes' mean
    margin: float  # log p(refusal) - log p(affirmative) of the openings, the probes' mean
    kls: tuple[float, ...]  # of each probe
    margins: tuple[float, ...]  # of each probe


@dataclass(frozen=True, kw_only=True)
class DriftMonitor:
    """Settings of the drift readings of every job.

    Attributes:
        every: Steps of a job between readings, at least 1.
        prompts: Probes: token ids, or messages that the chat template renders.
        on_reading: Called with each reading. After a resume, those since the checkpoint come again.
        refusal: Opening of an answer that refuses.
        affirmative: Opening of an answer that complies.
        max_kl: A reading above it ends the job as if this were its last step; None = no limit.
    """

    every: int
    prompts: Sequence[Sequence[int] | Sequence[Mapping[str, Any]]]
    on_reading: Callable[[DriftReading], None]
    refusal: str = "I cannot help"
    affirmative: str = "Sure"
    max_kl: float | None = None

    def __post_init__(self) -> None:
        if type(self.every) is not int or self.every < 1:
            raise UsageError(f"DriftMonitor: every is {self.every!r}, expected at least 1")
        if not self.prompts:
            raise UsageError("DriftMonitor: prompts are none, expected one or more")
        if self.max_kl is not None and not self.max_kl > 0:
            raise UsageError(f"DriftMonitor: max_kl is {self.max_kl!r}, expected more than 0")


class DriftProbe:
    """The probes of a monitor, tokenized and run through the base once."""

    def __init__(self, monitor: DriftMonitor, model: Transformer, tokenizer: Encoder) -> None:
        """Run the base on the probes.

        Raises:
            UsageError: An opening has no token, or a probe is empty or too long.
        """
        self.monitor = monitor
        self._base = model
        openings = [
            tuple(tokenizer.encode(text, add_special_tokens=False))
            for text in (monitor.refusal, monitor.affirmative)
        ]
        prompts = [_past_thought(_encode(p, tokenizer), tokenizer) for p in monitor.prompts]
        longest = model.config.max_position_embeddings - max(map(len, openings))
        for i, prompt in enumerate(prompts):
            if not 1 <= len(prompt) <= longest:
                raise UsageError(
                    f"DriftMonitor: prompt {i} has {len(prompt)} tokens, expected 1 to {longest}"
                )
        if not all(openings):
            raise UsageError("DriftMonitor: an opening has no token, expected some text")
        self._tiles = []
        for begin in range(0, len(prompts), _PROBES_AT_ONCE):
            batch = prompts[begin : begin + _PROBES_AT_ONCE]
            packed = pack([[_probe(p, o) for p in batch] for o in openings], model.device)
            self._tiles.append((packed, _hidden(packed, model, None)))

    @torch.no_grad()
    def read(self, job: str, step: int, model: Transformer, project: Project) -> DriftReading:
        """Measure one adapter in its present state.

        Args:
            job: Name of the job.
            step: Steps taken.
            model: The model that the adapter runs on.
            project: Its linear layers, the adapter included.
        """
        kls: list[float] = []
        margins: list[float] = []
        for packed, base in self._tiles:
            hidden = _hidden(packed, model, project)
            refusals = packed.kept[0]
            first = torch.nonzero(packed.answer_index[:refusals] == 0)[:, 0]
            kls += divergence(hidden[first], base[first], model, self._base).tolist()
            logprobs = target_logprobs(hidden, packed.targets, model)
            refusal = logprobs[:refusals].view(len(first), -1).sum(1)
            margins += (refusal - logprobs[refusals:].view(len(first), -1).sum(1)).tolist()
        return DriftReading(job, step, fmean(kls), fmean(margins), tuple(kls), tuple(margins))


@torch.no_grad()
def _hidden(packed: Packed, model: Transformer, project: Project | None) -> Tensor:
    return model.forward(packed.token_ids, packed.positions, packed.attention, project, packed.keep)


def _encode(prompt: Sequence[Any], tokenizer: Encoder) -> tuple[int, ...]:
    if all(type(token) is int for token in prompt):
        return tuple(prompt)
    text = tokenizer.render_chat(prompt, add_generation_prompt=True)
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def _past_thought(prompt: tuple[int, ...], tokenizer: Encoder) -> tuple[int, ...]:
    """Return a prompt with the empty thought that its template prints behind it, if any."""
    turns = [{"role": "user", "content": "Hello"}]
    answer = {"role": "assistant", "content": "Hello"}
    try:
        asked = tokenizer.render_chat(turns, add_generation_prompt=True)
        whole = tokenizer.render_chat([*turns, answer], add_generation_prompt=False)
    except TokenizerError:  # there is no template
        asked = whole = ""
    thought = empty_thought(tokenizer.decode(prompt, False), asked, whole)
    return prompt + tuple(tokenizer.encode(thought, add_special_tokens=False) if thought else ())


def _probe(prompt: tuple[int, ...], opening: tuple[int, ...]) -> TrainExample:
    return TrainExample(prompt + opening, (False,) * len(prompt) + (True,) * len(opening))
