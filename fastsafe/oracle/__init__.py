"""transformers and PEFT behind the engine's interface: the fallback, and the judge of ours.

Nothing here is imported before it is asked for; ``transformers`` takes seconds to import.
"""

from fastsafe.oracle.backend import TransformersLLM
from fastsafe.oracle.finetune import finetune

__all__ = ["TransformersLLM", "finetune"]
