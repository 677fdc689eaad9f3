"""transformers and PEFT behind the engine's interface: the fallback, and the judge of ours.

Nothing here is imported before it is asked for; ``transformers`` takes seconds to import.
"""

from fastsafe.transformers_backend.peft_training import finetune
from fastsafe.transformers_backend.transformers_llm import TransformersLLM

__all__ = ["TransformersLLM", "finetune"]
