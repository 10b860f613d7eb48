"""A training run's records from the live engine, kept in a store on the way: each is captured once, then read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch.distributed as dist

from specforge.alignment import teacher_rows
from specforge.features import aside
from specforge.features.index import Manifest, held_bytes
from specforge.features.packing import Row
from specforge.features.shard import record_bytes
from specforge.features.sources import LiveSource
from specforge.features.store import Store
from specforge.features.writer import SHARD_BYTES, SHARD_OWN, StoreWriter
from specforge.records import Example, FeatureRecord, Ranks


class HybridSource:
    """RecordSource. What the store in `folder` holds when an iteration begins is read from it; the rest is captured,
    and goes into the store where the disk's share allows. Once it holds everything the target rests, and the store is
    one that `specforge prepare-hidden` could have written.

    max_bytes  of disk for this store, over all ranks; None: no limit. What has no room is captured in every epoch.
               Which part that is does not matter: time to capture and bytes to keep both go with the tokens."""

    def __init__(
        self,
        live: LiveSource,
        examples: Sequence[Example],
        folder: Path,
        manifest: Manifest,
        ranks: Ranks,
        max_bytes: int | None,
    ) -> None:
        self.lengths = live.lengths
        self._live, self._examples, self._folder, self._ranks = live, examples, folder, ranks
        self._manifest, self._max_bytes = manifest, max_bytes
        self._ids = np.array([example.sample_id for example in examples])
        self._stored: Store | None = None
        self._aside: set[int] = set()  # sample ids of what cannot be captured
        self._writer: StoreWriter | None = None

    @property
    def kind(self) -> str:
        return "data" if self._complete() else "target"

    def _complete(self) -> bool:
        return self._stored is not None and len(self._stored) + len(self._aside) == len(self._ids)

    def batches(self, slots: Sequence[Sequence[Row]]) -> Iterator[list[FeatureRecord]]:
        """Opens the store before anything is asked of the iterator; at the next call, and at the end, what was kept is
        committed."""
        self.close()
        self._open()
        return self._batches(slots)

    def _batches(self, slots: Sequence[Sequence[Row]]) -> Iterator[list[FeatureRecord]]:
        place = {int(one): at for at, one in enumerate(self._stored.sample_ids)} if self._stored else {}
        wanted = np.array([int(one) not in place and int(one) not in self._aside for one in self._ids])
        missing = [[[at for at in row if wanted[at]] for row in slot] for slot in slots]
        captured = self._live.batches(missing)
        for slot in slots:
            fresh = {record.sample_id: record for record in next(captured)}
            self._keep(fresh.values())
            own = [int(self._ids[at]) for at in slot[self._ranks.tp_rank]]
            there = [one for one in own if one in place or one in fresh]
            yield [self._read(place[one]) if one in place else fresh[one] for one in there]

    def _read(self, place: int) -> FeatureRecord:
        assert self._stored
        return self._stored.record(place, self._ranks.device)

    def _open(self) -> None:
        """The store as all ranks see it, and this rank's writer where something is missing. Collective."""
        if self._complete():
            return
        dist.barrier()  # what every rank has written so far is committed, and its lock is free
        if self._ranks.rank > 0:
            dist.barrier()  # writer 0 comes first
        self._writer = StoreWriter(self._folder, self._manifest, self._ranks.rank)
        if self._ranks.rank == 0:
            dist.barrier()
        self._stored = Store(self._folder, partial=True)
        self._aside = set(aside.reasons(self._folder)) - set(self._stored.sample_ids.tolist())
        aside.check_share(self._folder, len(self._ids))
        own = SHARD_OWN * (1 + (self._max_bytes or 0) // SHARD_BYTES)
        used = held_bytes(self._folder)
        dist.barrier()  # all ranks have read the same index before any of them adds to it
        self._room = None if self._max_bytes is None else (self._max_bytes - used) // self._ranks.world - own
        if self._complete():
            self.close()

    def _keep(self, records: Iterable[FeatureRecord]) -> None:
        for record in records if self._writer else []:
            if self._room is not None:
                teachers = len(teacher_rows(record.loss_mask.cpu().numpy()))
                tokens = len(record.token_ids)
                self._room -= record_bytes(self._manifest.codec, self._manifest.hidden_size, tokens, teachers)
                if self._room < 0:
                    continue
            assert self._writer
            self._writer.add(record)

    def close(self) -> None:
        if self._writer:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> HybridSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
