"""Other people's kernels for the tasks of ours, by op, for benchmarks/kernels.py.

A peer is a function of the op's own arguments with the op's own results; what it would rather be
given (another layout) is prepared before the clock starts. Its library is imported when its op is
timed, where it is installed. Nothing else in this repository needs these libraries.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsafe_kernels import _accuracy
from fastsafe_kernels._spec import Dims, Kernel

LOOSE = 0.05  # of the largest value, or of all whole numbers: what a peer may differ by


def as_given(*args: Any) -> tuple[Any, ...]:
    """Leave the arguments as the op takes them."""
    return args


def anywhere(dims: Dims) -> bool:
    """Take every benchmark point."""
    return True


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One peer of one op."""

    library: str  # distribution that it comes from
    fn: Callable[..., Any]  # of what ``prepare`` returns
    prepare: Callable[..., tuple[Any, ...]] = as_given  # not timed
    fits: Callable[[Dims], bool] = anywhere  # benchmark points at which it does the same task
    grads: tuple[int, ...] | None = None  # positions in what ``prepare`` returns; None: the op's
    check: Callable[..., str] | None = None  # of arguments and results, where these are random

    def disagreement(self, kernel: Kernel, args: tuple[Any, ...]) -> str:
        """Why it may not be timed with these arguments; "" when it does the same task."""

        def fn(*given: Any) -> Any:
            return self.fn(*self.prepare(*given))

        if self.check is not None:
            return self.check(args, fn(*args))
        got = _accuracy.outputs(kernel, fn, args)
        for what, expected in _accuracy.outputs(kernel, kernel.reference, args).items():
            if found := _far(what, got[what], expected):
                return found
        return ""


def _far(what: str, got: Tensor, expected: Tensor) -> str:
    if got.shape != expected.shape:
        return f"{what} is {list(got.shape)}, expected {list(expected.shape)}"
    finite = expected.isfinite()
    if not finite.any():
        return ""
    truth = expected[finite].double()
    off = (got[finite].double() - truth).abs()
    if expected.is_floating_point():
        scale = truth.abs().max().item()
        if not (off <= LOOSE * scale).all():  # also when it is NaN
            return f"{what} is off by {off.max().item():.1e} at {scale=:.1e}"
    elif (off != 0).double().mean().item() > LOOSE:
        return f"{what} differs in {int((off != 0).sum())} of {off.numel()} values"
    return ""


def torch_rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, one_plus: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Add, then torch's fused norm."""
    h = x if residual is None else torch.add(residual, x, alpha=scale)
    return F.rms_norm(h, weight.shape, weight + 1 if one_plus else weight, eps), h


def liger(file: str, function: str) -> Any:
    """One of Liger's ops; from its file, which holds its Triton kernels on any GPU."""
    return getattr(import_module(f"liger_kernel.ops.{file}"), function).apply


def liger_rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, one_plus: bool, _: float
) -> Any:
    """Liger's norm, with its fused addition where there is a residual."""
    rest = (weight, eps, *((1.0, "gemma") if one_plus else (0.0, "llama")), False)
    if residual is None:
        return liger("rms_norm", "LigerRMSNormFunction")(x, *rest), x
    return liger("fused_add_rms_norm", "LigerFusedAddRMSNormFunction")(x, residual, *rest)


def liger_rope(x: Tensor, cos: Tensor, sin: Tensor, *_: Any) -> Any:
    """Liger's rotation of queries and keys, in place, with one key head beside our heads."""
    queries, keys = x[None].transpose(1, 2), x.new_empty(1, 1, *x.shape[::2])
    return liger("rope", "LigerRopeFunction")(queries, keys, cos, sin)[0].transpose(1, 2)[0]


def halves(gate_up: Tensor, activation: str) -> tuple[Tensor, Tensor, str]:
    """Gate and up as two matrices, which is how Liger takes them."""
    gate, up = gate_up.chunk(2, -1)
    return gate.contiguous(), up.contiguous(), activation


def liger_gated(gate: Tensor, up: Tensor, activation: str) -> Any:
    """Liger's silu(gate) * up or gelu(gate) * up."""
    if activation == "silu":
        return liger("swiglu", "LigerSiLUMulFunction")(gate, up)
    return liger("geglu", "LigerGELUMulFunction")(gate, up)


def torch_token_logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """torch's cross entropy, in the dtype of the logits."""
    return -F.cross_entropy(logits, token_ids, reduction="none")


def liger_token_logprobs(logits: Tensor, token_ids: Tensor) -> Any:
    """Liger's cross entropy, which puts the gradient in the place of the logits."""
    rest = (None, -100, 0.0, 0.0, "none")
    return -liger("cross_entropy", "LigerCrossEntropyFunction")(logits, token_ids, *rest)[0]


def torch_linear_logprobs(hidden: Tensor, head: Tensor, targets: Tensor, *_: Any) -> Tensor:
    """A product and torch's cross entropy: logits of all rows at once."""
    return -F.cross_entropy(F.linear(hidden, head), targets, reduction="none")


def liger_linear_logprobs(
    hidden: Tensor, head: Tensor, targets: Tensor, scale: float, softcap: float
) -> Any:
    """Liger's fused product and cross entropy, which computes the logits again for gradients."""
    rest = (None, None, -100, 0.0, 0.0, "none", softcap or None)
    ops = liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
    return -ops(hidden / scale if scale != 1 else hidden, head, targets, *rest)[0]


def summed(logprobs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A weighted sum of losses from what gives each row's log-probability."""

    def loss(
        hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None, *rest: Any
    ) -> Tensor:
        losses = -logprobs(hidden, head, targets, *rest[2:])
        return (losses if weights is None else weights * losses).sum()

    return loss


def adapter_rows(
    params: Tensor, grads: Tensor, m: Tensor, v: Tensor, *rest: Any
) -> tuple[list[Any], Tensor]:
    """What one call per adapter needs: views of its row, its numbers on the host."""
    rates, steps, lengths, beta1, beta2, eps, decays, clips = rest
    columns = [x.tolist() for x in (rates, steps, lengths, decays, clips)]
    rows = []
    for a, (rate, step, length, decay, clip) in enumerate(zip(*columns, strict=True)):
        if step:
            tensors = [x[a, :length] for x in (params, grads, m, v)]
            counter = torch.tensor(float(step), device=params.device)
            options = {"lr": rate, "beta1": beta1, "beta2": beta2, "eps": eps}
            rows.append((a, tensors, counter, clip, options | {"weight_decay": decay}))
    return rows, torch.zeros(len(params), device=params.device)


def torch_adamw(rows: list[Any], norms: Tensor) -> Tensor:
    """Clipping by norm and torch's fused AdamW, adapter by adapter."""
    for a, (p, g, m, v), step, clip, options in rows:
        norms[a] = torch.linalg.vector_norm(g)
        if clip:
            g.mul_((clip / (norms[a] + 1e-6)).clamp(max=1.0))
        state = [p], [g], [m], [v]
        torch._fused_adamw_(*state, [], [step], **options, amsgrad=False, maximize=False)
    return norms


def torch_sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax and multinomial, argmax where the temperature is 0; no filters or stop flags."""
    greedy = temperature == 0
    z = logits.float()
    p = torch.softmax(z / torch.where(greedy, 1.0, temperature)[:, None], -1)
    ids = torch.where(greedy, z.argmax(-1), torch.multinomial(p, 1)[:, 0])
    chosen = z.gather(-1, ids[:, None])[:, 0]
    return ids, chosen - z.logsumexp(-1), z.amax(-1).isfinite()


def drawn(args: tuple[Any, ...], results: tuple[Tensor, ...]) -> str:
    """Whether these are possible draws, with their log-probabilities."""
    logits, temperature = args[0].float(), args[1]
    ids, logprobs, is_finite = results[:3]
    expected = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    if not is_finite.all() or not expected.isfinite().all():
        return "token_ids holds a banned token"
    if not torch.equal(ids[temperature == 0], logits.argmax(-1)[temperature == 0]):
        return "token_ids is not the largest logit at temperature 0"
    return _far("logprobs", logprobs, expected)


def torch_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """cuBLAS, whose rows may change with the number of rows."""
    return torch.mm(x, weight.T)


def bnb_nf4_dequantize(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Any:
    """Weights by bitsandbytes."""
    ops = import_module("bitsandbytes.functional")
    out = torch.empty(len(codes), 2 * codes.shape[1], dtype=dtype, device=codes.device)
    flat = codes.view(-1, 1), None, absmax.view(-1), out
    return ops.dequantize_4bit(*flat, blocksize=64, quant_type="nf4")


def bnb_nf4_quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes by bitsandbytes, which divides by the absmax before it compares."""
    ops = import_module("bitsandbytes.functional")
    codes, state = ops.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    return codes.view(len(weight), -1), state.absmax.view(len(weight), -1)


LIGER, BNB = "liger-kernel", "bitsandbytes"
MODULES = {LIGER: "liger_kernel", BNB: "bitsandbytes", "torch": "torch"}

PEERS: dict[str, tuple[Peer, ...]] = {
    "rms_norm": (
        Peer(library="torch", fn=torch_rms_norm),
        Peer(library=LIGER, fn=liger_rms_norm, fits=lambda d: not d["scaled"]),
    ),
    "rope": (Peer(library=LIGER, fn=liger_rope, fits=lambda d: not d["norm"]),),
    "gated": (Peer(library=LIGER, fn=liger_gated, prepare=halves, grads=(0, 1)),),
    "token_logprobs": (
        Peer(library="torch", fn=torch_token_logprobs),
        Peer(library=LIGER, fn=liger_token_logprobs),
    ),
    "linear_logprobs": (
        Peer(library="torch", fn=torch_linear_logprobs, fits=lambda d: not d["capped"]),
        Peer(library=LIGER, fn=liger_linear_logprobs),
    ),
    "linear_cross_entropy": (
        Peer(
            library="torch",
            fn=summed(torch_linear_logprobs),
            fits=lambda d: not d["kl"] and not d["capped"],
        ),
        Peer(library=LIGER, fn=summed(liger_linear_logprobs), fits=lambda d: not d["kl"]),
    ),
    "adamw": (Peer(library="torch", fn=torch_adamw, prepare=adapter_rows),),
    "sample": (
        Peer(library="torch", fn=torch_sample, fits=lambda d: not d["filters"], check=drawn),
    ),
    "matmul_invariant": (Peer(library="torch", fn=torch_matmul),),
    "nf4_dequantize": (Peer(library=BNB, fn=bnb_nf4_dequantize),),
    "nf4_quantize": (Peer(library=BNB, fn=bnb_nf4_quantize),),
}


def installed(op: str) -> dict[str, Peer]:
    """Peers of one op whose library is here, by library and version."""
    return {
        f"{peer.library} {version(peer.library)}": peer
        for peer in PEERS.get(op, ())
        if importlib.util.find_spec(MODULES[peer.library]) is not None
    }
