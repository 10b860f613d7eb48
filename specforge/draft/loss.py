"""Cross-entropy of the draft against the target's own distribution, renormalised over the draft vocabulary.

For a row with hidden state h, student logits s = W h, q = softmax(s), and teacher logits z, p = softmax(z):

    loss = logsumexp(s) - sum_d p_d s_d = logsumexp(s) - h . (p W)
    d loss / d h = q W - p W            d loss / d W = q h' - p h'

The teacher's part is one product for each teacher row, whatever the number of steps that it teaches: nothing is done
with p for a student row. What is left of a student row's width are its logits, one softmax and two products, all in
the draft's dtype. A bf16 logit is off by up to 2^-9 of itself, so where it is 16 its q by 3 %; what rounding q as well
adds, 0.2 %, is little beside it.

One pass, a chunk of teacher rows at a time; `[rows, draft vocabulary]` exists for one chunk only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge.records import TargetHead

CHUNK = 128  # teacher rows
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
        wide = torch.promote_types(head_DH.dtype, torch.float32)
        order_M = torch.argsort(teacher_M, stable=True)
        sorted_M = teacher_M[order_M].contiguous()
        starts = list(range(0, len(last_SH), CHUNK))
        bounds = torch.searchsorted(sorted_M, torch.tensor([*starts, len(last_SH)], device=sorted_M.device)).tolist()
        with_grad = student_MH.requires_grad or head_DH.requires_grad
        loss_M = torch.zeros(len(teacher_M), device=student_MH.device, dtype=wide)
        best_M = torch.zeros(len(teacher_M), dtype=torch.int64, device=student_MH.device)
        grad_student_MH = torch.zeros_like(student_MH) if with_grad else None
        grad_head_DH = torch.zeros_like(head_DH, dtype=wide) if with_grad else None
        last_SH = F.pad(last_SH, (0, 0, 0, -len(last_SH) % CHUNK))
        for number, start in enumerate(starts):
            picked = order_M[bounds[number] : bounds[number + 1]]
            count, spare = len(picked), -len(picked) % MULTIPLE
            if count == 0:
                continue
            teacher_m = teacher_M[picked] - start
            student_mH = F.pad(student_MH[picked], (0, 0, 0, spare))
            both_xD = head_DH.new_empty(count + spare + CHUNK, len(head_DH))  # q of the rows, p of their teachers
            q_mD, p_CD = both_xD.split([count + spare, CHUNK])
            p_CD.copy_(target.logits(last_SH[start : start + CHUNK], teacher_head_DH).softmax(-1))
            logits_mD = F.linear(student_mH, head_DH)
            torch.softmax(logits_mD, -1, out=q_mD)
            q_best_m, found_m = q_mD.max(-1)
            lse_m = logits_mD.gather(1, found_m[:, None]).squeeze(1).to(wide) - q_best_m.to(wide).log()
            del logits_mD
            expected_qH, expected_pH = (both_xD @ head_DH).split([count + spare, CHUNK])  # q W, p W
            pull_mH = expected_pH[teacher_m]
            loss_M[picked] = lse_m[:count] - (student_mH[:count].to(wide) * pull_mH.to(wide)).sum(-1)
            best_M[picked] = found_m[:count]
            if grad_student_MH is not None and grad_head_DH is not None:
                weight_m1 = weight_M[picked, None]
                grad_student_MH[picked] = ((expected_qH[:count] - pull_mH) * weight_m1).to(student_MH.dtype)
                weighted_mH = student_mH[:count] * weight_m1
                both_xH = student_MH.new_zeros(count + spare + CHUNK, student_MH.shape[1])
                both_xH[:count] = weighted_mH
                both_xH[count + spare :] = -weighted_mH.new_zeros(CHUNK, weighted_mH.shape[1]).index_add_(
                    0, teacher_m, weighted_mH
                )
                grad_head_DH += both_xD.T @ both_xH
        if grad_student_MH is not None and grad_head_DH is not None:
            ctx.save_for_backward(grad_student_MH, grad_head_DH.to(head_DH.dtype))
        ctx.mark_non_differentiable(loss_M, best_M)
        return (loss_M * weight_M).sum(), loss_M, best_M

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad_student_MH, grad_head_DH = ctx.saved_tensors
        scale = grad_sum.to(grad_student_MH.dtype)
        return grad_student_MH * scale, grad_head_DH * scale, None, None, None, None, None
