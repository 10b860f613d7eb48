"""Starts the ranks of a command on this machine, or joins those that torchrun or deepspeed started."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from specforge.console import say
from specforge.errors import ConfigError
from specforge.records import Ranks

TIMEOUT = timedelta(seconds=int(os.environ.get("SPECFORGE_TIMEOUT", "1800")))


def device_count() -> int:
    """GPUs of this machine, or its cores where it has none."""
    return torch.cuda.device_count() if torch.cuda.is_available() else len(os.sched_getaffinity(0))


def is_rank() -> bool:
    """Whether some launcher started this process as one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def start_ranks(tp_size: int, replicas: bool = True) -> int | None:
    """Run this very command as several ranks and return its exit code; None where this process is a rank already, or
    the only one. With `replicas` one rank for each GPU, else (and on a CPU) `tp_size` ranks.

    Raises ConfigError where the machine has fewer devices than a replica needs."""
    if is_rank():
        return None
    if tp_size > device_count():
        raise ConfigError(
            f"{tp_size} ranks need {tp_size} devices, this machine has {device_count()}",
            where=f"--tp-size {tp_size}",
            fix="lower it, or start the command with torchrun on several machines",
        )
    count = device_count() // tp_size * tp_size if torch.cuda.is_available() and replicas else tp_size
    if count == 1:
        return None
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    plan = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0
    )
    try:
        elastic_launch(plan, sys.executable)(*_own_command())
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        if 2 not in codes.values():  # such a fault was explained by rank 0
            ended = ", ".join(f"rank {rank} with code {code}" for rank, code in codes.items())
            say(f"[bold red]error[/] {ended}; see specforge.log and specforge-rank*.log in the output folder")
        return next((code for code in codes.values() if code > 0), 1)
    return 0


def _own_command() -> list[str]:
    """What this process was started with, for Python: a script, or the command line as a module."""
    script = Path(sys.argv[0])
    return [*(["-m", "specforge.cli"] if script.name == "cli.py" else [str(script)]), *sys.argv[1:]]


def join(tp_size: int) -> Ranks:
    """The process group of all ranks (one rank too: DeepSpeed and SGLang want one) and the replica of this one."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world % tp_size:
        raise ConfigError(
            f"{world} ranks are no multiple of the tensor-parallel size {tp_size}",
            where=f"--tp-size {tp_size}",
            fix="start a multiple of it",
        )
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        _keep_freed_memory()
    if not dist.is_initialized():
        if not is_rank():
            os.environ.update(
                RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT=str(_free_port())
            )
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    group = None
    if world > tp_size:
        groups = [dist.new_group(list(range(first, first + tp_size))) for first in range(0, world, tp_size)]
        group = groups[rank // tp_size]
    return Ranks(rank=rank, world=world, tp_size=tp_size, device=device, tp_group=group)


def _keep_freed_memory() -> None:
    """glibc hands blocks over 32 MB back at every free, and faults them in again at every use: activations on a CPU
    are such blocks. Keeping them made large element-wise operations 3 to 4 times faster (benchmarks/LOG.md)."""
    mmap_threshold, trim_threshold = -3, -1
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, 1 << 33)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])
