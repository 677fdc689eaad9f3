"""grouped_lora: a step of one adapter is the same alone and among others."""

import pytest
import torch
from torch import Tensor

from fastsafe_kernels._segments import Segments
from fastsafe_kernels._spec import runs_reference
from fastsafe_kernels.grouped_lora import grouped_lora

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
IDS = [0] * 37 + [3] * 2 + [-1] * 3 + [1] * 16
PARTS = ((0, 20), (20, 50))
I, O, RANK = 40, 50, 9


def step(
    device: str, chosen: list[int], ranks: list[int] | None = None, told: bool = False
) -> dict[str, Tensor]:
    """Result and gradients on the rows of some adapters, with fp32 weights and bf16 rows.

    What lies behind ``ranks`` is zero; the tables are told of them or not.
    """
    torch.manual_seed(1)
    keep = [m for m, slot in enumerate(IDS) if slot in chosen]
    ids = [IDS[m] for m in keep]
    base = torch.randn(len(IDS), O, device=device).bfloat16()[keep]
    dy = torch.randn(len(IDS), O, device=device).bfloat16()[keep]
    x = torch.randn(len(IDS), I, device=device).bfloat16()[keep].requires_grad_()
    own = torch.arange(RANK) < torch.tensor(ranks or [RANK] * 4)[:, None]  # [slots, r]
    own = own.float().to(device)
    lora_A = torch.randn(4, len(PARTS) * RANK, I, device=device)
    lora_A = (lora_A * own.repeat(1, len(PARTS))[..., None]).requires_grad_()
    lora_B = (torch.randn(4, O, RANK, device=device) * own[:, None]).requires_grad_()
    tiles, sums = (
        Segments.build(ids, 4, block_m, ranks=ranks if told else None, device=device)
        for block_m in (16, 32)
    )
    y = grouped_lora(base, x, lora_A, lora_B, tiles, sums, PARTS)
    dx, dA, dB = torch.autograd.grad(y, (x, lora_A, lora_B), dy)
    return {"y": y, "dx": dx, "dA": dA, "dB": dB}


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_of_one_adapter_has_the_same_bits_among_others(device: str) -> None:
    together = step(device, [0, 1, 3, -1])
    assert together["dA"].dtype == together["dB"].dtype == torch.float32
    for slot in (0, 1, 3):
        rows = [m for m, s in enumerate(IDS) if s == slot]
        for name, alone in step(device, [slot]).items():
            among = together[name][rows if name in ("y", "dx") else slot]
            own = alone if name in ("y", "dx") else alone[slot]
            if runs_reference(own):  # torch's matmul on a CPU promises nothing about bits
                torch.testing.assert_close(own, among, rtol=0.02, atol=0.1)
            else:
                assert torch.equal(own, among), name
            assert (own != 0).any(), name
    assert (together["dA"][2] == 0).all()
    assert (together["dB"][2] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_ragged_ranks_are_those_of_the_adapters_alone(device: str) -> None:
    ranks = [4, 1, 4, 9]
    expected, told = (step(device, [0, 1, 3], ranks, told) for told in (False, True))
    for name, value in told.items():
        assert torch.equal(value, expected[name]), name
    assert (told["dA"][1].view(2, RANK, I)[:, 1:] == 0).all()
    assert (told["dA"][1].view(2, RANK, I)[:, :1] != 0).all()
    assert (told["dB"][1, :, 1:] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_base_rows_pass_the_gradient_on(device: str) -> None:
    torch.manual_seed(2)
    base = torch.randn(3, O, device=device, requires_grad=True)
    x = torch.randn(3, I, device=device, requires_grad=True)
    lora_A = torch.randn(1, len(PARTS) * RANK, I, device=device)
    lora_B = torch.randn(1, O, RANK, device=device)
    table = Segments.build([-1] * 3, 1, device=device)
    y = grouped_lora(base * 1, x, lora_A, lora_B, table, table, PARTS)
    dbase, dx = torch.autograd.grad(y.square().sum(), (base, x))
    assert torch.equal(y, base)
    assert torch.equal(dbase, 2 * base)
    assert torch.equal(dx, torch.zeros_like(x))


def test_tables_of_other_rows_are_refused() -> None:
    x, y = torch.zeros(3, I), torch.zeros(3, O)
    lora_A, lora_B = torch.zeros(1, 8, I), torch.zeros(1, O, RANK)
    tiles, sums = Segments.build([0] * 3, 1), Segments.build([0] * 4, 1)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared whole
        grouped_lora(y, x, lora_A, lora_B, tiles, sums, PARTS)
    assert str(caught.value) == "grouped_lora: x has 3 rows, expected 4 as in segments"
