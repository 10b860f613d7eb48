"""The teacher's columns: what the target would say, and the logsumexp of its logits, over the whole vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from specforge.errors import EngineError
from specforge.records import TargetInfo

CACHED = 3 << 20  # bytes of fp32 logits that stay in a CPU core's cache between the passes over them


def columns(logits_nV: Tensor, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """(argmax [n] int32, of equals the first; logsumexp [n] float32), exact in fp32 whatever the logits' dtype. The
    logits become softcap * tanh(logits / softcap) first.

    On a CPU a few rows at a time and in one buffer: six times as fast, for a row is read four times, and new memory
    costs more than what is done in it (benchmarks/LOG.md). The largest of each group of logits is found first, for
    torch's amax is ten times as fast as its argmax; about as many groups as logits in a group make both short."""
    count, size = logits_nV.shape
    rows = max(1, count if logits_nV.is_cuda else min(count, CACHED // (4 * size)))
    group = 1 << size.bit_length() // 2
    groups = -(-size // group)
    wide_rW = logits_nV.new_empty((rows, groups * group), dtype=torch.float32)
    wide_rW[:, size:] = float("-inf")
    best, lse = [], []
    for piece_rV in logits_nV.split(rows):
        own_rW = wide_rW[: len(piece_rV)]
        own_rV = own_rW[:, :size].copy_(piece_rV)
        if softcap:
            own_rV.div_(softcap).tanh_().mul_(softcap)
        grouped_rgG = own_rW.view(-1, groups, group)
        most_rg = grouped_rgG.amax(-1)
        most_r1, group_r1 = most_rg.max(-1, keepdim=True)
        in_group_rG = grouped_rgG[torch.arange(len(own_rW), device=own_rW.device), group_r1[:, 0]]
        best.append((group_r1[:, 0] * group + in_group_rG.argmax(-1)).to(torch.int32))
        lse.append(own_rW.sub_(most_r1).exp_().sum(-1).log_() + most_r1[:, 0])
    return torch.cat(best), torch.cat(lse)


def check_logits(logits: Tensor, info: TargetInfo) -> None:
    """Raises EngineError where one is NaN: then no text and no teacher of this target means anything."""
    if torch.isnan(logits).any():
        raise EngineError(
            "the target's logits are not numbers, though its states are: its output head is damaged",
            where=info.path,
            fix="fetch or convert the target again",
        )


class Shard(NamedTuple):
    """The part of the vocabulary whose logits a rank has."""

    start: int
    size: int  # without what fills the vocabulary up


def shard_columns(logits_nW: Tensor, shard: Shard, softcap: float | None) -> Tensor:
    """[n, 3] float64, which holds each exactly: argmax (a token id), the logit there, logsumexp, over the shard alone.
    `logits_nW` may have more columns than the shard; -inf where the shard is empty."""
    if shard.size == 0:
        return logits_nW.new_full((len(logits_nW), 3), float("-inf"), dtype=torch.float64)
    own_nW = logits_nW[:, : shard.size]
    best_n, lse_n = columns(own_nW, softcap)
    most_n = capped(own_nW.gather(1, best_n.long()[:, None])[:, 0].float(), softcap)
    return torch.stack([best_n.double() + shard.start, most_n.double(), lse_n.double()], dim=1)


def merged(found_n3: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """`columns` of the whole vocabulary out of `shard_columns` of each rank of the group, in the order of their shards.
    Collective."""
    if group is None:
        return found_n3[:, 0].to(torch.int32), found_n3[:, 2].float()
    every = [torch.empty_like(found_n3) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, found_n3, group=group)
    best_rn, most_rn, lse_rn = torch.stack(every).unbind(-1)
    first_1n = most_rn.argmax(0, keepdim=True)  # of equals the first, as in `columns`
    return best_rn.gather(0, first_1n)[0].to(torch.int32), lse_rn.logsumexp(0).float()


def gathered(logits_nW: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[n, V or more] the logits of all ranks side by side. Collective."""
    if group is None:
        return logits_nW
    every = [torch.empty_like(logits_nW) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, logits_nW.contiguous(), group=group)
    return torch.cat(every, dim=1)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return softcap * torch.tanh(logits / softcap) if softcap else logits
