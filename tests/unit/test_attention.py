"""The merged attention against one dense softmax: output and every gradient."""

from __future__ import annotations

import pytest
import torch

from specforge.draft import attention
from specforge.draft.attention import MergedAttention, dense

NAMES = ("q", "keys", "values", "own keys", "own values")


def inputs(own, dtype, rows=23, tokens=40, heads=6, size=16):
    torch.manual_seed(own)
    position_r = torch.randperm(tokens)[:rows].sort().values
    unseen_rn = torch.arange(tokens) > position_r[:, None]
    shapes = [(heads, rows, size), (heads, tokens, size), (heads, tokens, size)]
    shapes += [(heads, rows, own, size)] * 2 if own else []
    tensors = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    return tensors, unseen_rn


def run(function, tensors, unseen_rn, weight):
    q, k, v, *own = tensors
    out = function(q, k, v, unseen_rn, *(own or (None, None)))
    return out, torch.autograd.grad((out * weight).sum(), tensors)


def worst(own, dtype):
    """Largest difference of output and gradients, relative to the largest value of each."""
    tensors, unseen_rn = inputs(own, dtype)
    weight = torch.randn_like(tensors[0])
    one, two = (run(function, tensors, unseen_rn, weight) for function in (MergedAttention.apply, dense))
    pairs = {"output": (one[0], two[0])} | dict(zip(NAMES, zip(one[1], two[1], strict=True), strict=False))
    return {name: float((a - b).abs().max() / b.abs().max()) for name, (a, b) in pairs.items()}


# 8 bits of bf16 are 4e-3, and sums of 40
# rounded products wander a few of them. A wrong log-sum-exp or a row sum of the unmerged output is off by over 0.05.
@pytest.mark.parametrize("own", [0, 1, 6])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_output_and_gradients_are_those_of_the_dense_softmax(own, dtype, bound):
    for name, difference in worst(own, dtype).items():
        assert difference < bound, name


def test_a_broken_merge_is_seen(monkeypatch):
    scores = attention._own_scores
    monkeypatch.setattr(attention, "_own_scores", lambda q, k, scale: scores(q, k, scale) * 1.1)
    assert max(worst(3, torch.float32).values()) > 0.02
