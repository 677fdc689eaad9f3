"""Losses through the head: chunks change nothing, and a head that is trained gets its gradient."""

import pytest
import torch

from fastsafe import LLM
from fastsafe.train import loss


@pytest.fixture
def states(llm: LLM) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, llm.model.config.hidden_size, generator=generator) * 0.05
    return hidden, torch.arange(11) * 7 % 96


def test_chunks_change_no_bit(
    llm: LLM, states: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, targets = states
    weights = torch.linspace(0, 2, 11)
    found = []
    for rows in (11, 3):
        monkeypatch.setattr(loss, "CHUNK_ELEMENTS", rows * 96)
        leaf = hidden.clone().requires_grad_()
        losses = torch.cat(
            (
                loss.token_loss(leaf, targets, llm.model, weights),
                loss.divergence(leaf, hidden + 0.01, llm.model, llm.model),
            )
        )
        (losses * torch.arange(1, 23)).sum().backward()
        found.append((losses.detach(), leaf.grad, loss.target_logprobs(leaf, targets, llm.model)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert found[0][0].shape == (22,)
    assert (found[0][0][11:] >= 0).all(), "a divergence is not negative"
    assert found[0][0][0] == 0, "its weight is 0"


def test_no_rows_have_no_loss_but_a_graph(llm: LLM) -> None:
    leaf = torch.zeros(0, llm.model.config.hidden_size, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    losses = loss.token_loss(leaf, none, llm.model)
    losses.sum().backward()
    assert losses.shape == loss.target_logprobs(leaf, none, llm.model).shape == (0,)
    assert leaf.grad is not None


def test_a_trained_head_gets_its_gradient(
    llm: LLM, states: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, targets = states
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 4 * 96)
    frozen = hidden.clone().requires_grad_()
    loss.token_loss(frozen, targets, llm.model).sum().backward()
    llm.model.head = llm.model.head.clone().requires_grad_()
    leaf = hidden.clone().requires_grad_()
    loss.token_loss(leaf, targets, llm.model).sum().backward()
    torch.testing.assert_close(leaf.grad, frozen.grad)
    logits = (hidden @ llm.model.head.detach().T).softmax(-1)
    logits[torch.arange(11), targets] -= 1
    torch.testing.assert_close(llm.model.head.grad, logits.T @ hidden, rtol=1e-4, atol=1e-6)
