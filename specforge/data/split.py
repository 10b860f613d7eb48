"""Removal of duplicates, and the split into train and test by prompt, without leaks.

All of it works on hashes, so that memory does not grow with the text: 16 bytes a row, and 12 bytes for each word of the
held-out side."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from specforge.data.formats import Entry, Text, Tokens

SAID = ("functions", "function_calls")  # keys of a turn that are part of its text; others are ids, times and the like
SHINGLE = 3  # words
COMMON = 50  # held-out conversations: a run of words in more of them is a phrase, and no sign of a duplicate
LEAK_SHARE = 0.5  # of a training conversation's shingles inside one held-out conversation
FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 1], dtype=np.uint64)  # odd: no word's hash is lost
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")  # of scripts that put no space between words, each character


def words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def spoken(entry: Entry) -> list[str]:
    """The texts by which duplicates are told: what user and assistant say; of tokens, their ids."""
    if isinstance(entry, Tokens):
        return [" ".join(map(str, entry.token_ids.tolist()))]
    if isinstance(entry, Text):
        return [entry.text]
    return [m.content for m in entry.messages if m.role in ("user", "assistant")]


def prompt_key(entry: Entry) -> str:
    """The first user turn, without case and punctuation: rows with the same key go to the same side. Of tokens what
    stands before the first supervised one; formatted text is its own prompt."""
    if isinstance(entry, Tokens):
        return " ".join(map(str, entry.token_ids[: int(np.argmax(entry.loss_mask))].tolist()))
    if isinstance(entry, Text):
        return " ".join(words(entry.text))
    return " ".join(next((words(m.content) for m in entry.messages if m.role == "user"), []))


def prompt_hash(entry: Entry, seed: int) -> int:
    return xxhash.xxh3_64_intdigest(prompt_key(entry).encode(), seed=seed)


def content_hash(entry: Entry) -> int:
    """Equal for exact duplicates: same roles, texts, tools and template arguments, white space around a turn apart."""
    if isinstance(entry, Tokens):
        return xxhash.xxh3_128_intdigest(entry.token_ids.tobytes() + entry.loss_mask.tobytes())
    if isinstance(entry, Text):
        return xxhash.xxh3_128_intdigest(entry.text.strip().encode())
    turns = [
        "\x1f".join(
            [
                *(m.role, m.reasoning or "", m.content.strip(), str(m.tool_calls or ""), str(m.trained)),
                *(str(m.more[key]) for key in SAID if key in m.more),
            ]
        )
        for m in entry.messages
    ]
    turns += [f"{given}" for given in (entry.tools, entry.kwargs) if given]
    return xxhash.xxh3_128_intdigest("\x1e".join(turns).encode())


def held_out(prompt_hashes: NDArray[np.uint64], share: float) -> NDArray[np.bool_]:
    """[rows] True for the held-out side: by the hash of the prompt alone, so that a row's side does not depend on the
    other rows. Only where a side would stay empty, the lowest hash is held out, or all but the lowest."""
    test = prompt_hashes < np.uint64(min(int(share * 2**64), 2**64 - 1))
    if len(test) and not test.any():
        test = prompt_hashes == prompt_hashes.min()
    elif len(test) and test.all():
        test = prompt_hashes != prompt_hashes.min()
    return test


@lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    return xxhash.xxh3_64_intdigest(word.encode())


def shingles(entry: Entry) -> NDArray[np.uint64]:
    """Hashes of every run of three words in a turn, each once, ascending."""
    found = []
    for text in spoken(entry):
        tokens = words(text)
        hash_W = np.fromiter(map(_word_hash, tokens), dtype=np.uint64, count=len(tokens))
        runs = max(1, len(tokens) - SHINGLE + 1)
        hash_W = np.concatenate([hash_W, np.zeros(max(0, SHINGLE - len(tokens)), dtype=np.uint64)])
        found.append(sum(hash_W[at : at + runs] * factor for at, factor in enumerate(FACTORS)))
    return np.unique(np.concatenate(found)) if found else np.empty(0, dtype=np.uint64)


@dataclass(frozen=True, slots=True)
class HeldOutIndex:
    """The shingles of the held-out side, to find training rows that are near-duplicates of one of its rows."""

    hash_U: NDArray[np.uint64]  # ascending
    row_U: NDArray[np.int32]  # the held-out row that shingle is of

    @classmethod
    def of(cls, rows: Iterable[NDArray[np.uint64]]) -> HeldOutIndex:
        hashes = list(rows)
        hash_U = np.concatenate([*hashes, np.empty(0, dtype=np.uint64)])
        row_U = np.repeat(np.arange(len(hashes), dtype=np.int32), [len(found) for found in hashes])
        order = np.argsort(hash_U, kind="stable")
        return cls(hash_U[order], row_U[order])

    def save(self, folder: Path) -> None:
        np.save(folder / "hash.npy", self.hash_U)
        np.save(folder / "row.npy", self.row_U)

    @classmethod
    def load(cls, folder: Path) -> HeldOutIndex:
        """Memory-mapped: processes share one copy."""
        return cls(np.load(folder / "hash.npy", mmap_mode="r"), np.load(folder / "row.npy", mmap_mode="r"))

    def leaks(self, own: NDArray[np.uint64]) -> bool:
        """Whether over half of a training row's shingles (as `shingles` gives them) stand in one held-out row."""
        first = np.searchsorted(self.hash_U, own, "left")
        count = np.searchsorted(self.hash_U, own, "right") - first
        judged = len(own) - int((count > COMMON).sum())
        kept = (count > 0) & (count <= COMMON)
        if not kept.any():
            return False
        first, count = first[kept], count[kept]
        within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        _, shared = np.unique(self.row_U[np.repeat(first, count) + within], return_counts=True)
        return bool(shared.max() > LEAK_SHARE * judged)
