"""Which records go through the target together, and what becomes of a batch that memory does not hold."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specforge.errors import OutOfMemoryError
from specforge.features import aside
from specforge.features.packing import CAPTURE_WINDOW, in_batches
from specforge.features.passes import Passes
from specforge.features.sources import LiveSource
from specforge.records import Example, FeatureRecord

LENGTHS = st.lists(st.integers(1, 60), max_size=200)


def chat_lengths(count: int) -> np.ndarray:
    drawn = np.random.default_rng(0).lognormal(5.5, 0.8, count)
    return np.clip(drawn, 8, 2048).astype(np.int64)


@given(LENGTHS, st.integers(60, 200), st.integers(1, 20))
@settings(max_examples=200, deadline=None)
def test_every_record_once_within_both_bounds_and_longest_first(lengths, budget, most):
    lengths = np.array(lengths, dtype=np.int64)
    batches = in_batches(lengths, budget, most)
    assert sorted(at for batch in batches for at in batch) == list(range(len(lengths)))  # the last partial one too
    for batch in batches:
        assert 1 <= len(batch) <= most
        assert lengths[batch].sum() <= budget
        assert (np.diff(lengths[batch]) <= 0).all()
    firsts = [lengths[batch[0]] for batch in batches]  # all of it is one window
    assert firsts == sorted(firsts, reverse=True)


def test_windows_keep_to_the_order_of_the_data():
    lengths = chat_lengths(2 * CAPTURE_WINDOW + 100)
    batches = in_batches(lengths, 8192)
    windows = [{at // CAPTURE_WINDOW for at in batch} for batch in batches]
    assert all(len(window) == 1 for window in windows)
    order = [window.pop() for window in windows]
    assert order == sorted(order)
    assert set(order) == {0, 1, 2}


def test_passes_are_full():
    """No padding at all; and of the tokens that a pass may hold, over 99 % are used (0.996; next-fit over the
    data's order: 0.96)."""
    lengths = chat_lengths(3 * CAPTURE_WINDOW)
    batches = in_batches(lengths, 8192)
    assert lengths.sum() / (len(batches) * 8192) > 0.99


def test_a_plan_follows_from_the_lengths_alone():
    lengths = chat_lengths(3000)
    assert in_batches(lengths, 4096) == in_batches(lengths.copy(), 4096)


def test_a_record_that_is_too_long_has_a_pass_of_its_own():
    assert in_batches(np.array([5, 100, 5]), 50) == [[1], [0, 2]]


@dataclass
class SmallMemory:
    """An engine whose memory holds `room` tokens; its states are the sample's number."""

    room: int
    tokens_per_batch: int = 1000
    calls: list[int] = field(default_factory=list)

    def capture(self, examples):
        tokens = sum(len(example.token_ids) for example in examples)
        self.calls.append(tokens)
        if tokens > self.room:
            raise OutOfMemoryError("full", where="here", fix="none")
        return [
            FeatureRecord(
                sample_id=example.sample_id,
                token_ids=torch.from_numpy(example.token_ids),
                loss_mask=torch.from_numpy(example.loss_mask),
                aux=torch.full((len(example.token_ids), 6), float(example.sample_id)),
                last=torch.zeros(0, 2),
                teacher_top1=torch.zeros(0, dtype=torch.int32),
                teacher_lse=torch.zeros(0),
            )
            for example in examples
        ]


def examples_of(lengths) -> list[Example]:
    return [
        Example(sample_id=at, token_ids=np.ones(n, dtype=np.int32), loss_mask=np.ones(n, dtype=np.bool_))
        for at, n in enumerate(lengths)
    ]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(10, 200))
@settings(max_examples=200, deadline=None)
def test_halving_captures_all_that_fits_alone(lengths, room):
    order = sorted(range(len(lengths)), key=lambda at: -lengths[at])
    got, too_large = {}, set()
    for captured in Passes(SmallMemory(room), examples_of(lengths)).run(order):
        for at, record in captured:
            if record == aside.TOO_LARGE:
                too_large.add(at)
            else:
                got[at] = int(record.aux[0, 0])
    assert got == {at: at for at in order if lengths[at] <= room}
    assert too_large == {at for at in order if lengths[at] > room}


def test_what_did_not_fit_once_is_not_tried_again():
    lengths = [50] * 8
    engine = SmallMemory(room=210)
    passes = Passes(engine, examples_of(lengths))
    for _ in range(3):
        assert sorted(at for captured in passes.run(range(8)) for at, _ in captured) == list(range(8))
    assert engine.calls == [400, 200, 200, 200, 200, 200, 200]


def test_the_live_source_halves_too_and_names_what_is_too_large():
    lengths = [40, 30, 20]
    source = LiveSource(SmallMemory(room=45), examples_of(lengths), tp_rank=0)
    (records,) = source.batches([[[2, 0, 1]]])
    assert [int(record.aux[0, 0]) for record in records] == [2, 0, 1]
    source = LiveSource(SmallMemory(room=35), examples_of(lengths), tp_rank=0)
    with pytest.raises(OutOfMemoryError, match="40 tokens"):
        list(source.batches([[[2, 0, 1]]]))
