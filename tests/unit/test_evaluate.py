"""Acceptance by brute force, its figures on simulated conversations, the chain drafter against the unrolled step, and
the rule for equal texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from specforge.draft.unroll import unroll
from specforge.evaluate.acceptance import binned, confident_guesses, guesses, teacher_forced, walk
from specforge.evaluate.decode import GREEDY, Text, compare, is_near_tie
from specforge.evaluate.drafter import Drafter, Drafting
from specforge.evaluate.figures import MAX_DOMAINS, by_domain, calibration, calibration_error, figures, intervals
from specforge.evaluate.shape import Shape
from specforge.records import Acceptance, FeatureBatch, FeatureRecord
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
    # 0 -> 3 (three tokens), 3 -> 4 (one); 6 -> 7 (one), 7 -> 8 (one, though it stands: the turn ends); 9 -> 12 (three)
    assert walk(depth, accepted, [9, 4]).tolist() == [[6, 4], [3, 1]]


def all_sums(found):
    return [found.sample_ids_N, found.rows_NK, found.accepted_NK, found.walk_N2, found.known_N, found.bins_3B]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_sums_of_each_record_add_up_to_the_totals(seed):
    draft, head, kept, batch = agreeing(seed)
    found = teacher_forced(draft, head.embedding_VH, kept, [batch], STEPS)
    all_rows, all_accepted = [0] * STEPS, [0] * STEPS
    hits = hits_by_row(draft, head, kept, batch)
    record_of = [n for n, length in enumerate(batch.lengths) for _ in range(length)]
    rows_nk = np.zeros((len(batch.lengths), STEPS), dtype=np.int64)
    accepted_nk = rows_nk.copy()
    for t, i in hits:
        rows_nk[record_of[t], i] += 1
        accepted_nk[record_of[t], i] += all(hits[t, j] for j in range(i + 1))
        all_rows[i] += 1
        all_accepted[i] += all(hits[t, j] for j in range(i + 1))
    np.testing.assert_array_equal(found.rows_NK, rows_nk)
    np.testing.assert_array_equal(found.accepted_NK, accepted_nk)
    assert (found.rows, found.accepted) == (all_rows, all_accepted)
    first = batch.teacher_top1[batch.teacher_index[torch.nonzero(batch.depth > 0).squeeze(1) + 1]]
    assert found.known == int(torch.isin(first, kept).sum())
    assert found.sample_ids_N.tolist() == list(batch.sample_ids)


def test_lengths_are_those_of_fewer_steps():
    draft, head, kept, batch = agreeing()
    found = teacher_forced(draft, head.embedding_VH, kept, [batch], STEPS)
    assert found.lengths[-1] == found.length
    for k in range(1, STEPS + 1):
        fewer = teacher_forced(draft, head.embedding_VH, kept, [batch], k)
        assert found.lengths[k - 1] == pytest.approx(fewer.length, abs=1e-12)
    assert found.lengths[0] < found.lengths[2]


def test_calibration_changes_nothing_else_and_counts_every_first_guess():
    draft, head, kept, batch = agreeing()
    plain = teacher_forced(draft, head.embedding_VH, kept, [batch], STEPS)
    found = teacher_forced(draft, head.embedding_VH, kept, [batch], STEPS, calibrate=True)
    assert plain.bins_3B is None
    assert "calibration" not in figures(plain)
    for one, two in zip(all_sums(plain)[:-1], all_sums(found)[:-1], strict=True):
        np.testing.assert_array_equal(one, two)
    said = figures(found)
    assert sum(row["rows"] for row in said["calibration"]) == found.rows[0]
    assert sum(row["rows"] * row["accepted"] for row in said["calibration"]) == pytest.approx(found.accepted[0])
    hidden_RH = unroll(draft, head.embedding_VH, batch, 1)[0].hidden_RH
    with torch.no_grad():
        guess_R, confidence_R = confident_guesses(draft, hidden_RH, kept)
        want = draft.lm_head(draft.norm(hidden_RH)).softmax(-1).max(-1).values
    assert torch.equal(guess_R, guesses(draft, hidden_RH, kept))
    torch.testing.assert_close(confidence_R, want)


def rank_of_two(rank, meeting, results):
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    draft, head, kept, _, records = make(0.8, torch.float32)
    mine = [pack(records[3:]), None] if rank == 0 else [pack(records[:2]), pack(records[2:3])]
    found = teacher_forced(draft, head.embedding_VH, kept, mine, STEPS, calibrate=True)
    np.savez(f"{results}/{rank}.npz", *all_sums(found))
    dist.destroy_process_group()


def test_two_ranks_both_have_what_one_rank_finds(tmp_path):
    torch.multiprocessing.spawn(rank_of_two, (tmp_path / "meeting", tmp_path), nprocs=2)
    draft, head, kept, _, records = make(0.8, torch.float32)
    one = teacher_forced(draft, head.embedding_VH, kept, [pack(records)], STEPS, calibrate=True)
    zero, other = (list(np.load(tmp_path / f"{rank}.npz").values()) for rank in (0, 1))
    for mine, theirs, want in zip(zero, other, all_sums(one), strict=True):
        np.testing.assert_array_equal(mine, theirs)
        np.testing.assert_allclose(mine, want, rtol=1e-5)  # integers, and sums of fp32 probabilities


SIMULATED = 4  # draft steps
TURN = 40  # rows of a simulated conversation, at most


def simulated(random, conversations):
    """(acceptance by conversation, the same with every row as its own conversation). A conversation has its own chance
    p that a draft is the target's, uniform in 0.2 .. 0.9, and at most TURN rows, so its rows resemble each other."""
    p_N = random.uniform(0.2, 0.9, conversations)
    lengths_N = random.integers(5, TURN + 1, conversations)
    record_R = np.repeat(np.arange(conversations), lengths_N)
    hits_RK = random.random((len(record_R), SIMULATED)) < p_N[record_R, None]
    accepted_RK = np.cumprod(hits_RK, axis=1)
    starts_N = np.cumsum(lengths_N) - lengths_N

    def acceptance(rows_NK, accepted_NK, walk_N2):
        ids = np.arange(len(rows_NK))
        return Acceptance(
            sample_ids_N=ids, rows_NK=rows_NK, accepted_NK=accepted_NK, walk_N2=walk_N2, known_N=rows_NK[:, 0]
        )

    by_row = acceptance(np.ones_like(accepted_RK), accepted_RK, np.ones((len(accepted_RK), 2), dtype=np.int64))
    walk_N2 = walk(np.full(len(record_R), TURN), accepted_RK.sum(1), lengths_N.tolist())
    rows_NK = np.repeat(lengths_N[:, None], SIMULATED, axis=1)
    return acceptance(rows_NK, np.add.reduceat(accepted_RK, starts_N), walk_N2), by_row


def true_lengths():
    """E[p^j] of a uniform p, added up: 1 + the chance that the first j drafts are the target's, j = 1 .. k."""
    low, high = 0.2, 0.9
    chances = [(high ** (j + 1) - low ** (j + 1)) / ((j + 1) * (high - low)) for j in range(1, SIMULATED + 1)]
    return 1 + np.cumsum(chances)


def test_intervals_hold_the_truth_as_often_as_they_say_and_rows_alone_do_not():
    """Of 300 data sets of 60 conversations; the share found has a standard error of 1.3 points at 95 %."""
    random, truth = np.random.default_rng(0), true_lengths()
    walks = [simulated(random, 2000)[0].walk_N2.sum(0) for _ in range(20)]
    true_walk = np.sum(walks, axis=0)[0] / np.sum(walks, axis=0)[1]
    held, held_by_row, held_walk = np.zeros(SIMULATED), np.zeros(SIMULATED), 0
    for _ in range(300):
        found, by_row = simulated(random, 60)
        assert found.lengths == pytest.approx(by_row.lengths)
        for share, acceptance in ((held, found), (held_by_row, by_row)):
            low_K, high_K = np.array(intervals(acceptance)[0]).T
            share += (low_K <= truth) & (truth <= high_K)
        low, high = intervals(found)[1]
        held_walk += low <= true_walk <= high
    assert (held / 300 > 0.90).all(), held
    assert (held / 300 < 0.99).all(), held
    assert 0.90 < held_walk / 300 < 0.99
    assert (held_by_row / 300 < 0.80).all(), held_by_row


def test_intervals_are_the_same_each_time_and_narrow_with_more_text():
    few, many = (simulated(np.random.default_rng(1), n)[0] for n in (50, 5000))
    assert intervals(few) == intervals(few)
    widths = [[high - low for low, high in intervals(found)[0]] for found in (few, many)]
    for wide, narrow in zip(*widths, strict=True):
        assert 5 < wide / narrow < 20  # the root of 100
    nothing = few.of(np.zeros(50, dtype=bool))
    assert intervals(nothing) == ([[1.0, 1.0]] * SIMULATED, [1.0, 1.0])
    assert figures(nothing)["acceptance_length"] == 1.0


def test_a_calibrated_draft_has_no_error_and_a_distorted_one_has():
    random = np.random.default_rng(2)
    confidence_R = random.beta(2, 1, 200_000)
    hit_R = random.random(200_000) < confidence_R
    right = binned(confidence_R, hit_R)
    assert calibration_error(right) < 0.005  # chance alone: about sqrt(0.2 / 20,000) a bin
    for row in calibration(right):
        assert row["accepted"] == pytest.approx(row["confidence"], abs=0.03)
    assert sum(row["rows"] for row in calibration(right)) == 200_000
    too_sure = binned(confidence_R**0.5, hit_R)
    want = float((confidence_R**0.5 - confidence_R).mean())
    assert calibration_error(too_sure) == pytest.approx(want, abs=0.005)
    assert want > 0.1


def test_bins_without_rows_are_left_out_and_one_is_in_the_last():
    found = calibration(binned(np.array([1.0, 0.95, 0.31], dtype=np.float32), np.array([True, False, True])))
    assert [(row["accepted"], row["rows"]) for row in found] == [(1.0, 1), (0.5, 2)]
    assert found[1]["confidence"] == pytest.approx(0.975)
    assert calibration_error(binned(np.zeros(0), np.zeros(0, dtype=bool))) == 0.0


def test_domains_add_up_to_the_total():
    found, _ = simulated(np.random.default_rng(3), 90)
    domains = {n: ("code", "chat", "")[n % 3] for n in range(80)}  # the others are not named at all
    said = figures(found, domains)["by_domain"]
    assert set(said) == {"code", "chat", "(none)"}
    assert sum(part["predictions"] for part in said.values()) == found.rows[0]
    assert sum(part["conversations"] for part in said.values()) == 90
    for j in range(SIMULATED):
        accepted = [part["acceptance_by_position"][j] * part["predictions"] for part in said.values()]
        assert sum(accepted) == pytest.approx(found.accepted[j])
    parts = by_domain(found, domains)
    for name in ("code", "chat"):
        alone = found.of(np.array([domains.get(n) == name for n in range(90)]))
        assert said[name]["acceptance_length"] == parts[name].length == alone.length
        assert said[name]["interval"] == intervals(alone)[0][-1]


def test_one_domain_is_the_total_and_many_small_ones_have_a_common_name():
    found, _ = simulated(np.random.default_rng(4), 50)
    assert "by_domain" not in figures(found)
    assert "by_domain" not in figures(found, dict.fromkeys(range(50), "chat"))
    parts = by_domain(found, {n: f"d{n}" for n in range(50)})
    assert len(parts) == MAX_DOMAINS
    assert list(parts)[-1] == "(others)"
    assert sum(part.rows[0] for part in parts.values()) == found.rows[0]


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
    shape = Shape.chain(STEPS)
    drafter = Drafter(Drafting(draft=draft, embedding_VH=head.embedding_VH, kept_D=kept, shape=shape))
    start = 0
    for piece in pieces:  # seen at once, or bit by bit as decoding does
        drafter.see({0: (aux[start : start + piece], ids[start + 1 : start + piece + 1].tolist())})
        start += piece
    proposed = drafter.grow({0: GREEDY})[0].tokens[1:]
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
    return Text(prompt=[], tokens=tokens, near_ties=list(ties) or [False] * len(tokens))


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
