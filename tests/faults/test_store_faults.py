"""What can happen to a store: kills at any instant, damage to any byte, a full disk, a second run."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from specforge import cli
from specforge.config import StoreVerifySettings
from specforge.errors import StoreError
from specforge.features.index import read_index
from specforge.features.shard import HEAD
from specforge.features.store import Store
from specforge.pipeline.stores import store_verify
from tests import tiny
from tests.faults.page import fault
from tests.faults.store_kills import INSTANTS, RECORDS, WRITERS
from tests.stores import assert_holds, filled

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


# Kills


@pytest.fixture(scope="module")
def kills(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    command = [sys.executable, "-m", "tests.faults.store_kills", str(folder)]
    subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, check=True, timeout=300)
    return folder, json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize(("what", "number"), INSTANTS)
@fault(
    "a capture is killed at any instant",
    "the same command finishes it with the bytes of an unbroken run",
)
def test_a_run_killed_at_any_instant_is_finished_with_the_same_bytes(kills, what, number):
    """Two writers, 20 shards and more. Not only the records: each shard file is the one of the unbroken run."""
    folder, report = kills
    name = f"{what}-{number}".replace(" ", "-")
    told = report[name]
    assert told["ended"] == -9, "it was not killed"
    lost = {entry for entry in told["left"] if "shard-" in entry} - set(told["committed"])
    assert len(lost) <= WRITERS, "more than the open shards were lost"
    assert told["resumed"] == 0
    one, two = folder / "unbroken", folder / name
    files = {line["file"] for line in read_index(one)}
    assert len(files) >= 20
    assert {path.name for path in two.iterdir() if not path.name.startswith(".lock")} == {
        "manifest.json",
        "shards.jsonl",
        *files,
    }
    for file in [*files, "manifest.json"]:
        assert (one / file).read_bytes() == (two / file).read_bytes(), file
    lines = [sorted((path / "shards.jsonl").read_text().splitlines()) for path in (one, two)]
    assert lines[0] == lines[1]  # writers take turns, so their order is not fixed
    assert_holds(two, RECORDS)


# Damage


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return {codec: filled(tmp_path_factory.mktemp("whole") / "store", 12, codec) for codec in ("bf16", "fp8+zstd")}


def read_all(folder):
    store = Store(folder)
    list(store.tokens_and_masks())
    for index in range(len(store)):
        store.record(index)


def told(folder):
    """What reading and verifying say, which must be errors of the store."""
    said = []
    for use in (lambda: read_all(folder), lambda: store_verify(StoreVerifySettings(folder=folder))):
        with pytest.raises(StoreError) as refused:
            use()
        said.append(str(refused.value))
    return said


def record_at(line, position):
    """The record whose states hold that byte of the shard, None outside the states."""
    at = position - HEAD
    for number, one in enumerate(line["records"]):
        if 0 <= at < one["bytes"]:
            return number
        at -= one["bytes"]
    return None


def positions(folder, count, seed):
    """Half of them anywhere, half in each file alike, so that small files and headers come into it too."""
    chance = random.Random(seed)
    sizes = {path: path.stat().st_size for path in sorted(folder.iterdir()) if not path.name.startswith(".")}
    everywhere = [(path, at) for path, size in sizes.items() for at in range(size)]
    chosen = [chance.choice(everywhere) for _ in range(count // 2)]
    for number in range(count - len(chosen)):
        path = list(sizes)[number % len(sizes)]
        limit = HEAD if path.suffix == ".safetensors" and number % 2 else sizes[path]
        chosen.append((path, chance.randrange(limit)))
    return chosen


@pytest.mark.parametrize("codec", ["bf16", "fp8+zstd"])
@fault(
    "any bit of a store flips",
    "refused where it is read; shard and record are named",
)
def test_each_of_100_single_bit_flips_is_noticed_and_named(whole, codec, tmp_path):
    """Over shards, manifest and index; two codecs make 200."""
    folder = shutil.copytree(whole[codec], tmp_path / "store")
    lines = {line["file"]: line for line in read_index(folder)}
    chance = random.Random(7)
    for path, at in positions(folder, 100, seed=len(codec)):
        good = path.read_bytes()
        bad = bytearray(good)
        bad[at] ^= 1 << chance.randrange(8)
        path.write_bytes(bad)
        for said in told(folder):
            assert path.name in said, (path.name, at, said)
            record = record_at(lines[path.name], at) if path.name in lines else None
            if record is not None:
                assert f"{path.name}, record {record} " in said, (at, said)
        path.write_bytes(good)
    read_all(folder)


def test_a_flip_in_tokens_or_masks_names_its_record(whole, tmp_path):
    folder = shutil.copytree(whole["bf16"], tmp_path / "store")
    line = read_index(folder)[0]
    states = sum(record["bytes"] for record in line["records"])
    at = HEAD + states + -states % 8 + 4 * line["records"][0]["tokens"]  # the first token id of record 1
    path = folder / line["file"]
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    for said in told(folder):
        assert f"{path.name}, record 1 " in said


@pytest.mark.parametrize("codec", ["bf16", "fp8+zstd"])
@fault(
    "a file of a store is cut short",
    "the same",
)
def test_each_of_50_truncations_is_noticed_and_named(whole, codec, tmp_path):
    """Cutting the index makes its last lines uncommitted, as a kill does: the store is then unfinished, not damaged."""
    folder = shutil.copytree(whole[codec], tmp_path / "store")
    for path, at in positions(folder, 50, seed=len(codec)):
        good = path.read_bytes()
        os.truncate(path, at)
        for said in told(folder):
            if path.name == "shards.jsonl":
                assert re.search(r"unfinished: (\w+ holds )?\d+ of 12 records", said), said
            else:
                assert path.name in said, (path.name, at, said)
        path.write_bytes(good)
    read_all(folder)


# A full disk, for certain: a file system of its own, of which only the child knows


def on_small_disk(script, *arguments, timeout=120):
    """Run a Python script where it may mount; what it mounts is gone with it."""
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a small disk of its own needs user namespaces, which this machine does not allow")
    command = [*alone, sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


FULL = """
import json, shutil, subprocess, sys
from pathlib import Path
from specforge.errors import StoreError
from specforge.features.index import read_index
from specforge.features.writer import StoreWriter
from tests.stores import listing, manifest, record

disk, output, size = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
store = disk / "store"

def capture():
    with StoreWriter(store, manifest(200), shard_bytes=20_000) as writer:
        for sample_id in range(200):
            writer.add(record(sample_id))

subprocess.run(["mount", "-t", "tmpfs", "-o", "size=" + size, "tmpfs", disk], check=True)
try:
    capture()
    said = "nothing"
except StoreError as error:
    said = str(error)
left = [path.name for path in store.iterdir()]
lines = read_index(store)
whole = all((store / line["file"]).stat().st_size == line["bytes"] for line in lines)
before = {line["file"]: (store / line["file"]).read_bytes() for line in lines}
subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
capture()
kept = all((store / name).read_bytes() == content for name, content in before.items())
shutil.copytree(store, output)
print(json.dumps({"said": said, "left": left, "committed": len(lines), "whole": whole, "kept": kept}))
"""


@pytest.mark.parametrize("size", ["60k", "92k", "100k", "120k", "200k"])
@fault(
    "the disk is full while features are written",
    "refused; what was committed is whole, and the same command goes on",
)
def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(tmp_path, size):
    """Blocks run out, in the kernel, at some write, here or there. (200 records take about 230 kB.)"""
    (tmp_path / "disk").mkdir()
    found = on_small_disk(FULL, tmp_path / "disk", tmp_path / "store", size)
    assert "ENOSPC" in found["said"]
    assert str(tmp_path / "disk" / "store") in found["said"]
    assert "fix:" in found["said"]
    assert not [name for name in found["left"] if name.endswith(".tmp")]
    assert found["whole"]
    assert found["kept"]
    assert found["committed"] >= 1
    assert_holds(tmp_path / "store", 200)


COMMAND = """
import json, subprocess, sys
from pathlib import Path

disk, given = Path(sys.argv[1]), sys.argv[2:]
command = [sys.executable, "-m", "specforge.cli", "prepare-hidden", *given, "--output", str(disk / "features")]

def run(*flags):
    done = subprocess.run([*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout

# Space there is, but room for ten files only: folders, log, lock, manifest, index, and a few shards
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,nr_inodes=10", "tmpfs", disk], check=True)
full = run()
shards = len(list(disk.rglob("shard-*")))
subprocess.run(["mount", "-o", "remount,nr_inodes=1000", disk], check=True)
limited = run("--max-disk", "5MB")
used = 512 * sum(path.stat().st_blocks for path in disk.rglob("*") if path.suffix != ".log")
finished = run()
verified = subprocess.run([sys.executable, "-m", "specforge.cli", "store", "verify", disk / "features"]).returncode
print(json.dumps({"full": full, "shards": shards, "limited": limited, "used": used, "finished": finished,
                  "verified": verified}))
"""


def test_prepare_hidden_on_a_full_disk_then_with_a_limit_then_to_the_end(tmp_path):
    """The command itself, four times over one output folder."""
    tiny.make_target(tmp_path / "target")
    tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(150))
    (tmp_path / "disk").mkdir()
    given = ["--model-path", tmp_path / "target", "--data", tmp_path / "rows.jsonl", "--engine", "hf"]
    given += ["--shard-mb", 1, "--tokens-per-batch", 512, "--codec", "bf16"]
    found = on_small_disk(COMMAND, tmp_path / "disk", *given)
    code, said = found["full"]
    assert code == 2
    assert "ENOSPC" in said
    assert "where:" in said
    assert "Traceback" not in said
    assert found["shards"] >= 1
    code, said = found["limited"]
    assert code == 2
    assert "going on" in said
    assert re.search(r"stopped at the limit of the disk: \d+ of \d+ batches of train", said)
    assert "--max-disk" in said
    assert 3_000_000 < found["used"] <= 5_000_000
    code, said = found["finished"]
    assert code == 0, said
    assert "going on" in said
    assert found["verified"] == 0


# A second run


HOLDER = """
import sys, time
from pathlib import Path
from specforge.features.index import lock
Path(sys.argv[1]).mkdir(parents=True)
held = lock(Path(sys.argv[1]), 0)
print("holding", flush=True)
time.sleep(120)
"""


@fault(
    "two captures get one output folder",
    "the second is refused",
)
def test_prepare_hidden_into_a_store_that_is_being_written(tmp_path):
    """Refused before the target is loaded, and without a change."""
    tiny.make_target(tmp_path / "target")
    tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(20))
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "features" / "train")]
    holder = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "holding\n"
        given = ["--model-path", tmp_path / "target", "--data", tmp_path / "rows.jsonl", "--engine", "hf"]
        given += ["--output", tmp_path / "features"]
        found = CliRunner().invoke(cli.app, ["prepare-hidden", *map(str, given)])
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert found.exit_code == 2, found.output
    assert f"being written by process {holder.pid}" in found.output
    assert [path.name for path in (tmp_path / "features").rglob("*")] == ["train", ".lock"]
