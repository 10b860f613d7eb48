"""Two machines: network namespaces with a cable between them. The run spans both, over torchrun; then one is cut off.

Namespaces need root and `ip`; where these are not to be had, nothing of this is tested."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from specforge.features.store import Store
from tests.e2e.test_commands import ROOT, capture, losses, train, work  # noqa: F401  a fixture
from tests.faults.page import fault
from tests.stores import assert_same

ADDRESSES = ("10.99.77.1", "10.99.77.2")
pytestmark = [
    pytest.mark.proof,
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="network namespaces need root and iproute2"),
]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=20)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    """Two namespaces, each with the end of one cable, called eth0."""
    names = [f"specforge-{os.getpid()}-{number}" for number in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                ip("-n", name, "link", "set", link, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, timeout=20)


@contextmanager
def spanning(hosts: list[str], command: list[str], folder: Path) -> Iterator[list[subprocess.Popen]]:
    """The command on both hosts, a rank on each, as torchrun starts it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
    agents = []
    for number, host in enumerate(hosts):
        agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(number)]
        agent += ["--nproc-per-node", "1", "--master-addr", ADDRESSES[0], "--master-port", "29501", *command[1:]]
        agents.append(
            subprocess.Popen(
                ["ip", "netns", "exec", host, *agent],
                cwd=folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        yield agents
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()


def test_training_and_capture_on_two_machines_give_what_one_gives(work, hosts):  # noqa: F811
    for command in (capture("far"), train("--online", "--data", "data", "--output", "far-run")):
        with spanning(hosts, command, work) as agents:
            said = [agent.communicate(timeout=200)[0] for agent in agents]
            assert [agent.returncode for agent in agents] == [0, 0], said
    for split in ("train", "test"):
        one, two = Store(work / "feat" / split), Store(work / "far" / split)
        assert len(one) == len(two)
        for index in range(len(one)):
            assert_same(one.record(index), two.record(index))
    assert losses(work / "far-run") == pytest.approx(losses(work / "offline"), rel=1e-4)


@pytest.mark.parametrize("gone", [0, 1])
@fault(
    "one of two machines loses its network",
    "the other names the rank that is lost, and ends",
)
def test_a_machine_that_vanishes_ends_the_run_on_the_other(work, hosts, gone):  # noqa: F811
    """The cable is cut: no connection is closed, nothing arrives any more."""
    output = f"cut{gone}"
    command = train(
        "--online", "--data", "data", "--output", output, "--rank-timeout", 15, "--epochs", 4000, "--tracker", "none"
    )
    metrics = work / output / "metrics.jsonl"
    try:
        with spanning(hosts, command, work) as agents:
            until = time.monotonic() + 120
            while not metrics.exists() or metrics.read_bytes().count(b"\n") < 10:
                assert time.monotonic() < until
                assert [agent.poll() for agent in agents] == [None, None], [a.communicate()[0] for a in agents]
                time.sleep(0.2)
            ip("-n", hosts[gone], "link", "set", "eth0", "down")
            began = time.monotonic()
            said = [agent.communicate(timeout=120)[0] for agent in agents]
            seconds = time.monotonic() - began
            codes = [agent.returncode for agent in agents]
    finally:
        ip("-n", hosts[gone], "link", "set", "eth0", "up")
    assert 0 not in codes
    assert seconds < 90  # of which 12 are the watchdog's patience, and torchrun waits 30 for its own
    lost = f"common store at {ADDRESSES[0]}, did not answer for 12 s" if gone == 0 else "error rank 1 did not answer"
    assert lost in said[1 - gone]
    assert "fault of specforge" not in said[0] + said[1]
