"""Muon for the draft's matrices, AdamW for the rest: one optimizer, whole or partitioned by ZeRO.

For a matrix with gradient G, momentum M and learning rate lr (Jordan et al., 2024; the factor 0.2 makes an update as
large as one of AdamW, Liu et al., 2025):

    M <- 0.95 M + 0.05 G          U = 0.95 M + 0.05 G (Nesterov)
    W <- (1 - lr * weight_decay) W - lr * 0.2 * sqrt(larger dimension) * orthogonal(U)

`orthogonal` is five Newton-Schulz steps, which bring all singular values near 1.

DeepSpeed has a Muon of its own. It orthogonalises before it measures and clips the gradient, so the norm that clipping
and spike detection read is that of the update; and it computes in 16 bits whatever the training dtype, so other numbers
of ranks give other weights. Here ZeRO hands over a clipped gradient, as it does to AdamW, and what is skipped never
reaches the momentum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration (Jordan et al., 2024)
NEWTON_SCHULZ_STEPS = 5
MOMENTUM = 0.95
HEAD = "lm_head.weight"


def is_muon(name: str, shape: torch.Size) -> bool:
    """Whether Muon trains this parameter: the matrices, but for the head, whose rows are tokens."""
    return len(shape) == 2 and not name.endswith(HEAD)


def orthogonal(update_nm: Tensor, dtype: torch.dtype) -> Tensor:
    """The update with its singular values brought near 1 (0.7 to 1.2), in `dtype`.

    Per step 4 n^2 m + 2 n^3 operations, n being the smaller dimension."""
    a, b, c = COEFFICIENTS
    x_nm = update_nm / update_nm.norm().clamp(min=1e-7)
    x_nm = x_nm.to(dtype)
    tall = x_nm.shape[0] > x_nm.shape[1]
    if tall:
        x_nm = x_nm.T
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram_nn = x_nm @ x_nm.T
        polynomial_nn = torch.addmm(gram_nn, gram_nn, gram_nn, beta=b, alpha=c)
        x_nm = torch.addmm(x_nm, polynomial_nn, x_nm, beta=a)
    return x_nm.T if tall else x_nm


def orthogonal_flops(shapes: Iterable[Sequence[int]]) -> int:
    """Operations of one Muon step over matrices of these shapes."""
    sides = [sorted(shape) for shape in shapes]
    return NEWTON_SCHULZ_STEPS * sum(4 * n * n * m + 2 * n**3 for n, m in sides)


def update_bytes(parameters: int, matrices: Sequence[torch.Size], world: int) -> float:
    """What an optimizer step takes on a rank beyond its state, in bf16 under ZeRO 1 and 2: gradients in fp32; the
    matrices' updates, this rank's and those of all; the orthogonal ones in bf16; then this rank's of these in fp32, or
    before that what Newton-Schulz needs for the largest."""
    sizes = [shape.numel() for shape in matrices]
    whole = 4 * sum(sizes)
    gathered = whole if world > 1 else 0
    return (4 * parameters + whole) / world + gathered + whole / 2 + max(6 * max(sizes), whole / world)


def scale(shape: torch.Size) -> float:
    """What an orthogonal matrix is multiplied by, so that its elements are as large as AdamW's updates."""
    return 0.2 * math.sqrt(max(shape))


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """How ZeRO lays matrices out over the ranks. A run holds matrices one after the other, padded at its end, and is
    cut into equal parts, one for each rank. A rank's tensor holds its part of each run.

    ZeRO 1 and 2 have one run of all matrices, ZeRO 3 has a run for each matrix."""

    runs: tuple[tuple[torch.Size, ...], ...]
    parts: tuple[int, ...]  # elements of each run on one rank
    rank: int
    world: int

    def owners(self) -> list[int]:
        """The rank that orthogonalises each matrix: the dearest first, each to the rank with the least to do."""
        shapes = [shape for run in self.runs for shape in run]
        load, owner = [0] * self.world, [0] * len(shapes)
        for at in sorted(range(len(shapes)), key=lambda at: -orthogonal_flops([shapes[at]])):
            owner[at] = min(range(self.world), key=load.__getitem__)
            load[owner[at]] += orthogonal_flops([shapes[at]])
        return owner

    def by_run(self, gathered_WP: Tensor) -> list[Tensor]:
        """Each run whole, from what all ranks hold."""
        return [piece_Wp.reshape(-1) for piece_Wp in gathered_WP.split(self.parts, dim=1)]

    def matrices(self, runs: Sequence[Tensor]) -> list[Tensor]:
        """Views of the matrices in whole runs."""
        found = []
        for flat, shapes in zip(runs, self.runs, strict=True):
            start = 0
            for shape in shapes:
                found.append(flat[start : start + shape.numel()].view(shape))
                start += shape.numel()
        return found

    def own(self, matrices: Sequence[Tensor], scales: Sequence[float], dtype: torch.dtype) -> Tensor:
        """This rank's tensor, from whole matrices, each multiplied by its scale."""
        found = torch.zeros(sum(self.parts), dtype=dtype, device=matrices[0].device)
        waiting, offset = iter(zip(matrices, scales, strict=True)), 0
        for shapes, part in zip(self.runs, self.parts, strict=True):
            start, first = 0, self.rank * part  # of the matrix in its run, of this rank's part in the run
            for shape in shapes:
                matrix, factor = next(waiting)
                low, high = max(start, first), min(start + shape.numel(), first + part)
                if low < high:
                    place = found[offset + low - first : offset + high - first]
                    place.copy_(matrix.flatten()[low - start : high - start]).mul_(factor)
                start += shape.numel()
            offset += part
        return found


class Muon(torch.optim.AdamW):
    """Muon over the parameter groups with `muon: True`, AdamW over the others. State: `momentum_buffer`, or AdamW's.

    A parameter of a Muon group is a matrix, or a rank's part of several (`partitions`). In the second case a step
    gathers the updates of all ranks, each matrix is orthogonalised on one rank, and the results are exchanged."""

    def __init__(self, groups: list[dict[str, Any]], dtype: torch.dtype, device: torch.device, **adam: Any) -> None:
        """`dtype` and `device` are those of Newton-Schulz; `adam` are AdamW's arguments."""
        super().__init__([{"muon": False} | group for group in groups], **adam)
        self.dtype, self.device = dtype, device
        self.partitions: dict[Tensor, Partition] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # nobody passes a closure
        every = self.param_groups
        for group in every:
            for parameter in group["params"] if group["muon"] else ():
                self._muon(parameter, group)
        self.param_groups = [group for group in every if not group["muon"]]
        try:
            super().step(closure)
        finally:
            self.param_groups = every

    def _muon(self, parameter: Tensor, group: dict[str, Any]) -> None:
        if parameter.grad is None:
            return
        state = self.state[parameter]
        momentum = state.setdefault("momentum_buffer", torch.zeros_like(parameter))
        momentum.lerp_(parameter.grad, 1 - MOMENTUM)
        update = parameter.grad.lerp(momentum, MOMENTUM).to(self.device)
        partition = self.partitions.get(parameter)
        if partition is None:
            step = orthogonal(update, self.dtype).to(update.dtype) * scale(update.shape)
        else:
            step = self._shared(update, partition)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(step.to(parameter.device), alpha=-group["lr"])

    def _shared(self, update_P: Tensor, partition: Partition) -> Tensor:
        """This rank's part of the scaled orthogonal matrices. Collective."""
        alone = partition.world == 1
        gathered_WP = update_P[None] if alone else update_P.new_empty(partition.world, len(update_P))
        if not alone:
            dist.all_gather_into_tensor(gathered_WP.view(-1), update_P)
        updates = partition.matrices(partition.by_run(gathered_WP))
        sizes = [part * partition.world for part in partition.parts]
        flat = torch.zeros(sum(sizes), dtype=self.dtype, device=self.device)
        steps = partition.matrices(flat.split(sizes))
        for update, step, owner in zip(updates, steps, partition.owners(), strict=True):
            if owner == partition.rank:
                step.copy_(orthogonal(update, self.dtype))
        if not alone:
            dist.all_reduce(flat)  # zeros on all ranks but the owner: exact
        return partition.own(steps, [scale(step.shape) for step in steps], update_P.dtype)
