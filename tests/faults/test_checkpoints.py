"""Checkpoints that the disk changed, and two trainings in one folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import tiny, warm
from tests.e2e.test_commands import command, run
from tests.faults.page import fault

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Target, features, and a run of two epochs that could go on to a third."""
    folder = tmp_path_factory.mktemp("work")
    tiny.make_target(folder / "target")
    tiny.write_token_rows(folder / "data", train=60, test=8)
    given = ["--model-path", "target", "--data", "data", "--output", "feat", "--engine", "hf"]
    run(command("prepare-hidden", *given), folder)
    run(train("run", "--epochs", 2), folder)
    assert [path.name for path in sorted((folder / "run/checkpoints").iterdir())] == ["step-0000015", "step-0000030"]
    return folder


def train(output: str, *arguments: object) -> list[str]:
    given = ["--model-path", "target", "--features", "feat", "--output", output, "--draft-vocab-size", 200]
    given += ["--deepspeed-config", ROOT / "ds_config.json", "--max-length", 64, "--row-tokens", 64, "--batch-size", 4]
    return command("train", *given, "--steps", 2, "--tracker", "none", "--schedule", "constant", *arguments)


@pytest.fixture
def copied(work, tmp_path) -> Path:
    """A copy of the run, beside links to what it was made from."""
    for name in ("target", "data", "feat"):
        (tmp_path / name).symlink_to(work / name)
    shutil.copytree(work / "run", tmp_path / "run")
    return tmp_path


def flip(path: Path, share: float) -> None:
    """One bit of the byte that lies at this share of the file."""
    content = bytearray(path.read_bytes())
    content[int(share * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def steps(folder: Path) -> list[int]:
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "step" in row]


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("optimizer.safetensors", 0.5),
        ("optimizer.safetensors", 1.0),
        ("model.safetensors", 0.7),
        ("config.json", 0.3),
        ("state.json", 0.2),
        ("state.json", 1.0),
    ],
)
@fault(
    "a bit flips in any file of a checkpoint",
    "a warning names the file; training goes on from the checkpoint before",
)
def test_a_flipped_bit_is_named_and_the_checkpoint_before_is_taken(copied, name, share):
    flip(copied / "run/checkpoints/step-0000030" / name, share)
    said = run(train("run", "--epochs", 2), copied)
    assert f"step-0000030/{name} is not as it was written: this checkpoint is left out" in said
    assert "going on after step 15, epoch 2" in said
    assert steps(copied) == list(range(1, 31))
    assert "is not as it was written" not in run(train("run", "--epochs", 2), copied)  # written anew


@fault(
    "somebody edits the numbers in a checkpoint's state.json",
    "the same",
)
def test_a_plausible_edit_of_the_state_is_found(copied):
    state = copied / "run/checkpoints/step-0000030/state.json"
    state.write_text(state.read_text().replace('"applied": 30', '"applied": 20'))
    assert "step-0000030/state.json is not as it was written" in run(train("run", "--epochs", 2), copied)


@fault(
    "a file of a checkpoint is gone",
    "the same",
)
def test_a_missing_file_is_named_too(copied):
    (copied / "run/checkpoints/step-0000030/optimizer.safetensors").unlink()
    assert "step-0000030/optimizer.safetensors is not as" in run(train("run", "--epochs", 2), copied)


@fault(
    "every checkpoint is damaged",
    "refused; nothing is removed",
)
def test_where_all_are_damaged_nothing_is_removed(copied):
    for path in (copied / "run/checkpoints").iterdir():
        flip(path / "optimizer.safetensors", 0.5)
    said = run(train("run", "--epochs", 2), copied, code=2)
    assert "every checkpoint is damaged" in said
    assert "--no-resume removes the checkpoints" in said
    assert (copied / "run/checkpoints/step-0000030/optimizer.safetensors").exists()
    assert "is damaged" not in run(train("run", "--epochs", 1, "--no-resume"), copied)


@fault(
    "two trainings get one output folder",
    "the second is refused and names the process of the first, which goes on",
)
def test_a_second_training_into_the_same_folder_is_refused(copied):
    """Without a trace of it; the first goes on."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(
        [sys.executable, "-m", "specforge.cli", *train("two", "--epochs", 10_000)[3:]],
        cwd=copied,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        metrics, deadline = copied / "two" / "metrics.jsonl", time.monotonic() + 60
        while not (metrics.exists() and len(metrics.read_bytes().splitlines()) > 5):
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        done = warm.run(train("two", "--epochs", 3), copied, environment, timeout=60)
        assert done.returncode == 2
        assert f"process {first.pid} on " in done.stdout
        assert "is training into the output folder" in done.stdout
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGTERM)
        first.wait(60)
    found = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in found if "step" in row] == list(range(1, sum("step" in row for row in found) + 1))


@fault(
    "somebody plants a link in the place of a lock",
    "refused; what the link points to stays as it is",
)
def test_a_planted_link_is_not_followed(copied):
    (copied / "mine").write_text("precious")
    (copied / "run" / ".lock").unlink(missing_ok=True)
    (copied / "run" / ".lock").symlink_to(copied / "mine")
    said = run(train("run", "--epochs", 2), copied, code=2)
    assert ".lock" in said
    assert (copied / "mine").read_text() == "precious"
