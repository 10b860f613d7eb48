"""The teacher's columns: what the target would say, and the logsumexp of its logits, over the whole vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

CACHED = 3 << 20  # bytes of fp32 logits that stay in a CPU core's cache between the passes over them


def columns(logits_nV: Tensor, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """(argmax [n] int32, logsumexp [n] float32), exact in fp32 whatever the logits' dtype. The logits become
    softcap * tanh(logits / softcap) first.

    On a CPU a few rows at a time: twice as fast, for a row is read four times (benchmarks/LOG.md)."""
    rows = len(logits_nV) if logits_nV.is_cuda else CACHED // (4 * logits_nV.shape[1])
    best, lse = [], []
    for piece_rV in logits_nV.split(max(1, rows)):
        wide_rV = capped(piece_rV.float(), softcap)
        most_r, best_r = wide_rV.max(-1)
        best.append(best_r.to(torch.int32))
        lse.append((wide_rV - most_r[:, None]).exp_().sum(-1).log_().add_(most_r))
    return torch.cat(best), torch.cat(lse)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return softcap * torch.tanh(logits / softcap) if softcap else logits
