"""One draft step over a packed row: unroll, then the loss of all steps. The module that DeepSpeed wraps."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from specforge.draft.loss import FusedLoss, Teacher
from specforge.draft.model import Eagle3Draft
from specforge.draft.unroll import unroll
from specforge.records import FeatureBatch, TargetHead, sent


class StepResult(NamedTuple):  # a tuple: DeepSpeed's hooks look for tensors in tuples only
    """loss is the only tensor with a gradient; the rest are sums over this packed row, [steps] each."""

    loss: Tensor  # scalar: sum over i of weight_i * loss_sum[i] / normaliser[i]
    loss_sum: Tensor  # float32 or wider, nats, over the loss rows
    loss_rows: Tensor  # int64, on the host
    hits: Tensor  # int64, rows whose first guess is the target's
    rows: Tensor  # int64, on the host: rows that count (a teacher outside the draft vocabulary is a miss)


class DraftStep(nn.Module):
    """The draft, the frozen parts of the target that it learns from, and the loss."""

    def __init__(
        self, draft: Eagle3Draft, head: TargetHead, kept_D: Tensor, steps: int, decay: float, loss: str = "kl"
    ) -> None:
        """`loss`: kl or lk (loss.py)."""
        super().__init__()
        self.draft = draft
        self.steps, self.loss = steps, loss
        self.unrolled = steps  # of them, those that are computed; training may begin with fewer
        self.weight_i = decay ** torch.arange(steps, dtype=torch.float64)  # on the host
        known_V = torch.zeros(draft.config.vocab_size, dtype=torch.bool)  # on the host, as what decides on rows is
        known_V[kept_D.cpu()] = True
        # Plain attributes, not buffers: nothing of the target is trained, cast, broadcast or saved.
        teacher_head_DH = head.head_VH[kept_D].contiguous()
        self.frozen = (replace(head, head_VH=teacher_head_DH), teacher_head_DH, kept_D, known_V)

    @property
    def kept_D(self) -> Tensor:
        """[D] the draft vocabulary: target ids, ascending."""
        return self.frozen[2]

    @property
    def embedding_VH(self) -> Tensor:
        return self.frozen[0].embedding_VH

    def no_rows(self) -> Tensor:
        return torch.zeros(self.steps, dtype=torch.int64)

    def loss_rows(self, batch: FeatureBatch) -> Tensor:
        """[steps] on the host: number of loss rows, which count and whose teacher's first choice the draft can say. The
        normalisers are these, summed over all ranks and packed rows of an optimizer step."""
        known_S = self.frozen[3][batch.teacher_top1]
        counts = []
        for i in range(self.steps):
            rows_R = torch.nonzero(batch.depth > i).squeeze(1)
            counts.append(known_S[batch.teacher_index[rows_R + 1 + i]].sum())
        return torch.stack(counts)

    def forward(self, batch: FeatureBatch | None, normaliser: Tensor, anchor: Tensor | None = None) -> StepResult:
        """`anchor`: a scalar that takes a gradient and changes nothing. Its gradient is the last to be made, and tells
        hooks on the module's inputs that the backward is done."""
        idle = batch is None or not bool((batch.depth > 0).any())
        if batch is None or idle:  # ZeRO-2 needs every gradient, in one order, on all ranks: the same graph, times zero
            batch = self._blank()
        head, teacher_head_DH, kept_D, known_V = self.frozen
        device = kept_D.device
        unrolled = unroll(self.draft, head.embedding_VH, batch, self.unrolled)
        step_M = torch.cat([torch.full_like(step.rows_R, i) for i, step in enumerate(unrolled)])
        teacher_M = torch.cat([step.teacher_R for step in unrolled])
        hidden_MH = torch.cat([step.hidden_RH for step in unrolled])
        del unrolled  # the loss needs the memory
        top1_M = batch.teacher_top1[teacher_M]
        known_M = torch.nonzero(known_V[top1_M]).squeeze(1)
        step_m, top1_m = sent(step_M[known_M], device), sent(top1_M[known_M], device)
        share_i = sent(self.weight_i, device) / sent(normaliser, device).clamp(min=1)
        teacher = Teacher(
            head=head, head_DH=teacher_head_DH, last_SH=batch.last, lse_S=batch.teacher_lse, kind=self.loss
        )
        weight_m = share_i.to(torch.promote_types(hidden_MH.dtype, torch.float32))[step_m]
        normed_mH = self.draft.norm(hidden_MH[sent(known_M, device)])
        del hidden_MH
        loss, loss_m, best_m = FusedLoss.apply(
            normed_mH, self.draft.lm_head.weight, teacher, teacher_M[known_M], weight_m
        )
        if anchor is not None:
            loss = loss + 0 * anchor
        if idle:
            none, none_there = self.no_rows(), sent(self.no_rows(), device)
            return StepResult(loss=loss * 0, loss_sum=none_there.float(), loss_rows=none, hits=none_there, rows=none)
        hit_m = (kept_D[best_m] == top1_m).long()
        return StepResult(
            loss=loss,
            loss_sum=loss_m.new_zeros(self.steps).index_add_(0, step_m, loss_m),
            loss_rows=torch.bincount(step_M[known_M], minlength=self.steps),
            hits=hit_m.new_zeros(self.steps).index_add_(0, step_m, hit_m),
            rows=torch.bincount(step_M, minlength=self.steps),
        )

    def _blank(self) -> FeatureBatch:
        """One record of three tokens with one row that counts, for a rank that has none."""
        config, dtype, device = self.draft.config, self.frozen[1].dtype, self.kept_D.device

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return FeatureBatch(
            sample_ids=(),
            lengths=(3,),
            token_ids=zeros(3, dtype=torch.int64),
            positions=torch.arange(3, device=device),
            aux=zeros(3, len(config.aux_layers) * config.hidden_size, dtype=dtype),
            last=zeros(1, config.hidden_size, dtype=dtype),
            teacher_lse=zeros(1, dtype=torch.float32),
            depth=torch.tensor([1, 0, 0]),
            teacher_index=torch.tensor([-1, 0, -1]),
            teacher_top1=torch.nonzero(self.frozen[3])[0],
        )
