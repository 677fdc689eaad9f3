"""The C++ operations are as exact as torch's on every instruction set, and bit-equal among them."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsafe import _native
from fastsafe.model import cpu_ops

SETS = ["avx512", "avx2", "baseline"]


@pytest.fixture(params=SETS)
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.instruction_set()
    if not _native.use_instruction_set(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    _native.use_instruction_set(before)


def close(got: Tensor, plain: Callable[..., Tensor], *args: Tensor) -> None:
    """Error against fp64 is at most twice that of torch in fp32, plus a rounding step."""
    exact = plain(*(a.double() for a in args))
    scale = exact.abs().max().item()
    plain_error = (plain(*args) - exact).abs().max().item()
    budget = 2 * (plain_error + torch.finfo(torch.float32).eps * scale)
    assert (got - exact).abs().max().item() <= budget


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("rows", "width", "depth"),
    [(1, 1, 1), (3, 31, 7), (12, 32, 128), (13, 33, 129), (65, 390, 300), (2, 5, 1000)],
)
def test_linear(instructions: str, rows: int, width: int, depth: int, threads: int) -> None:
    torch.manual_seed(0)
    x, w, b = torch.randn(rows, depth), torch.randn(width, depth), torch.randn(width)
    p, q = torch.randn(rows, 5), torch.randn(width, 5)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        close(cpu_ops.linear(x, w), F.linear, x, w)
        close(cpu_ops.linear(x, w, b), F.linear, x, w, b)
        strided = cpu_ops.linear(x.T.contiguous().T, w.T.contiguous().T, b, second_product=(p, q))
        close(strided, lambda x, w, b, p, q: F.linear(x, w, b) + p @ q.T, x, w, b, p, q)
        start = torch.randn(rows, width)
        close(
            cpu_ops.linear(x, w, accumulate_into=start.clone()),
            lambda y, x, w: y + x @ w.T,
            start,
            x,
            w,
        )
    finally:
        torch.set_num_threads(before)


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_ops, "_WORTH_THREADS", 0)
    x, w = torch.randn(33, 200), torch.randn(390, 200)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(cpu_ops.linear(x, w))
    torch.set_num_threads(before)
    with cpu_ops.shared_products(3):
        found.append(cpu_ops.linear(x, w))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_callers_at_once_get_their_own_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The threads that share products belong to one caller at a time; others compute alone."""
    monkeypatch.setattr(cpu_ops, "_WORTH_THREADS", 0)
    pairs = [(torch.randn(n, 130), torch.randn(200, 130)) for n in range(1, 9)]
    wanted = [cpu_ops.linear(x, w) for x, w in pairs]

    def products(index: int) -> bool:
        x, w = pairs[index % len(pairs)]
        with cpu_ops.shared_products(1 + index % 4):
            return all(
                torch.equal(cpu_ops.linear(x, w), wanted[index % len(pairs)]) for _ in range(200)
            )

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(products, range(48)))


def test_instruction_sets_agree_to_the_bit() -> None:
    """With fused multiply-adds in both, AVX2 and AVX-512 do the same arithmetic."""
    torch.manual_seed(0)
    x, w, gate_up = torch.randn(37, 130), torch.randn(50, 130), 4 * torch.randn(37, 2 * 45)
    q, k = torch.randn(37, 4, 20), torch.randn(37, 2, 20)
    shape = torch.tensor([0, 30, 37]), cpu_ops.AttentionFlags(0.3, None, 2.0)
    cos, sin, dy = torch.randn(37, 1, 18), torch.randn(37, 1, 18), torch.randn(37, 45)
    found: dict[str, list[Tensor]] = {}
    before = _native.instruction_set()
    for name in ("avx2", "avx512"):
        if _native.use_instruction_set(name):
            out, scales = cpu_ops.attention(q, k, k, *shape)
            y, h, scale = cpu_ops.norm(x, x[0], 1e-6, False, -2 * x.flip(0), 0.3)
            found[name] = [
                cpu_ops.linear(x, w),
                *(y, h, scale),
                cpu_ops.norm_backward(x, x, h, scale, x[0], True),
                *(cpu_ops.gated(gate_up, gelu) for gelu in (False, True)),
                *(cpu_ops.gated_backward(dy, gate_up, gelu) for gelu in (False, True)),
                *(cpu_ops.rope(q, cos, sin, inverse=inverse) for inverse in (False, True)),
                out,
                *cpu_ops.attention_backward(q, scales, q, k, k, *shape),
            ]
    _native.use_instruction_set(before)
    if len(found) < 2:
        pytest.skip("this CPU has not both")
    assert all(map(torch.equal, found["avx2"], found["avx512"]))


@pytest.mark.parametrize("rows", [1, 2, 5, 11, 12, 13, 40])
def test_a_row_has_the_same_bits_among_any_number(rows: int) -> None:
    x, w = torch.randn(40, 300), torch.randn(70, 300)
    assert torch.equal(cpu_ops.linear(x[:rows], w), cpu_ops.linear(x, w)[:rows])
    assert torch.equal(cpu_ops.linear(x[-rows:], w), cpu_ops.linear(x, w)[-rows:])


def test_nothing_leaks_between_rows() -> None:
    """A row of NaN stays alone, and memory used before does not show."""
    x, w = torch.randn(5, 40), torch.randn(33, 40)
    clean = cpu_ops.linear(x, w)
    x[2] = float("nan")
    dirty = cpu_ops.linear(x, w)
    assert dirty[2].isnan().all()
    keep = torch.tensor([0, 1, 3, 4])
    assert torch.equal(dirty[keep], clean[keep])


@pytest.mark.parametrize("one_plus", [False, True])
@pytest.mark.parametrize("columns", [1, 16, 45])
def test_norm(instructions: str, columns: int, one_plus: bool) -> None:
    torch.manual_seed(0)
    x, residual, w, dy, dh = (
        torch.randn(7, columns),
        torch.randn(7, columns),
        torch.randn(columns),
        torch.randn(7, columns),
        torch.randn(7, columns),
    )

    def plain(x: Tensor, residual: Tensor, w: Tensor) -> Tensor:
        h = residual + 0.5 * x
        return F.rms_norm(h, w.shape, 1 + w if one_plus else w, 1e-5)

    y, h, scale = cpu_ops.norm(x, w, 1e-5, one_plus, residual, 0.5)
    close(y, plain, x, residual, w)
    close(h, lambda x, r: r + 0.5 * x, x, residual)

    def slope(h: Tensor, w: Tensor, dy: Tensor, dh: Tensor) -> Tensor:
        h = h.detach().requires_grad_()
        y = F.rms_norm(h, w.shape, 1 + w if one_plus else w, 1e-5)
        return torch.autograd.grad(y, h, dy)[0] + dh

    close(cpu_ops.norm_backward(dy, dh, h, scale, w, one_plus), slope, h, w, dy, dh)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("columns", [1, 16, 45])
def test_gated(instructions: str, columns: int, gelu: bool) -> None:
    torch.manual_seed(0)
    gate_up, dy = 6 * torch.randn(5, 2 * columns), torch.randn(5, columns)

    def plain(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up

    def slope(gate_up: Tensor, dy: Tensor) -> Tensor:
        gate_up = gate_up.detach().requires_grad_()
        return torch.autograd.grad(plain(gate_up), gate_up, dy)[0]

    close(cpu_ops.gated(gate_up, gelu), plain, gate_up)
    close(cpu_ops.gated_backward(dy, gate_up, gelu), slope, gate_up, dy)


def attend(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], window: int | None, cap: float | None
) -> Tensor:
    """Attention written out, sequence by sequence."""
    outs = []
    group = q.shape[1] // k.shape[1]
    for qs, ks, vs in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        n = len(qs)
        ks, vs = (x.repeat_interleave(group, 1) for x in (ks, vs))
        scores = torch.einsum("ihd,jhd->hij", qs, ks) * 0.3
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        distance = torch.arange(n)[:, None] - torch.arange(n)
        hidden = (distance < 0) | (distance >= (window or n))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        outs.append(torch.einsum("hij,jhd->ihd", weights, vs))
    return torch.cat(outs)


@pytest.mark.parametrize(("window", "cap"), [(None, None), (9, None), (None, 2.0), (70, 2.0)])
@pytest.mark.parametrize("lengths", [[2, 1], [5, 1, 33], [64, 65], [200, 3]])
def test_attention(
    instructions: str, lengths: list[int], window: int | None, cap: float | None
) -> None:
    torch.manual_seed(0)
    total = sum(lengths)
    fused = 2 * torch.randn(total, 4 + 2 + 2, 20)
    q, k, v = fused.split([4, 2, 2], 1)  # strided, as the fused projection leaves them
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    flags = cpu_ops.AttentionFlags(0.3, window, cap)
    out, scales = cpu_ops.attention(q, k, v, starts, flags)
    close(out, lambda q, k, v: attend(q, k, v, lengths, window, cap), q, k, v)
    d_out = torch.randn(total, 4, 20)
    gradients = cpu_ops.attention_backward(d_out, scales, q, k, v, starts, flags)
    for i, got in enumerate(gradients):

        def slope(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, i: int = i) -> Tensor:
            leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
            y = attend(*leaves, lengths, window, cap)
            return torch.autograd.grad(y, leaves, d_out)[i]

        close(got, slope, q, k, v, d_out)


def test_tensors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"linear: tensors do not fit: \[2, 3\] torch.float32"):
        cpu_ops.linear(torch.zeros(2, 3), torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"norm: tensors do not fit"):
        cpu_ops.norm(torch.zeros(2, 3), torch.zeros(4), 1e-6, False)
    with pytest.raises(ValueError, match=r"linear: tensors do not fit.*float64"):
        cpu_ops.linear(torch.zeros(2, 3), torch.zeros(4, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: cpu_ops.linear(x, x, torch.ones(2)),
        lambda x: cpu_ops.linear(x, x, torch.ones(3).bfloat16()),
        lambda x: cpu_ops.linear(x, x, torch.ones(3), accumulate_into=torch.zeros(3, 3)),
        lambda x: cpu_ops.gated(x, False),
        lambda x: cpu_ops.norm(x, torch.ones(3, dtype=torch.int64), 1e-6, False),
        lambda x: cpu_ops.attention(
            *[torch.zeros(3, 1, 4)] * 3,
            torch.tensor([0, 2]),
            cpu_ops.AttentionFlags(1.0, None, None),
        ),
        lambda x: cpu_ops.attention(
            *[torch.zeros(3, 1, 4)] * 3,
            torch.tensor([0, 3]).int(),
            cpu_ops.AttentionFlags(1.0, None, None),
        ),
        lambda x: cpu_ops.rope(torch.zeros(3, 1, 8), *[torch.ones(3, 1, 5)] * 2),
    ],
)
def test_what_would_read_beyond_its_memory_is_refused(wrong: Callable[[Tensor], object]) -> None:
    with pytest.raises(ValueError, match="tensors do not fit"):
        wrong(torch.zeros(3, 3))


def test_a_bias_may_be_strided() -> None:
    x, w, bias = torch.randn(2, 3), torch.randn(4, 3), torch.randn(4, 2)[:, 0]
    close(cpu_ops.linear(x, w, bias), F.linear, x, w, bias)
    assert torch.equal(cpu_ops.linear(x[:, :0], w[:, :0], bias), bias.expand(2, 4))
