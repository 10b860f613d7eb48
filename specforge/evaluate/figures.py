"""What is said of teacher-forced acceptance: with intervals, by domain, and how far the draft's own probability can be
believed. All of it follows from the sums of each record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specforge.records import Acceptance

RESAMPLES, SEED = 1000, 0
BOUNDS = (2.5, 97.5)  # percentiles: 95 %
AT_ONCE = 1 << 22  # draws in memory
MAX_DOMAINS = 20
NO_DOMAIN, OTHERS = "(none)", "(others)"


def figures(found: Acceptance, domains: Mapping[int, str] | None = None) -> dict[str, Any]:
    """For JSON. `domains`: of sample ids; acceptance is told apart where they name at least two."""
    lengths, walk = intervals(found)
    said = found.as_json() | {
        "conversations": len(found.sample_ids_N),
        "lengths": found.lengths,
        "intervals": lengths,
        "walk_interval": walk,
    }
    if found.bins_3B is not None:
        said |= {"calibration": calibration(found.bins_3B), "calibration_error": calibration_error(found.bins_3B)}
    parts = by_domain(found, domains or {})
    if len(parts) > 1:
        said["by_domain"] = {name: _part(part) for name, part in parts.items()}
    return said


def intervals(found: Acceptance) -> tuple[list[list[float]], list[float]]:
    """([low, high] of each of `lengths`, and of the walk length), 95 %.

    The percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13) over
    conversations: the rows of one conversation resemble each other, so they are drawn together."""
    steps = found.rows_NK.shape[1]
    sums_BF = resampled(np.concatenate([found.rows_NK, found.accepted_NK, found.walk_N2], axis=1))
    rows_BK, accepted_BK, walk_B2 = np.split(sums_BF, [steps, 2 * steps], axis=1)
    lengths_BK = 1 + np.cumsum(accepted_BK / np.maximum(rows_BK, 1), axis=1)
    walk_B = np.where(walk_B2[:, 1] > 0, walk_B2[:, 0] / np.maximum(walk_B2[:, 1], 1), 1.0)
    return np.percentile(lengths_BK, BOUNDS, axis=0).T.tolist(), np.percentile(walk_B, BOUNDS).tolist()


def resampled(sums_NF: NDArray[np.int64]) -> NDArray[np.float64]:
    """[RESAMPLES, F] sums over as many records as there are, drawn with replacement."""
    random, n = np.random.default_rng(SEED), len(sums_NF)
    if n == 0:
        return np.zeros((RESAMPLES, sums_NF.shape[1]))
    pieces, at_once = [], max(1, AT_ONCE // n)
    for first in range(0, RESAMPLES, at_once):
        count = min(at_once, RESAMPLES - first)
        drawn_bN = random.integers(n, size=(count, n)) + n * np.arange(count)[:, None]
        times_bN = np.bincount(drawn_bN.ravel(), minlength=count * n).reshape(count, n)
        pieces.append(times_bN.astype(np.float64) @ sums_NF)  # whole numbers under 2^53: exact
    return np.concatenate(pieces)


def by_domain(found: Acceptance, domains: Mapping[int, str]) -> dict[str, Acceptance]:
    """The domains with the most predictions first; many small ones, and records without one, have a common name. Each
    record is in one of them."""
    if not domains:
        return {}
    names = [domains.get(int(sample), "") or NO_DOMAIN for sample in found.sample_ids_N]
    predictions = Counter[str]()
    for name, rows in zip(names, found.rows_NK[:, 0].tolist(), strict=True):
        predictions[name] += rows
    order = [name for name, _ in predictions.most_common()]
    if len(order) > MAX_DOMAINS:
        order = order[: MAX_DOMAINS - 1]
        names = [name if name in order else OTHERS for name in names]
        order.append(OTHERS)
    named_N = np.array(names)
    return {name: found.of(named_N == name) for name in order}


def calibration(bins_3B: NDArray[np.float64]) -> list[dict[str, Any]]:
    """For each bin with rows: the mean probability that the draft gave to its first choice at step 0, and the share of
    these choices that are the target's own (a reliability diagram)."""
    return [
        {"confidence": float(confidence / rows), "accepted": float(hits / rows), "rows": int(rows)}
        for confidence, hits, rows in bins_3B.T
        if rows
    ]


def calibration_error(bins_3B: NDArray[np.float64]) -> float:
    """Expected calibration error: the mean over rows of their bin's |accepted - confidence| (Guo et al., On Calibration
    of Modern Neural Networks, 2017, equation 3)."""
    confidence_B, hits_B, rows_B = bins_3B
    return float(np.abs(hits_B - confidence_B).sum() / max(rows_B.sum(), 1))


def _part(part: Acceptance) -> dict[str, Any]:
    return {
        "acceptance_length": part.length,
        "interval": intervals(part)[0][-1],
        "predictions": part.rows[0],
        "conversations": len(part.sample_ids_N),
        "acceptance_by_position": part.share,
    }
