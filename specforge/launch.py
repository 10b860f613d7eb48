"""Starts the ranks of a command on this machine, or joins those that torchrun or deepspeed started."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]  # its stubs leave them out

from specforge.console import is_main_rank, say
from specforge.errors import TOLD, UNTOLD, ConfigError
from specforge.records import Ranks

TIMEOUT = timedelta(seconds=int(os.environ.get("SPECFORGE_TIMEOUT", "1800")))


_board_address: tuple[str, int] | None = None  # one for each process, as torch.distributed has one world
_board_server: TCPStore | None = None


def device_count() -> int:
    """GPUs of this machine, or its cores where it has none."""
    return torch.cuda.device_count() if torch.cuda.is_available() else len(os.sched_getaffinity(0))


def is_rank() -> bool:
    """Whether some launcher started this process as one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def start_ranks(tp_size: int, replicas: bool = True, dp_size: int | None = None, saves: bool = False) -> int | None:
    """Run this very command as several ranks and return its exit code; None where this process is a rank already, or
    the only one. `dp_size` replicas of `tp_size` ranks; where it is not given, with `replicas` as many as there are
    GPUs for, else (and on a CPU) one. SIGTERM is passed on to the ranks, which have 30 seconds; with `saves` they are
    known to use them, and the exit code is 0.

    Raises ConfigError where the machine has fewer devices than that."""
    if is_rank():
        return None
    least = tp_size * (dp_size or 1)
    if least > device_count():
        raise ConfigError(
            f"{least} ranks need {least} devices, this machine has {device_count()}",
            where=f"--tp-size {tp_size}" + (f", --dp-size {dp_size}" if dp_size else ""),
            fix="lower it, or start the command with torchrun on several machines",
        )
    every = torch.cuda.is_available() and replicas and dp_size is None
    count = device_count() // tp_size * tp_size if every else least
    if count == 1:
        return None
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    plan = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0
    )
    try:
        elastic_launch(plan, sys.executable)(*_own_command())
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from error
        return 0 if saves and error.sigval == signal.SIGTERM else 128 + error.sigval
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        if TOLD in codes.values():
            return TOLD
        first = {rank: code for rank, code in codes.items() if code not in (UNTOLD, -signal.SIGTERM)}  # not for others
        ended = ", ".join(f"rank {rank} {_ending(code)}" for rank, code in (first or codes).items())
        say(f"[bold red]error[/] ended: {ended}; see specforge.log and specforge-rank*.log in the output folder")
        return 1
    return 0


def _ending(code: int) -> str:
    if code >= 0:
        return f"with code {code}"
    return f"by {signal.Signals(-code).name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")


def _own_command() -> list[str]:
    """What this process was started with, for Python: a script, or the command line as a module."""
    script = Path(sys.argv[0])
    return [*(["-m", "specforge.cli"] if script.name == "cli.py" else [str(script)]), *sys.argv[1:]]


def join(tp_size: int, dp_size: int | None = None) -> Ranks:
    """The process group of all ranks (one rank too: DeepSpeed and SGLang want one) and the replica of this one."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if dp_size and world != tp_size * dp_size:
        raise ConfigError(
            f"{world} ranks were started, {dp_size} replicas of {tp_size} are {tp_size * dp_size}",
            where=f"--tp-size {tp_size}, --dp-size {dp_size}",
            fix="leave --dp-size out: it follows from the number of ranks",
        )
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
    _open_board(device)
    group = None
    if world > tp_size:
        groups = [dist.new_group(list(range(first, first + tp_size))) for first in range(0, world, tp_size)]
        group = groups[rank // tp_size]
    return Ranks(rank=rank, world=world, tp_size=tp_size, device=device, tp_group=group)


def _open_board(device: torch.device) -> None:
    """Rank 0 serves a key-value store; the others learn its port."""
    global _board_address, _board_server
    host, port = os.environ["MASTER_ADDR"], torch.zeros(1, dtype=torch.int64, device=device)
    if dist.get_rank() == 0:
        _board_server = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        port.fill_(_board_server.port)
    dist.broadcast(port, 0)
    _board_address = host, int(port)


def board(timeout: timedelta = TIMEOUT) -> Store:
    """A connection of its own to the key-value store of this run: for what ranks tell each other outside of
    collectives, which all of them would have to take part in. A call that gets no answer raises after `timeout`."""
    assert _board_address, "join() comes first"
    return TCPStore(*_board_address, is_master=False, wait_for_workers=False, timeout=timeout)


def speaks() -> bool:
    """Whether this rank tells the user of the fault that ends it: the first one that has such a fault does."""
    if not joined():
        return is_main_rank()
    number = list[int]()

    def ask() -> None:
        with contextlib.suppress(RuntimeError):  # rank 0, which serves the board, is gone: it has spoken or died
            number.append(board(timedelta(seconds=5)).add("faults", 1))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(6)  # a rank 0 that is stopped never answers
    return number == [1]


def joined() -> bool:
    """Whether `join` has been called, and `leave` has not."""
    return _board_address is not None and dist.is_initialized()


def claimed(count: int, ranks: Ranks, name: str) -> Iterator[int]:
    """Numbers below `count`, ascending: each goes to one replica, the next to whichever is free first. The ranks of a
    replica get the same. Every rank must iterate to the end; `name` must be new in this run."""
    if ranks.replicas == 1:
        yield from range(count)
        return
    store, turn = board(), 0
    while True:
        key = f"{name}/{ranks.replica}/{turn}"
        if ranks.tp_rank == 0:
            number = store.add(name, 1) - 1
            store.set(key, str(number))
        else:
            number = int(store.get(key))
        if number >= count:
            return
        yield number
        turn += 1


def _keep_freed_memory() -> None:
    """glibc hands blocks over 32 MB back at every free, and faults them in again at every use: activations on a CPU
    are such blocks. Keeping them made large element-wise operations 3 to 4 times faster (benchmarks/LOG.md)."""
    mmap_threshold, trim_threshold = -3, -1
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, -1)  # never; both are C ints, and 0 would be at every free


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])
