"""The draft vocabulary: the tokens that the draft can say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from specforge.errors import ConfigError


def count_supervised(rows: Iterable[tuple[NDArray[np.int32], NDArray[np.bool_]]], vocab_size: int) -> NDArray[np.int64]:
    """[V] how often each token is supervised, over (token_ids [T], loss_mask [T]) pairs."""
    counts_V = np.zeros(vocab_size, dtype=np.int64)
    for token_ids_T, loss_mask_T in rows:
        counts_V += np.bincount(token_ids_T[loss_mask_T], minlength=vocab_size)
    return counts_V


def choose(counts_V: NDArray[np.int64], size: int, always: Sequence[int]) -> NDArray[np.int64]:
    """[D] target ids, ascending: `always`, then the most frequent, then the lowest ids. D = min(size, V).

    Raises ConfigError where `always` alone is more."""
    if len(set(always)) > size:
        raise ConfigError(
            f"{len(set(always))} special tokens do not fit into a draft vocabulary of {size}",
            where=f"--draft-vocab-size {size}",
            fix="raise it; 32,000 is usual",
        )
    rank_V = counts_V.copy()
    rank_V[list(always)] = np.iinfo(np.int64).max
    return np.sort(np.argsort(-rank_V, kind="stable")[: min(size, len(counts_V))])


def coverage(counts_V: NDArray[np.int64], kept_D: NDArray[np.int64]) -> float:
    """Share of the supervised tokens that the draft can say."""
    return float(counts_V[kept_D].sum() / max(counts_V.sum(), 1))
