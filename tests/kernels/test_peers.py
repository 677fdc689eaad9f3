"""Peers are called as their libraries are meant to be, and only where these are installed."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsafe_kernels._spec import registry
from fastsafe_testing.scripts import benchmark


@pytest.fixture(scope="module")
def peers() -> Any:
    return benchmark("peers")


def test_peers_are_of_ops_that_exist(peers: Any) -> None:
    assert set(peers.PEERS) <= set(registry())
    assert all(peer.library in peers.MODULES for op in peers.PEERS.values() for peer in op)


def test_a_peer_that_is_not_installed_is_no_peer(
    peers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(peers.MODULES, "torch", "no_such_module")
    assert peers.installed("matmul_invariant") == {}
    assert peers.installed("an_op_without_peers") == {}


def torch_peers() -> list[Any]:
    return [
        pytest.param(op, peer, dims, id=f"{op}-{i}-{tuple(dims.items())}")
        for op, found in benchmark("peers").PEERS.items()
        for i, peer in enumerate(found)
        for dims in (registry()[op].tests if op in registry() else ())
        if peer.library == "torch" and peer.fits(dims)
    ]


@pytest.mark.parametrize(("op", "peer", "dims"), torch_peers())
def test_peers_of_torch_do_the_same_task(op: str, peer: Any, dims: Mapping[str, int]) -> None:
    """In fp32: one value in bf16 may lie further from another than a peer may differ."""
    torch.manual_seed(0)
    kernel = registry()[op]
    args = kernel.make(dims, torch.float32, torch.device("cpu"))
    assert peer.disagreement(kernel, args) == ""


def test_a_draw_is_checked_for_what_can_be_known(peers: Any) -> None:
    logits = torch.tensor([[0.0, 2.0, -torch.inf], [1.0, 0.0, -torch.inf]])
    args = (logits, torch.tensor([0.0, 1.0]))
    ok = torch.tensor([True, True])

    def draw(*ids: int) -> tuple[Tensor, Tensor, Tensor]:
        chosen = torch.tensor(ids)
        return chosen, logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0], ok

    assert peers.drawn(args, draw(1, 0)) == peers.drawn(args, draw(1, 1)) == ""
    assert peers.drawn(args, draw(0, 1)) == "token_ids is not the largest logit at temperature 0"
    assert peers.drawn(args, draw(1, 2)) == "token_ids holds a banned token"
    ids, logprobs, _ = draw(1, 1)
    assert peers.drawn(args, (ids, 2 * logprobs, ok)).startswith("logprobs is off by ")
