"""What ends a training that learns nothing, or cannot write."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from specforge.errors import CheckpointError, TrainingError
from specforge.train import checkpoint, loop
from tests.faults.page import fault


@fault(
    "the draft vocabulary covers nothing that the target says, or the target's head is broken",
    "training ends with one message, code 2",
)
def test_steps_that_cover_nothing_end_the_run(tmp_path):
    run = SimpleNamespace(state=checkpoint.RunState(updates=30), output=tmp_path)
    loop._check_coverage(run, loop.STEPS_UNCOVERED - 1)
    with pytest.raises(TrainingError, match="nothing is learned"):
        loop._check_coverage(run, loop.STEPS_UNCOVERED)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), SafetensorError("I/O error: No space left on device")],
)
def test_a_full_disk_at_a_checkpoint_is_one_message_and_leaves_no_part(tmp_path, error):
    part = tmp_path / ".step-0000007.tmp"

    def write() -> None:
        with checkpoint.writing(part):
            part.mkdir()
            (part / "optimizer.safetensors").write_bytes(b"half")
            raise error

    with pytest.raises(CheckpointError, match="No space left") as told:
        write()
    assert told.value.where == str(tmp_path)
    assert "goes on from the last checkpoint" in told.value.fix
    assert not part.exists()
