"""The feature store: what is committed comes back bit for bit, whatever happened in between."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from specforge.alignment import teacher_rows
from specforge.errors import StoreError
from specforge.features.store import Manifest, Store, StoreWriter, read_index
from specforge.records import FeatureRecord

ROOT = Path(__file__).parents[2]
HIDDEN = 8
TENSORS = ("token_ids", "loss_mask", "aux", "last", "teacher_top1", "teacher_lse")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def record(sample_id, length=None, codec="bf16"):
    """Contents follow from the sample id: any process makes the same record."""
    random = np.random.default_rng(sample_id)
    length = length or int(random.integers(3, 40))
    mask = np.repeat(random.random(length // 4 + 1) < 0.6, 4)[:length]
    mask[-2:] = True
    rows = len(teacher_rows(mask))

    def states(*shape):
        return torch.from_numpy(random.standard_normal(shape, dtype=np.float32)).to(DTYPES[codec])

    return FeatureRecord(
        sample_id=sample_id,
        token_ids=torch.from_numpy(random.integers(0, 1000, length, dtype=np.int32)),
        loss_mask=torch.from_numpy(mask),
        aux=states(length, 3 * HIDDEN),
        last=states(rows, HIDDEN),
        teacher_top1=torch.from_numpy(random.integers(0, 1000, rows, dtype=np.int32)),
        teacher_lse=states(rows).float(),
    )


def manifest(records, codec="bf16", **other):
    base = Manifest(
        target="target",
        target_fingerprint="f0",
        tokenizer_hash="t0",
        template_hash="c0",
        aux_layers=(1, 3, 4),
        data_hash="d0",
        max_length=64,
        codec=codec,
        hidden_size=HIDDEN,
        num_records=records,
        tokens_per_batch=256,
        engine="hf",
    )
    return replace(base, **other)


def add_all(writer, sample_ids):
    for sample_id in sample_ids:
        writer.add(record(sample_id))


def filled(folder, count=20, codec="bf16", shard_bytes=4000):
    writer = StoreWriter(folder, manifest(count, codec), shard_bytes=shard_bytes)
    for sample_id in range(count):
        writer.add(record(sample_id, codec=codec))
    writer.close()
    return folder


def assert_same(found, want):
    assert found.sample_id == want.sample_id
    for name in TENSORS:
        mine, theirs = getattr(found, name), getattr(want, name)
        assert mine.dtype == theirs.dtype, name
        assert mine.shape == theirs.shape, name
        assert torch.equal(mine, theirs), f"{name} of record {want.sample_id}"


def assert_holds(folder, count, codec="bf16"):
    store = Store(folder)
    assert len(store) == count
    for index in range(count):
        assert_same(store.record(index), record(index, codec=codec))
        assert store.lengths[index] == len(record(index, codec=codec))


def listing(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# Round trip


@pytest.mark.parametrize("codec", ["bf16", "fp32"])
@pytest.mark.parametrize("shard_bytes", [1, 4000, 1 << 30])
def test_round_trip_is_bit_equal(tmp_path, codec, shard_bytes):
    filled(tmp_path, 20, codec, shard_bytes)
    assert_holds(tmp_path, 20, codec)
    shards = len(list(tmp_path.glob("shard-*")))
    assert shards == 20 if shard_bytes == 1 else 1 if shard_bytes > 4000 else 1 < shards < 20


@given(st.permutations(range(8)), st.integers(1, 20_000))
@settings(max_examples=20, deadline=None)
def test_any_order_of_adding_reads_in_order_of_sample_id(tmp_path_factory, order, shard_bytes):
    folder = tmp_path_factory.mktemp("store")
    writer = StoreWriter(folder, manifest(8), shard_bytes=shard_bytes)
    for sample_id in order:
        writer.add(record(sample_id))
    writer.close()
    assert_holds(folder, 8)


def test_random_access_in_any_order(tmp_path):
    store = Store(filled(tmp_path))
    for index in (19, 0, 7, 7, 18, 1):
        assert_same(store.record(index), record(index))


def test_a_record_without_teachers_and_states_that_are_not_finite(tmp_path):
    plain = record(0)
    odd = replace(
        plain,
        loss_mask=torch.zeros_like(plain.loss_mask),
        aux=torch.full_like(plain.aux, float("inf")),
        last=plain.last[:0],
        teacher_top1=plain.teacher_top1[:0],
        teacher_lse=plain.teacher_lse[:0],
    )
    writer = StoreWriter(tmp_path, manifest(2))
    writer.add(odd)
    writer.add(record(1))
    writer.close()
    store = Store(tmp_path)
    assert_same(store.record(0), odd)
    assert_same(store.record(1), record(1))


def test_the_index_says_lengths_counts_and_checksums(tmp_path):
    filled(tmp_path)
    described = {r["sample_id"]: r for line in read_index(tmp_path) for r in line["records"]}
    for sample_id, found in described.items():
        assert found["tokens"] == len(record(sample_id))
        assert found["supervised"] == int(record(sample_id).loss_mask.sum())
    assert len({found["xxh3"] for found in described.values()}) == 20


def test_tokens_and_masks_are_those_of_all_records(tmp_path):
    pairs = list(Store(filled(tmp_path)).tokens_and_masks())
    want = [record(n) for n in range(20)]
    np.testing.assert_array_equal(np.concatenate([t for t, _ in pairs]), torch.cat([r.token_ids for r in want]))
    np.testing.assert_array_equal(np.concatenate([m for _, m in pairs]), torch.cat([r.loss_mask for r in want]))


# Several writers


def test_two_writers_into_one_store(tmp_path):
    StoreWriter(tmp_path, manifest(20))
    writers = [StoreWriter(tmp_path, manifest(20), number, shard_bytes=3000) for number in (0, 1)]
    for sample_id in range(20):
        writers[sample_id % 2].add(record(sample_id))
    for writer in writers:
        writer.close()
    assert_holds(tmp_path, 20)
    assert {line["writer"] for line in read_index(tmp_path)} == {0, 1}


def test_more_than_ten_writers_do_not_touch_each_others_shards(tmp_path):
    """Writer 1's clean-up must spare the shards of writers 10 and 11."""
    writers = {number: StoreWriter(tmp_path, manifest(3), number, shard_bytes=1) for number in (1, 10, 11)}
    for sample_id, writer in enumerate(writers.values()):
        writer.add(record(sample_id))
    stray = tmp_path / ".shard-10-7.safetensors.tmp"
    stray.write_bytes(b"being written by writer 10")
    for number in writers:
        if number != 10:
            StoreWriter(tmp_path, manifest(3), number)
    assert stray.exists()
    assert_holds(tmp_path, 3)


def test_the_same_command_started_twice_spoils_nothing_committed(tmp_path):
    """Both are writer 0. The second may be refused, but may not write over what the first has committed."""
    first, second = StoreWriter(tmp_path, manifest(2)), StoreWriter(tmp_path, manifest(2))
    first.add(record(0))
    first.close()
    with contextlib.suppress(StoreError):
        second.add(record(1))
        second.close()
    for line in read_index(tmp_path):
        content = (tmp_path / line["file"]).read_bytes()
        assert xxhash.xxh3_64_hexdigest(content) == line["xxh3"], line["file"]


# Kill and resume


def test_resume_after_a_kill_writes_only_what_is_missing(tmp_path):
    whole, broken = filled(tmp_path / "whole"), tmp_path / "broken"
    writer = StoreWriter(broken, manifest(20), shard_bytes=4000)
    add_all(writer, range(10))
    committed = set(writer.committed)
    assert 0 < len(committed) < 10  # the last ones are pending, and lost with the process
    del writer
    number = len(read_index(broken))
    # renamed but not committed; being written; and a commit line that the kill cut short
    (broken / f"shard-0-{number}.safetensors").write_bytes((broken / "shard-0-0.safetensors").read_bytes())
    (broken / f".shard-0-{number}.safetensors.tmp").write_bytes(b"half a sh")
    with (broken / "shards.jsonl").open("a") as file:
        file.write('{"file": "shard-0-9.safetensors", "writer": 0, "records": [{"sample_id": 9')
    before = listing(broken)

    writer = StoreWriter(broken, manifest(20), shard_bytes=4000)
    assert writer.committed == committed
    add_all(writer, range(20))
    writer.close()

    lines = read_index(broken)
    written = [r["sample_id"] for line in lines for r in line["records"]]
    assert sorted(written) == list(range(20))
    assert set(written[len(committed) :]).isdisjoint(committed)
    for name in {line["file"] for line in lines[:number]}:  # what was committed is never written again
        assert (broken / name).read_bytes() == before[Path(name)]
    assert {p.name for p in broken.iterdir()} == {"manifest.json", "shards.jsonl"} | {line["file"] for line in lines}
    resumed, unbroken = Store(broken), Store(whole)
    for index in range(20):
        assert_same(resumed.record(index), unbroken.record(index))


def test_a_finished_store_opened_again_is_left_as_it_is(tmp_path):
    before = listing(filled(tmp_path))
    writer = StoreWriter(tmp_path, manifest(20))
    add_all(writer, range(20))
    writer.close()
    assert listing(tmp_path) == before


def test_a_resume_keeps_the_planned_batches(tmp_path):
    """Another token budget is no reason to refuse, but the batches of the first one stand."""
    filled(tmp_path)
    assert StoreWriter(tmp_path, manifest(20, tokens_per_batch=9, target="other name")).manifest == manifest(20)


CHILD = """
import sys
from pathlib import Path
from tests.unit.test_store import manifest, record
from specforge.features.store import StoreWriter
writer = StoreWriter(Path(sys.argv[1]), manifest(5000), shard_bytes=3000)
print("going", flush=True)
for sample_id in range(5000):
    writer.add(record(sample_id))
"""


def test_sigkill_in_the_middle_of_writing_then_resume(tmp_path):
    """A real process, really killed, at three different moments of one store."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    for killed_after in (3, 5, 4):
        known = len(read_index(tmp_path))
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
        )
        assert child.stdout.readline() == "going\n"
        until = time.monotonic() + 60
        while len(read_index(tmp_path)) < known + killed_after and time.monotonic() < until:
            assert child.poll() is None
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        child.stdout.close()
        assert len(read_index(tmp_path)) >= known + killed_after
        with pytest.raises(StoreError, match="unfinished"):
            Store(tmp_path)
    written = {r["sample_id"] for line in read_index(tmp_path) for r in line["records"]}
    assert len(written) < 5000
    count = max(written) + 10

    raw = json.loads((tmp_path / "manifest.json").read_text())  # a store of fewer records, so that the test ends soon
    (tmp_path / "manifest.json").write_text(json.dumps(raw | {"num_records": count}))
    writer = StoreWriter(tmp_path, manifest(count), shard_bytes=3000)
    assert writer.committed == written
    add_all(writer, range(count))
    writer.close()
    assert_holds(tmp_path, count)
    files = {line["file"] for line in read_index(tmp_path)}
    assert {p.name for p in tmp_path.iterdir()} == {"manifest.json", "shards.jsonl"} | files


# Refusals


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target_fingerprint", "f1"),
        ("tokenizer_hash", "t1"),
        ("template_hash", "c1"),
        ("aux_layers", (1, 3, 5)),
        ("data_hash", "d1"),
        ("max_length", 65),
        ("codec", "fp32"),
        ("num_records", 21),
        ("engine", "sglang"),
    ],
)
def test_another_manifest_is_refused_with_the_field_named(tmp_path, name, value):
    before = listing(filled(tmp_path))
    with pytest.raises(StoreError) as refused:
        StoreWriter(tmp_path, manifest(20, **{name: value}))
    assert name in refused.value.what
    assert name in refused.value.where
    assert str(value) in refused.value.what
    assert str(getattr(manifest(20), name)) in refused.value.what
    assert refused.value.fix
    assert listing(tmp_path) == before


def test_every_field_but_names_and_budget_is_compared():
    """A field that is added later must be compared, or be listed here."""
    compared = set(asdict(manifest(1))) - {"target", "tokens_per_batch"}
    for name in compared:
        value = getattr(manifest(1), name)
        other = (0, 1, 2) if isinstance(value, tuple) else value + value if isinstance(value, str) else value + 1
        assert manifest(1).differences(manifest(1, **{name: other})) == [name]
    assert manifest(1).differences(manifest(1)) == []


def test_an_unfinished_store_is_refused_on_reading(tmp_path):
    writer = StoreWriter(tmp_path, manifest(20), shard_bytes=4000)
    add_all(writer, range(19))
    writer.close()
    with pytest.raises(StoreError, match="19 of 20"):
        Store(tmp_path)


def test_records_written_twice_are_not_taken_for_a_whole_store(tmp_path):
    """Two of a kind and one missing: the count alone is right."""
    writers = [StoreWriter(tmp_path, manifest(3), number) for number in (0, 1)]
    for writer, ids in zip(writers, [(0, 1), (1,)], strict=True):
        for sample_id in ids:
            writer.add(record(sample_id))
        writer.close()
    with pytest.raises(StoreError):
        Store(tmp_path)


def damaged(folder, harm):
    """A store whose second shard was harmed after it was written."""
    filled(folder)
    path = folder / read_index(folder)[1]["file"]
    content = bytearray(path.read_bytes())
    if harm == "cut":
        del content[len(content) // 2 :]
    elif harm == "flipped":
        content[-100] ^= 1
    elif harm == "header":
        content[2] ^= 0x40
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize("harm", ["cut", "flipped", "header", "missing"])
def test_a_damaged_shard_is_refused_by_name(tmp_path, harm):
    path = damaged(tmp_path, harm)
    store = Store(tmp_path)
    assert_same(store.record(0), record(0))  # the other shards are whole
    index = read_index(tmp_path)[1]["records"][0]["sample_id"]
    with pytest.raises(StoreError, match=re.escape(path.name)):
        store.record(index)
    with pytest.raises(StoreError, match=re.escape(path.name)):
        list(store.tokens_and_masks())


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"text"', '{"format_version": 1}', '{"format_version": 9}'])
def test_a_damaged_manifest_is_refused(tmp_path, content):
    filled(tmp_path)
    (tmp_path / "manifest.json").write_text(content)
    for use in (lambda: Store(tmp_path), lambda: StoreWriter(tmp_path, manifest(20))):
        with pytest.raises(StoreError) as refused:
            use()
        assert "manifest.json" in refused.value.where


def test_a_damaged_index_is_refused(tmp_path):
    """A whole line that is no JSON cannot come from a kill: the file was harmed."""
    filled(tmp_path)
    index = tmp_path / "shards.jsonl"
    index.write_text(index.read_text().replace('"writer"', '"wri', 1))
    with pytest.raises(StoreError, match=re.escape("shards.jsonl")):
        Store(tmp_path)


def test_no_store_here(tmp_path):
    with pytest.raises(StoreError, match="no feature store"):
        Store(tmp_path)


def test_a_folder_of_something_else_is_refused_and_left_as_it_was(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "shard-0-0.safetensors").write_bytes(b"somebody else's")
    before = listing(tmp_path)
    with pytest.raises(StoreError) as refused:
        StoreWriter(tmp_path, manifest(20))
    assert str(tmp_path) in refused.value.where
    assert listing(tmp_path) == before


def test_a_full_disk_is_named_and_what_was_committed_stays(tmp_path):
    """A limit on the size of files stands for the full disk: the write fails in the kernel, half way."""
    writer = StoreWriter(tmp_path, manifest(20), shard_bytes=4000)
    add_all(writer, range(8))
    committed = set(writer.committed)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(StoreError) as refused:
            add_all(writer, range(8, 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "--output" in refused.value.fix
    again = StoreWriter(tmp_path, manifest(20), shard_bytes=4000)
    assert again.committed == committed
    add_all(again, range(20))
    again.close()
    assert_holds(tmp_path, 20)


# What lies in the folder


def test_only_the_documented_files_and_no_pickle(tmp_path):
    filled(tmp_path)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names[:1] == ["manifest.json"]
    assert "shards.jsonl" in names
    rest = set(names) - {"manifest.json", "shards.jsonl"}
    assert all(re.fullmatch(r"shard-0-\d+\.safetensors", name) for name in rest)
    for name in rest:
        content = (tmp_path / name).read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        assert set(header) - {"__metadata__"} == {
            *("input_ids", "loss_mask", "aux", "last", "teacher_top1", "teacher_lse"),
            *("offsets", "teacher_offsets", "sample_ids"),
        }
        assert {k: header[k]["dtype"] for k in ("input_ids", "loss_mask", "aux", "teacher_lse", "offsets")} == {
            "input_ids": "I32",
            "loss_mask": "U8",
            "aux": "BF16",
            "teacher_lse": "F32",
            "offsets": "I64",
        }
        # nothing but the header and the tensors: no padding anywhere
        assert len(content) == 8 + int.from_bytes(content[:8], "little") + max(
            header[k]["data_offsets"][1] for k in header if k != "__metadata__"
        )
    tokens = sum(len(record(n)) for n in range(20))
    teachers = sum(len(record(n).last) for n in range(20))
    held = tokens * (4 + 1 + 3 * HIDDEN * 2) + teachers * (HIDDEN * 2 + 4 + 4)
    assert held < Store(tmp_path).bytes() < held + len(rest) * 2000
