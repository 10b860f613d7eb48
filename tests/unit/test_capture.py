"""What every captured record passes through, and the memory of a process that captures."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from specforge.features.passes import finite
from tests.stores import record


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["aux", "last", "teacher_lse"])
def test_a_record_that_is_not_finite_is_named_among_others(name, bad, dtype):
    records = [record(sample_id, length=30) for sample_id in range(4)]
    records = [replace(one, aux=one.aux.to(dtype), last=one.last.to(dtype)) for one in records]
    assert finite(records) == [True] * 4
    getattr(records[2], name).view(-1)[-1] = bad
    assert finite(records) == [True, True, False, True]


def test_large_states_are_finite():
    """Their sum in fp16 would not be."""
    one = record(0, length=30)
    assert finite([replace(one, aux=torch.full_like(one.aux, 6e4, dtype=torch.float16))]) == [True]


CHURN = """
import resource, torch
from specforge import launch
launch.join(1)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(64 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def test_freed_memory_is_kept():
    """20 blocks of 64 MB, each as large as the last: without the settings 16,384 pages are faulted in for each."""
    on_a_cpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # elsewhere activations are not in this memory
    command = [sys.executable, "-c", CHURN]
    done = subprocess.run(command, env=on_a_cpu, capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) < 1000
