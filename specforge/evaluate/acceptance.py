"""Teacher-forced acceptance: one unrolled pass over held-out features gives every number of steps at once.

length(k) = 1 + sum over j = 1..k of P(the first j drafts all equal the target's own choice), over rows where step j - 1
counts; a teacher outside the draft vocabulary is a miss. The walk starts at each turn's first position and advances by
accepted + 1: this, not the uniform mean over rows, is what decoding meets on text that the target wrote.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from specforge.draft.model import Eagle3Draft
from specforge.draft.unroll import unroll
from specforge.records import Acceptance, FeatureBatch

HEAD_ROWS = 2048
BINS = 10  # of the draft's probability
Sums = tuple[NDArray[np.int64], ...]  # of each record, see `_by_record`


@torch.no_grad()
def teacher_forced(
    draft: Eagle3Draft,
    embedding_VH: Tensor,
    kept_D: Tensor,
    batches: Iterable[FeatureBatch | None],
    steps: int,
    calibrate: bool = False,
) -> Acceptance:
    """Over all ranks' batches; every rank gets the same result. `calibrate` fills the bins: it costs a softmax."""
    found, bins_3B = [_nothing(steps)], np.zeros((3, BINS))
    for batch in batches:
        if batch is None:
            continue
        accepted_T = torch.zeros_like(batch.depth)  # on the host: drafts in a row that the target would accept
        for i, step in enumerate(unroll(draft, embedding_VH, batch, steps)):
            teacher_R = batch.teacher_top1[step.teacher_R]
            if calibrate and i == 0:
                guess_R, confidence_R = confident_guesses(draft, step.hidden_RH, kept_D)
                bins_3B += binned(confidence_R.cpu().numpy(), (guess_R.cpu() == teacher_R).numpy())
            else:
                guess_R = guesses(draft, step.hidden_RH, kept_D)
            hit_R = guess_R.cpu() == teacher_R
            accepted_T[step.rows_R] += (hit_R & (accepted_T[step.rows_R] == i)).long()
        found.append(_by_record(batch, accepted_T, kept_D, steps))
    of_ranks: list[Any] = [(found, bins_3B)]
    if dist.is_initialized():
        of_ranks = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, (found, bins_3B))
    pieces = [piece for of_rank, _ in of_ranks for piece in of_rank]
    sample_ids_N, *sums = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
    order_N = np.argsort(sample_ids_N, kind="stable")  # the same for every number of ranks
    rows_NK, accepted_NK, walk_N2, known_N = (array[order_N] for array in sums)
    return Acceptance(
        sample_ids_N=sample_ids_N[order_N],
        rows_NK=rows_NK,
        accepted_NK=accepted_NK,
        walk_N2=walk_N2,
        known_N=known_N,
        bins_3B=np.sum([bins for _, bins in of_ranks], axis=0) if calibrate else None,
    )


def _nothing(steps: int) -> Sums:
    return tuple(np.zeros(shape, dtype=np.int64) for shape in ((0,), (0, steps), (0, steps), (0, 2), (0,)))


def _by_record(batch: FeatureBatch, accepted_T: Tensor, kept_D: Tensor, steps: int) -> Sums:
    """(sample ids, rows, accepted, walk, known) of the batch's records."""
    depth, accepted = batch.depth.numpy(), accepted_T.numpy()
    first_S = batch.teacher_index[torch.nonzero(batch.depth > 0).squeeze(1) + 1]
    known = np.zeros(len(depth), dtype=np.int64)
    known[depth > 0] = torch.isin(batch.teacher_top1[first_S], kept_D.cpu()).numpy()
    starts_N = np.cumsum((0, *batch.lengths[:-1]))

    def beyond(count_T: NDArray[np.int64]) -> NDArray[np.int64]:
        """[N, K] tokens of a record whose count is over k = 0 .. K - 1."""
        return np.stack([np.add.reduceat((count_T > k).astype(np.int64), starts_N) for k in range(steps)], axis=1)

    return (
        np.array(batch.sample_ids, dtype=np.int64),
        beyond(depth),
        beyond(accepted),
        walk(depth, accepted, batch.lengths),
        np.add.reduceat(known, starts_N),
    )


@torch.no_grad()
def surprise(draft: Eagle3Draft, embedding_VH: Tensor, kept_D: Tensor, batches: Iterable[FeatureBatch]) -> Tensor:
    """[R] nats: minus the log of the probability that draft step 0 gives to the target's own choice; rows whose choice
    is outside the draft vocabulary are left out. Finer than acceptance: a few hundred rows tell two inputs apart."""
    found, host_D = [], kept_D.cpu()
    for batch in batches:
        step = unroll(draft, embedding_VH, batch, 1)[0]
        teacher_R = batch.teacher_top1[step.teacher_R]
        known_R = torch.isin(teacher_R, host_D)
        wanted_R = torch.searchsorted(host_D, teacher_R[known_R]).to(kept_D.device)
        hidden_RH = step.hidden_RH[known_R.to(kept_D.device)]
        pieces = zip(hidden_RH.split(HEAD_ROWS), wanted_R.split(HEAD_ROWS), strict=True)
        found += [F.cross_entropy(draft.lm_head(draft.norm(h)).float(), w, reduction="none") for h, w in pieces]
    return torch.cat(found) if found else torch.empty(0)


def guesses(draft: Eagle3Draft, hidden_RH: Tensor, kept_D: Tensor) -> Tensor:
    """[R] the target's id of the draft's first choice."""
    best = [draft.lm_head(draft.norm(piece)).argmax(-1) for piece in hidden_RH.split(HEAD_ROWS)]
    return kept_D[torch.cat(best)] if best else kept_D[:0]


def confident_guesses(draft: Eagle3Draft, hidden_RH: Tensor, kept_D: Tensor) -> tuple[Tensor, Tensor]:
    """`guesses`, and the probability [R] that the draft gives to each, over its own vocabulary."""
    ids, confidence = [kept_D[:0]], [torch.zeros(0, device=kept_D.device)]
    for piece in hidden_RH.split(HEAD_ROWS):
        logits_RD = draft.lm_head(draft.norm(piece)).float()
        best_R, at_R = logits_RD.max(-1)
        ids.append(kept_D[at_R])
        confidence.append((best_R - logits_RD.logsumexp(-1)).exp())
    return torch.cat(ids), torch.cat(confidence)


def binned(confidence_R: NDArray[np.floating], hit_R: NDArray[np.bool_]) -> NDArray[np.float64]:
    """[3, B] of each of B equally wide bins of the probability: sum of probabilities, hits, rows."""
    bin_R = np.minimum((confidence_R * BINS).astype(np.int64), BINS - 1)
    weights = (confidence_R.astype(np.float64), hit_R.astype(np.float64), None)
    return np.stack([np.bincount(bin_R, w, minlength=BINS).astype(np.float64) for w in weights])


def walk(depth_T: NDArray[np.int64], accepted_T: NDArray[np.int64], lengths: Iterable[int]) -> NDArray[np.int64]:
    """[N, 2] (tokens, passes of the target) of each record when every turn is walked through from its first
    position."""
    found, start = list[tuple[int, int]](), 0
    for length in lengths:
        tokens, passes, t = 0, 0, start
        while t < start + length:
            if depth_T[t] == 0:
                t += 1
                continue
            advance = min(int(accepted_T[t]) + 1, int(depth_T[t]))  # behind a turn's last token nothing is written
            tokens, passes, t = tokens + advance, passes + 1, t + advance
        found.append((tokens, passes))
        start += length
    return np.array(found, dtype=np.int64)
