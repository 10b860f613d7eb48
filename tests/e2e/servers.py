"""Starts SGLang's own HTTP server for a test."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from tests.e2e.test_commands import ROOT

# What SGLang needs to run on a CPU with torch alone
ON_A_CPU = (
    "--device cpu --skip-server-warmup --sampling-backend pytorch --grammar-backend none --disable-cuda-graph "
    "--disable-overlap-schedule --mem-fraction-static 0.1 --max-total-tokens 8192 --max-running-requests 16"
)


@contextlib.contextmanager
def server(folder: Path, port: int, *flags: object, **environment: str) -> Iterator[subprocess.Popen]:
    """A real one of folder/target, in fp32; killed at the end. It attends with torch, unless `flags` say otherwise."""
    fixed = f"--model-path target --dtype float32 --host 127.0.0.1 --port {port} --attention-backend torch_native"
    given = [*fixed.split(), *ON_A_CPU.split(), *map(str, flags)]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("sglang_server.py")), *given],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 240
        while True:
            assert process.poll() is None, (folder / "server.log").read_text()[-3000:]
            assert time.monotonic() < deadline
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=5).status_code == 200:
                    break
            time.sleep(0.2)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
