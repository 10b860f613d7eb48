"""Attention over a packed row, by a kernel and record by record with one dense softmax: for tests with and without a
GPU. Imports torch and specforge.draft.attention only."""

from __future__ import annotations

import torch
from torch import Tensor

from specforge.draft.attention import Flash, attend_packed, dense

LENGTHS = (5, 40, 3, 23, 1, 17)  # tokens; the third and fifth have no rows
ROWS = (0, 4, 5, 6, 30, 43, 44, 50, 68, 72, 88)  # positions in the packed row: first and last of records among them
TOTAL = 96  # tokens of the packed row; the last ones belong to no record
FILLED = 3  # query rows behind them that do not count


def inputs(
    own: int, heads: int = 6, kv_heads: int = 2, size: int = 16, rows: int = len(ROWS), total: int = TOTAL
) -> list[Tensor]:
    """q, keys, values, then the own keys and the own values of each step, fp64 on the CPU. Query rows that do not count
    hold NaN, and so do their own columns: they must leave no trace."""
    torch.manual_seed(own)
    shapes = [(rows + FILLED, heads, size), *[(total, kv_heads, size)] * 2]
    shapes += [(rows + FILLED, kv_heads, size)] * (2 * own)
    found = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    for x in (found[0], *found[3:]):
        x[rows:] = torch.nan
    return found


def by_kernel(tensors: list[Tensor], kernel: Flash, rows: tuple[int, ...] = ROWS) -> Tensor:
    q, k, v, *own = tensors
    half = len(own) // 2
    return attend_packed(q, k, v, own[:half], own[half:], torch.tensor(rows, device=q.device), kernel)


def by_dense(tensors: list[Tensor], lengths: tuple[int, ...] = LENGTHS, rows: tuple[int, ...] = ROWS) -> Tensor:
    q, k, v, *own = tensors
    group, half = q.shape[1] // k.shape[1], len(own) // 2
    pieces, first = [], 0
    for length in lengths:
        here = [at for at, row in enumerate(rows) if first <= row < first + length]
        tokens, first = slice(first, first + length), first + length
        if not here:
            continue

        def of_heads(x: Tensor, at: list[int] | slice) -> Tensor:
            return x[at].repeat_interleave(group, 1).transpose(0, 1)

        row_r1 = torch.tensor([rows[at] for at in here], device=q.device)[:, None]
        unseen_rn = torch.arange(tokens.start, tokens.stop, device=q.device) > row_r1
        stacked = [torch.stack([of_heads(x, here) for x in part], 2) for part in (own[:half], own[half:]) if part]
        keys_values = (of_heads(k, tokens), of_heads(v, tokens))
        found = dense(q[here].transpose(0, 1), *keys_values, unseen_rn, *(stacked or (None, None)))
        pieces.append(found.transpose(0, 1))
    return torch.cat([*pieces, torch.zeros_like(q[len(rows) :])])


def worst(
    tensors: list[Tensor],
    kernel: Flash,
    lengths: tuple[int, ...] = LENGTHS,
    rows: tuple[int, ...] = ROWS,
    dtype: torch.dtype = torch.float64,
) -> float:
    """Largest difference between the kernel in `dtype` and fp64, of output and of each gradient, relative to the
    largest value of each."""
    given = [x.to(kernel.starts.device, dtype).requires_grad_() for x in tensors]
    exact = [x.detach().double().requires_grad_() for x in given]
    weight = torch.randn(given[0].shape, dtype=torch.float64, device=given[0].device).to(dtype)
    found = []
    for mine, out in ((given, by_kernel(given, kernel, rows)), (exact, by_dense(exact, lengths, rows))):
        grads = torch.autograd.grad((out * weight.to(out.dtype)).sum(), mine)
        found.append([x.detach().double() for x in (out, *grads)])
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found, strict=True))
