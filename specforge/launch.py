"""Starts the ranks of a command on this machine, or joins those that torchrun or deepspeed started."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import (  # type: ignore[attr-defined]  # its stubs leave them out
    HashStore,
    PrefixStore,
    Store,
    TCPStore,
)

from specforge.console import is_main_rank, show_error
from specforge.errors import TOLD, UNTOLD, ConfigError, EngineError, first_line
from specforge.records import Ranks

TIMEOUT = timedelta(seconds=int(os.environ.get("SPECFORGE_TIMEOUT", "1800")))
LAUNCHED = "SPECFORGE_LAUNCHED"  # set in the environment of ranks that `start_ranks` started
LOOPBACK = "127.0.0.1"
ON_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}  # where a run of one machine talks to itself
SAVING_S = 30  # which ranks have to end after a signal
FAILING_S = 5  # which ranks have to end by themselves after another one has failed


def device_count() -> int:
    """GPUs of this machine, or its cores where it has none."""
    return torch.cuda.device_count() if torch.cuda.is_available() else len(os.sched_getaffinity(0))


def is_rank() -> bool:
    """Whether some launcher started this process as one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def start_ranks(tp_size: int, replicas: bool = True, dp_size: int | None = None, saves: bool = False) -> int | None:
    """Run this very command as several ranks and return its exit code; None where this process is a rank already, or
    the only one. `dp_size` replicas of `tp_size` ranks; where it is not given, with `replicas` as many as there are
    GPUs for, else (and on a CPU) one. SIGTERM and SIGINT are passed on to the ranks, which have 30 seconds; with
    `saves` they are known to use them, and the exit code after SIGTERM is 0.

    Raises ConfigError where the machine has fewer devices than that, EngineError where a rank ended without a word."""
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
    codes, received = _run(count)
    if received is not None:
        return 0 if saves and received == signal.SIGTERM else 128 + received
    if not any(codes.values()):
        return 0
    told = [code for code in codes.values() if code > 0 and code != UNTOLD]
    if told:
        return TOLD if TOLD in told else told[0]
    raise EngineError(
        ", ".join(f"rank {rank} {_ending(code)}" for rank, code in codes.items() if code != UNTOLD)
        or "the ranks lost one another",
        where="specforge.log and specforge-rank*.log in the output folder have the last words of each rank",
        fix="run the same command again: capture, training and regenerate go on where they were",
    )


def _run(count: int) -> tuple[dict[int, int], int | None]:
    """Starts `count` ranks and waits for them: (exit code of each rank that ended by itself, signal that ended all).
    This process serves the store through which they find one another; nothing listens outside of this machine."""
    listening = socket.create_server((LOOPBACK, 0))
    port = listening.getsockname()[1]
    store = TCPStore(
        LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
    )  # lives as long as the ranks
    threads = str(max(1, len(os.sched_getaffinity(0)) // count))
    common = (
        {"OMP_NUM_THREADS": threads}
        | os.environ
        | ON_LOOPBACK
        | {
            "MASTER_ADDR": LOOPBACK,
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 serves no store of its own
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            LAUNCHED: str(os.getpid()),
        }
    )
    processes = list[subprocess.Popen[bytes]]()
    with _signals() as received:
        try:
            for rank in range(count):
                own = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(subprocess.Popen([sys.executable, *_own_command()], env=own))
            return _wait(processes, received), received[0] if received else None
        finally:
            for process in processes:
                process.kill()
                process.wait()


def _wait(processes: Sequence[subprocess.Popen[bytes]], received: Sequence[int]) -> dict[int, int]:
    """Until all have ended, or had their time to. Exit code of each rank that ended by itself."""
    deadline, passed_on = float("inf"), False
    while True:
        codes = {rank: code for rank, process in enumerate(processes) if (code := process.poll()) is not None}
        if len(codes) == len(processes) or time.monotonic() > deadline:
            return codes
        if received and not passed_on:
            passed_on, deadline = True, time.monotonic() + SAVING_S
            for process in processes:
                process.send_signal(received[0])
        elif any(codes.values()):
            deadline = min(deadline, time.monotonic() + FAILING_S)
            for process in processes:
                if process.poll() is None and _is_stopped(process.pid):
                    process.kill()
        time.sleep(0.1)


def _is_stopped(pid: int) -> bool:
    """Whether a child of ours is held by SIGSTOP, so that it cannot end by itself."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals to end that arrive meanwhile."""
    received = list[int]()
    before = {
        number: signal.signal(number, lambda which, _: received.append(which))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    return f"was ended by {signal.Signals(-code).name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")


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
    if LAUNCHED in os.environ:
        _end_with_parent()
    if on_gpu:
        torch.cuda.set_device(device)
        for name in ("NCCL_NVLS_ENABLE", "NCCL_CUMEM_ENABLE"):  # buffers of gigabytes; off in SGLang's server too
            os.environ.setdefault(name, "0")
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # passes and steps of all sizes
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        _keep_freed_memory()
    if not dist.is_initialized():
        backend = "nccl" if on_gpu else "gloo"
        if is_rank():
            dist.init_process_group(backend, timeout=TIMEOUT)
        else:
            os.environ.update(ON_LOOPBACK)
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
            dist.init_process_group(backend, timeout=TIMEOUT, store=HashStore(), rank=0, world_size=1)
    group = None
    if world > tp_size:
        groups = [dist.new_group(list(range(first, first + tp_size))) for first in range(0, world, tp_size)]
        group = groups[rank // tp_size]
    return Ranks(rank=rank, world=world, tp_size=tp_size, device=device, tp_group=group)


def joined() -> bool:
    """Whether `join` has been called, and the process group is not left yet."""
    return dist.is_initialized()


def board() -> Store:
    """A connection of its own to the key-value store of this run, which the launcher serves (rank 0 under deepspeed):
    for what ranks tell each other outside of collectives, which all of them would have to take part in."""
    if not is_rank():
        return HashStore()
    server = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(*server, is_master=False, wait_for_workers=False, timeout=TIMEOUT)
    return PrefixStore(f"specforge/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def speaks() -> bool:
    """Whether this rank tells the user of the fault that ends it: the first one that has such a fault does."""
    if not joined() or dist.get_world_size() == 1:
        return is_main_rank()
    try:
        return board().add("faults", 1) == 1
    except RuntimeError:  # the launcher has gone
        return is_main_rank()


def lost_others(error: Exception) -> int:
    """The exit code of a rank whose call to others failed, after it has told of that where nobody else does: the
    launcher tells of a rank that died."""
    if LAUNCHED in os.environ:
        return UNTOLD
    time.sleep(FAILING_S)  # the launcher ends this rank first if the other one ran on this machine
    if not speaks():
        return UNTOLD
    gone = EngineError(
        f"rank {os.environ['RANK']} lost another rank: {first_line(error)}",
        where="the network, or the machine of the other rank",
        fix="run the same command again: capture, training and regenerate go on where they were",
    )
    show_error(str(gone))
    return TOLD


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


def _end_with_parent() -> None:
    """A launcher that was killed leaves no rank behind: they get SIGTERM, after which training saves."""
    parent_death_signal = 1
    ctypes.CDLL("libc.so.6").prctl(parent_death_signal, signal.SIGTERM)
    if os.getppid() != int(os.environ[LAUNCHED]):
        os.kill(os.getpid(), signal.SIGTERM)  # it had ended before
