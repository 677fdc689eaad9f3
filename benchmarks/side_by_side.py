"""What benchmarks beside transformers + PEFT share: rates, machine, and the tuned PEFT trainer."""

import copy
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastsafe import TrainConfig
from fastsafe.data.packing import TrainExample
from fastsafe.model import cpu_ops

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # token ids, attention mask, labels

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# (rows, inner, columns) from the organism's to large, and those of an 8B model.
CPU_SIZES = ((640, 128, 768), (2048, 384, 128), (1024, 1024, 1024))
CUDA_SIZES = ((8192, 4096, 14336), (8192, 4096, 6144), (8192, 8192, 8192))


def gemm_rate(product: Product, device: str = "cpu") -> float:
    """Best FLOP/s of matrix products, over several sizes: fp32 on a CPU, bf16 on a GPU."""
    best = 0.0
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for rows, inner, columns in CPU_SIZES if device == "cpu" else CUDA_SIZES:
        a = torch.randn(rows, inner, device=device, dtype=dtype)
        b = torch.randn(columns, inner, device=device, dtype=dtype)
        for _ in range(5):
            seconds, _ = timed(lambda a=a, b=b: [product(a, b) for _ in range(20)][-1])
            best = max(best, 20 * 2 * rows * inner * columns / seconds)
    return best


def own_gemm_rate() -> float:
    """The same for fastsafe's product on a CPU: all cores at once, each with its own products."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(lambda _: gemm_rate(cpu_ops.linear), range(threads)))
    finally:
        torch.set_num_threads(threads)


def timed(fn: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a call takes, until the GPU is done if there is one, and its result."""
    is_cuda = torch.cuda.is_available()
    if is_cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    result = fn()
    if is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin, result


def facts() -> dict[str, Any]:
    """What the numbers depend on."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu_name = names[0] if names else platform.processor()
    found = {
        "commit": commit or "unknown",
        "machine": f"{cpu_name}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    for package in ("transformers", "peft", "liger_kernel"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


class PeftTrainer:
    """transformers + PEFT, one condition at a time: fused AdamW on padded batches."""

    def __init__(self, base: Any, pad_id: int) -> None:
        self.base, self.pad_id = base, pad_id

    def batches(self, examples: Sequence[TrainExample], config: TrainConfig) -> list[Batch]:
        """Padded batches in the order of the rows, made before the clock starts."""
        found: list[Any] = []
        for step in range(config.max_steps or 0):
            at = step * config.batch_size % len(examples)
            rows = examples[at : at + config.batch_size]
            longest = max(len(e.token_ids) for e in rows)
            ids = torch.full((len(rows), longest), self.pad_id)
            labels = torch.full_like(ids, -100)
            mask = torch.zeros_like(ids)
            for i, e in enumerate(rows):
                n = len(e.token_ids)
                ids[i, :n] = torch.tensor(e.token_ids)
                mask[i, :n] = 1
                on = torch.tensor(e.trained)
                labels[i, :n][on] = ids[i, :n][on]
            found.append(tuple(t.to(self.base.device) for t in (ids, mask, labels)))
        return found

    def train(self, batches: Sequence[Batch], config: TrainConfig) -> list[float]:
        """Train one adapter; the loss of every step."""
        import peft

        torch.manual_seed(config.seed)
        lora = peft.LoraConfig(
            r=config.rank,
            lora_alpha=int(config.alpha),
            target_modules=list(config.target_modules),
            task_type="CAUSAL_LM",
        )
        # a copy, as PEFT puts its modules into the model; not of frozen weights on a GPU
        base = copy.deepcopy(self.base) if self.base.device.type == "cpu" else self.base
        model = peft.get_peft_model(base, lora).train()
        weights = [w for w in model.parameters() if w.requires_grad]
        optimizer = torch.optim.AdamW(
            weights, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        autocast = torch.autocast("cuda", torch.bfloat16, enabled=self.base.device.type == "cuda")
        losses = []
        for ids, mask, labels in batches:
            with autocast:
                out = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
            loss = out.loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
            optimizer.step()
            losses.append(loss.item())
        if base is self.base:
            model.unload()
        return losses
