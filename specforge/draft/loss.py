"""The loss of the draft against the target's own distribution, and its gradient, in one pass.

`kl`: cross-entropy against the teacher renormalised over the draft vocabulary. For a row with hidden state h, student
logits s = W h, q = softmax(s), teacher logits z, p = softmax(z):

    loss = logsumexp(s) - sum_d p_d s_d = logsumexp(s) - h . (p W)
    d loss / d h = q W - p W            d loss / d W = q h' - p h'

The teacher's part is one product for each teacher row, whatever the number of steps that it teaches: nothing is done
with p for a student row. What is left of a student row's width are its logits, one softmax and two products, all in
the draft's dtype. A bf16 logit is off by up to 2^-9 of itself, so where it is 16 its q by 3 %; what rounding q as well
adds, 0.2 %, is little beside it.

`lk`: minus the log of the share of drawn drafts that a target at temperature 1 accepts (Leviathan et al., 2023, theorem
3.5), with p = exp(z - lse) the teacher's probabilities over the whole vocabulary:

    a = sum_d min(p_d, q_d)        loss = -log a        d loss / d s_d = -q_d ([q_d < p_d] - sum_e [q_e < p_e] q_e) / a

A chunk of teacher rows at a time; `[rows, draft vocabulary]` exists for one chunk only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge.records import TargetHead, sent

CHUNK = 256  # teacher rows
MULTIPLE = 64  # rows are filled up to it with zeros of no weight: few shapes (unroll.py says why)


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """What the student is held against."""

    head: TargetHead
    head_DH: Tensor  # the target's, over the draft vocabulary
    last_SH: Tensor
    lse_S: Tensor  # over the target's whole vocabulary
    kind: str  # kl or lk


class FusedLoss(torch.autograd.Function):
    """(student_MH, head_DH) -> (sum of weight * loss, loss_M, best_M).

    M rows of all steps. `teacher_M` (on the host) is the teacher row of each, `weight_M` its share in the sum. loss_M
    is each row's loss (nats), best_M the draft id with the highest student logit; neither carries a gradient."""

    @staticmethod
    def forward(
        ctx: Any, student_MH: Tensor, head_DH: Tensor, teacher: Teacher, teacher_M: Tensor, weight_M: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(head_DH.dtype, torch.float32)
        total = len(teacher.last_SH)
        starts = list(range(0, total, CHUNK))
        teacher_M, order_M = torch.sort(teacher_M, stable=True)
        bounds = torch.searchsorted(teacher_M, torch.tensor([*starts, total])).tolist()
        teacher_M, order_M = sent(teacher_M, student_MH.device), sent(order_M, student_MH.device)
        with_grad = student_MH.requires_grad or head_DH.requires_grad
        loss_M = torch.zeros(len(teacher_M), device=student_MH.device, dtype=wide)
        best_M = torch.zeros(len(teacher_M), dtype=torch.int64, device=student_MH.device)
        grad_student_MH = torch.zeros_like(student_MH) if with_grad else None
        grad_head_DH = torch.zeros_like(head_DH, dtype=wide) if with_grad else None
        of_chunk = _kl if teacher.kind == "kl" else _lk
        for number, start in enumerate(starts):
            own = slice(bounds[number], bounds[number + 1])
            picked = order_M[own]
            count, spare = len(picked), -len(picked) % MULTIPLE
            if count == 0:
                continue
            last_CH = F.pad(teacher.last_SH[start : start + CHUNK], (0, 0, 0, max(0, start + CHUNK - total)))
            z_CD = teacher.head.logits(last_CH, teacher.head_DH)
            found = of_chunk(
                F.pad(student_MH[picked], (0, 0, 0, spare)),
                head_DH,
                z_CD,
                F.pad(teacher.lse_S[start : start + CHUNK], (0, max(0, start + CHUNK - total))),
                F.pad(teacher_M[own] - start, (0, spare)),
                F.pad(weight_M[picked], (0, spare)),
            )
            loss_M[picked], best_M[picked] = found.loss_m[:count], found.best_m[:count]
            if grad_student_MH is not None and grad_head_DH is not None:
                grad_student_MH[picked] = found.grad_student_mH[:count]
                grad_head_DH += found.left_xD.T @ found.right_xH
            del z_CD, found  # before the next chunk makes its own
        if grad_student_MH is not None and grad_head_DH is not None:
            ctx.save_for_backward(grad_student_MH, grad_head_DH.to(head_DH.dtype))
        ctx.mark_non_differentiable(loss_M, best_M)
        return (loss_M * weight_M).sum(), loss_M, best_M

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad_student_MH, grad_head_DH = ctx.saved_tensors
        scale = grad_sum.to(grad_student_MH.dtype)
        return grad_student_MH * scale, grad_head_DH * scale, None, None, None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Of m student rows and C teacher rows. The head's gradient is left' right."""

    loss_m: Tensor
    best_m: Tensor
    grad_student_mH: Tensor
    left_xD: Tensor
    right_xH: Tensor


def _kl(student_mH: Tensor, head_DH: Tensor, z_CD: Tensor, lse_C: Tensor, teacher_m: Tensor, weight_m: Tensor) -> Chunk:
    count, dtype, wide = len(student_mH), student_mH.dtype, z_CD.dtype
    both_xD = head_DH.new_empty(count + len(z_CD), len(head_DH))  # q of the rows, then p of their teachers
    q_mD, p_CD = both_xD.split([count, len(z_CD)])
    p_CD.copy_(z_CD.softmax(-1))
    logits_mD = F.linear(student_mH, head_DH)
    torch.softmax(logits_mD, -1, out=q_mD)
    q_best_m, best_m = q_mD.max(-1)
    lse_m = logits_mD.gather(1, best_m[:, None]).squeeze(1).to(wide) - q_best_m.to(wide).log()
    del logits_mD
    expected_mH, taught_CH = (both_xD @ head_DH).split([count, len(z_CD)])  # q W, p W
    taught_mH = taught_CH[teacher_m]
    weighted_mH = (student_mH * weight_m[:, None]).to(dtype)
    pulled_CH = torch.zeros(taught_CH.shape, dtype=wide, device=taught_CH.device)
    pulled_CH.index_add_(0, teacher_m, weighted_mH.to(wide))
    return Chunk(
        loss_m=lse_m - (student_mH.to(wide) * taught_mH.to(wide)).sum(-1),
        best_m=best_m,
        grad_student_mH=((expected_mH - taught_mH) * weight_m[:, None]).to(dtype),
        left_xD=both_xD,
        right_xH=torch.cat([weighted_mH, -pulled_CH.to(dtype)]),
    )


def _lk(student_mH: Tensor, head_DH: Tensor, z_CD: Tensor, lse_C: Tensor, teacher_m: Tensor, weight_m: Tensor) -> Chunk:
    p_mD = (z_CD - lse_C[:, None]).exp_()[teacher_m]
    q_mD = F.linear(student_mH, head_DH).to(z_CD.dtype).softmax(-1)
    overlap_m = torch.minimum(p_mD, q_mD).sum(-1).clamp_(min=torch.finfo(q_mD.dtype).tiny)
    best_m = q_mD.argmax(-1)
    rising_mD = q_mD * (q_mD < p_mD)  # where more of q is more overlap
    share_m = rising_mD.sum(-1, keepdim=True)
    grad_mD = rising_mD.addcmul_(q_mD, share_m, value=-1).mul_((-weight_m / overlap_m)[:, None]).to(student_mH.dtype)
    return Chunk(
        loss_m=-overlap_m.log(),
        best_m=best_m,
        grad_student_mH=grad_mD @ head_DH,
        left_xD=grad_mD,
        right_xH=student_mH,
    )
