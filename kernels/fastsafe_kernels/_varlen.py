"""Causal attention within packed sequences on a GPU: a choice of backend, not a kernel.

    y[n, h] = sum_t softmax_t(scale * q[n, h] . k[t, h // G]) v[t, h // G],   G = H / Hkv

over the tokens t <= n of the sequence of token n; with a window only its last ``window`` ones,
with a softcap the scores are softcap * tanh(s / softcap).

Source   Dao 2023, arXiv:2307.08691 (FlashAttention-2), of which torch carries a copy
Used by  fastsafe.engine (prefill) and fastsafe.train on a GPU

Nothing of a backend is imported before the first call.
"""

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._spec import match

_Attend = Callable[[Tensor, Tensor, Tensor, Tensor, int, float, int | None, float | None], Tensor]


class AttentionBackend(NamedTuple):
    """The backend of attention over packed sequences on this machine, and its limits."""

    name: str  # distribution to install
    version: str  # "unknown" where it says none
    supports_window: bool
    supports_softcap: bool


class _Flash(NamedTuple):
    """One generation of flash-attn."""

    name: str
    module: str
    majors: tuple[int, ...]  # compute capabilities that its forward and backward run on


# In order of preference: the newest first.
_FLASHES = (
    _Flash("flash-attn-4", "flash_attn.cute", (9, 10, 11)),
    _Flash("flash-attn-3", "flash_attn_interface", (9,)),
    _Flash("flash-attn", "flash_attn", (8, 9, 10, 11, 12)),
)


class _Deterministic(torch.autograd.Function):
    """Runs the backward of torch's own attention with its sums in a fixed order.

    Its only switch for that is the global one, which is set for the time of the backward.
    """

    @staticmethod
    def forward(ctx: Any, attend: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.enable_grad():
            inputs = tuple(x.detach().requires_grad_() for x in (q, k, v))
            y: Tensor = attend(*inputs)
        ctx.graph = inputs, y
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # let go of, so that a layer's tensors do not outlive its backward
        (inputs, y), ctx.graph = ctx.graph, None
        enabled = torch.are_deterministic_algorithms_enabled()
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            return None, *torch.autograd.grad(y, inputs, grads[0])
        finally:
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def _from_flash(flash: _Flash) -> tuple[AttentionBackend, _Attend] | None:
    """Return the backend of one generation of flash-attn, if it is installed for this GPU."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] not in flash.majors:
        return None
    try:
        module = importlib.import_module(flash.module)
    except ModuleNotFoundError:
        return None  # a broken build raises another ImportError, and is not passed over
    # flash-attn 4 alone leaves an empty namespace where flash-attn 2 would be
    fn = getattr(module, "flash_attn_varlen_func", None)
    if fn is None:
        return None
    try:
        version = importlib.metadata.version(flash.name)
    except importlib.metadata.PackageNotFoundError:
        version = getattr(module, "__version__", "unknown")
    parameters = inspect.signature(fn).parameters
    # sums in a fixed order, and not in an order that the other sequences decide
    fixed = {"deterministic": True, "num_splits": 1}
    fixed = {name: value for name, value in fixed.items() if name in parameters}

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        options: dict[str, Any] = dict(fixed)
        if window is not None:
            options["window_size"] = (
                window - 1,
                0,
            )  # keys to the left, the query's own not counted
        if softcap is not None:
            options["softcap"] = softcap
        y = fn(
            q,
            k,
            v,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            softmax_scale=scale,
            causal=True,
            **options,
        )
        # flash-attn 4 and early builds of 3 return the log-sum-exp too
        out: Tensor = y[0] if isinstance(y, tuple) else y
        return out

    return AttentionBackend(
        flash.name, version, "window_size" in parameters, "softcap" in parameters
    ), attend


def _from_torch() -> tuple[AttentionBackend, _Attend]:
    """Return the backend of torch itself, which is always there."""
    fn: Any = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    parameters = inspect.signature(fn).parameters
    options: dict[str, Any] = {}
    if "enable_gqa" in parameters:  # without it torch 2.11 takes fewer key/value heads as they are
        options["enable_gqa"] = True
    if "num_splits" in parameters and torch.nn.attention.current_flash_attention_impl() is not None:
        options["num_splits"] = 1  # else an activated flash-attn 3 lets other sequences decide

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        left = -1 if window is None else window - 1

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
            y: Tensor = fn(q, k, v, *lengths, scale=scale, window_size=(left, 0), **options)
            return y

        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            y: Tensor = _Deterministic.apply(run, q, k, v)
            return y
        return run(q, k, v)

    return AttentionBackend("torch", torch.__version__, "window_size" in parameters, False), attend


@cache
def _choice() -> tuple[AttentionBackend, _Attend]:
    for flash in _FLASHES:
        found = _from_flash(flash)
        if found is not None:
            return found
    return _from_torch()


def choose_backend() -> AttentionBackend:
    """Return the backend of ``varlen_attention`` in this process; chosen once, at the first call.

    The first that is installed and made for the current GPU of: flash-attn 4, 3, 2, torch.

    Returns:
        Its name, its version and what it can do.

    Example:
        >>> choose_backend()  # doctest: +SKIP
        AttentionBackend(name='torch', version='2.11.0', supports_window=True, ...)
    """
    return _choice()[0]


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attend causally within each of several sequences that lie end to end.

    Args:
        q: [N, H, D] bf16 or fp16, on a GPU, contiguous in D. Head h looks at key/value head
            h // (H / Hkv).
        k: [N, Hkv, D] like ``q``.
        v: As ``k``.
        cu_seqlens: [B + 1] int32: sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1]. The
            values are not checked: that would cost a synchronisation.
        max_seqlen: Length of the longest sequence or more.
        scale: Multiplies q . k.
        window: Number of keys that a query sees, itself included; None = all before it.
        softcap: Bound of the scaled scores; None = none.

    Returns:
        [N, H, D] like ``q``. Differentiable in q, k and v, once; the backward sums in a fixed
        order.

    Raises:
        ValueError: Shapes or devices disagree, a tensor is on the CPU, or a size is not positive.
        TypeError: A dtype is not listed above.
        NotImplementedError: The backend lacks the window or the softcap.

    Example:
        >>> q = torch.randn(5, 4, 64, dtype=torch.bfloat16, device="cuda")  # doctest: +SKIP
        >>> cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32, device="cuda")  # doctest: +SKIP
        >>> varlen_attention(q, q, q, cu_seqlens, 3, scale=0.125).shape  # doctest: +SKIP
        torch.Size([5, 4, 64])
    """
    size = match(
        "varlen_attention",
        q=(q, "N H D", (torch.bfloat16, torch.float16)),
        k=(k, "N Hkv D", (q.dtype,)),
        v=(v, "N Hkv D", (q.dtype,)),
        cu_seqlens=(cu_seqlens, "C", (torch.int32,)),
    )
    if q.device.type == "cpu":
        raise ValueError("varlen_attention: q is on cpu, expected a GPU; there is no CPU path")
    H, Hkv = size["H"], size["Hkv"]
    if H % Hkv:
        raise ValueError(f"varlen_attention: q has {H} heads, expected a multiple of Hkv={Hkv}")
    for name, bound in (("window", window), ("softcap", softcap)):
        if bound is not None and bound <= 0:
            want = "a positive number; None = none"
            raise ValueError(f"varlen_attention: {name} is {bound}, expected {want}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(2) != 1:
            stride = f"stride {x.stride(2)} in D, expected 1"
            raise ValueError(f"varlen_attention: {name} has {stride}; call .contiguous()")
    backend, attend = _choice()
    for name, bound, supported in (
        ("window", window, backend.supports_window),
        ("softcap", softcap, backend.supports_softcap),
    ):
        if bound is not None and not supported:
            have = f"{backend.name} {backend.version} has none"
            raise NotImplementedError(
                f"varlen_attention: {name} is {bound}, but {have}; pip install flash-attn"
            )
    if size["N"] == 0:
        return q.clone()
    return attend(q, k, v, cu_seqlens, max_seqlen, scale, window, softcap)
