"""The step computes what its rows need, and no more: its matrix products are counted and compared with the formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from specforge.alignment import teacher_rows
from specforge.draft import unroll as unroll_module
from specforge.draft.model import DraftConfig, Eagle3Draft
from specforge.draft.step import DraftStep
from specforge.records import FeatureBatch, FeatureRecord, TargetHead
from tests.unit.test_draft_step import CONFIG, DECAY, STEPS

V, D, H, I, Q, K, LENGTH, CONVERSATIONS = 400, 256, 64, 96, 64, 32, 512, 16
WIDE: DraftConfig = replace(
    CONFIG,
    hidden_size=H,
    intermediate_size=I,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=V,
    draft_vocab_size=D,
    max_position_embeddings=LENGTH,
)


def example(supervised: float) -> tuple[DraftStep, FeatureBatch]:
    g = torch.Generator().manual_seed(0)
    head = TargetHead(embedding_VH=torch.randn(V, H, generator=g), head_VH=torch.randn(V, H, generator=g))
    kept = torch.randperm(V, generator=g)[:D].sort().values
    records = []
    for number in range(CONVERSATIONS):
        mask = torch.arange(LENGTH) >= round(LENGTH * (1 - supervised))
        rows = torch.from_numpy(teacher_rows(mask.numpy()))
        last = torch.randn(len(rows), H, generator=g)
        logits = head.logits(last)
        records.append(
            FeatureRecord(
                sample_id=number,
                token_ids=torch.randint(0, V, (LENGTH,), generator=g).int(),
                loss_mask=mask,
                aux=torch.randn(LENGTH, 3 * H, generator=g),
                last=last,
                teacher_top1=logits.argmax(-1).int(),
                teacher_lse=logits.logsumexp(-1),
            )
        )
    draft = Eagle3Draft(WIDE)
    draft.initialise(head, kept, 0)
    return DraftStep(draft, head, kept, STEPS, DECAY), FeatureBatch.pack(records, torch.device("cpu"), torch.float32)


def counted(step: DraftStep, batch: FeatureBatch) -> int:
    """Of one step with its backward: products of activations with weights. Attention has operators of its own."""
    with FlopCounterMode(display=False) as counter:
        step(batch, step.loss_rows(batch)).loss.backward()
    operators = counter.get_flop_counts()["Global"]
    return sum(operators.get(name, 0) for name in (torch.ops.aten.mm, torch.ops.aten.addmm))


def needed(step: DraftStep, batch: FeatureBatch) -> int:
    """Two operations a weight and row forward, four backward (two where the input takes no gradient)."""
    tokens, teachers, losses = len(batch.token_ids), len(batch.last), int(step.loss_rows(batch).sum())
    rows_i = [int((batch.depth > i).sum()) for i in range(STEPS)]
    features = tokens * 3 * H * H * 4  # the target's states take no gradient
    keys_values = (tokens + sum(rows_i[1:])) * 2 * H * 2 * K * 6
    queries = sum(rows_i) * (2 * H * Q + Q * H) * 6
    mlp = sum(rows_i) * 3 * H * I * 6
    # Teacher's logits once; the students' logits; q W and p W; the head's gradient from both.
    head = (teachers + losses + 2 * (teachers + losses)) * D * H * 2
    return features + keys_values + queries + mlp + head


@pytest.mark.parametrize("supervised", [1.0, 0.5, 0.25])
def test_the_step_counts_what_its_rows_need(supervised):
    step, batch = example(supervised)
    assert counted(step, batch) == pytest.approx(needed(step, batch), rel=0.02)


def test_the_count_notices_rows_that_cannot_matter(monkeypatch):
    """Twice the rows in every step: their results are dropped, so nothing but the count tells."""
    step, batch = example(0.5)
    want = needed(step, batch)
    monkeypatch.setattr(unroll_module, "filled", lambda rows_R: (torch.cat([rows_R, rows_R]), len(rows_R)))
    assert counted(step, batch) > 1.1 * want
