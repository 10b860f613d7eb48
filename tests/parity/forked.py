"""Ranks as forks of a process that has imported SGLang (8 s) and not yet started a thread: SGLang takes one model a
process, and so many can be tried for one import."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable

import torch

from specforge.target import hf_engine  # noqa: F401
from specforge.target.sglang import engine  # noqa: F401


def run_ranks(world: int, work: Callable[[], None]) -> None:
    """Calls `work` in `world` new processes with the environment of torchrun; exits where one of them fails."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(world):
        started.append(os.fork())
        if started[-1] == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
            os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
            torch.set_num_threads(2 if world == 1 else 1)
            code = 1
            try:
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started]
    if any(codes):
        sys.exit(f"exit codes of the ranks: {codes}")
