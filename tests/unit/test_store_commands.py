"""specforge store verify, info, merge: as they are typed."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from specforge import cli
from specforge.features import aside
from specforge.features.index import read_index
from specforge.features.store import Store
from specforge.features.writer import StoreWriter
from specforge.pipeline import stores
from tests.stores import assert_same, filled, listing, manifest, record


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def run(*arguments):
    found = CliRunner().invoke(cli.app, ["store", *map(str, arguments)])
    assert "Traceback" not in found.output
    return found.exit_code, found.output


def refused(*arguments):
    code, output = run(*arguments)
    assert code == 2, output
    assert output.count("error ") == 1
    assert "where:" in output
    assert "fix:" in output
    return output


def features(folder, count=20, first=0, **other):
    """As prepare-hidden writes them: a store for each split, the test split a quarter as large."""
    for name, size in (("train", count), ("test", count // 4)):
        given = {"data_hash": f"{name} from {first}", **other}
        with StoreWriter(folder / name, manifest(size, **given), shard_bytes=4000) as writer:
            for sample_id in range(size):
                writer.add(replace(record(first + sample_id), sample_id=sample_id))
    return folder


def flip(path, at=4096):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


# verify


def test_verify_says_that_a_store_is_whole(tmp_path):
    for folder in (filled(tmp_path / "one"), features(tmp_path / "both")):
        before = listing(folder)
        code, output = run("verify", folder)
        assert code == 0, output
        assert "as it was written" in output
        assert listing(folder) == before


def test_verify_names_everything_that_is_damaged(tmp_path):
    folder = features(tmp_path)
    damaged = [read_index(folder / "train")[1], read_index(folder / "test")[0]]
    flip(folder / "train" / damaged[0]["file"])
    flip(folder / "test" / damaged[1]["file"], at=-1)
    gone = read_index(folder / "train")[2]["file"]
    (folder / "train" / gone).unlink()
    output = refused("verify", folder)
    assert f"train/{damaged[0]['file']}, record 0 (sample {damaged[0]['records'][0]['sample_id']}): damaged" in output
    last = damaged[1]["records"][-1]
    assert f"test/{damaged[1]['file']}, record {len(damaged[1]['records']) - 1} (sample {last['sample_id']})" in output
    assert f"train/{gone}: a shard is missing" in output
    assert "3 place(s)" in output


def test_a_damaged_shard_is_mended_as_the_message_says(tmp_path):
    """Its line deleted from the index, the same capture writes its records anew, and no others."""
    filled(tmp_path)
    lines = read_index(tmp_path)
    flip(tmp_path / lines[1]["file"])
    assert "delete its line" in refused("verify", tmp_path)
    index = tmp_path / "shards.jsonl"
    kept = index.read_text().splitlines(keepends=True)
    index.write_text("".join(kept[:1] + kept[2:]))
    with StoreWriter(tmp_path, manifest(20), shard_bytes=4000) as writer:
        assert set(range(20)) - writer.committed == {r["sample_id"] for r in lines[1]["records"]}
        for sample_id in range(20):
            writer.add(record(sample_id))
    assert run("verify", tmp_path)[0] == 0


def test_verify_of_an_unfinished_store(tmp_path):
    with StoreWriter(tmp_path, manifest(20)) as writer:
        writer.add(record(0))
    assert "1 of 20 records" in refused("verify", tmp_path)


def test_verify_of_nothing(tmp_path):
    assert "manifest.json" in refused("verify", tmp_path / "none")
    assert "where: FOLDER\n" in refused("verify")


# info


def test_info_says_what_is_in_it(tmp_path):
    folder = features(tmp_path, 20)
    for path in folder.rglob("shard-*"):
        path.unlink()  # only the index is read
    code, output = run("info", folder)
    assert code == 0, output
    lines = [r for line in read_index(folder / "train") for r in line["records"]]
    tokens, supervised = (sum(r[name] for r in lines) for name in ("tokens", "supervised"))
    said = re.sub(r"[│ ]+", " ", output)
    for fact in ("20 of 20", "5 of 5", f"tokens {tokens:,}", f"supervised {supervised / tokens:.1%}", "codec bf16"):
        assert fact in said, fact
    shown = output.split("lengths")[1]  # of train, which comes first
    counts = [tuple(map(int, found)) for found in re.findall(r"^ *(\d+) - (\d+) +(\d+) +█*", shown, re.MULTILINE)]
    assert sum(number for *_, number in counts) == 20
    for low, high, number in counts:
        assert number == sum(low <= r["tokens"] <= high for r in lines)


def test_info_of_an_unfinished_store(tmp_path):
    StoreWriter(tmp_path, manifest(20)).close()
    code, output = run("info", tmp_path)
    assert code == 0
    assert "0 of 20" in output


# merge


def test_merged_stores_hold_the_records_of_all(tmp_path):
    one, two = features(tmp_path / "one"), features(tmp_path / "two", 12, first=100)
    before = listing(one), listing(two)
    code, output = run("merge", one, two, "--output", tmp_path / "deep" / "three")
    assert code == 0, output
    assert "specforge train --features" in output
    for name, counts in (("train", (20, 12)), ("test", (5, 3))):
        merged = Store(tmp_path / "deep" / "three" / name)
        assert len(merged) == sum(counts)
        for index in range(len(merged)):
            own = index if index < counts[0] else 100 + index - counts[0]
            assert_same(merged.record(index), replace(record(own), sample_id=index))
    assert (listing(one), listing(two)) == before
    assert run("verify", tmp_path / "deep" / "three")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "one", "two"]


def test_three_single_stores_of_several_writers(tmp_path):
    for number in range(3):
        folder = tmp_path / str(number)
        writers = [StoreWriter(folder, manifest(10, data_hash=str(number)), n, 2000) for n in range(2)]
        for sample_id in range(10):
            writers[sample_id % 2].add(replace(record(10 * number + sample_id), sample_id=sample_id))
        for writer in writers:
            writer.close()
    assert run("merge", *(tmp_path / str(n) for n in range(3)), "--output", tmp_path / "all")[0] == 0
    store = Store(tmp_path / "all")
    for index in range(30):
        assert_same(store.record(index), record(index))
    assert {line["writer"] for line in read_index(tmp_path / "all")} == set(range(6))


def test_records_that_were_set_aside_are_not_missing(tmp_path):
    folders = []
    for number in range(2):
        folders.append(tmp_path / str(number))
        with StoreWriter(folders[-1], manifest(10, data_hash=str(number))) as writer:
            for sample_id in range(9):
                writer.add(replace(record(10 * number + sample_id), sample_id=sample_id))
        aside.set_aside(folders[-1], 9, aside.TOO_LARGE, records=10)
        assert run("verify", folders[-1])[0] == 0
        assert re.search(r"set aside +│ +1", run("info", folders[-1])[1])
    assert run("merge", *folders, "--output", tmp_path / "all")[0] == 0
    store = Store(tmp_path / "all")
    assert len(store) == 18
    for index in range(18):
        own = index if index < 9 else index + 1
        assert_same(store.record(index), replace(record(own), sample_id=index))


def test_merging_takes_no_disk_where_links_are_possible(tmp_path):
    one, two = filled(tmp_path / "one"), filled(tmp_path / "two", data_hash="d1")
    run("merge", one, two, "--output", tmp_path / "three")
    for path in (tmp_path / "three").glob("shard-*"):
        assert path.stat().st_nlink == 2


def test_merging_copies_where_links_are_not(tmp_path, monkeypatch):
    """As between two disks."""
    one, two = filled(tmp_path / "one"), filled(tmp_path / "two", data_hash="d1")

    def no_link(*given):
        raise OSError(18, os.strerror(18))

    monkeypatch.setattr("pathlib.Path.hardlink_to", no_link)
    assert run("merge", one, two, "--output", tmp_path / "three")[0] == 0
    assert run("verify", tmp_path / "three")[0] == 0
    assert {path.stat().st_nlink for path in (tmp_path / "three").glob("shard-*")} == {1}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target_fingerprint", "f1"),
        ("tokenizer_hash", "t1"),
        ("template_hash", "c1"),
        ("aux_layers", (1, 3, 5)),
        ("codec", "fp32"),
        ("dtype", "float16"),
        ("engine", "sglang"),
    ],
)
def test_stores_of_another_kind_are_not_merged(tmp_path, name, value):
    one, two = filled(tmp_path / "one"), filled(tmp_path / "two", **{"data_hash": "d1", name: value})
    output = refused("merge", one, two, "--output", tmp_path / "three")
    assert f"another {name}" in output
    assert str(value) in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_what_else_is_not_merged(tmp_path):
    one, two = filled(tmp_path / "one"), filled(tmp_path / "two", data_hash="d1")
    both = features(tmp_path / "both")
    unfinished = tmp_path / "unfinished"
    StoreWriter(unfinished, manifest(5, data_hash="d2")).close()
    names = sorted(path.name for path in tmp_path.iterdir())
    output = ["--output", tmp_path / "three"]
    assert "data_hash" in refused("merge", one, one, *output)
    assert "unfinished" in refused("merge", one, unfinished, *output)
    assert "splits" in refused("merge", one, both, *output)
    assert "none" in refused("merge", one, tmp_path / "none", *output)
    assert "--output" in refused("merge", one, two, "--output", both)
    assert "where: FOLDERS" in refused("merge", one, *output)
    assert "--output" in refused("merge", one, two)
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_merge_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch):
    one, two = filled(tmp_path / "one"), filled(tmp_path / "two", data_hash="d1")
    before = listing(tmp_path)
    calls = []

    def full(folder, line):
        calls.append(line)
        if len(calls) == 3:
            raise OSError(28, os.strerror(28), str(folder))

    monkeypatch.setattr(stores, "append_line", full)
    code, output = run("merge", one, two, "--output", tmp_path / "three")
    assert code == 2
    assert "No space left" in output
    assert listing(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_a_merged_store_is_not_gone_on_with(tmp_path):
    """It was made from other data than either command's."""
    one, two = filled(tmp_path / "one"), filled(tmp_path / "two", data_hash="d1")
    assert run("merge", one, two, "--output", tmp_path / "three")[0] == 0
    found = json.loads((tmp_path / "three" / "manifest.json").read_text())
    assert found["data_hash"] not in ("d0", "d1")
    shutil.rmtree(one)
    assert len(Store(tmp_path / "three")) == 40  # a link is as good as the file itself
