"""Attention of a draft step: the step-0 keys of earlier positions, and the row's own earlier steps.

At step i the row of position t sees the step-0 keys of positions <= t of its record, and the keys that steps 1 .. i
made at t itself; so the latter are one column a step, not a matrix. Records never see each other, and each is computed
by itself, so nothing is spent on the others' keys.

On a CPU the step-0 part goes through torch's flash kernel, which keeps no [rows, keys] for the backward, and the own
columns are merged with it by their log-sum-exp. Elsewhere both parts go through one dense softmax, which is also the
reference that the tests compare the merged one with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MULTIPLE = 32
flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend(
    q_RNE: Tensor,
    keys_TKE: Tensor,
    values_TKE: Tensor,
    own_keys: Sequence[Tensor],
    own_values: Sequence[Tensor],
    rows_R: Tensor,
    segments: Sequence[tuple[slice, slice]],
) -> Tensor:
    """[R, N, E].

    rows_R      position of each query row in the packed row
    own_keys    [R, K, E] for each earlier step 1 .. i of the same rows (empty at step 0), and own_values alike
    segments    for each record with rows, in order: (its query rows, its tokens in the packed row); rows behind the
                last segment get zeros
    """
    group = q_RNE.shape[1] // keys_TKE.shape[1]
    own_k_RiKE = torch.stack(list(own_keys), dim=1) if own_keys else None
    own_v_RiKE = torch.stack(list(own_values), dim=1) if own_values else None
    attend_record = MergedAttention.apply if q_RNE.device.type == "cpu" else dense
    pieces, count = [], 0
    for own_rows, own_tokens in segments:
        rows, tokens = widened(own_rows, len(q_RNE)), widened(own_tokens, len(keys_TKE))
        token_n = torch.arange(tokens.start, tokens.stop, device=rows_R.device)
        row_r1 = rows_R[rows, None].clamp(min=own_tokens.start)  # every row sees something: no NaN in unused ones
        unseen_rn = (token_n > row_r1) | (token_n < own_tokens.start)
        out_NrE = attend_record(
            q_RNE[rows].transpose(0, 1),
            _for_each_head(keys_TKE[tokens], group),
            _for_each_head(values_TKE[tokens], group),
            unseen_rn,
            None if own_k_RiKE is None else _for_each_head(own_k_RiKE[rows], group),
            None if own_v_RiKE is None else _for_each_head(own_v_RiKE[rows], group),
        )
        mine = slice(own_rows.start - rows.start, own_rows.stop - rows.start)
        pieces.append(out_NrE[:, mine].transpose(0, 1))
        count = own_rows.stop
    return torch.cat([*pieces, q_RNE[count:] * 0])


def _for_each_head(x_nKE: Tensor, group: int) -> Tensor:
    """[n, ..., K, E] to [N, n, ..., E]: each key or value head for all query heads that share it."""
    return x_nKE.movedim(-2, 0).repeat_interleave(group, dim=0)


def dense(
    q_NrE: Tensor,
    k_NnE: Tensor,
    v_NnE: Tensor,
    unseen_rn: Tensor,
    own_k_NriE: Tensor | None,
    own_v_NriE: Tensor | None,
) -> Tensor:
    """One softmax over the step-0 keys and the row's own columns, [N, r, E]; scores in fp32."""
    q_NrE = q_NrE * q_NrE.shape[-1] ** -0.5
    scores_Nrn = (q_NrE @ k_NnE.transpose(1, 2)).float().masked_fill(unseen_rn, float("-inf"))
    if own_k_NriE is None or own_v_NriE is None:
        return scores_Nrn.softmax(-1).to(q_NrE.dtype) @ v_NnE
    own_Nri = torch.einsum("nre,nrie->nri", q_NrE, own_k_NriE).float()
    shares = torch.cat([scores_Nrn, own_Nri], dim=-1).softmax(-1).to(q_NrE.dtype)
    first_Nrn, own_Nri = shares.split([scores_Nrn.shape[-1], own_Nri.shape[-1]], dim=-1)
    return first_Nrn @ v_NnE + torch.einsum("nri,nrie->nre", own_Nri, own_v_NriE)


class MergedAttention(torch.autograd.Function):
    """`dense` by parts. With lse0 and out0 of the step-0 keys, and scores s_i of the own columns:

        lse = log(exp(lse0) + sum_i exp(s_i))
        out = exp(lse0 - lse) out0 + sum_i exp(s_i - lse) v_i

    Backward: the flash backward takes its probabilities as exp(score - lse) and its row sums from out; given the merged
    ones it computes exactly the step-0 part. The own part is the same formula by hand (FlashAttention-2, section 3)."""

    @staticmethod
    def forward(
        ctx: Any,
        q_NrE: Tensor,
        k_NnE: Tensor,
        v_NnE: Tensor,
        unseen_rn: Tensor,
        own_k_NriE: Tensor | None,
        own_v_NriE: Tensor | None,
    ) -> Tensor:
        ctx.scale = q_NrE.shape[-1] ** -0.5
        bias_11rn = torch.zeros(unseen_rn.shape, dtype=q_NrE.dtype).masked_fill_(unseen_rn, float("-inf"))[None, None]
        out, lse = flash(q_NrE[None], k_NnE[None], v_NnE[None], attn_mask=bias_11rn, scale=ctx.scale)
        if own_k_NriE is not None and own_v_NriE is not None:
            own_1Nri = _own_scores(q_NrE, own_k_NriE, ctx.scale)[None]
            merged = torch.logaddexp(lse, own_1Nri.logsumexp(-1).to(lse.dtype))
            shares_1Nri = (own_1Nri - merged[..., None]).exp()
            own_out = torch.einsum("bnri,nrie->bnre", shares_1Nri.to(q_NrE.dtype), own_v_NriE)
            out = (out * (lse - merged).exp()[..., None] + own_out).to(q_NrE.dtype)
            lse = lse.copy_(merged)  # in the layout that the kernel expects back
        ctx.save_for_backward(q_NrE, k_NnE, v_NnE, bias_11rn, own_k_NriE, own_v_NriE, out, lse)
        return out[0]

    @staticmethod
    def backward(ctx: Any, grad_NrE: Tensor) -> tuple[Tensor | None, ...]:
        q_NrE, k_NnE, v_NnE, bias_11rn, own_k_NriE, own_v_NriE, out, lse = ctx.saved_tensors
        found = flash_backward(
            *(grad_NrE[None], q_NrE[None], k_NnE[None], v_NnE[None], out, lse, 0.0, False),
            attn_mask=bias_11rn,
            scale=ctx.scale,
        )
        grad_q_NrE, grad_k_NnE, grad_v_NnE = (grad[0] for grad in found)
        if own_k_NriE is None:
            return grad_q_NrE, grad_k_NnE, grad_v_NnE, None, None, None
        wide = lse.dtype
        share_Nri = (_own_scores(q_NrE, own_k_NriE, ctx.scale) - lse[0, ..., None]).exp()
        grad_share_Nri = torch.einsum("nre,nrie->nri", grad_NrE, own_v_NriE).to(wide)
        row_sum_Nr = (grad_NrE.to(wide) * out[0].to(wide)).sum(-1, keepdim=True)
        grad_score_Nri = (share_Nri * (grad_share_Nri - row_sum_Nr) * ctx.scale).to(q_NrE.dtype)
        grad_q_NrE = grad_q_NrE + torch.einsum("nri,nrie->nre", grad_score_Nri, own_k_NriE)
        grad_own_k_NriE = grad_score_Nri[..., None] * q_NrE[:, :, None]
        grad_own_v_NriE = share_Nri.to(q_NrE.dtype)[..., None] * grad_NrE[:, :, None]
        return grad_q_NrE, grad_k_NnE, grad_v_NnE, None, grad_own_k_NriE, grad_own_v_NriE


def _own_scores(q_NrE: Tensor, own_k_NriE: Tensor, scale: float) -> Tensor:
    scores_Nri = torch.einsum("nre,nrie->nri", q_NrE, own_k_NriE)
    return scores_Nri.to(torch.promote_types(q_NrE.dtype, torch.float32)) * scale


def widened(part: slice, total: int) -> slice:
    """`part` and some neighbours, a multiple of 32 long where there is room: few shapes (unroll.py says why)."""
    size = min(total, -(-(part.stop - part.start) // MULTIPLE) * MULTIPLE)
    start = min(part.start, total - size)
    return slice(start, start + size)
