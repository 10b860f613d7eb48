"""The checks of `specforge doctor --gpu`, one by one, and the command over all cards. What needs SGLang or DeepSpeed is
skipped by the command itself where they are missing, and its table says so."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from specforge import launch
from specforge.pipeline.gpu import attention, training, waits

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
DTYPES = (torch.bfloat16, torch.float32)


@pytest.fixture
def ranks():
    joined = launch.join(1)
    yield joined
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_that_of_the_dense_softmax(dtype):
    result = attention.attention(GPU, dtype)
    assert result.passed, result


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_training_step_is_that_of_the_cpu(ranks, dtype):
    result = training.training_step("plain", dtype, ranks)
    assert result.passed, result


def test_a_step_takes_the_memory_that_is_planned(ranks):
    result = training.memory("none", ranks)
    assert result.passed, result


def test_a_step_waits_for_the_device_once(ranks):
    result = waits.training_waits("plain", ranks)
    assert result.passed, result


def doctor() -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "specforge.cli", "doctor", "--gpu"]
    return subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)


def test_the_command_passes_on_all_cards():
    done = doctor()
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def test_several_cards_are_checked_together():
    if torch.cuda.device_count() == 1:
        pytest.skip("needs several cards, and this machine has one")
    assert f"{torch.cuda.device_count()} x " in doctor().stdout
