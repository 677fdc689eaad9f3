"""Generation: a base model and its adapters answer prompts in batches."""

from fastsafe.engine.llm import LLM
from fastsafe.engine.request import Completion, SamplingParams, Score

__all__ = ["LLM", "Completion", "SamplingParams", "Score"]
