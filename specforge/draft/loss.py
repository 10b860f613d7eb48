"""Cross-entropy of the draft against the target's own distribution, renormalised over the draft vocabulary.

For a row with student logits s and teacher logits z over the draft vocabulary, with p = softmax(z):

    loss = logsumexp(s) - sum_d p_d s_d            d loss / d s = softmax(s) - p

One pass, a chunk of teacher rows at a time: teacher logits once, student logits of every step's rows that this chunk
teaches, loss, and the gradients of hidden states and head. `[rows, draft vocabulary]` exists for one chunk only, and on
a CPU what is done to each element is done to a few rows at a time, while they are in the core's cache: there the
products are quick and the dozen passes over memory would be most of the step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge.records import TargetHead

CHUNK = 64  # teacher rows; with seven steps seven times as many student rows
CACHED = 1 << 20  # bytes of fp32 logits that stay in a core's cache beside the teacher's
MULTIPLE = 64  # rows are filled up to it with zeros of no weight: few shapes (unroll.py says why)


class FusedCrossEntropy(torch.autograd.Function):
    """(student_MH, head_DH) -> (sum of weight * loss, loss_M, best_M).

    M rows of all steps. `teacher_M` is the teacher row of each, `weight_M` its share in the sum. loss_M is each row's
    loss (nats), best_M the draft id with the highest student logit; neither carries a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        student_MH: Tensor,
        head_DH: Tensor,
        last_SH: Tensor,
        teacher_head_DH: Tensor,
        target: TargetHead,
        teacher_M: Tensor,
        weight_M: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        order_M = torch.argsort(teacher_M, stable=True)
        sorted_M = teacher_M[order_M].contiguous()
        starts = list(range(0, len(last_SH), CHUNK))
        bounds = torch.searchsorted(sorted_M, torch.tensor([*starts, len(last_SH)], device=sorted_M.device)).tolist()
        with_grad = student_MH.requires_grad or head_DH.requires_grad
        loss_M = torch.zeros(len(teacher_M), device=student_MH.device)
        best_M = torch.zeros(len(teacher_M), dtype=torch.int64, device=student_MH.device)
        grad_student_MH = torch.zeros_like(student_MH) if with_grad else None
        grad_head_DH = torch.zeros_like(head_DH, dtype=torch.float32) if with_grad else None
        last_SH = F.pad(last_SH, (0, 0, 0, -len(last_SH) % CHUNK))
        for number, start in enumerate(starts):
            picked = order_M[bounds[number] : bounds[number + 1]]
            count, spare = len(picked), -len(picked) % MULTIPLE
            if count == 0:
                continue
            p_CD = target.logits(last_SH[start : start + CHUNK], teacher_head_DH).softmax(-1)
            student_mH = F.pad(student_MH[picked], (0, 0, 0, spare))
            logits_mD = F.linear(student_mH, head_DH)
            rows = CACHED // (4 * len(head_DH)) if logits_mD.device.type == "cpu" else len(logits_mD)
            for first in range(0, count, max(1, rows)):
                part = slice(first, min(first + max(1, rows), count))
                mine = picked[part]
                loss_M[mine], best_M[mine] = _row_losses(logits_mD[part], p_CD[teacher_M[mine] - start])
            if grad_student_MH is not None and grad_head_DH is not None:  # logits_mD holds their gradient now
                weight_m1 = F.pad(weight_M[picked], (0, spare))[:, None]
                logits_mD[count:] = 0
                grad_student_MH[picked] = ((logits_mD @ head_DH) * weight_m1).to(student_MH.dtype)[:count]
                grad_head_DH += logits_mD.T @ (student_mH * weight_m1).to(student_MH.dtype)
        if grad_student_MH is not None and grad_head_DH is not None:
            ctx.save_for_backward(grad_student_MH, grad_head_DH.to(head_DH.dtype))
        ctx.mark_non_differentiable(loss_M, best_M)
        return (loss_M * weight_M).sum(), loss_M, best_M

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad_student_MH, grad_head_DH = ctx.saved_tensors
        scale = grad_sum.to(grad_student_MH.dtype)
        return grad_student_MH * scale, grad_head_DH * scale, None, None, None, None, None


def _row_losses(logits_rD: Tensor, p_rD: Tensor) -> tuple[Tensor, Tensor]:
    """(loss_r, best_r) of a few rows; `logits_rD` becomes softmax(logits) - p, the gradient."""
    wide_rD = logits_rD.float()
    top_r, best_r = wide_rD.max(-1)
    share_rD = wide_rD.softmax(-1)
    lse_r = top_r - share_rD.gather(1, best_r[:, None]).squeeze(1).log()  # of the largest share: at least 1 / D
    loss_r = lse_r - (p_rD * wide_rD).sum(-1)
    logits_rD.copy_(share_rD.sub_(p_rD))
    return loss_r, best_r
