"""The command line with a fault in rank 1, named by $FAULT. Run by test_watch.py."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

from specforge import cli


def after(calls: int, fault: Callable[[], None], method: Callable) -> Callable:
    """The method; from so many calls on the fault comes first."""
    left = iter(range(calls))

    def faulty(*arguments, **named):
        if next(left, None) is None:
            fault()
        return method(*arguments, **named)

    return faulty


def no_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def asleep() -> None:
    time.sleep(1000)


def in_the_step(fault: Callable[[], None]) -> None:
    from specforge.draft.step import DraftStep

    DraftStep.forward = after(20, fault, DraftStep.forward)


def in_the_target(fault: Callable[[], None]) -> None:
    from specforge.target.sglang.engine import SglangEngine

    SglangEngine._forward = after(20, fault, SglangEngine._forward)


if __name__ == "__main__":
    if os.environ.get("RANK") == "1":
        fault, place = os.environ["FAULT"].split()
        globals()[place](globals()[fault])
    cli.main()
