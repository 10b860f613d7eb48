"""Cross-entropy of the draft against the target's own distribution, renormalised over the draft vocabulary.

For a row with student logits s and teacher logits z over the draft vocabulary, with p = softmax(z):

    loss = logsumexp(s) - sum_d p_d s_d            d loss / d s = softmax(s) - p

One pass, a chunk of teacher rows at a time: teacher logits once, student logits of every step's rows that this chunk
teaches, loss, and the gradients of hidden states and head. `[rows, draft vocabulary]` exists for one chunk only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge.records import TargetHead

CHUNK = 256  # teacher rows
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
            p_mD = p_CD[F.pad(teacher_M[picked] - start, (0, spare))]
            student_mH = F.pad(student_MH[picked], (0, 0, 0, spare))
            logits_mD = F.linear(student_mH, head_DH).float()
            lse_m = logits_mD.logsumexp(-1)
            loss_M[picked] = (lse_m - (p_mD * logits_mD).sum(-1))[:count]
            best_M[picked] = logits_mD.argmax(-1)[:count]
            if grad_student_MH is not None and grad_head_DH is not None:
                weight_m = F.pad(weight_M[picked], (0, spare))
                grad_mD = logits_mD.sub_(lse_m[:, None]).exp_().sub_(p_mD).mul_(weight_m[:, None])
                grad_mD = grad_mD.to(student_MH.dtype)
                grad_student_MH[picked] = (grad_mD @ head_DH)[:count]
                grad_head_DH += grad_mD.T @ student_mH
        if grad_student_MH is not None and grad_head_DH is not None:
            ctx.save_for_backward(grad_student_MH, grad_head_DH.to(head_DH.dtype))
        ctx.mark_non_differentiable(loss_M, best_M)
        return (loss_M * weight_M).sum(), loss_M, best_M

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad_student_MH, grad_head_DH = ctx.saved_tensors
        scale = grad_sum.to(grad_student_MH.dtype)
        return grad_student_MH * scale, grad_head_DH * scale, None, None, None, None, None
