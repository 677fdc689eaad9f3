"""Fused Triton ops. Each file is one op: definition, kernel, launcher, test points."""

from .token_logprobs import token_logprobs

__all__ = ["token_logprobs"]
