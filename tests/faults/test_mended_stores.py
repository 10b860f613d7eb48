"""A store that the disk changed, and the same `prepare-hidden` again: what is damaged is captured anew, and said."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from specforge.features.index import INDEX
from specforge.features.store import Store
from specforge.files import seal, unseal
from tests import tiny
from tests.e2e.test_commands import command, run
from tests.faults.page import fault


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A target, data, and a store of several shards."""
    folder = tmp_path_factory.mktemp("work")
    tiny.make_target(folder / "target")
    tiny.write_token_rows(folder / "data", train=600, test=4)
    run(capture("feat"), folder)
    assert len(list((folder / "feat" / "train").glob("shard-*"))) > 5
    return folder


def capture(output: str) -> list[str]:
    given = ["--model-path", "target", "--data", "data", "--output", output, "--engine", "hf", "--shard-mb", 5]
    return command("prepare-hidden", *given)


@pytest.fixture
def copied(work, tmp_path) -> Path:
    for name in ("target", "data"):
        (tmp_path / name).symlink_to(work / name)
    shutil.copytree(work / "feat", tmp_path / "feat")
    return tmp_path


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flipped(path: Path) -> None:
    """In every record's states."""
    content = bytearray(path.read_bytes())
    for at in range(len(content) // 2, len(content), 2000):
        content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [shortened, flipped, Path.unlink])
@fault(
    "a shard is cut short, changed or deleted, and the same `prepare-hidden` runs again",
    "the shard is named, and its records are captured again",
)
def test_a_damaged_shard_is_named_and_captured_again(work, copied, damage):
    damage(copied / "feat/train/shard-0-2.safetensors")
    said = run(capture("feat"), copied)
    assert "feat/train/shard-0-2.safetensors: a shard " in said
    assert "records are captured again" in said
    assert said.count("captured again") == 1
    one, two = Store(copied / "feat" / "train"), Store(work / "feat" / "train")
    assert sorted(one.sample_ids.tolist()) == sorted(two.sample_ids.tolist())
    assert "as it was written" in run(command("store", "verify", "feat"), copied)
    assert "captured again" not in run(capture("feat"), copied)


@pytest.mark.parametrize("name", ["../../mine.safetensors", "/etc/hosts", "shard-0-2.safetensors/x", "mine"])
@fault(
    "an index names files outside of its store",
    "refused; they are not read",
)
def test_an_index_that_names_other_files_is_refused(copied, name):
    """They are not read, and not removed."""
    (copied / "mine.safetensors").write_text("precious")
    index = copied / "feat" / "train" / INDEX
    lines = [unseal(line) for line in index.read_bytes().splitlines()]
    lines[1]["file"] = name
    index.write_text("".join(seal(line) + "\n" for line in lines))
    for given in (capture("feat"), command("store", "verify", "feat")):
        assert "line 2 of the index is damaged" in run(given, copied, code=2)
    assert (copied / "mine.safetensors").read_text() == "precious"


@pytest.mark.parametrize("split", ["train", "test"])
@fault(
    "one of the two splits of a store is gone",
    "`store verify` refuses it",
)
def test_half_a_store_is_not_as_it_was_written(copied, split):
    (copied / "feat" / split / "manifest.json").unlink()
    said = run(command("store", "verify", "feat"), copied, code=2)
    assert f"no {split}" in said
    other = {"train": "test", "test": "train"}[split]
    assert "as it was written" in run(command("store", "verify", f"feat/{other}"), copied)


def test_a_line_that_was_cut_short_is_still_ignored(copied):
    index = copied / "feat" / "train" / INDEX
    index.write_bytes(index.read_bytes()[:-50])
    run(capture("feat"), copied)
    assert "as it was written" in run(command("store", "verify", "feat"), copied)
