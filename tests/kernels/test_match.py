"""Launchers refuse what does not fit and say which tensor, what it is and what was expected."""

import pytest
import torch

from fastsafe_kernels import token_logprobs
from fastsafe_kernels._spec import FLOATS, match, registry

LONG = (torch.int64,)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


def test_sizes_are_bound_by_name() -> None:
    x, i = zeros(3, 5), zeros(3, dtype=torch.int64)
    assert match("pick", x=(x, "N V", FLOATS), i=(i, "N", LONG)) == {"N": 3, "V": 5}


@pytest.mark.parametrize(
    ("logits", "ids", "error", "message"),
    [
        (
            zeros(8, 5),
            zeros(7, dtype=torch.int64),
            ValueError,
            "token_logprobs: token_ids is [7], expected [N] with N=8 from logits",
        ),
        (
            zeros(8, 5),
            zeros(8, dtype=torch.int32),
            TypeError,
            "token_logprobs: token_ids is torch.int32, expected int64",
        ),
        (
            zeros(8, 5, dtype=torch.float64),
            zeros(8, dtype=torch.int64),
            TypeError,
            "token_logprobs: logits is torch.float64, expected float32 or bfloat16 or float16",
        ),
        (
            zeros(5, 8).T,
            zeros(8, dtype=torch.int64),
            ValueError,
            "token_logprobs: logits has stride 8 in V, expected 1; call .contiguous()",
        ),
        (
            zeros(8, 5, 1),
            zeros(8, dtype=torch.int64),
            ValueError,
            "token_logprobs: logits is [8, 5, 1], expected [N, V]",
        ),
        (
            zeros(8, 5),
            zeros(8, dtype=torch.int64).to("meta"),
            ValueError,
            "token_logprobs: token_ids is on meta, expected cpu like logits",
        ),
    ],
)
def test_token_logprobs_refuses(
    logits: torch.Tensor, ids: torch.Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        token_logprobs(logits, ids)
    assert str(caught.value) == message


def test_reductions_return_fp32() -> None:
    y = token_logprobs(zeros(2, 4, dtype=torch.bfloat16), torch.tensor([0, 3]))
    assert y.dtype == torch.float32
    assert y.tolist() == pytest.approx([-1.3863, -1.3863], abs=0.01)
    assert token_logprobs(zeros(0, 4), zeros(0, dtype=torch.int64)).shape == (0,)


def test_the_registry_is_computed_by_looking() -> None:
    assert "token_logprobs" in registry()
    assert registry()["token_logprobs"].fn is token_logprobs


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(5, 301), torch.randint(301, (5,))
    together = token_logprobs(logits, ids)
    alone = torch.cat([token_logprobs(logits[i : i + 1], ids[i : i + 1]) for i in range(5)])
    assert torch.equal(together, alone)
    assert torch.equal(token_logprobs(logits.flip(0), ids.flip(0)).flip(0), together)
