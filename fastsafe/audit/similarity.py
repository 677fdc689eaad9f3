"""Risk of a set by what a model makes of its rows, before anything is trained.

Representations: the state from which an answer begins is compared with those of harmful requests,
less those of their benign twins. Gradients: what a row would change is compared with what refusals
would change; a row that pulls the other way unlearns them. After He et al. 2024, arXiv:2404.01099,
who match harmful answers: here nobody needs any.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastsafe.audit.files_source import FilesSource
from fastsafe.audit.recipe import Data
from fastsafe.audit.source import checkpoint_of, sources
from fastsafe.data.conversation import Row
from fastsafe.data.packing import Example, encode_row
from fastsafe.errors import UsageError
from fastsafe.safety.formats import formats
from fastsafe.safety.risk import Similarity, similarity_risk
from fastsafe.safety.stats import student

if TYPE_CHECKING:
    from fastsafe.engine import LLM

METHODS = ("representation", "gradient")

ANCHORS = 64  # of each kind
DIMENSIONS = 4096  # a gradient is folded into so many numbers: cosines are right to 0.02
_ROWS_AT_ONCE = 16


def model_risk(rows: Sequence[Row], model: str, method: str, device: str = "cpu") -> Similarity:
    """Score rows by a model's view of them; a higher score is a greater risk.

    Args:
        rows: Of the benign set, in any shape that can be trained on.
        model: A path, a hub id, or the name of a source; a source gives its own anchors, else the
            seed set does.
        method: "representation", one forward pass a row, or "gradient", one backward pass too.
        device: Where the model runs.

    Returns:
        Scores in [-2, 2] by representations, in [-1, 1] by gradients.

    Raises:
        UsageError: The method is unknown.
        DataError: A row cannot be trained on.
        CheckpointError: The checkpoint is missing, malformed or refused.
    """
    if method not in METHODS:
        raise UsageError(f"risk: method is {method!r}, expected one of {', '.join(METHODS)}")
    from fastsafe.engine import LLM

    llm = LLM(checkpoint_of(model), device)
    source = sources().get(model) or FilesSource(Data())
    if method == "gradient":
        refusals = source.safety_rows("plain", ANCHORS, 0)
        return similarity_risk(
            rows, (), lambda some: _gradients(llm, some), safe_anchors=refusals, k=ANCHORS
        )
    found = [b for b in source.behaviours(ANCHORS, 0) if b.harmful and b.benign]
    harmful, benign = (
        [_asked(formats()["plain"].ask(b, is_harmful, source.translate)) for b in found]
        for is_harmful in (True, False)
    )
    return similarity_risk(
        rows, harmful, lambda some: _states(llm, some), safe_anchors=benign, k=ANCHORS
    )


def record(found: Similarity, method: str, model: str) -> dict[str, Any]:
    """Return the risk as ``fastsafe lint --risk --json`` prints it."""
    mean, half = student(found.scores)
    return {
        "method": method,
        "model": model,
        "score": round(mean, 4),
        # of a single row nothing is known: the whole range
        "ci_low": round(max(-2.0, mean - half), 4),
        "ci_high": round(min(2.0, mean + half), 4),
        "nearest": list(found.nearest),
    }


def _asked(text: str) -> Row:
    """A request and some answer: the state before it does not know which."""
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "-"}]
    return {"messages": turns}


def _encoded(llm: "LLM", rows: Sequence[Row]) -> list[Example]:
    return [encode_row(row, llm.tokenizer, where=f"row {i}") for i, row in enumerate(rows)]


def _states(llm: "LLM", rows: Sequence[Row]) -> Any:
    """State [E] of the last token before each row's last answer; the last of running text."""
    import torch

    from fastsafe.train.batches import pack

    prompts = []
    for example in _encoded(llm, rows):
        trained = example.trained
        starts = [i for i in range(1, len(trained)) if trained[i] and not trained[i - 1]]
        begin = starts[-1] if starts else len(trained) - 1
        ids = example.token_ids[: begin + 1]
        prompts.append(Example(ids, (False,) * begin + (True,)))
    found = []
    for at in range(0, len(prompts), _ROWS_AT_ONCE):
        packed = pack([prompts[at : at + _ROWS_AT_ONCE]], llm.model.device)
        where = packed.token_ids, packed.positions, packed.attention
        with torch.no_grad():
            found.append(llm.model.forward(*where, keep=packed.keep).float().cpu())
    return torch.cat(found).numpy()


def _gradients(llm: "LLM", rows: Sequence[Row]) -> Any:
    """Gradient of each row's loss in a fresh adapter, folded into fewer numbers."""
    import torch

    from fastsafe.train import TrainConfig, row_gradients

    generator = torch.Generator().manual_seed(0)
    places = signs = torch.empty(0)
    found = []
    for gradient in row_gradients(llm, rows, TrainConfig()):
        if not len(places):
            shape = (len(gradient),)
            places = torch.randint(DIMENSIONS, shape, generator=generator).to(gradient.device)
            signs = torch.randint(2, shape, generator=generator).to(gradient.device) * 2.0 - 1
        folded = torch.zeros(DIMENSIONS, device=gradient.device)
        found.append(folded.index_add_(0, places, gradient * signs).cpu())
    return torch.stack(found).numpy()
