"""Which records share a packed row, and which rank trains on it: pure functions, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

WINDOW = 256  # records among which the best fit is sought: more would pack the same company in every epoch

Row = Sequence[int]  # record indices


def pack_rows(lengths: NDArray[np.int64], row_tokens: int, seed: int, epoch: int) -> list[Row]:
    """All records once, in rows of at most `row_tokens` tokens (a longer record has a row of its own).

    First-fit decreasing within windows of a shuffled order; the rows are shuffled again. Depends on nothing but the
    arguments, so every number of ranks trains on the same rows in the same order."""
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    rows: list[list[int]] = []
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        first, room = len(rows), list[int]()
        for record in window[np.argsort(-lengths[window], kind="stable")].tolist():
            length = int(lengths[record])
            place = next((at for at, free in enumerate(room) if free >= length), None)
            if place is None:
                rows.append([record])
                room.append(row_tokens - length)
            else:
                rows[first + place].append(record)
                room[place] -= length
    return [rows[at] for at in random.permutation(len(rows))]


def share_out(rows: Sequence[Row], rows_per_step: int, world: int) -> list[list[list[Row]]]:
    """[optimizer step][slot][rank] -> row. `rows_per_step` is a multiple of `world`; where the last step has fewer
    rows, empty ones fill it up."""
    steps = []
    for start in range(0, len(rows), rows_per_step):
        chosen = list(rows[start : start + rows_per_step])
        chosen += [[]] * (-len(chosen) % rows_per_step)
        steps.append([chosen[at : at + world] for at in range(0, rows_per_step, world)])
    return steps


def in_batches(lengths: Sequence[int], tokens_per_batch: int, max_records: int = 256) -> list[range]:
    """Runs of consecutive records that fit into one forward pass of the target. A record longer than the budget is
    refused before (its batch would not fit)."""
    batches, start, tokens = [], 0, 0
    for at, length in enumerate(lengths):
        if at > start and (tokens + length > tokens_per_batch or at - start == max_records):
            batches.append(range(start, at))
            start, tokens = at, 0
        tokens += length
    if len(lengths) > start:
        batches.append(range(start, len(lengths)))
    return batches
