"""One draft step over a packed row: unroll, then the loss of all steps. The module that DeepSpeed wraps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from specforge.draft.loss import FusedLoss, Teacher
from specforge.draft.model import Eagle3Draft
from specforge.draft.unroll import unroll
from specforge.records import FeatureBatch, TargetHead


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """loss is the only tensor with a gradient; the rest are sums over this packed row, [steps] each."""

    loss: Tensor  # scalar: sum over i of decay^i * loss_sum[i] / normaliser[i]
    loss_sum: Tensor  # float32 or wider, nats, over the loss rows
    loss_rows: Tensor  # int64
    hits: Tensor  # int64, rows whose first guess is the target's
    rows: Tensor  # int64, rows that count (a teacher outside the draft vocabulary is a miss)


class DraftStep(nn.Module):
    """The draft, the frozen parts of the target that it learns from, and the loss."""

    def __init__(
        self, draft: Eagle3Draft, head: TargetHead, kept_D: Tensor, steps: int, decay: float, loss: str = "kl"
    ) -> None:
        """`loss`: kl or lk (loss.py)."""
        super().__init__()
        self.draft = draft
        self.steps, self.decay, self.loss = steps, decay, loss
        draft_id_V = torch.full((draft.config.vocab_size,), -1, dtype=torch.int64, device=kept_D.device)
        draft_id_V[kept_D] = torch.arange(len(kept_D), device=kept_D.device)
        # Plain attributes, not buffers: nothing of the target is trained, cast, broadcast or saved.
        teacher_head_DH = head.head_VH[kept_D].contiguous()
        self.frozen = (replace(head, head_VH=teacher_head_DH), teacher_head_DH, kept_D, draft_id_V)

    @property
    def kept_D(self) -> Tensor:
        """[D] the draft vocabulary: target ids, ascending."""
        return self.frozen[2]

    @property
    def embedding_VH(self) -> Tensor:
        return self.frozen[0].embedding_VH

    def no_rows(self) -> Tensor:
        return torch.zeros(self.steps, dtype=torch.int64, device=self.kept_D.device)

    def loss_rows(self, batch: FeatureBatch) -> Tensor:
        """[steps] number of loss rows: rows that count and whose teacher's first choice the draft can say. The
        normalisers are these, summed over all ranks and packed rows of an optimizer step."""
        draft_id_V = self.frozen[3]
        known_S = draft_id_V[batch.teacher_top1] >= 0
        counts = []
        for i in range(self.steps):
            rows_R = torch.nonzero(batch.depth > i).squeeze(1)
            counts.append(known_S[batch.teacher_index[rows_R + 1 + i]].sum())
        return torch.stack(counts)

    def forward(self, batch: FeatureBatch | None, normaliser: Tensor) -> StepResult:
        idle = batch is None or not bool((batch.depth > 0).any())
        if batch is None or idle:  # ZeRO-2 needs every gradient, in one order, on all ranks: the same graph, times zero
            batch = self._blank()
        head, teacher_head_DH, kept_D, draft_id_V = self.frozen
        unrolled = unroll(self.draft, head.embedding_VH, batch, self.steps)
        step_M = torch.cat([torch.full_like(step.rows_R, i) for i, step in enumerate(unrolled)])
        teacher_M = torch.cat([step.teacher_R for step in unrolled])
        hidden_MH = torch.cat([step.hidden_RH for step in unrolled])
        top1_M = batch.teacher_top1[teacher_M]
        known_M = torch.nonzero(draft_id_V[top1_M] >= 0).squeeze(1)
        step_m = step_M[known_M]
        step_i = torch.arange(self.steps, device=normaliser.device, dtype=torch.float64)
        share_i = self.decay**step_i / normaliser.clamp(min=1)
        teacher = Teacher(
            head=head, head_DH=teacher_head_DH, last_SH=batch.last, lse_S=batch.teacher_lse, kind=self.loss
        )
        weight_m = share_i.to(torch.promote_types(hidden_MH.dtype, torch.float32))[step_m]
        normed_mH = self.draft.norm(hidden_MH[known_M])
        loss, loss_m, best_m = FusedLoss.apply(
            normed_mH, self.draft.lm_head.weight, teacher, teacher_M[known_M], weight_m
        )
        if idle:
            none = self.no_rows()
            return StepResult(loss=loss * 0, loss_sum=none.float(), loss_rows=none, hits=none, rows=none)
        hit_m = kept_D[best_m] == top1_M[known_M]
        return StepResult(
            loss=loss,
            loss_sum=loss_m.new_zeros(self.steps).index_add_(0, step_m, loss_m),
            loss_rows=torch.bincount(step_m, minlength=self.steps),
            hits=torch.bincount(step_m[hit_m], minlength=self.steps),
            rows=torch.bincount(step_M, minlength=self.steps),
        )

    def _blank(self) -> FeatureBatch:
        """One record of three tokens with one row that counts, for a rank that has none."""
        config, dtype, device = self.draft.config, self.frozen[1].dtype, self.kept_D.device

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return FeatureBatch(
            sample_ids=(),
            lengths=(3,),
            token_ids=zeros(3),
            positions=torch.arange(3, device=device),
            depth=torch.tensor([1, 0, 0], device=device),
            aux=zeros(3, len(config.aux_layers) * config.hidden_size, dtype=dtype),
            last=zeros(1, config.hidden_size, dtype=dtype),
            teacher_index=torch.tensor([-1, 0, -1], device=device),
            teacher_top1=self.kept_D[:1].clone(),
            teacher_lse=zeros(1, dtype=torch.float32),
        )
