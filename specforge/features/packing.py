"""Which records share a packed row or a pass of the target, and which rank trains on a row: pure functions, the same
on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from specforge.records import MAX_EXAMPLES

WINDOW = 256  # records among which the best fit is sought: more would pack the same company in every epoch
CAPTURE_WINDOW = 2048  # the same for passes of the target, whose company does not matter. Part of the store's format:
# a resume plans its batches anew, from the lengths and the manifest's tokens_per_batch

Row = Sequence[int]  # record indices


def pack_rows(lengths: NDArray[np.int64], row_tokens: int, seed: int, epoch: int) -> list[Row]:
    """All records once, in rows of at most `row_tokens` tokens (a longer record has a row of its own).

    First-fit decreasing within windows of a shuffled order; the rows are shuffled again. Depends on nothing but the
    arguments, so every number of ranks trains on the same rows in the same order."""
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    rows: list[list[int]] = []
    for start in range(0, len(order), WINDOW):
        rows += _first_fit(order[start : start + WINDOW], lengths, row_tokens, WINDOW)
    return [rows[at] for at in random.permutation(len(rows))]


def in_batches(lengths: NDArray[np.int64], tokens_per_batch: int, max_records: int = MAX_EXAMPLES) -> list[list[int]]:
    """Which records go through the target together: whole, unpadded, at most `tokens_per_batch` tokens and
    `max_records` records a pass. A longer record has a pass of its own (callers refuse it before).

    First-fit decreasing within windows of the data's order. So a window's largest pass is its first: memory that does
    not suffice is known at once, and what is left for the slowest replica at the end is small."""
    batches: list[list[int]] = []
    for start in range(0, len(lengths), CAPTURE_WINDOW):
        window = np.arange(start, min(start + CAPTURE_WINDOW, len(lengths)))
        batches += _first_fit(window, lengths, tokens_per_batch, max_records)
    return batches


def _first_fit(window: NDArray[np.int64], lengths: NDArray[np.int64], tokens: int, max_records: int) -> list[list[int]]:
    """First-fit decreasing: longest first (of equals the earlier), each into the first group that has room."""
    groups, room = list[list[int]](), list[int]()
    for record in window[np.argsort(-lengths[window], kind="stable")].tolist():
        length = int(lengths[record])
        place = next((at for at, free in enumerate(room) if free >= length and len(groups[at]) < max_records), None)
        if place is None:
            groups.append([record])
            room.append(tokens - length)
        else:
            groups[place].append(record)
            room[place] -= length
    return groups


def share_out(rows: Sequence[Row], batch_size: int, world: int) -> list[list[list[Row]]]:
    """[optimizer step][slot][rank] -> row. `batch_size` is a multiple of `world`; where the last step has fewer
    rows, empty ones fill it up."""
    steps = []
    for start in range(0, len(rows), batch_size):
        chosen = list(rows[start : start + batch_size])
        chosen += [[]] * (-len(chosen) % batch_size)
        steps.append([chosen[at : at + world] for at in range(0, batch_size, world)])
    return steps
