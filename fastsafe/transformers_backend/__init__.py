"""transformers and PEFT behind the engine's interface: the fallback, and the reference of verify.

Their imports, which take seconds, wait for the first use.
"""

from fastsafe.transformers_backend.peft_training import finetune
from fastsafe.transformers_backend.transformers_llm import TransformersLLM

__all__ = ["TransformersLLM", "finetune"]
