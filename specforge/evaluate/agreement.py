"""How far a server's own draft class is from ours: the same draft, the same real features, the logits of step 0."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from specforge.draft.model import Eagle3Draft
from specforge.draft.unroll import unroll
from specforge.records import DraftJudge, FeatureBatch, FeatureRecord

# Of the norm of a position's logits. Both sides round each of about a dozen products and norms to the dtype, sums in
# another order: in bf16 (8 bits, 2^-9 a rounding) that adds up to less than 2^-6, in fp32 to a few 1e-6. A wrong key,
# rope or layer, or one token off, is above 0.1.
TOLERANCE = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9, torch.float32: 1e-4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Over all positions that count."""

    positions: int
    max_difference: float  # of any one logit
    apart: float  # norm of the difference over the norm of the logits, all positions together
    same_top1: int
    wrong_top1: int  # where the two first choices differ by more than the tolerance allows for a near-tie
    tolerance: float

    @property
    def equal(self) -> bool:
        return self.apart <= self.tolerance and self.wrong_top1 == 0


@torch.no_grad()
def agreement(
    judge: DraftJudge, draft: Eagle3Draft, embedding_VH: Tensor, records: Iterable[FeatureRecord], dtype: torch.dtype
) -> Agreement:
    """`draft` and the judge hold the same weights in `dtype`. Record by record: logits are large."""
    positions = same = wrong = 0
    largest = difference = norm = 0.0
    for record in records:
        batch = FeatureBatch.pack([record], embedding_VH.device, dtype)
        step = unroll(draft, embedding_VH, batch, 1)[0]
        ours_RD = draft.lm_head(draft.norm(step.hidden_RH)).float()
        theirs_RD = judge.logits(record)[step.rows_R]
        apart_RD = (ours_RD - theirs_RD).abs()
        first_R, second_R = ours_RD.argmax(-1), theirs_RD.argmax(-1)
        gap_R = (ours_RD.gather(1, first_R[:, None]) - ours_RD.gather(1, second_R[:, None])).squeeze(1)
        positions += len(first_R)
        same += int((first_R == second_R).sum())
        wrong += int((gap_R > 2 * TOLERANCE[dtype] * ours_RD.abs().amax(-1)).sum())
        if len(first_R):
            largest = max(largest, float(apart_RD.max()))
        difference += float(apart_RD.double().square().sum())
        norm += float(theirs_RD.double().square().sum())
    return Agreement(
        positions=positions,
        max_difference=largest,
        apart=(difference / norm) ** 0.5 if norm else 0.0,
        same_top1=same,
        wrong_top1=wrong,
        tolerance=TOLERANCE[dtype],
    )
