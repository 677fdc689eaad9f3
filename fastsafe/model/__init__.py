"""The decoder, its adapters and their weights."""

import torch

from fastsafe.model.config import ModelConfig
from fastsafe.model.lora import Adapter, AdapterBank
from fastsafe.model.transformer import Transformer

__all__ = ["Adapter", "AdapterBank", "ModelConfig", "Transformer"]

# The first call of any of MKL's vector functions (torch's cos, exp, tanh, ...) finds out what the
# CPU is and stores it in two steps. A thread that calls between the two gets code that is right in
# half of the digits (pytorch/pytorch#188792), so the first call is made while there is one thread.
torch.zeros(1, dtype=torch.float32, device="cpu").cos()
