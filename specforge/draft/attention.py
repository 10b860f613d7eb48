"""Attention of a draft step: the step-0 keys of earlier positions, and the row's own earlier steps.

At step i the row of position t sees the step-0 keys of positions <= t of its record, and the keys that steps 1 .. i
made at t itself; so the latter are one column a step, not a matrix. Records never see each other, and each is computed
by itself, so nothing is spent on the others' keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MULTIPLE = 32


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
    q_RKGE = q_RNE.unflatten(1, (-1, group)) * q_RNE.shape[-1] ** -0.5
    own_k_RiKE = torch.stack(list(own_keys), dim=1) if own_keys else None
    own_v_RiKE = torch.stack(list(own_values), dim=1) if own_values else None
    pieces, count = [], 0
    for own_rows, own_tokens in segments:
        rows, tokens = widened(own_rows, len(q_RNE)), widened(own_tokens, len(keys_TKE))
        q_KGrE = q_RKGE[rows].permute(1, 2, 0, 3)
        k_K1En = keys_TKE[tokens].permute(1, 2, 0).unsqueeze(1)
        v_K1nE = values_TKE[tokens].transpose(0, 1).unsqueeze(1)
        scores_KGrn = (q_KGrE @ k_K1En).float()
        token_n = torch.arange(tokens.start, tokens.stop, device=rows_R.device)
        row_r1 = rows_R[rows, None].clamp(min=own_tokens.start)  # every row sees something: no NaN in unused ones
        later_rn = (token_n > row_r1) | (token_n < own_tokens.start)
        scores_KGrn = scores_KGrn.masked_fill(later_rn, float("-inf"))
        if own_k_RiKE is None or own_v_RiKE is None:
            out_KGrE = scores_KGrn.softmax(-1).to(q_RNE.dtype) @ v_K1nE
        else:
            own_KGri = torch.einsum("rkge,rike->kgri", q_RKGE[rows], own_k_RiKE[rows]).float()
            shares = torch.cat([scores_KGrn, own_KGri], dim=-1).softmax(-1).to(q_RNE.dtype)
            first, own = shares.split([scores_KGrn.shape[-1], own_KGri.shape[-1]], dim=-1)
            out_KGrE = first @ v_K1nE + torch.einsum("kgri,rike->kgre", own, own_v_RiKE[rows])
        mine = slice(own_rows.start - rows.start, own_rows.stop - rows.start)
        pieces.append(out_KGrE[:, :, mine].permute(2, 0, 1, 3).flatten(1, 2))
        count = own_rows.stop
    return torch.cat([*pieces, q_RNE[count:] * 0])


def widened(part: slice, total: int) -> slice:
    """`part` and some neighbours, a multiple of 32 long where there is room: few shapes (unroll.py says why)."""
    size = min(total, -(-(part.stop - part.start) // MULTIPLE) * MULTIPLE)
    start = min(part.start, total - size)
    return slice(start, start + size)
