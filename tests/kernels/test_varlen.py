"""Attention of packed sequences: which backend is chosen, what it is told, what it refuses."""

import importlib
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsafe_kernels import _varlen
from fastsafe_kernels._varlen import AttentionBackend, choose_backend, varlen_attention

FLASHES = ("flash_attn.cute", "flash_attn_interface", "flash_attn")
Call = tuple[tuple[Any, ...], dict[str, Any]]


class Installed:
    """Stands in for the packages of a machine; remembers how a backend was called."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        self.calls: list[Call] = []
        for name in FLASHES:
            patch.setitem(sys.modules, name, None)  # importing it raises ModuleNotFoundError
        self.gpu(None)

    def gpu(self, major: int | None) -> None:
        self.patch.setattr(torch.cuda, "is_available", lambda: major is not None)
        self.patch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))

    def add(self, name: str, fn: Any, version: str = "9.8.7") -> None:
        module = ModuleType(name)
        module.__dict__.update(flash_attn_varlen_func=fn, __version__=version)
        if "." in name:  # the parent is imported first
            self.patch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
        self.patch.setitem(sys.modules, name, module)

    def torch(self, fn: Any) -> None:
        module = ModuleType("torch.nn.attention.varlen")
        module.__dict__.update(varlen_attn=fn)
        self.patch.setitem(sys.modules, "torch.nn.attention.varlen", module)

    def called(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls.append((args, kwargs))
        y: Tensor = 2 * args[0] + args[1].sum() + args[2].sum()
        return y

    def flash(self, returns_lse: bool = False) -> Any:
        """Arguments as flash-attn 3 and 4 name them."""

        def flash_attn_varlen_func(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            cu_seqlens_q: Tensor,
            cu_seqlens_k: Tensor,
            max_seqlen_q: int,
            max_seqlen_k: int,
            softmax_scale: float | None = None,
            causal: bool = False,
            window_size: tuple[int, int] = (-1, -1),
            softcap: float = 0.0,
            num_splits: int = 0,
            deterministic: bool = False,
        ) -> Any:
            fixed = {"num_splits": num_splits, "deterministic": deterministic}
            lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
            bounds = {"causal": causal, "window_size": window_size, "softcap": softcap}
            y = self.called(q, k, v, *lengths, scale=softmax_scale, **bounds, **fixed)
            return (y, torch.zeros(1)) if returns_lse else y

        return flash_attn_varlen_func


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Installed]:
    _varlen._choice.cache_clear()
    yield Installed(monkeypatch)
    _varlen._choice.cache_clear()


def arguments(device: str = "meta") -> tuple[Tensor, Tensor, Tensor, Tensor, int, float]:
    q = torch.empty(5, 4, 16, dtype=torch.bfloat16, device=device)
    k, v = torch.empty(2, 5, 2, 16, dtype=torch.bfloat16, device=device)
    cu_seqlens = torch.empty(3, dtype=torch.int32, device=device)
    return q, k, v, cu_seqlens, 3, 0.25


def test_the_newest_flash_attn_is_chosen(installed: Installed) -> None:
    installed.add("flash_attn", installed.flash(), "2.8.3")
    assert choose_backend() == AttentionBackend("flash-attn", "2.8.3", True, True)
    _varlen._choice.cache_clear()
    installed.add("flash_attn_interface", installed.flash(), "3.0.0")
    assert choose_backend() == AttentionBackend("flash-attn-3", "3.0.0", True, True)
    _varlen._choice.cache_clear()
    installed.add("flash_attn.cute", installed.flash(), "4.0.0")
    assert choose_backend() == AttentionBackend("flash-attn-4", "4.0.0", True, True)
    installed.add("flash_attn.cute", installed.flash(), "4.0.1")
    assert choose_backend().version == "4.0.0", "chosen once"


@pytest.mark.parametrize(
    ("major", "name"),
    [(8, "flash-attn"), (9, "flash-attn-4"), (10, "flash-attn-4"), (12, "flash-attn")],
)
def test_a_flash_attn_made_for_another_gpu_is_passed_over(
    installed: Installed, major: int, name: str
) -> None:
    installed.add("flash_attn.cute", installed.flash())
    installed.add("flash_attn_interface", installed.flash())
    installed.add("flash_attn", installed.flash())
    installed.gpu(major)
    assert choose_backend().name == name


def test_without_flash_attn_torch_is_chosen(installed: Installed) -> None:
    assert choose_backend() == AttentionBackend("torch", torch.__version__, True, False)


def test_flash_attn_4_alone_leaves_an_empty_namespace(installed: Installed) -> None:
    installed.add("flash_attn.cute", installed.flash())
    installed.gpu(8)
    assert choose_backend().name == "torch"


def test_a_broken_build_is_not_passed_over(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> ModuleType:
        if name == "flash_attn":
            raise ImportError("undefined symbol: _ZN3c10")
        return load(name)

    load = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ImportError, match="undefined symbol"):
        choose_backend()


@pytest.mark.parametrize("name", FLASHES)
@pytest.mark.parametrize("returns_lse", [False, True])
def test_flash_attn_is_told_exactly(installed: Installed, returns_lse: bool, name: str) -> None:
    installed.add(name, installed.flash(returns_lse))
    q, k, v, cu_seqlens, longest, scale = arguments()
    y = varlen_attention(q, k, v, cu_seqlens, longest, scale)
    assert y.shape == q.shape
    varlen_attention(q, k, v, cu_seqlens, longest, scale, window=7, softcap=30.0)
    told = {"scale": 0.25, "causal": True, "num_splits": 1, "deterministic": True}
    plain = {"window_size": (-1, -1), "softcap": 0.0}
    # 7 keys with the query's own: 6 to its left
    bounded = {"window_size": (6, 0), "softcap": 30.0}
    assert [call[1] for call in installed.calls] == [told | plain, told | bounded]
    for args, _ in installed.calls:
        assert args[:3] == (q, k, v)
        assert args[3] is cu_seqlens
        assert args[4] is cu_seqlens
        assert args[5:] == (3, 3)


def test_an_old_flash_attn_is_not_told_what_it_does_not_know(installed: Installed) -> None:
    def old(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float,
        causal: bool,
    ) -> Tensor:
        return installed.called(q, k, v)

    installed.add("flash_attn", old, "2.2.0")
    assert choose_backend() == AttentionBackend("flash-attn", "2.2.0", False, False)
    varlen_attention(*arguments())
    with pytest.raises(NotImplementedError) as caught:
        varlen_attention(*arguments(), window=7)
    has_none = "but flash-attn 2.2.0 has none; pip install flash-attn"
    assert str(caught.value) == f"varlen_attention: window is 7, {has_none}"


@pytest.mark.parametrize("activated", [None, "FA3"])
def test_torch_is_told_exactly(
    installed: Installed, monkeypatch: pytest.MonkeyPatch, activated: str | None
) -> None:
    def varlen_attn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
        num_splits: int | None = None,
    ) -> Tensor:
        lengths = (cu_seq_q, cu_seq_k, max_q, max_k)
        options = {"enable_gqa": enable_gqa, "num_splits": num_splits, "window_size": window_size}
        return installed.called(query, key, value, *lengths, scale=scale, **options)

    installed.torch(varlen_attn)
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: activated)
    q, k, v, cu_seqlens, longest, scale = arguments()
    varlen_attention(q, k, v, cu_seqlens, longest, scale)
    varlen_attention(q, k, v, cu_seqlens, longest, scale, window=7)
    told = {"scale": 0.25, "enable_gqa": True, "num_splits": 1 if activated else None}
    causal, local = {"window_size": (-1, 0)}, {"window_size": (6, 0)}
    assert [call[1] for call in installed.calls] == [told | causal, told | local]
    assert installed.calls[0][0][5:] == (3, 3)
    assert installed.calls[0][0][3] is installed.calls[0][0][4] is cu_seqlens


def as_in_torch_2_11(installed: Installed) -> Any:
    def varlen_attn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        return_aux: Any = None,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        return installed.called(query, key, value, scale=scale, window_size=window_size)

    return varlen_attn


def test_torch_2_11_knows_neither_option(installed: Installed) -> None:
    installed.torch(as_in_torch_2_11(installed))
    varlen_attention(*arguments(), window=2)
    assert installed.calls[0][1] == {"scale": 0.25, "window_size": (1, 0)}


class _SeesTheSwitch(torch.autograd.Function):
    """Doubles; its gradient says whether torch was deterministic during the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * (1 + torch.are_deterministic_algorithms_enabled())


@pytest.mark.parametrize("before", [False, True])
def test_the_backward_of_torch_is_deterministic(
    installed: Installed, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def varlen_attn(q: Tensor, k: Tensor, v: Tensor, *lengths: Any, **options: Any) -> Tensor:
        doubled: Tensor = _SeesTheSwitch.apply(q)  # type: ignore[no-untyped-call]
        return doubled + k.sum() + 3 * v.sum()

    def on_a_gpu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, cu_seqlens, 3, 0.25, None, None)

    installed.torch(varlen_attn)
    attend = _varlen._choice()[1]
    q, k, v = (torch.randn(5, n, 16, requires_grad=True) for n in (4, 2, 2))
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    y = on_a_gpu(q, k, v)
    assert torch.equal(y, 2 * q + k.sum() + 3 * v.sum())
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(before, warn_only=True)
    try:
        dq, dk, dv = torch.autograd.grad(y, (q, k, v), torch.ones_like(y))
        assert torch.are_deterministic_algorithms_enabled() is before
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False, warn_only=warn_only)
    assert torch.equal(dq, torch.full_like(q, 2))
    assert torch.equal(dk, torch.full_like(k, y.numel()))
    assert torch.equal(dv, torch.full_like(v, 3 * y.numel()))
    with torch.no_grad():
        assert not on_a_gpu(q, k, v).requires_grad


def test_a_failing_backward_leaves_the_switch_as_it_was(installed: Installed) -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            raise RuntimeError("out of memory")

    def varlen_attn(q: Tensor, k: Tensor, v: Tensor, *lengths: Any, **options: Any) -> Tensor:
        doubled: Tensor = Fails.apply(q)  # type: ignore[no-untyped-call]
        return doubled + k.sum() + v.sum()

    installed.torch(varlen_attn)
    x = torch.randn(5, 4, 16, requires_grad=True)
    y = _varlen._choice()[1](x, x, x, torch.zeros(2), 5, 0.25, None, None)
    with pytest.raises(RuntimeError, match="out of memory"):
        y.sum().backward()  # type: ignore[no-untyped-call]
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"softcap": 50.0},
            NotImplementedError,
            f"softcap is 50.0, but torch {torch.__version__} has none; pip install flash-attn",
        ),
        ({"softcap": 0.0}, ValueError, "softcap is 0.0, expected a positive number; None = none"),
        ({"window": 0}, ValueError, "window is 0, expected a positive number; None = none"),
        (
            {"q": torch.empty(5, 3, 16, dtype=torch.bfloat16, device="meta")},
            ValueError,
            "q has 3 heads, expected a multiple of Hkv=2",
        ),
        (
            {"q": torch.empty(5, 4, 16, device="meta")},
            TypeError,
            "q is torch.float32, expected bfloat16 or float16",
        ),
        (
            {"v": torch.empty(6, 2, 16, dtype=torch.bfloat16, device="meta")},
            ValueError,
            "v is [6, 2, 16], expected [N, Hkv, D] with N=5 from q",
        ),
        (
            {"cu_seqlens": torch.empty(3, dtype=torch.int64, device="meta")},
            TypeError,
            "cu_seqlens is torch.int64, expected int32",
        ),
        (
            {"k": torch.empty(5, 16, 2, dtype=torch.bfloat16, device="meta").mT},
            ValueError,
            "k has stride 2 in D, expected 1; call .contiguous()",
        ),
    ],
)
def test_refuses(
    installed: Installed, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    installed.torch(as_in_torch_2_11(installed))
    names = ("q", "k", "v", "cu_seqlens", "max_seqlen", "scale")
    args: dict[str, Any] = dict(zip(names, arguments(), strict=True))
    varlen_attention(**args)
    with pytest.raises(error) as caught:
        varlen_attention(**args | change)
    assert str(caught.value) == f"varlen_attention: {message}"


def test_refuses_the_cpu(installed: Installed) -> None:
    with pytest.raises(ValueError, match=r"q is on cpu, expected a GPU; there is no CPU path$"):
        varlen_attention(*arguments("cpu"))


def test_no_tokens(installed: Installed) -> None:
    installed.torch(as_in_torch_2_11(installed))
    q, k, v, cu_seqlens, longest, scale = arguments()
    assert varlen_attention(q[:0], k[:0], v[:0], cu_seqlens, longest, scale).shape == (0, 4, 16)
    assert installed.calls == []


def test_nothing_is_imported_before_the_first_call() -> None:
    names = ("torch.nn.attention.varlen", *FLASHES)
    code = f"import sys, fastsafe_kernels._varlen; print([n for n in {names} if n in sys.modules])"
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=True)
    assert run.stdout.decode().strip() == "[]"
