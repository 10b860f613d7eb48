"""The attention through torch's own kernels, on a GPU, against one dense softmax in fp64: output and every gradient.
Imports torch and specforge.draft only.

Bounds: with inputs and results in that dtype and sums in fp32, a CPU gives 1.3e-2, 9.5e-4 and 7.8e-7. The kernel for
fp32 multiplies in three parts on tensor cores. A backward with an unmerged log-sum-exp is off by 4.7 in each dtype."""

from __future__ import annotations

import pytest
import torch

from specforge.draft.attention import Efficient, Flash, attend_packed, kernel_for
from tests.packed_attention import LENGTHS, TOTAL, inputs, worst

pytestmark = pytest.mark.gpu
BOUNDS = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 2e-5}
GPU = torch.device("cuda")
LONG = (700, 1, 1500, 33)
LONG_ROWS = (*range(3, 400), *range(650, 700), *range(701, 2000, 3), 2200, 2201, 2233)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(6, 2, 64), (4, 4, 128), (8, 1, 256)])
@pytest.mark.parametrize("own", [0, 1, 7])
def test_output_and_gradients_are_those_of_the_dense_softmax(dtype, heads, kv_heads, size, own):
    tensors = inputs(own, heads, kv_heads, size)
    kernel = kernel_for(tensors[1].to(GPU, dtype)).over(LENGTHS, TOTAL, GPU)
    assert type(kernel) is (Efficient if dtype is torch.float32 else Flash)
    assert worst(tensors, kernel, dtype=dtype) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("own", [0, 6])
def test_long_records(dtype, own):
    """Of several blocks of the kernels, and one of a single token."""
    tensors = inputs(own, 8, 2, 128, len(LONG_ROWS), 2240)
    kernel = kernel_for(tensors[1].to(GPU, dtype)).over(LONG, 2240, GPU)
    assert worst(tensors, kernel, LONG, LONG_ROWS, dtype) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS)
def test_head_sizes_that_flash_does_not_take(dtype):
    tensors = inputs(3, 4, 2, 20)
    kernel = kernel_for(tensors[1].to(GPU, dtype)).over(LENGTHS, TOTAL, GPU)
    assert type(kernel) is Efficient
    assert worst(tensors, kernel, dtype=dtype) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS)
def test_a_backward_with_an_unmerged_lse_is_seen(dtype):
    tensors = inputs(3, size=64)
    kind = kernel_for(tensors[1].to(GPU, dtype))

    class WithItsOwnLse(kind):
        def backward(self, grad_TNE, qkv, out_TNE, lse_NT, *of):
            return kind.backward(self, grad_TNE, qkv, out_TNE, self.forward(*qkv)[1].contiguous(), *of)

    assert worst(tensors, WithItsOwnLse.over(LENGTHS, TOTAL, GPU), dtype=dtype) > 1


def test_a_long_record_takes_memory_in_proportion():
    """16,384 tokens, 32 heads. Scores would be 17 GB in bf16; q, out and what the backward needs are some 2 GB."""
    tokens = 16_384
    q, k, *own = (
        torch.randn(tokens, heads, 128, device=GPU, dtype=torch.bfloat16, requires_grad=True)
        for heads in (32, 8, *[8] * 6)
    )
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kernel = Flash.over((tokens,), tokens, GPU)
    out = attend_packed(q, k, k, own[:3], own[3:], torch.arange(tokens, device=GPU), kernel)
    out.backward(torch.ones_like(out))
    assert torch.cuda.max_memory_allocated() - before < 6e9
