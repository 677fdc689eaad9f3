"""Layer freezing: no adapter on layers that safety depends on."""

from dataclasses import dataclass
from typing import ClassVar

from fastsafe.errors import UsageError
from fastsafe.train.objectives.objective import Objective


@dataclass(frozen=True, kw_only=True)
class FreezeLayers(Objective):
    """CE with no LoRA on selected layers. (unverified)

    Attributes:
        layers: Indices of the layers that carry no adapter, from 0; none is plain fine-tuning.
    """

    id: ClassVar[str] = "freeze_layers"

    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._check("layers", all(i >= 0 for i in self.layers), "indices from 0")

    def trained_layers(self, num_layers: int) -> tuple[int, ...] | None:
        """Return all layers but ``layers``."""
        remaining = tuple(i for i in range(num_layers) if i not in self.layers)
        if max(self.layers, default=0) >= num_layers or not remaining:
            raise UsageError(
                f"objective 'freeze_layers': layers is {list(self.layers)}, expected some but not "
                f"all of 0 to {num_layers - 1}, the layers of the model"
            )
        return remaining if self.layers else None
