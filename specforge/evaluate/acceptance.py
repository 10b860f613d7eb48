"""Teacher-forced acceptance: one unrolled pass over held-out features gives every number of steps at once.

length(k) = 1 + sum over j = 1..k of P(the first j drafts all equal the target's own choice), over rows where step j - 1
counts; a teacher outside the draft vocabulary is a miss. The walk starts at each turn's first position and advances by
accepted + 1: this, not the uniform mean over rows, is what decoding meets on text that the target wrote.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from specforge.draft.model import Eagle3Draft
from specforge.draft.unroll import unroll
from specforge.records import Acceptance, FeatureBatch

HEAD_ROWS = 2048


@torch.no_grad()
def teacher_forced(
    draft: Eagle3Draft, embedding_VH: Tensor, kept_D: Tensor, batches: Iterable[FeatureBatch | None], steps: int
) -> Acceptance:
    """Over all ranks' batches; every rank gets the same result."""
    sums = torch.zeros(2 * steps + 3, dtype=torch.int64, device=kept_D.device)
    for batch in batches:
        if batch is None:
            continue
        accepted_T = torch.zeros_like(batch.depth)  # drafts in a row that the target would accept
        for i, step in enumerate(unroll(draft, embedding_VH, batch, steps)):
            hit_R = guesses(draft, step.hidden_RH, kept_D) == batch.teacher_top1[step.teacher_R]
            accepted_T[step.rows_R] += (hit_R & (accepted_T[step.rows_R] == i)).long()
            sums[i] += len(step.rows_R)
            sums[steps + i] += (accepted_T > i).sum()
        tokens, passes = walk(batch.depth.cpu().numpy(), accepted_T.cpu().numpy(), batch.lengths)
        sums[-3] += tokens
        sums[-2] += passes
        first_S = batch.teacher_index[torch.nonzero(batch.depth > 0).squeeze(1) + 1]
        sums[-1] += torch.isin(batch.teacher_top1[first_S], kept_D).sum()
    if dist.is_initialized():
        dist.all_reduce(sums)
    counts = sums.tolist()
    return Acceptance(
        rows=counts[:steps],
        accepted=counts[steps : 2 * steps],
        walk_tokens=counts[-3],
        walk_passes=counts[-2],
        known=counts[-1],
    )


@torch.no_grad()
def surprise(draft: Eagle3Draft, embedding_VH: Tensor, kept_D: Tensor, batches: Iterable[FeatureBatch]) -> Tensor:
    """[R] nats: minus the log of the probability that draft step 0 gives to the target's own choice; rows whose choice
    is outside the draft vocabulary are left out. Finer than acceptance: a few hundred rows tell two inputs apart."""
    found = []
    for batch in batches:
        step = unroll(draft, embedding_VH, batch, 1)[0]
        teacher_R = batch.teacher_top1[step.teacher_R]
        known_R = torch.isin(teacher_R, kept_D)
        wanted_R = torch.searchsorted(kept_D, teacher_R[known_R])
        hidden_RH = step.hidden_RH[known_R]
        pieces = zip(hidden_RH.split(HEAD_ROWS), wanted_R.split(HEAD_ROWS), strict=True)
        found += [F.cross_entropy(draft.lm_head(draft.norm(h)).float(), w, reduction="none") for h, w in pieces]
    return torch.cat(found) if found else torch.empty(0)


def guesses(draft: Eagle3Draft, hidden_RH: Tensor, kept_D: Tensor) -> Tensor:
    """[R] the target's id of the draft's first choice."""
    best = [draft.lm_head(draft.norm(piece)).argmax(-1) for piece in hidden_RH.split(HEAD_ROWS)]
    return kept_D[torch.cat(best)] if best else kept_D[:0]


def walk(depth_T: NDArray[np.int64], accepted_T: NDArray[np.int64], lengths: Iterable[int]) -> tuple[int, int]:
    """(tokens, passes of the target) when every turn is walked through from its first position."""
    tokens = passes = start = 0
    for length in lengths:
        t = start
        while t < start + length:
            if depth_T[t] == 0:
                t += 1
                continue
            advance = int(accepted_T[t]) + 1
            tokens, passes, t = tokens + advance, passes + 1, t + advance
        start += length
    return tokens, passes
