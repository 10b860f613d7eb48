"""The update does not depend on the number of ranks, also where a rank has no row in the last step of an epoch.

fp32: sums in another order, 1e-5; a rank that fills ZeRO-2's bucket in another order was 0.4 apart."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("ranks_worker.py")


def state(folder: Path, stage: int, world: int) -> dict[str, torch.Tensor]:
    output = folder / f"stage{stage}-world{world}.safetensors"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(WORKER), str(output), str(stage), str(world)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(output)


@pytest.mark.parametrize("stage", [1, 2])
def test_two_ranks_give_the_update_of_one(tmp_path, stage):
    one, two = state(tmp_path, stage, 1), state(tmp_path, stage, 2)
    assert one.keys() == two.keys()
    for name in one:
        error = (one[name] - two[name]).norm() / one[name].norm().clamp(min=1e-12)
        assert error < 1e-4, name
