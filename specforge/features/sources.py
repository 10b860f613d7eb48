"""Where a training run's records come from: a store, or the live engine. Both give the same rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from specforge.errors import EngineError, OutOfMemoryError
from specforge.features import aside
from specforge.features.packing import Row, in_batches
from specforge.features.passes import Passes
from specforge.features.store import Store
from specforge.records import Example, FeatureBatch, FeatureRecord, Ranks, RecordSource, TargetEngine


class StoreSource:
    """RecordSource over a finished store: each rank reads its own rows only, and decodes them on its device."""

    kind = "data"

    def __init__(self, store: Store, tp_rank: int, device: torch.device) -> None:
        self.lengths, self._store, self._tp_rank, self._device = store.lengths, store, tp_rank, device

    def batches(self, slots: Sequence[Sequence[Row]]) -> Iterator[list[FeatureRecord]]:
        for slot in slots:
            yield [self._store.record(index, self._device) for index in slot[self._tp_rank]]


class LiveSource:
    """RecordSource over the live engine: the ranks of a replica capture all its rows together, each keeps its own.

    folder  where a record that is not finite is set aside; its row then lacks it. None: such a record is an error"""

    kind = "target"

    def __init__(
        self, engine: TargetEngine, examples: Sequence[Example], tp_rank: int, folder: Path | None = None
    ) -> None:
        self.lengths: NDArray[np.int64] = np.array([len(example.token_ids) for example in examples], dtype=np.int64)
        self._engine, self._examples, self._tp_rank, self._folder = engine, examples, tp_rank, folder
        self._passes = Passes(engine, examples)

    def batches(self, slots: Sequence[Sequence[Row]]) -> Iterator[list[FeatureRecord]]:
        for slot in slots:
            wanted = [index for row in slot for index in row]
            lengths = self.lengths[wanted]
            mine = set(slot[self._tp_rank])
            captured: dict[int, FeatureRecord] = {}
            for batch in in_batches(lengths, self._engine.tokens_per_batch):
                for found in self._passes.run([wanted[at] for at in batch]):
                    for index, record in found:
                        if record == aside.TOO_LARGE:
                            raise _too_large(self._examples[index])
                        if isinstance(record, FeatureRecord) and index in mine:
                            captured[index] = record
                        elif index in mine:
                            self._set_aside(self._examples[index].sample_id)
            yield [captured[index].copy() for index in slot[self._tp_rank] if index in captured]

    def _set_aside(self, sample_id: int) -> None:
        if self._folder is None:
            raise EngineError(
                "the target's states are not finite",
                where=f"sample {sample_id} of the data",
                fix="try another --dtype (float16 overflows where bfloat16 does not), or leave the sample out",
            )
        aside.set_aside(self._folder, sample_id, aside.NOT_FINITE, len(self._examples))


def held_out_batches(
    source: RecordSource, rows: Sequence[Row], ranks: Ranks, dtype: torch.dtype
) -> Iterator[FeatureBatch | None]:
    """This rank's share of the packed rows, each once over all ranks; None where it has none in a slot."""
    filled = [*rows, *([[]] * (-len(rows) % ranks.world))]
    slots = [filled[at : at + ranks.world] for at in range(0, len(filled), ranks.world)]
    for records in source.batches([ranks.of_replica(slot) for slot in slots]):
        yield FeatureBatch.pack(records, ranks.device, dtype) if records else None


def _too_large(example: Example) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"a conversation of {len(example.token_ids)} tokens does not fit into memory beside the draft",
        where=f"sample {example.sample_id} of the data",
        fix="lower --max-length, raise --tp-size, or give the target more or less of the memory with --mem-frac",
    )
