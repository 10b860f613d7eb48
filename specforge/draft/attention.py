"""Attention of a draft step: the step-0 keys of earlier positions, and the row's own earlier steps.

At step i the row of position t sees the step-0 keys of positions <= t of its record, and the keys that steps 1 .. i
made at t itself; so the latter are one column a step, not a matrix. Records never see each other.

A fused kernel computes the step-0 part and keeps no [rows, keys] for the backward. The own columns are merged with it
by their log-sum-exp:

    lse = log(exp(lse0) + sum_i exp(s_i))
    out = exp(lse0 - lse) out0 + sum_i exp(s_i - lse) v_i

The backward of these kernels takes its probabilities as exp(score - lse) and its row sums from out. Given the merged
ones it computes exactly the step-0 part; the own part is the same formula by hand (FlashAttention-2, section 3).

On a CPU the kernel is called once for each record (`attend`), on a GPU once for all records of a packed row
(`attend_packed`). `dense`, one softmax over all columns, is the reference for both. Decoding on a GPU uses it too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor

from specforge.records import sent

MULTIPLE = 32
CAUSAL = 1  # of the memory-efficient operators: a mask from the top left of each record
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
    """[R, N, E], record by record; rows may share a position.

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
    """One softmax over the step-0 keys and the row's own columns, [N, r, E]; scores in fp32 or wider."""
    wide, scale = torch.promote_types(q_NrE.dtype, torch.float32), q_NrE.shape[-1] ** -0.5
    scores_Nrn = (q_NrE.to(wide) @ k_NnE.to(wide).transpose(1, 2) * scale).masked_fill(unseen_rn, float("-inf"))
    if own_k_NriE is None or own_v_NriE is None:
        return scores_Nrn.softmax(-1).to(q_NrE.dtype) @ v_NnE
    own_Nri = torch.einsum("nre,nrie->nri", q_NrE.to(wide), own_k_NriE.to(wide)) * scale
    shares = torch.cat([scores_Nrn, own_Nri], dim=-1).softmax(-1).to(q_NrE.dtype)
    first_Nrn, own_Nri = shares.split([scores_Nrn.shape[-1], own_Nri.shape[-1]], dim=-1)
    return first_Nrn @ v_NnE + torch.einsum("nri,nrie->nre", own_Nri, own_v_NriE)


class MergedAttention(torch.autograd.Function):
    """`dense` on a CPU, through torch's flash kernel."""

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
    size = min(total, _filled(part.stop - part.start))
    start = min(part.start, total - size)
    return slice(start, start + size)


def _filled(count: int) -> int:
    return -(-count // MULTIPLE) * MULTIPLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Flash:
    """Causal attention inside each record of a packed row, in one call: FlashAttention-2 as torch has it, for 16 bits.

    Scores are scaled by 1 / sqrt(E), the operators' default. `backward` gives the gradient that belongs to the `out`
    and `lse` that it gets. A row whose q, out and gradient are zero adds exactly nothing to any gradient, if its lse
    is finite."""

    lengths: tuple[int, ...]
    starts: Tensor  # [records + 1] int32, on the row's device: where each record begins, and where the last ends
    op: Callable[..., Any] = torch.ops.aten._flash_attention_forward
    backward_op: Callable[..., Any] = torch.ops.aten._flash_attention_backward

    @classmethod
    def over(cls, lengths: Sequence[int], total: int, device: torch.device, **operators: Callable[..., Any]) -> Self:
        """Over a row of `total` tokens; does not wait for the device. Tokens behind the records count as one more
        record: the operators write nothing to tokens of none."""
        lengths = (*lengths, *([total - sum(lengths)] if total > sum(lengths) else []))
        starts = sent(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)
        return cls(lengths=lengths, starts=starts, **operators)

    @property
    def bounds(self) -> tuple[Tensor, Tensor, int, int]:
        return self.starts, self.starts, max(self.lengths), max(self.lengths)

    def forward(self, q_TNE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> tuple[Tensor, ...]:
        """(out [T, N, E], lse [N, T] in fp32 or wider, two tensors that `backward` wants)."""
        return tuple(self.op(q_TNE, k_TKE, v_TKE, *self.bounds, 0.0, True, False)[:4])

    def backward(
        self, grad_TNE: Tensor, qkv: Sequence[Tensor], out_TNE: Tensor, lse_NT: Tensor, *of: Tensor
    ) -> tuple[Tensor, ...]:
        """Gradients of q, k and v."""
        return tuple(self.backward_op(grad_TNE, *qkv, out_TNE, lse_NT, *self.bounds, 0.0, True, *of))


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficient(Flash):
    """The same by torch's memory-efficient operators, for fp32 and head sizes that flash does not take. They know no
    grouped heads, and hold lse as [records, N, tokens], filled up to a multiple of 32 with infinity: [B, N, n] here."""

    op: Callable[..., Any] = torch.ops.aten._efficient_attention_forward
    backward_op: Callable[..., Any] = torch.ops.aten._efficient_attention_backward

    def forward(self, q_TNE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> tuple[Tensor, ...]:
        inputs = self._for_each_head(q_TNE, k_TKE, v_TKE)
        out_1TNE, lse_BNn, *of, _, _ = self.op(*inputs, None, *self.bounds, 0.0, CAUSAL, True)
        lse_TN = lse_BNn.transpose(1, 2).flatten(0, 1).index_select(0, self._places(len(q_TNE)))
        return out_1TNE.squeeze(0), lse_TN.T, *of

    def backward(
        self, grad_TNE: Tensor, qkv: Sequence[Tensor], out_TNE: Tensor, lse_NT: Tensor, *of: Tensor
    ) -> tuple[Tensor, ...]:
        count, filled, kv_heads = len(self.lengths), _filled(max(self.lengths)), qkv[1].shape[1]
        lse_xN = lse_NT.new_full((count * filled, len(lse_NT)), float("inf"))
        lse_xN.index_copy_(0, self._places(len(grad_TNE)), lse_NT.T)
        lse_BNn = lse_xN.unflatten(0, (count, filled)).transpose(1, 2).clone(memory_format=torch.contiguous_format)
        inputs = (grad_TNE.unsqueeze(0), *self._for_each_head(*qkv), None, out_TNE.unsqueeze(0))
        found = self.backward_op(*inputs, *self.bounds, lse_BNn, 0.0, *of, CAUSAL, False)
        grad_q, grad_k, grad_v = (grad.squeeze(0) for grad in found[:3])
        return grad_q, *(grad.unflatten(1, (kv_heads, -1)).sum(2) for grad in (grad_k, grad_v))

    @staticmethod
    def _for_each_head(q_TNE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """With a key/value head for each query head, and a first dimension of one."""
        group = q_TNE.shape[1] // k_TKE.shape[1]
        k_TNE, v_TNE = (x.repeat_interleave(group, 1) for x in (k_TKE, v_TKE))
        return q_TNE.unsqueeze(0), k_TNE.unsqueeze(0), v_TNE.unsqueeze(0)

    def _places(self, total: int) -> Tensor:
        """The index of each token in [records * filled tokens]."""
        token_T = torch.arange(total, device=self.starts.device)
        record_T = torch.searchsorted(self.starts.long(), token_T, right=True) - 1
        return token_T - self.starts.index_select(0, record_T) + record_T * _filled(max(self.lengths))


def kernel_for(keys_TKE: Tensor) -> type[Flash]:
    """Flash takes 16 bits, heads of up to 256 elements, and GPUs from Ampere on."""
    size, device = keys_TKE.shape[-1], keys_TKE.device
    old = device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0)
    return Flash if keys_TKE.dtype.itemsize == 2 and size <= 256 and size % 8 == 0 and not old else Efficient


def attend_packed(
    q_RNE: Tensor,
    keys_TKE: Tensor,
    values_TKE: Tensor,
    own_keys: Sequence[Tensor],
    own_values: Sequence[Tensor],
    rows_r: Tensor,
    kernel: Flash,
) -> Tensor:
    """As `attend`, all records in one call. `rows_r`: positions in the packed row of the first r <= R query rows, each
    once; the other rows get zeros."""
    if not len(rows_r):
        return q_RNE * 0
    own_k_RKiE = torch.stack(list(own_keys), dim=2) if own_keys else None
    own_v_RKiE = torch.stack(list(own_values), dim=2) if own_values else None
    return PackedAttention.apply(q_RNE, keys_TKE, values_TKE, own_k_RKiE, own_v_RKiE, rows_r, kernel)


class PackedAttention(torch.autograd.Function):
    """`dense` for all records of a packed row. The kernel wants a query at every token: rows go to their own positions,
    and the rest is zero. Nothing of [T, N, E] is kept for the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        q_RNE: Tensor,
        k_TKE: Tensor,
        v_TKE: Tensor,
        own_k_RKiE: Tensor | None,
        own_v_RKiE: Tensor | None,
        rows_r: Tensor,
        kernel: Flash,
    ) -> Tensor:
        ctx.kernel, count = kernel, len(rows_r)
        q_rNE = q_RNE.narrow(0, 0, count)
        out_TNE, lse_NT, *of = kernel.forward(_scattered(q_rNE, rows_r, len(k_TKE)), k_TKE, v_TKE)
        out_rNE, lse_rN = out_TNE.index_select(0, rows_r), lse_NT.T.index_select(0, rows_r)
        if own_k_RKiE is not None and own_v_RKiE is not None:
            own_k_rKiE, own_v_rKiE = own_k_RKiE.narrow(0, 0, count), own_v_RKiE.narrow(0, 0, count)
            own_rKgi = _packed_scores(q_rNE, own_k_rKiE)
            merged_rN = torch.logaddexp(lse_rN, own_rKgi.logsumexp(-1).flatten(1))
            share_rKgi = (own_rKgi - _grouped(merged_rN.unsqueeze(-1), own_rKgi)).exp().to(q_RNE.dtype)
            own_rNE = torch.einsum("rkgi,rkie->rkge", share_rKgi, own_v_rKiE).flatten(1, 2)
            out_rNE = (out_rNE * (lse_rN - merged_rN).exp().unsqueeze(-1) + own_rNE).to(q_RNE.dtype)
            lse_rN = merged_rN
        out_RNE = _filled_up(out_rNE, len(q_RNE))
        ctx.save_for_backward(q_RNE, k_TKE, v_TKE, own_k_RKiE, own_v_RKiE, rows_r, out_RNE, lse_rN, *of)
        return out_RNE

    @staticmethod
    def backward(ctx: Any, grad_RNE: Tensor) -> tuple[Tensor | None, ...]:
        q_RNE, k_TKE, v_TKE, own_k_RKiE, own_v_RKiE, rows_r, out_RNE, lse_rN, *of = ctx.saved_tensors
        count, total = len(rows_r), len(k_TKE)
        q_rNE, out_rNE, grad_rNE = (x.narrow(0, 0, count) for x in (q_RNE, out_RNE, grad_RNE))
        grad_TNE, q_TNE, out_TNE = (_scattered(x, rows_r, total) for x in (grad_rNE, q_rNE, out_rNE))
        lse_NT = lse_rN.new_zeros(lse_rN.shape[1], total).index_copy_(1, rows_r, lse_rN.T)
        grad_q_TNE, grad_k, grad_v = ctx.kernel.backward(grad_TNE, (q_TNE, k_TKE, v_TKE), out_TNE, lse_NT, *of)
        grad_q_rNE = grad_q_TNE.index_select(0, rows_r)
        if own_k_RKiE is None:
            return _filled_up(grad_q_rNE, len(q_RNE)), grad_k, grad_v, None, None, None, None
        own_k_rKiE, own_v_rKiE, wide = own_k_RKiE.narrow(0, 0, count), own_v_RKiE.narrow(0, 0, count), lse_rN.dtype
        own_rKgi = _packed_scores(q_rNE, own_k_rKiE)
        share_rKgi = (own_rKgi - _grouped(lse_rN.unsqueeze(-1), own_rKgi)).exp()
        row_sum_rN1 = (grad_rNE.to(wide) * out_rNE.to(wide)).sum(-1, keepdim=True)
        grad_rKgE = _grouped(grad_rNE, own_rKgi)
        grad_share_rKgi = torch.einsum("rkge,rkie->rkgi", grad_rKgE.to(wide), own_v_rKiE.to(wide))
        grad_score_rKgi = share_rKgi * (grad_share_rKgi - _grouped(row_sum_rN1, own_rKgi))
        grad_score_rKgi = (grad_score_rKgi * q_RNE.shape[-1] ** -0.5).to(q_RNE.dtype)
        grad_q_rNE = grad_q_rNE + torch.einsum("rkgi,rkie->rkge", grad_score_rKgi, own_k_rKiE).flatten(1, 2)
        grad_own_k = torch.einsum("rkgi,rkge->rkie", grad_score_rKgi, _grouped(q_rNE, own_rKgi))
        grad_own_v = torch.einsum("rkgi,rkge->rkie", share_rKgi.to(q_RNE.dtype), grad_rKgE)
        grad_q, *of_own = (_filled_up(grad, len(q_RNE)) for grad in (grad_q_rNE, grad_own_k, grad_own_v))
        return grad_q, grad_k, grad_v, *of_own, None, None


def _packed_scores(q_rNE: Tensor, own_k_rKiE: Tensor) -> Tensor:
    """[r, K, g, i] in fp32 or wider: of the g query heads that share a key/value head."""
    wide, scale = torch.promote_types(q_rNE.dtype, torch.float32), q_rNE.shape[-1] ** -0.5
    q_rKgE = q_rNE.unflatten(1, (own_k_rKiE.shape[1], -1))
    return torch.einsum("rkge,rkie->rkgi", q_rKgE.to(wide), own_k_rKiE.to(wide)) * scale


def _grouped(x_rN: Tensor, like_rKgi: Tensor) -> Tensor:
    """[r, N, ...] to [r, K, g, ...]."""
    return x_rN.unflatten(1, like_rKgi.shape[1:3])


def _scattered(x_r: Tensor, rows_r: Tensor, total: int) -> Tensor:
    """[r, ...] to [total, ...]: each row to its own position, zeros elsewhere."""
    return x_r.new_zeros((total, *x_r.shape[1:])).index_copy_(0, rows_r, x_r)


def _filled_up(x_r: Tensor, total: int) -> Tensor:
    """[r, ...] to [total, ...] with zeros behind."""
    return torch.cat([x_r, x_r.new_zeros((total - len(x_r), *x_r.shape[1:]))])
