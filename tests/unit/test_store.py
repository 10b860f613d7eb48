"""The feature store: what is committed comes back bit for bit; what was made from something else is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specforge.errors import StoreError
from specforge.features.index import read_index
from specforge.features.store import Store
from specforge.features.writer import StoreWriter
from specforge.files import seal
from tests.stores import assert_holds, assert_same, filled, listing, manifest, record

ROOT = Path(__file__).parents[2]
BIT_EXACT = ["bf16", "fp32", "bf16+zstd"]


# Round trip


@pytest.mark.parametrize("codec", BIT_EXACT)
@pytest.mark.parametrize("shard_bytes", [1, 4000, 1 << 30])
def test_round_trip_is_bit_equal(tmp_path, codec, shard_bytes):
    filled(tmp_path, 20, codec, shard_bytes)
    assert_holds(tmp_path, 20, codec)
    shards = len(list(tmp_path.glob("shard-*")))
    assert (shards == 20) if shard_bytes == 1 else (shards == 1) if shard_bytes > 4000 else (1 < shards < 20)


@given(st.permutations(range(8)), st.integers(1, 20_000))
@settings(max_examples=20, deadline=None)
def test_any_order_of_adding_reads_in_order_of_sample_id(tmp_path_factory, order, shard_bytes):
    folder = tmp_path_factory.mktemp("store")
    with StoreWriter(folder, manifest(8), shard_bytes=shard_bytes) as writer:
        for sample_id in order:
            writer.add(record(sample_id))
    assert_holds(folder, 8)


def test_random_access_in_any_order(tmp_path):
    store = Store(filled(tmp_path))
    for index in (19, 0, 7, 7, 18, 1):
        assert_same(store.record(index), record(index))


@pytest.mark.parametrize("codec", BIT_EXACT)
def test_a_record_without_teachers_and_states_that_are_not_finite(tmp_path, codec):
    plain = record(0, codec=codec)
    odd = replace(
        plain,
        loss_mask=torch.zeros_like(plain.loss_mask),
        aux=torch.full_like(plain.aux, float("inf")),
        last=plain.last[:0],
        teacher_top1=plain.teacher_top1[:0],
        teacher_lse=plain.teacher_lse[:0],
    )
    with StoreWriter(tmp_path, manifest(2, codec)) as writer:
        writer.add(odd)
        writer.add(record(1, codec=codec))
    store = Store(tmp_path)
    assert_same(store.record(0), odd)
    assert_same(store.record(1), record(1, codec=codec))


def test_records_that_are_views_of_a_larger_batch(tmp_path):
    """As an engine gives them: rows of one tensor for the whole batch, which it drops right after."""
    records = [record(n) for n in range(4)]
    aux, last = torch.cat([r.aux for r in records]), torch.cat([r.last for r in records])
    starts, rows = np.cumsum([0, *map(len, records)]), np.cumsum([0, *(len(r.last) for r in records)])
    with StoreWriter(tmp_path, manifest(4)) as writer:
        for n, one in enumerate(records):
            view = replace(one, aux=aux[starts[n] : starts[n + 1]], last=last[rows[n] : rows[n + 1]])
            writer.add(view)
    assert_holds(tmp_path, 4)


def test_the_index_says_lengths_counts_and_checksums(tmp_path):
    filled(tmp_path)
    described = {r["sample_id"]: r for line in read_index(tmp_path) for r in line["records"]}
    for sample_id, found in described.items():
        want = record(sample_id)
        assert found["tokens"] == len(want)
        assert found["teachers"] == len(want.last)
        assert found["supervised"] == int(want.loss_mask.sum())
        assert found["bytes"] == want.aux.nbytes + want.last.nbytes
    assert len({found["xxh3"] for found in described.values()}) == 20


def test_tokens_and_masks_are_those_of_all_records(tmp_path):
    pairs = list(Store(filled(tmp_path)).tokens_and_masks())
    want = [record(n) for n in range(20)]
    np.testing.assert_array_equal(np.concatenate([t for t, _ in pairs]), torch.cat([r.token_ids for r in want]))
    np.testing.assert_array_equal(np.concatenate([m for _, m in pairs]), torch.cat([r.loss_mask for r in want]))


OPENING = """
import json, sys, time
from pathlib import Path
from specforge.features.store import Store
opened = []
sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event in ("open", "os.open") else None)
began = time.process_time()
store = Store(Path(sys.argv[1]))
seconds = time.process_time() - began
print(json.dumps({"records": len(store), "seconds": seconds, "opened": opened}))
"""


def test_opening_100_000_records_reads_the_two_index_files_only(tmp_path):
    """The index is real: the lines of a written store, repeated under other sample ids. The shards are not there at
    all, so that touching one would be an error."""
    [line] = read_index(filled(tmp_path / "small", shard_bytes=1 << 20))
    folder = tmp_path / "large"
    folder.mkdir()
    manifest(100_000).write(folder)
    with (folder / "shards.jsonl").open("w") as index:
        for number in range(5000):
            records = [r | {"sample_id": r["sample_id"] + 20 * number} for r in line["records"]]
            index.write(seal(line | {"file": f"shard-0-{number}.safetensors", "records": records}) + "\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", OPENING, str(folder)], env=environment, capture_output=True, text=True, check=True
    )
    said = json.loads(done.stdout)
    assert said["records"] == 100_000
    inside = [Path(name).name for name in said["opened"] if name.startswith(str(folder))]
    assert inside == ["manifest.json", "shards.jsonl"]
    assert said["seconds"] < 2  # of the processor, not of the clock: other processes do not count


# Resume


def test_a_resume_writes_only_what_is_missing(tmp_path):
    whole, broken = filled(tmp_path / "whole"), tmp_path / "broken"
    with StoreWriter(broken, manifest(20), shard_bytes=4000) as writer:
        for sample_id in range(10):
            writer.add(record(sample_id))
    committed, number = set(writer.committed), len(read_index(broken))
    assert committed == set(range(10))
    # renamed but not committed; being written, by this and by another writer; a commit line that a kill cut short
    (broken / f"shard-0-{number}.safetensors").write_bytes((broken / "shard-0-0.safetensors").read_bytes())
    (broken / "shard-7-0.safetensors").write_bytes(b"of a rank that this run does not have")
    (broken / f".shard-0-{number}.safetensors.tmp").write_bytes(b"half a sh")
    (broken / ".shard-3-1.safetensors.tmp").write_bytes(b"")
    with (broken / "shards.jsonl").open("a") as file:
        file.write('{"file": "shard-0-9.safetensors", "writer": 0, "records": [{"sample_id": 9')
    before = listing(broken)

    with StoreWriter(broken, manifest(20), shard_bytes=4000) as writer:
        assert writer.committed == committed
        for sample_id in range(20):
            writer.add(record(sample_id))

    lines = read_index(broken)
    written = [r["sample_id"] for line in lines for r in line["records"]]
    assert sorted(written) == list(range(20))
    for name in {line["file"] for line in lines[:number]}:  # what was committed is never written again
        assert (broken / name).read_bytes() == before[Path(name)]
    names = {path.name for path in broken.iterdir() if path.name != ".lock"}
    assert names == {"manifest.json", "shards.jsonl"} | {line["file"] for line in lines}
    resumed, unbroken = Store(broken), Store(whole)
    for index in range(20):
        assert_same(resumed.record(index), unbroken.record(index))


def test_a_resume_with_another_number_of_writers(tmp_path):
    with StoreWriter(tmp_path, manifest(20), 0, 2000) as first, StoreWriter(tmp_path, manifest(20), 1, 2000) as second:
        for sample_id in range(12):
            (first, second)[sample_id % 2].add(record(sample_id))
    with StoreWriter(tmp_path, manifest(20), shard_bytes=2000) as writer:
        assert writer.committed == set(range(12))
        for sample_id in range(16):
            writer.add(record(sample_id))
    writers = [StoreWriter(tmp_path, manifest(20), number, 2000) for number in range(3)]
    for sample_id in range(16, 20):
        writers[sample_id % 3].add(record(sample_id))
    for writer in writers:
        writer.close()
    assert_holds(tmp_path, 20)
    assert {line["writer"] for line in read_index(tmp_path)} == {0, 1, 2}


def test_a_finished_store_opened_again_is_left_as_it_is(tmp_path):
    before = listing(filled(tmp_path))
    with StoreWriter(tmp_path, manifest(20)) as writer:
        for sample_id in range(20):
            writer.add(record(sample_id))
    after = listing(tmp_path)
    assert after.pop(Path(".lock"))
    assert before.pop(Path(".lock"))
    assert after == before


def test_a_resume_keeps_the_planned_batches(tmp_path):
    """Another token budget is no reason to refuse, but the batches of the first one stand."""
    filled(tmp_path)
    assert StoreWriter(tmp_path, manifest(20, tokens_per_batch=9, target="other name")).manifest == manifest(20)


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
        ("codec", "fp8"),
        ("dtype", "float16"),
        ("hidden_size", 16),
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
    with StoreWriter(tmp_path, manifest(20), shard_bytes=4000) as writer:
        for sample_id in range(19):
            writer.add(record(sample_id))
    with pytest.raises(StoreError, match="19 of 20"):
        Store(tmp_path)


def test_records_written_twice_are_not_taken_for_a_whole_store(tmp_path):
    """Two of a kind and one missing: the count alone is right."""
    writers = [StoreWriter(tmp_path, manifest(3), number) for number in (0, 1)]
    for writer, ids in zip(writers, [(0, 1), (1,)], strict=True):
        for sample_id in ids:
            writer.add(record(sample_id))
        writer.close()
    with pytest.raises(StoreError, match="twice"):
        Store(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"text"', "{}", '{"format_version": 2}'])
def test_a_damaged_manifest_is_refused(tmp_path, content):
    filled(tmp_path)
    (tmp_path / "manifest.json").write_text(content)
    for use in (lambda: Store(tmp_path), lambda: StoreWriter(tmp_path, manifest(20))):
        with pytest.raises(StoreError, match="damaged") as refused:
            use()
        assert "manifest.json" in refused.value.where


@pytest.mark.parametrize("version", [1, 3])
def test_a_store_of_another_format_is_refused_with_what_to_do(tmp_path, version):
    """Format 1 had no seal. What a later format adds is not known, so it keeps the seal and may have other keys."""
    filled(tmp_path)
    content = asdict(manifest(20)) | {"format_version": version}
    if version == 1:
        del content["dtype"]
        text = json.dumps(content, indent=2) + "\n"
    else:
        text = seal(content | {"something": "new"}, indent=2) + "\n"
    (tmp_path / "manifest.json").write_text(text)
    for use in (lambda: Store(tmp_path), lambda: StoreWriter(tmp_path, manifest(20))):
        with pytest.raises(StoreError, match=f"format {version}") as refused:
            use()
        assert "capture again" in refused.value.fix


def test_a_damaged_index_is_refused_with_its_line(tmp_path):
    """A whole line that is not as it was written cannot come from a kill: the file was harmed."""
    filled(tmp_path)
    index = tmp_path / "shards.jsonl"
    index.write_text(index.read_text().replace('"tokens": ', '"tokens": 1', 1))
    for use in (lambda: Store(tmp_path), lambda: StoreWriter(tmp_path, manifest(20))):
        with pytest.raises(StoreError, match=re.escape("shards.jsonl, line 1")):
            use()


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


# Reading and checksums


def damaged(folder, harm):
    """A store whose second shard was harmed after it was written."""
    filled(folder)
    path = folder / read_index(folder)[1]["file"]
    content = bytearray(path.read_bytes())
    if harm == "cut":
        del content[len(content) // 2 :]
    elif harm == "tail":
        content[-10] ^= 1
    elif harm == "states":
        content[4096] ^= 1
    elif harm == "header":
        content[2] ^= 0x40
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize("harm", ["cut", "tail", "states", "header", "missing"])
def test_a_damaged_shard_is_refused_by_name(tmp_path, harm):
    path = damaged(tmp_path, harm)
    store = Store(tmp_path)
    assert_same(store.record(0), record(0))  # the other shards are whole
    index = read_index(tmp_path)[1]["records"][0]["sample_id"]
    with pytest.raises(StoreError, match=re.escape(path.name)):
        store.record(index)
    if harm == "states":  # counting tokens reads no states
        assert len(list(store.tokens_and_masks())) > 1
    else:
        with pytest.raises(StoreError, match=re.escape(path.name)):
            list(store.tokens_and_masks())


def test_one_damaged_record_leaves_the_others_of_its_shard(tmp_path):
    """A record costs the reading of a record: the shard's other states are not looked at."""
    path = damaged(tmp_path, "states")
    store = Store(tmp_path)
    first, *others = [r["sample_id"] for r in read_index(tmp_path)[1]["records"]]
    for index in others:
        assert_same(store.record(index), record(index))
    with pytest.raises(StoreError, match=rf"{re.escape(path.name)}, record 0 \(sample {first}\)"):
        store.record(first)


def test_when_checksums_are_compared(tmp_path):
    """The file changes after the first reading: the mapping shows it, only "always" looks again."""
    [line] = read_index(filled(tmp_path, 3, shard_bytes=1 << 20))
    stores = {verify: Store(tmp_path, verify) for verify in ("always", "first", "never")}
    for store in stores.values():
        store.record(0)
    with (tmp_path / line["file"]).open("r+b") as file:
        file.seek(4096)
        byte = file.read(1)[0]
        file.seek(4096)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(StoreError, match="record 0"):
        stores["always"].record(0)
    for verify in ("first", "never"):
        assert not torch.equal(stores[verify].record(0).aux, record(0).aux)
    with pytest.raises(StoreError, match="record 0"):
        Store(tmp_path, "first").record(0)
    Store(tmp_path, "never").record(0)


def test_a_damaged_zstd_frame_is_an_error_of_the_store_even_unchecked(tmp_path):
    [line] = read_index(filled(tmp_path, 3, "bf16+zstd", shard_bytes=1 << 20))
    with (tmp_path / line["file"]).open("r+b") as file:
        file.seek(4096)
        file.write(b"no zstd")
    with pytest.raises(StoreError, match="record 0"):
        Store(tmp_path, "never").record(0)


def test_many_shards_take_no_file_descriptors(tmp_path):
    """A store of some TB has thousands of shards."""
    store = Store(filled(tmp_path, 60, shard_bytes=1))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for index in range(60):
        store.record(index)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
