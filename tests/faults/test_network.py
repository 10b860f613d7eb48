"""A run of one machine can be reached from that machine alone, and what others write into its store does no harm."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from torch.distributed import PrefixStore, TCPStore

from tests.faults.page import fault
from tests.faults.test_engine_faults import children, environment_of
from tests.faults.test_watch import lines, started, train, wait_for, work  # noqa: F401  a fixture

LISTENING = "0A"
LOOPBACK = ("0100007F", "00000000000000000000000001000000")


def listeners(pids: list[int]) -> list[str]:
    """Local addresses, in hexadecimal, on which these processes listen."""
    sockets = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(descriptor)
            except OSError:
                continue
            if target.startswith("socket:["):
                sockets.add(target[8:-1])
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING and fields[9] in sockets:
                found.append(fields[1].split(":")[0])
    return found


def own_address() -> str | None:
    """One of this machine that is not loopback; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        found = probe.getsockname()[0]
    return None if found.startswith("127.") else found


def port_of(pid: int) -> int:
    pairs = dict(pair.partition("=")[::2] for pair in environment_of(pid).split("\0"))
    return int(pairs["MASTER_PORT"])


class Planted:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self):
        return Path.touch, (self._path,)


@fault(
    "another account writes pickles, false process ids, huge and deep entries into the store of a run",
    "nothing: the run goes on, no process of others is ended, nothing is unpickled",
)
def test_a_run_of_two_ranks_listens_on_loopback_alone_and_hostile_entries_do_nothing(work, tmp_path):  # noqa: F811
    output = "attacked"
    command = train(output, "--online", "--data", "data", "--tp-size", 2)
    innocent = subprocess.Popen(["sleep", "100"])
    try:
        with started(["-m", "specforge.cli", *command], work) as process:
            metrics = work / output / "metrics.jsonl"
            wait_for(process, lambda: lines(metrics) > 10)
            ranks = children(process.pid)
            found = listeners([process.pid, *ranks])
            assert len(found) >= 2  # the store, and gloo of each rank
            assert set(found) <= set(LOOPBACK)
            port = port_of(ranks[0])
            address = own_address()
            if address:
                with pytest.raises(ConnectionRefusedError):
                    socket.create_connection((address, port), timeout=5)
            attack("127.0.0.1", port, innocent.pid, tmp_path / "pwned")
            before = lines(metrics)
            time.sleep(4)  # several looks of the watchdog
            assert process.poll() is None
            assert lines(metrics) > before
            process.send_signal(signal.SIGTERM)
            said, _ = process.communicate(timeout=60)
        assert process.returncode == 0, said
        assert innocent.poll() is None
        assert not (tmp_path / "pwned").exists()
    finally:
        innocent.kill()
        innocent.wait()


def attack(host: str, port: int, pid: int, planted: Path) -> None:
    """From an account of the same machine: entries that name another process, are none, are huge or deep, and a pickle
    under each key that is known."""
    silent = {"tick": 1, "idle": 10**9, "where": "/bin/sh:1 in x", "waits": False, "done": False}
    for text in (
        json.dumps(silent | {"host": socket.gethostname(), "pid": pid}),
        "[" * 10_000,
        "x" * (1 << 24),
        json.dumps(silent | {"tick": 10**400}),
        pickle.dumps(Planted(planted), protocol=0).decode("latin-1"),
    ):
        for key in ("watch/2", "watch/77", "watch/-1", "torch.rendezvous.state"):
            for prefix in ("specforge/0", ""):
                with suppress(RuntimeError):  # the store may hang up
                    store = TCPStore(host, port, is_master=False, wait_for_workers=False)
                    PrefixStore(prefix, store).set(key, text)


@pytest.mark.parametrize("arguments", [("--features", "feat"), ("--online", "--data", "data")])
@fault(
    "somebody scans a machine on which one process trains",
    "nothing listens outside of loopback",
)
def test_a_single_process_listens_nowhere_else(work, arguments):  # noqa: F811
    output = f"alone{len(arguments)}"
    with started(["-m", "specforge.cli", *train(output, *arguments)], work) as process:
        wait_for(process, lambda: lines(work / output / "metrics.jsonl") > 5)
        assert set(listeners([process.pid])) <= set(LOOPBACK)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
