"""The draft's attention on a device against one dense softmax in fp64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specforge.alignment import prediction_depth
from specforge.draft.attention import dense
from specforge.draft.unroll import unroll
from specforge.pipeline.gpu.made_up import SIZE, STEPS, Size
from specforge.pipeline.gpu.results import SHORT, Result, within
from specforge.records import FeatureBatch

# Largest difference, relative to the largest value. Inputs and results in that dtype and sums in fp32 give 1.3e-2 and
# 7.8e-7 on a CPU; a GPU's fp32 kernel multiplies in three parts. A row that sees one key more is off by 0.2 and more.
ATTENTION_BOUND = {torch.bfloat16: 3e-2, torch.float32: 2e-5}


class _Given:
    """In place of a draft: hands out given queries, keys and values of each step, and keeps what attention makes of
    them. The feature of a token is its place in the packed row."""

    def __init__(self, q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor]) -> None:
        self._q, self._k, self._v, self._step = q, k, v, -1
        self.attended: list[Tensor] = []

    def fuse(self, aux_T1: Tensor) -> Tensor:
        return aux_T1

    def attention_input(self, embedding_RH: Tensor, feature_R1: Tensor) -> Tensor:
        return feature_R1

    def keys_values(self, x_R1: Tensor, positions_R: Tensor) -> tuple[Tensor, Tensor]:
        self._step += 1
        return self._k[self._step][x_R1[:, 0].long()], self._v[self._step][x_R1[:, 0].long()]

    def queries(self, x_R1: Tensor, positions_R: Tensor) -> Tensor:
        return self._q[self._step][x_R1[:, 0].long()]

    def finish(self, feature_R1: Tensor, attended_RNE: Tensor) -> Tensor:
        self.attended.append(attended_RNE)
        return feature_R1

    def feed_back(self, hidden_R1: Tensor) -> Tensor:
        return hidden_R1


def attention(device: torch.device, dtype: torch.dtype, size: Size = SIZE) -> Result:
    """The attention of all unrolled steps, whichever way `unroll` takes on this device, against `dense` in fp64."""
    config, lengths = size.config, size.lengths
    total, depth_T = sum(lengths), _depth(size)
    shapes = [(total, config.num_attention_heads, config.head_dim)] * STEPS
    shapes += [(total, config.num_key_value_heads, config.head_dim)] * (2 * STEPS)
    random = torch.Generator().manual_seed(0)
    given = [torch.randn(shape, generator=random).to(device, dtype).requires_grad_() for shape in shapes]
    exact = [x.detach().cpu().double().requires_grad_() for x in given]
    weight_TNE = torch.randn(shapes[0], generator=random).to(dtype)
    outputs = []
    for tensors, run in ((given, _unrolled), (exact, _dense)):
        pieces = run(tensors, depth_T, lengths)
        weighted = [
            (out_rNE * weight_TNE[depth_T > i].to(out_rNE)).sum(dtype=torch.float64) for i, out_rNE in enumerate(pieces)
        ]
        torch.stack(weighted).sum().backward()
        outputs.append([torch.cat([out_rNE.detach() for out_rNE in pieces]), *(x.grad for x in tensors)])
    found = [_largest_apart(a, b) for a, b in zip(*outputs, strict=True)]
    bound = ATTENTION_BOUND[dtype]
    bounds = {"output": bound, "gradients": bound}
    return within(f"attention, {SHORT[dtype]}", {"output": found[0], "gradients": max(found[1:])}, bounds)


def _largest_apart(got: Tensor | None, want: Tensor | None) -> float:
    assert got is not None
    assert want is not None
    apart = (got.cpu().double() - want.double()).abs().max() / want.abs().max()
    return float(apart.nan_to_num(nan=float("inf")))


def _depth(size: Size) -> Tensor:
    mask = [np.arange(length) % size.turn >= round(size.turn * (1 - size.share)) for length in size.lengths]
    return torch.from_numpy(prediction_depth(np.concatenate(mask), size.lengths))


def _unrolled(tensors: Sequence[Tensor], depth_T: Tensor, lengths: tuple[int, ...]) -> list[Tensor]:
    device, total = tensors[0].device, len(depth_T)
    zeros_T = torch.zeros(total, dtype=torch.int64)
    batch = FeatureBatch(
        sample_ids=(),
        lengths=lengths,
        token_ids=zeros_T.to(device),
        positions=zeros_T.to(device),
        aux=torch.arange(total, device=device, dtype=torch.float32)[:, None],
        last=torch.zeros(0, device=device),
        teacher_lse=torch.zeros(0, device=device),
        depth=depth_T,
        teacher_index=zeros_T,
        teacher_top1=zeros_T,
    )
    given: Any = _Given(tensors[:STEPS], tensors[STEPS : 2 * STEPS], tensors[2 * STEPS :])
    done = unroll(given, torch.zeros(1, 1, device=device), batch, STEPS)
    return [out[: len(step.rows_R)] for out, step in zip(given.attended, done, strict=True)]


def _dense(tensors: Sequence[Tensor], depth_T: Tensor, lengths: tuple[int, ...]) -> list[Tensor]:
    q, k, v = tensors[:STEPS], tensors[STEPS : 2 * STEPS], tensors[2 * STEPS :]
    group = q[0].shape[1] // k[0].shape[1]
    record_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    token_T = torch.arange(len(depth_T))

    def of_heads(x: Tensor) -> Tensor:
        return x.movedim(-2, 0).repeat_interleave(group, dim=0)

    found = []
    for i in range(STEPS):
        rows_r = torch.nonzero(depth_T > i).squeeze(1)
        unseen_rT = (token_T > rows_r[:, None]) | (record_T != record_T[rows_r, None])
        own = [of_heads(torch.stack([x[rows_r] for x in of[1 : i + 1]], 1)) if i else None for of in (k, v)]
        out_NrE = dense(q[i][rows_r].transpose(0, 1), of_heads(k[0]), of_heads(v[0]), unseen_rT, own[0], own[1])
        found.append(out_NrE.transpose(0, 1))
    return found
