"""Reading a finished store: random access by record, from memory-mapped shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from specforge.errors import StoreError
from specforge.features import aside
from specforge.features.codec import CODECS
from specforge.features.index import Manifest, read_index
from specforge.features.shard import DAMAGE, Shard, damage
from specforge.records import FeatureRecord

CPU = torch.device("cpu")
Verify = Literal["always", "first", "never"]


class Store:
    """Opening reads the two index files only. Record k is the record of the k-th smallest sample id.

    verify  when checksums are compared: "always" at each reading of a record, "first" at its first, "never". A shard's
            token ids, masks and header (a small part of it) are checked when it is first used, unless "never".
    partial whether a store may be unfinished.
    """

    def __init__(self, folder: Path, verify: Verify = "first", partial: bool = False) -> None:
        self.folder, self.manifest, self._verify = folder, Manifest.read(folder), verify
        self._lines = read_index(folder)
        ids = np.array([r["sample_id"] for line in self._lines for r in line["records"]], dtype=np.int64)
        held = len(np.unique(ids))
        if held < len(ids):
            raise StoreError(
                f"{len(ids) - held} records are in the store twice",
                where=str(folder / "shards.jsonl"),
                fix="delete the line of one of their shards, or capture again",
            )
        due = self.manifest.num_records - len(aside.reasons(folder))
        if held != due and not partial:
            raise StoreError(
                f"the store is unfinished: {held} of {due} records",
                where=str(folder),
                fix="run the same `specforge prepare-hidden` command again; it goes on where it was",
            )
        order = np.argsort(ids)
        counts = [len(line["records"]) for line in self._lines]
        self._shard_of = np.repeat(np.arange(len(counts)), counts)[order]
        self.sample_ids: NDArray[np.int64] = ids[order]
        self._place = np.concatenate([np.arange(0), *map(np.arange, counts)])[order]  # in its shard
        lengths = [r["tokens"] for line in self._lines for r in line["records"]]
        self.lengths: NDArray[np.int64] = np.array(lengths, dtype=np.int64)[order]
        self._shards: dict[int, Shard] = {}
        self._checked = np.zeros(len(ids), dtype=np.bool_)

    def __len__(self) -> int:
        return len(self.lengths)

    def record(self, index: int, device: torch.device = CPU) -> FeatureRecord:
        """Decoded, its states on `device`. Raises StoreError where shard or record is damaged."""
        number, at = int(self._shard_of[index]), int(self._place[index])
        shard = self._shard(number)
        if self._verify == "always" or (self._verify == "first" and not self._checked[index]):
            if not shard.intact(at):
                raise self._damaged(number)
            self._checked[index] = True
        try:
            return shard.record(at, CODECS[self.manifest.codec], device)
        except ValueError as error:  # not checked, and not what zstd wrote
            raise self._damaged(number) from error

    def tokens_and_masks(self) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
        """(token_ids, loss_mask) of whole shards, for counting. Touches no states."""
        for number in range(len(self._lines)):
            yield self._shard(number).tokens_and_mask()

    def bytes(self) -> int:
        return sum(line["bytes"] for line in self._lines)

    def _shard(self, number: int) -> Shard:
        if number not in self._shards:
            shard = Shard(self.folder, self._lines[number], self.manifest.hidden_size)
            if self._verify != "never" and not shard.whole():
                raise self._damaged(number)
            self._shards[number] = shard
        return self._shards[number]

    def _damaged(self, number: int) -> StoreError:
        """Reads the whole shard, to name each damaged record."""
        line = self._lines[number]
        found = damage(self.folder, line, self.manifest.hidden_size) or [f"{line['file']}: changed while it was read"]
        shown = "; ".join(found[:5]) + (f"; and {len(found) - 5} more" if len(found) > 5 else "")
        return StoreError(f"the store is damaged: {shown}", where=str(self.folder / line["file"]), fix=DAMAGE)
