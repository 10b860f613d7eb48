"""The unrolled training step: what the draft will do when served, step by step, over a whole packed row at once.

    position t            0        1        2        3
    step 0  feature      fc(a0)   fc(a1)   fc(a2)   fc(a3)
            embedding    e(x1)    e(x2)    e(x3)    e(x4)
            predicts     x2       x3       x4       x5       teacher: the target's own logits at t + 1
    step i  feature      own output of step i - 1, before the final norm (after it with `norm_output`)
            embedding    e(x_{t+1+i})
            predicts     x_{t+2+i}                           teacher: the target's own logits at t + 1 + i
            position id  t + i
            attends      step-0 keys of positions <= t, and steps 1..i at its own t

Only rows that count are computed: step i needs rows R_i = {t : depth[t] > i}, nested; step 0 needs keys and values of
every token, but queries and the MLP only at R_0. This is exact: a row of step i + 1 reads nothing but its own earlier
steps and the step-0 keys.

Row counts differ at every step, and libraries compile a matrix product anew for each shape (milliseconds on a CPU). So
rows are filled up to a multiple of 64 by repeating the last one; what these compute is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge.draft.attention import Flash, attend, attend_packed, kernel_for
from specforge.draft.model import Eagle3Draft
from specforge.records import FeatureBatch, sent

MULTIPLE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class UnrolledStep:
    """Step i of the rows that count."""

    rows_R: Tensor  # [R] on the host: positions in the packed row, ascending
    hidden_RH: Tensor  # before the final norm
    teacher_R: Tensor  # [R] on the host: the teacher row (index into the batch's [S, ...] tensors) of each prediction


def unroll(
    draft: Eagle3Draft, embedding_VH: Tensor, batch: FeatureBatch, steps: int, kernel: Flash | None = None
) -> list[UnrolledStep]:
    """All steps' hidden states; steps in which no row counts are empty. Never waits for the device. `kernel` computes
    the attention of all records in one call. The default on a GPU is the kernel that fits it; a CPU calls its own
    kernel once for each record."""
    spare = -len(batch.token_ids) % MULTIPLE
    tokens_T, positions_T, depth_T = (F.pad(x, (0, spare)) for x in (batch.token_ids, batch.positions, batch.depth))
    device = tokens_T.device
    next_token_T = torch.roll(tokens_T, -1)  # of a record's last token it is wrong, and read by no row that counts
    feature_TH = draft.fuse(F.pad(batch.aux, (0, 0, 0, spare)))
    x_T2H = draft.attention_input(F.embedding(next_token_T, embedding_VH), feature_TH)
    keys_TKE, values_TKE = draft.keys_values(x_T2H, positions_T)
    if kernel is None and device.type != "cpu":
        kernel = kernel_for(keys_TKE).over(batch.lengths, len(tokens_T), device)

    rows_R, count = filled(torch.nonzero(depth_T > 0).squeeze(1))
    at_R = sent(rows_R, device)
    feature_RH, x_R2H = feature_TH[at_R], x_T2H[at_R]
    own_keys: list[Tensor] = []
    own_values: list[Tensor] = []
    done = []
    for i in range(steps):
        if i > 0:
            inside_R, count = filled(torch.nonzero(depth_T[rows_R[:count]] > i).squeeze(1))
            rows_R, inside_R = rows_R[inside_R], sent(inside_R, device)
            at_R, feature_RH = at_R[inside_R], feature_RH[inside_R]
            x_R2H = draft.attention_input(F.embedding(tokens_T[at_R + 1 + i], embedding_VH), feature_RH)
            key_RKE, value_RKE = draft.keys_values(x_R2H, positions_T[at_R] + i)
            own_keys = [key[inside_R] for key in own_keys] + [key_RKE]
            own_values = [value[inside_R] for value in own_values] + [value_RKE]
        q_RNE = draft.queries(x_R2H, positions_T[at_R] + i)
        inputs = (q_RNE, keys_TKE, values_TKE, own_keys, own_values)
        if kernel:
            attended_RNE = attend_packed(*inputs, at_R[:count], kernel)
        else:
            attended_RNE = attend(*inputs, at_R, record_segments(rows_R[:count], batch.lengths))
        hidden_RH = draft.finish(feature_RH, attended_RNE)
        feature_RH = draft.feed_back(hidden_RH)
        done.append(
            UnrolledStep(
                rows_R=rows_R[:count],
                hidden_RH=hidden_RH[:count],
                teacher_R=batch.teacher_index[rows_R[:count] + 1 + i],
            )
        )
    return done


def filled(rows_R: Tensor) -> tuple[Tensor, int]:
    """(rows filled up to a multiple of 64 by repeating the last, their own number)."""
    count = len(rows_R)
    return torch.cat([rows_R, rows_R[-1:].expand(-count % MULTIPLE if count else 0)]), count


def record_segments(rows_R: Tensor, lengths: Sequence[int]) -> list[tuple[slice, slice]]:
    """(slice of rows, slice of tokens) of each record that has rows; the tokens end with the record's last row."""
    rows, segments, start, first = rows_R.tolist(), [], 0, 0
    for length in lengths:
        last = first
        while last < len(rows) and rows[last] < start + length:
            last += 1
        if last > first:
            segments.append((slice(first, last), slice(start, rows[last - 1] + 1)))
        start, first = start + length, last
    return segments
