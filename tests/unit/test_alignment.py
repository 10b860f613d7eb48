"""Which predictions count, against the contract's own words, written out as loops."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specforge.alignment import prediction_depth, teacher_rows
from specforge.records import FeatureBatch, FeatureRecord

# Runs, not independent bits: long turns and turns of one or two tokens are both common, and so are turns at an edge.
masks = st.lists(st.tuples(st.booleans(), st.integers(1, 6)), max_size=8).map(
    lambda runs: np.array([bit for bit, count in runs for _ in range(count)], dtype=np.bool_)
)
record_masks = masks.filter(len)
checked = settings(max_examples=50, deadline=None)


def turn_of(mask):
    """The number of the assistant turn that each token is in, None outside: a turn is a run of the mask."""
    turns, number = [], -1
    for at, bit in enumerate(mask):
        number += bool(bit and (at == 0 or not mask[at - 1]))
        turns.append(number if bit else None)
    return turns


def counts(mask, t, i):
    """(t, i) counts if x_{t+1} .. x_{t+2+i} all lie in one assistant turn."""
    if t + 2 + i >= len(mask):
        return False
    turns = {turn_of(mask)[j] for j in range(t + 1, t + 2 + i + 1)}
    return len(turns) == 1 and None not in turns


def counted(mask):
    return {(t, i) for t in range(len(mask)) for i in range(len(mask)) if counts(mask, t, i)}


@given(record_masks)
@checked
def test_depth_is_the_number_of_steps_that_count(mask):
    pairs = counted(mask)
    want = [sum((t, i) in pairs for i in range(len(mask))) for t in range(len(mask))]
    assert prediction_depth(mask).tolist() == want
    # depth stands for a set of steps: those that count must be the first ones, without a gap
    assert pairs == {(t, i) for t, depth in enumerate(want) for i in range(depth)}


@given(record_masks)
@checked
def test_teachers_are_the_union_over_all_counted_predictions(mask):
    rows = teacher_rows(mask).tolist()
    assert rows == sorted({t + 1 + i for t, i in counted(mask)})
    turns = turn_of(mask)
    assert rows == [j for j in range(1, len(mask) - 1) if turns[j] is not None and turns[j] == turns[j + 1]]


@given(st.lists(record_masks, min_size=1, max_size=5))
@checked
def test_packed_records_never_see_each_other(records):
    lengths = [len(mask) for mask in records]
    starts = np.cumsum([0, *lengths[:-1]])
    joined = np.concatenate(records)
    want_depth = np.concatenate([prediction_depth(mask) for mask in records])
    want_rows = np.concatenate([teacher_rows(mask) + start for mask, start in zip(records, starts, strict=True)])
    np.testing.assert_array_equal(prediction_depth(joined, lengths), want_depth)
    np.testing.assert_array_equal(teacher_rows(joined, lengths), want_rows)


def test_a_turn_that_ends_and_one_that_begins_at_a_records_edge_stay_apart():
    mask = np.ones(6, dtype=np.bool_)
    assert prediction_depth(mask).tolist() == [4, 3, 2, 1, 0, 0]
    assert prediction_depth(mask, [3, 3]).tolist() == [1, 0, 0, 1, 0, 0]
    assert teacher_rows(mask, [3, 3]).tolist() == [1, 4]
    assert teacher_rows(mask, [1, 1, 4]).tolist() == [3, 4]


def test_the_example_in_the_contract():
    """One turn A B C E behind two user tokens; E, its end, belongs to it."""
    mask = np.array([0, 0, 1, 1, 1, 1, 0], dtype=np.bool_)
    assert prediction_depth(mask).tolist() == [0, 3, 2, 1, 0, 0, 0]
    assert teacher_rows(mask).tolist() == [2, 3, 4]


@given(st.lists(record_masks, min_size=1, max_size=5))
@checked
def test_a_packed_batch_finds_the_teacher_of_every_prediction(records):
    """The teacher of (t, i) is the row captured for token t + 1 + i of the same record."""
    features = []
    for number, mask in enumerate(records):
        rows = torch.from_numpy(teacher_rows(mask))
        at = torch.stack([torch.full_like(rows, number), rows], dim=1).float()
        features.append(
            FeatureRecord(
                sample_id=number,
                token_ids=torch.arange(len(mask), dtype=torch.int32),
                loss_mask=torch.from_numpy(mask),
                aux=torch.zeros(len(mask), 6),
                last=at,
                teacher_top1=rows.int(),
                teacher_lse=rows.float(),
            )
        )
    batch = FeatureBatch.pack(features, torch.device("cpu"), torch.float32)
    start = 0
    for number, mask in enumerate(records):
        pairs = counted(mask)
        for t, i in pairs:
            row = int(batch.teacher_index[start + t + 1 + i])
            assert row >= 0
            assert batch.last[row].tolist() == [number, t + 1 + i]
            assert int(batch.teacher_top1[row]) == t + 1 + i
        assert batch.depth[start : start + len(mask)].tolist() == [
            sum((t, i) in pairs for i in range(len(mask))) for t in range(len(mask))
        ]
        assert batch.positions[start : start + len(mask)].tolist() == list(range(len(mask)))
        start += len(mask)
    assert int((batch.teacher_index >= 0).sum()) == len(batch.last)
