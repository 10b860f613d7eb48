"""Which predictions count: the one place that turns a loss mask into rows. Capture, training and evaluation call it.

Tokens x_0 x_1 ... ; at draft step i, row t reads x_{t+1+i} and predicts x_{t+2+i}. Serving asks for that prediction
only while x_{t+1} .. x_{t+2+i} lie in one assistant turn (the end-of-turn token belongs to the turn):

    tokens      u  u  A  B  C  E  u        A B C E: one assistant turn
    loss mask   0  0  1  1  1  1  0
    depth       0  3  2  1  0  0  0        row t takes part in steps 0 .. depth[t] - 1
    teacher     0  0  1  1  1  0  0        x_j and x_{j+1} in the turn: the target's logits at j are a teacher
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def prediction_depth(loss_mask_T: NDArray[np.bool_], lengths: Sequence[int] | None = None) -> NDArray[np.int64]:
    """[T] number of consecutive draft steps of row t that count: R_i = {t : depth[t] > i}.

    loss_mask_T  True on assistant tokens, end of turn included; packed records one after the other
    lengths      tokens of each record (default: one record); a turn never crosses a record's end
    """
    total = len(loss_mask_T)
    ends = np.cumsum(lengths if lengths is not None else [total])
    # remaining_T[t]: assistant tokens from t on without a gap, inside t's record
    closed_T = np.concatenate([loss_mask_T, [False]])
    stop_T = np.where(closed_T, total, np.arange(total + 1))
    stop_T = np.minimum.accumulate(stop_T[::-1])[::-1][:total]
    record_end_T = np.repeat(ends, np.diff(ends, prepend=0))
    remaining_T = np.minimum(stop_T, record_end_T) - np.arange(total)
    following_T = np.zeros(total, dtype=np.int64)
    following_T[:-1] = remaining_T[1:]
    following_T[ends[ends > 0] - 1] = 0  # a record's last token has no successor
    return np.maximum(following_T - 1, 0)


def teacher_rows(loss_mask_T: NDArray[np.bool_], lengths: Sequence[int] | None = None) -> NDArray[np.int64]:
    """[S] ascending positions j >= 1 of a record with x_j and x_{j+1} in one assistant turn: the union of all steps'
    teachers. Row t of step i is taught by the target's own logits at j = t + 1 + i."""
    return np.flatnonzero(prediction_depth(loss_mask_T, lengths) > 0) + 1
