"""What the accuracy gate does not see of gated: bits, limits, views and refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsafe_kernels.gated import ACTIVATIONS, gated

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=ACTIVATIONS)
def activation(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def random(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def run(activation: str, x: Tensor, g: Tensor) -> list[Tensor]:
    """Result and gradient."""
    x = x.detach().requires_grad_()
    y = gated(x, activation)
    return [y.detach(), *torch.autograd.grad(y, x, g)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [40, 3000])
def test_a_row_has_the_same_bits_in_any_batch(
    activation: str, width: int, dtype: torch.dtype, device: str
) -> None:
    x = random(3, 2 * width, dtype=dtype, device=device)
    g = random(3, width, seed=1, dtype=dtype, device=device)
    together, flipped = run(activation, x, g), run(activation, x.flip(0), g.flip(0))
    alone = [run(activation, x[i : i + 1], g[i : i + 1]) for i in range(3)]
    for i, result in enumerate(together):
        assert torch.equal(flipped[i].flip(0), result)
        assert torch.equal(torch.cat([row[i] for row in alone]), result)


@pytest.mark.parametrize("device", DEVICES)
def test_the_gate_is_the_first_half(activation: str, device: str) -> None:
    gate, up = random(2, 3, 5, device=device)
    activated = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    torch.testing.assert_close(gated(torch.cat((gate, up), 1), activation), activated * up)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's numpy
@pytest.mark.parametrize("device", DEVICES)
def test_far_from_zero_the_gate_is_shut_or_open(activation: str, device: str) -> None:
    """exp overflows there; results and gradients must not be NaN."""
    x = torch.tensor([[-1e5, 0.0, 1e5, 2.0, 3.0, 5.0]], device=device)
    y, dx = run(activation, x, torch.ones(1, 3, device=device))
    assert y.tolist() == [[0.0, 0.0, 5e5]]
    assert dx.tolist() == [[0.0, 1.5, 5.0, 0.0, 0.0, 1e5]]


@pytest.mark.parametrize("device", DEVICES)
def test_views_need_no_copy(activation: str, device: str) -> None:
    """Columns of a wider matrix, and an upstream gradient of any layout."""
    x, g = random(3, 30, device=device)[:, 8:18], random(5, 3, seed=1, device=device).T
    torch.testing.assert_close(
        run(activation, x, g), run(activation, x.contiguous(), g.contiguous())
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 6), (2, 0)])
def test_no_values(activation: str, shape: tuple[int, int], device: str) -> None:
    x = torch.zeros(shape, device=device)
    y, dx = run(activation, x, torch.zeros(shape[0], shape[1] // 2, device=device))
    assert y.shape == (shape[0], shape[1] // 2)
    assert dx.shape == shape


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 5), ValueError, "gate_up is [2, 5], expected [N, 2F]"),
        (torch.zeros(4), ValueError, "gate_up is [4], expected [N, C]"),
        (
            torch.zeros(4, 2).T,
            ValueError,
            "gate_up has stride 2 in F, expected 1; call .contiguous()",
        ),
        (
            torch.zeros(2, 4).double(),
            TypeError,
            "gate_up is torch.float64, expected float32 or bfloat16 or float16",
        ),
    ],
)
def test_refuses(activation: str, x: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        gated(x, activation)
    assert str(caught.value) == f"gated: {message}"


def test_refuses_another_activation() -> None:
    with pytest.raises(ValueError, match="activation is 'relu', expected 'silu' or 'gelu_tanh'"):
        gated(torch.zeros(2, 4), "relu")
