"""Stores for tests: the contents of a record follow from its sample id, so any process makes the same one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from specforge.alignment import teacher_rows
from specforge.features.codec import CODECS
from specforge.features.index import Manifest
from specforge.features.store import Store
from specforge.features.writer import StoreWriter
from specforge.records import FeatureRecord

HIDDEN = 8
TENSORS = ("token_ids", "loss_mask", "aux", "last", "teacher_top1", "teacher_lse")


def record(sample_id: int, length: int | None = None, codec: str = "bf16", hidden: int = HIDDEN) -> FeatureRecord:
    random = np.random.default_rng(sample_id)
    length = length or int(random.integers(3, 40))
    mask = np.repeat(random.random(length // 4 + 1) < 0.6, 4)[:length]
    mask[-2:] = True
    rows = len(teacher_rows(mask))

    def states(*shape: int) -> torch.Tensor:
        values = torch.from_numpy(random.standard_normal(shape, dtype=np.float32))
        return values.to(CODECS[codec].decoded)

    return FeatureRecord(
        sample_id=sample_id,
        token_ids=torch.from_numpy(random.integers(0, 1000, length, dtype=np.int32)),
        loss_mask=torch.from_numpy(mask),
        aux=states(length, 3 * hidden),
        last=states(rows, hidden),
        teacher_top1=torch.from_numpy(random.integers(0, 1000, rows, dtype=np.int32)),
        teacher_lse=states(rows).float(),
    )


def manifest(records: int, codec: str = "bf16", **other: object) -> Manifest:
    base = Manifest(
        target="target",
        target_fingerprint="f0",
        tokenizer_hash="t0",
        template_hash="c0",
        aux_layers=(1, 3, 4),
        data_hash="d0",
        max_length=64,
        codec=codec,
        dtype="bfloat16",
        hidden_size=HIDDEN,
        num_records=records,
        tokens_per_batch=256,
        engine="hf",
    )
    return replace(base, **other)


def filled(folder: Path, count: int = 20, codec: str = "bf16", shard_bytes: int = 4000, **other: object) -> Path:
    with StoreWriter(folder, manifest(count, codec, **other), shard_bytes=shard_bytes) as writer:
        for sample_id in range(count):
            writer.add(record(sample_id, codec=codec))
    return folder


def assert_same(found: FeatureRecord, want: FeatureRecord) -> None:
    assert found.sample_id == want.sample_id
    for name in TENSORS:
        mine, theirs = getattr(found, name), getattr(want, name)
        assert mine.dtype == theirs.dtype, name
        assert mine.shape == theirs.shape, name
        assert torch.equal(mine, theirs), f"{name} of record {want.sample_id}"


def assert_holds(folder: Path, count: int, codec: str = "bf16") -> None:
    store = Store(folder)
    assert len(store) == count
    for index in range(count):
        assert_same(store.record(index), record(index, codec=codec))
        assert store.lengths[index] == len(record(index, codec=codec))


def listing(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
