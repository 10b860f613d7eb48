"""The update does not depend on the number of ranks, on the ZeRO stage, or on DeepSpeed at all; also where ranks have
no row in a step, and where steps are skipped.

Bounds. fp32: sums in another order were 3e-7 apart in the state and 8e-8 in the loss; a rank that fills ZeRO-2's
bucket in another order, 0.4. bf16: ZeRO sums gradients in bf16, plain torch in fp32; the losses were 2e-4 apart, as far
as from fp32 itself. A forgotten moment or one optimizer step changes the loss by 1 %."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("ranks_worker.py")
FP32_STATE, FP32_LOSS, BF16_LOSS = 1e-4, 1e-6, 1e-3


def state(output: Path, kind: str, dtype: str, world: int, first: int = 0, last: int = 12, before: Path | None = None):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [output, kind, dtype, world, first, last, *([before] if before else [])]
    command = [sys.executable, *launcher, str(WORKER), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(output)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return {dtype: state(folder / dtype, "plain", dtype, 1) for dtype in ("float32", "bfloat16")}


def cases(kinds: Sequence[str], dtype: str, *worlds: int) -> list:
    """Those that `make test` runs; the rest are proofs."""
    usual = {("0", "float32", 1), ("2", "float32", 2), ("2", "bfloat16", 2)}
    found = [(kind, dtype, world) for kind in kinds for world in worlds]
    return [pytest.param(*one, marks=[] if one in usual else pytest.mark.proof) for one in found]


def apart(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).norm() / one.norm().clamp(min=1e-12))


@pytest.mark.parametrize(
    ("kind", "dtype", "world"),
    [
        *cases("0123", "float32", 1, 2),
        *cases("123", "bfloat16", 1, 2),
        *cases(["2o", "3o"], "float32", 1, 2),
        *cases(["2o"], "bfloat16", 2),
    ],
)
def test_deepspeed_gives_the_update_of_plain_torch(tmp_path, plain, kind, dtype, world):
    one, two = plain[dtype], state(tmp_path / "state", kind, dtype, world)
    assert one.keys() == two.keys()
    assert apart(one["losses"], two["losses"]) < (FP32_LOSS if dtype == "float32" else BF16_LOSS)
    if dtype == "float32":
        assert all(apart(one[name], two[name]) < FP32_STATE for name in one)


@pytest.mark.proof
@pytest.mark.parametrize("kind", ["2o", "3o"])
def test_an_offloaded_run_goes_on_without_it(tmp_path, plain, kind):
    """And the other way round: four steps each."""
    found, before = [], None
    for number, each in enumerate((kind, "2", kind)):
        output = tmp_path / f"part{number}"
        found.append(state(output, each, "float32", 1, 4 * number, 4 * number + 4, before)["losses"])
        before = output
    torch.testing.assert_close(torch.cat(found), plain["float32"]["losses"], rtol=1e-6, atol=0)


@pytest.mark.proof
def test_plain_torch_on_two_ranks(tmp_path, plain):
    two = state(tmp_path / "state", "plain", "float32", 2)
    assert apart(plain["float32"]["losses"], two["losses"]) < FP32_LOSS


@pytest.mark.proof
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path):
    """1, 2, 4 and 2 ranks in turn, against one throughout: the losses after each change."""
    straight = state(tmp_path / "straight", "2", "float32", 1, 0, 32)["losses"]
    found, before = [], None
    for number, world in enumerate((1, 2, 4, 2)):
        output = tmp_path / f"part{number}"
        found.append(state(output, "2", "float32", world, 8 * number, 8 * number + 8, before)["losses"])
        before = output
    torch.testing.assert_close(torch.cat(found), straight, rtol=1e-6, atol=0)
