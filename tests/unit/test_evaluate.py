"""Acceptance by brute force, the chain drafter against the unrolled step, and the rule for equal texts."""

from __future__ import annotations

import pytest
import torch

from specforge.draft.unroll import unroll
from specforge.evaluate.acceptance import guesses, teacher_forced, walk
from specforge.evaluate.decode import ChainDrafter, Decoded, Drafting, compare, is_near_tie
from specforge.records import FeatureBatch, FeatureRecord
from tests.unit.test_draft_step import CONFIG, STEPS, H, V, make


def pack(records):
    return FeatureBatch.pack(records, torch.device("cpu"), torch.float32)


def hits_by_row(draft, head, kept, batch):
    """{(t, i): whether the draft's i-th guess at row t is the target's}, for what counts."""
    found = {}
    for i, step in enumerate(unroll(draft, head.embedding_VH, batch, STEPS)):
        right = guesses(draft, step.hidden_RH, kept) == batch.teacher_top1[step.teacher_R]
        found.update({(int(t), i): bool(hit) for t, hit in zip(step.rows_R, right, strict=True)})
    return found


@torch.no_grad()
def agreeing(seed=0):
    """A batch whose teachers often are what the draft says, so that chains of every length occur."""
    draft, head, kept, _, records = make(0.8, torch.float32, seed)
    batch = pack(records)
    top1 = batch.teacher_top1.clone()
    source = torch.Generator().manual_seed(seed)
    for step in unroll(draft, head.embedding_VH, batch, STEPS):
        chosen = torch.rand(len(step.rows_R), generator=source) < 0.5
        top1[step.teacher_R[chosen]] = guesses(draft, step.hidden_RH, kept)[chosen]
    changed = {name: getattr(batch, name) for name in batch.__slots__} | {"teacher_top1": top1}
    return draft, head, kept, FeatureBatch(**changed)


@pytest.mark.parametrize("seed", [0, 1])
def test_acceptance_is_its_definition(seed):
    draft, head, kept, batch = agreeing(seed)
    hits = hits_by_row(draft, head, kept, batch)
    found = teacher_forced(draft, head.embedding_VH, kept, [batch, None], STEPS)
    for j in range(STEPS):
        rows = [t for t, i in hits if i == j]
        assert found.rows[j] == len(rows)
        assert found.accepted[j] == sum(all(hits[t, i] for i in range(j + 1)) for t in rows)
    assert found.accepted[1] > 0
    assert found.length == pytest.approx(1 + sum(a / n for a, n in zip(found.accepted, found.rows, strict=True)))


def test_walk_advances_by_accepted_plus_one_and_starts_anew_with_each_turn():
    #       two turns in the first record, one in the second
    depth = torch.tensor([4, 3, 2, 1, 0, 0, 2, 1, 0, 3, 2, 1, 0]).numpy()
    accepted = torch.tensor([2, 0, 0, 0, 0, 0, 0, 1, 0, 3, 0, 0, 0]).numpy()
    # 0 -> 3 (three tokens), 3 -> 4 (one); 6 -> 7 (one), 7 -> 9 (two); 9 -> 13 (four)
    assert walk(depth, accepted, [9, 4]) == (11, 5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("pieces", [[12], [5, 1, 6]])
@torch.no_grad()
def test_the_chain_drafter_says_what_the_unrolled_step_was_taught(seed, pieces):
    """The text behind position n - 1 is what the drafter itself proposes there: so every unrolled step of that row
    sees the drafter's own inputs, and must make the same guesses."""
    draft, head, kept, *_ = make(1.0, torch.float32, seed)
    source = torch.Generator().manual_seed(seed)
    n = sum(pieces)
    ids = torch.randint(0, V, (n + 1,), generator=source)
    aux = torch.randn(n + 1 + STEPS + 2, 3 * H, generator=source)
    drafter = ChainDrafter(Drafting(draft=draft, embedding_VH=head.embedding_VH, kept_D=kept, steps=STEPS))
    start = 0
    for piece in pieces:  # seen at once, or bit by bit as decoding does
        drafter.see(aux[start : start + piece], ids[start + 1 : start + piece + 1].tolist())
        start += piece
    proposed = [draft.token for draft in drafter.propose(STEPS)]
    text = torch.cat([ids, torch.tensor(proposed), torch.zeros(2, dtype=torch.int64)])
    rows = len(text) - 1
    record = FeatureRecord(
        sample_id=0,
        token_ids=text.int(),
        loss_mask=torch.ones(len(text), dtype=torch.bool),
        aux=aux[: len(text)],
        last=torch.zeros(rows - 1, H),
        teacher_top1=torch.zeros(rows - 1, dtype=torch.int32),
        teacher_lse=torch.zeros(rows - 1),
    )
    assert CONFIG.hidden_size == H
    for i, step in enumerate(unroll(draft, head.embedding_VH, pack([record]), STEPS)):
        at = step.rows_R.tolist().index(n - 1)
        assert int(guesses(draft, step.hidden_RH, kept)[at]) == proposed[i]


def decoded(tokens, ties=()):
    return Decoded(tokens=tokens, passes=1, seconds=1.0, near_ties=list(ties) or [False] * len(tokens))


def test_texts_may_only_part_at_a_near_tie_and_never_in_fp32():
    same = (decoded([1, 2, 3]), decoded([1, 2, 3]))
    at_tie = (decoded([1, 2, 3], [False, True, False]), decoded([1, 9, 9]))
    elsewhere = (decoded([1, 2, 3], [False, False, True]), decoded([1, 9, 3]))
    shorter = (decoded([1, 2, 3]), decoded([1, 2]))
    assert compare([same, at_tie], torch.bfloat16).lossless
    assert compare([same, at_tie], torch.bfloat16).apart_at_near_tie == 1
    assert not compare([same, at_tie], torch.float32).lossless
    assert not compare([elsewhere], torch.bfloat16).lossless
    assert not compare([shorter], torch.bfloat16).lossless


def test_a_near_tie_is_one_step_of_the_dtype():
    assert is_near_tie(torch.tensor([20.0, 19.9, 3.0]), torch.bfloat16)  # a step at 20 is 0.156
    assert not is_near_tie(torch.tensor([20.0, 19.8, 3.0]), torch.bfloat16)
    assert not is_near_tie(torch.tensor([20.0, 19.9, 3.0]), torch.float32)
