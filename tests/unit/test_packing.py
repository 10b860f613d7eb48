"""Packed rows, and their sharing-out over ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specforge.features.packing import WINDOW, pack_rows, share_out

lengths_of = st.lists(st.integers(1, 60), max_size=60).map(lambda found: np.array(found, dtype=np.int64))
checked = settings(max_examples=50, deadline=None)


def chat_lengths(count, seed=0, mean=300.0, sigma=0.8, longest=2048):
    """Lognormal with the given mean, cut at the maximum length as tokenization does."""
    drawn = np.random.default_rng(seed).lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(drawn, 8, longest).astype(np.int64)


@given(lengths_of, st.integers(8, 80), st.integers(0, 5), st.integers(0, 5))
@checked
def test_every_record_once_and_within_the_budget(lengths, row_tokens, seed, epoch):
    rows = pack_rows(lengths, row_tokens, seed, epoch)
    assert sorted(record for row in rows for record in row) == list(range(len(lengths)))
    assert all(rows)
    for row in rows:
        assert sum(lengths[record] for record in row) <= row_tokens or len(row) == 1


def test_a_record_that_is_too_long_has_a_row_of_its_own():
    rows = pack_rows(np.array([5, 100, 5]), 50, seed=0, epoch=0)
    assert [1] in [list(row) for row in rows]
    assert sorted(map(len, rows)) == [1, 2]


def test_rows_follow_from_the_arguments_alone():
    lengths = chat_lengths(3 * WINDOW)
    first = pack_rows(lengths, 2048, seed=3, epoch=1)
    np.random.seed(7)  # the global generator is neither read nor moved
    state = np.random.get_state()[1].tolist()
    assert pack_rows(lengths.copy(), 2048, seed=3, epoch=1) == first
    assert np.random.get_state()[1].tolist() == state


OTHERS = [{"seed": 3, "epoch": 2}, {"seed": 4, "epoch": 1}, {"seed": 1, "epoch": 3}]


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("count", [200, 500])
def test_epochs_and_seeds_differ_in_order(other, count):
    lengths = chat_lengths(count)
    first, second = pack_rows(lengths, 2048, seed=3, epoch=1), pack_rows(lengths, 2048, **other)
    in_place = sum(first[at] == second[at] for at in range(min(len(first), len(second))))
    assert in_place < 0.25 * len(first)


@pytest.mark.parametrize("other", OTHERS)
def test_epochs_and_seeds_differ_in_company(other):
    """Where there is more than one window, who shares a row with whom changes too."""
    lengths = chat_lengths(4 * WINDOW)
    pair = [pack_rows(lengths, 2048, seed=3, epoch=1), pack_rows(lengths, 2048, **other)]
    company = [{frozenset(row) for row in rows if len(row) > 1} for rows in pair]
    assert len(company[0] & company[1]) < 0.05 * len(company[0])


@pytest.mark.parametrize("seed", [0, 1])
def test_pad_share_is_below_two_percent(seed):
    """If every row were filled up to the budget, how much of it would be padding."""
    lengths = chat_lengths(20_000, seed)
    assert 270 < lengths.mean() < 310
    rows = pack_rows(lengths, 2048, seed, epoch=0)
    pad = 1 - lengths.sum() / (len(rows) * 2048)
    assert 0 <= pad < 0.02
    assert max(lengths[list(row)].sum() for row in rows) <= 2048


def in_order(steps, world):
    """The rows in the order of training: step by step, slot by slot, rank by rank, without the empty ones."""
    found = []
    for step in steps:
        for slot in step:
            assert len(slot) == world
            found += [tuple(row) for row in slot if row]
    return found


@given(st.integers(0, 40), st.sampled_from([4, 8, 12]))
@checked
def test_every_number_of_ranks_trains_on_the_same_rows_in_the_same_order(count, batch_size):
    rows = [[2 * n, 2 * n + 1] for n in range(count)]
    for world in (1, 2, 4):
        steps = share_out(rows, batch_size, world)
        assert in_order(steps, world) == [tuple(row) for row in rows]
        assert [len(step) for step in steps] == [batch_size // world] * -(-count // batch_size)
    # and each optimizer step holds the same rows whatever the number of ranks
    per_world = [
        [sorted(in_order([step], world)) for step in share_out(rows, batch_size, world)] for world in (1, 2, 4)
    ]
    assert per_world[0] == per_world[1] == per_world[2]
    assert rows == [[2 * n, 2 * n + 1] for n in range(count)]  # the argument is left as it was
