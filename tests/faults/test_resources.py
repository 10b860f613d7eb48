"""What a machine may run out of: disk, open files, memory. Each ends with one message that is true."""

from __future__ import annotations

import json
import re
import resource
import subprocess

import pytest

from tests import tiny
from tests.e2e.test_commands import FP32, ROOT, command, losses, run
from tests.faults.page import fault
from tests.faults.test_store_faults import ENVIRONMENT, on_small_disk

TRAIN = (
    "--model-path target --features feat --deepspeed-config ds.json --draft-vocab-size 100 --epochs 2 --row-tokens 256 "
    "--batch-size 2 --max-length 256 --lr 1e-3 --save-steps 5 --tracker none --keep 1"
).split()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Target, data, features, and the run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("work")
    tiny.make_target(folder / "target")
    tiny.write_jsonl(folder / "rows.jsonl", tiny.conversations(60))
    (folder / "ds.json").write_text(json.dumps(FP32))
    run(command("prepare-data", "--dataset", "rows.jsonl", "--model-path", "target", "--output", "data"), folder)
    given = ["--model-path", "target", "--data", "data", "--output", "feat", "--engine", "hf"]
    run(command("prepare-hidden", *given), folder)
    run(command("train", *TRAIN, "--output", "whole"), folder)
    return folder


FULL = """
import json, shutil, subprocess, sys
from pathlib import Path

disk, work, given = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
command = [sys.executable, "-m", "specforge.cli", "train", *given, "--output", str(disk / "run")]

def train():
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=work)
    return done.returncode, done.stdout

subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], check=True)
full = train()
left = sorted(str(path.relative_to(disk)) for path in disk.rglob("*") if path.is_file())
subprocess.run(["mount", "-o", "remount,size=300m", disk], check=True)
whole = train()
shutil.copy(disk / "run" / "metrics.jsonl", Path(work) / "full.jsonl")
print(json.dumps({"full": full, "left": left, "whole": whole}))
"""


@fault(
    "the disk is full at a checkpoint",
    "refused; the checkpoint before is whole, and the same command goes on",
)
def test_training_on_a_full_disk_goes_on_when_there_is_room(work, tmp_path):
    """2 MB hold the draft, but not a checkpoint with its moments beside it."""
    (tmp_path / "disk").mkdir()
    found = on_small_disk(FULL, tmp_path / "disk", work, *TRAIN)
    code, said = found["full"]
    assert code == 2, said
    assert re.search(r"error .*(No space left|cannot be written)", said), said
    assert "where:" in said
    assert "Traceback" not in said
    assert "fault of specforge" not in said
    assert not [name for name in found["left"] if ".tmp" in name]
    code, said = found["whole"]
    assert code == 0, said
    rows = [json.loads(line) for line in (work / "full.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows if "loss" in row] == pytest.approx(losses(work / "whole"), rel=1e-6)


def limited(work, which: int, most: int, *arguments: object) -> tuple[str, int]:
    """The command in a process that may have so much of a resource."""
    done = subprocess.run(
        command(*arguments),
        cwd=work,
        env=ENVIRONMENT | {"COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
        check=False,
        preexec_fn=lambda: resource.setrlimit(which, (most, most)),
    )
    return done.stdout, done.returncode


@fault(
    "a process may open 24 files only",
    "commands that need no more work; the others are refused, and name the limit",
)
def test_twenty_four_open_files(work):
    """Shards are mapped, not held open; the target in SGLang needs more."""
    said, code = limited(work, resource.RLIMIT_NOFILE, 24, "train", *TRAIN, "--epochs", 1, "--output", "few")
    assert code == 0, said
    given = ["--model-path", "target", "--data", "data", "--output", "few-feat", "--engine", "sglang"]
    said, code = limited(work, resource.RLIMIT_NOFILE, 24, "prepare-hidden", *given)
    assert code == 2, said
    assert "Too many open files" in said
    assert "ulimit -n" in said
    assert "Traceback" not in said


@fault(
    "memory ends while the target is loaded, or in training",
    "refused; the message names memory",
)
def test_a_small_address_space(work):
    for name, megabytes, arguments in (
        ("target", 2000, ["prepare-hidden", "--model-path", "target", "--data", "data", "--engine", "sglang"]),
        ("step", 2000, ["train", *TRAIN, "--epochs", 1, "--deepspeed-config", str(ROOT / "ds_config.json")]),
    ):
        said, code = limited(work, resource.RLIMIT_AS, megabytes << 20, *arguments, "--output", f"small-{name}")
        assert code == 2, said
        assert re.search(r"error .*memory", said), said
        assert "fault of specforge" not in said
        assert "Traceback" not in said
