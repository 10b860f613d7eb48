"""These tests run only if they are asked for (`-m gpu`), so a missing GPU is a failure, not a skip."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.fail("these tests need a GPU, and torch sees none; leave `-m gpu` out")
