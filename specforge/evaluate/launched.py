"""An SGLang server of our own: its command line, its start, its end. No torch; SGLang runs as a program."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
from rich.markup import escape

from specforge.console import console, say
from specforge.errors import EngineError
from specforge.evaluate.shape import Shape

MODULE = "sglang.launch_server"
HOST = "127.0.0.1"
START_LIMIT = 3600.0  # seconds; a large target is loaded from a slow disk for long
END_LIMIT = 20.0  # seconds that the server has between SIGTERM and SIGKILL
LOG_LINES = 12  # of a server that died, in the message


def arguments(model_path: str, draft: str | None, shape: Shape) -> list[str]:
    """SGLang's flags for a target and, where there is one, its EAGLE-3 draft."""
    own = ["--model-path", model_path]
    if draft is None:
        return own
    return [
        *own,
        *("--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", draft),
        *("--speculative-num-steps", str(shape.steps), "--speculative-eagle-topk", str(shape.top_k)),
        *("--speculative-num-draft-tokens", str(shape.draft_tokens)),
    ]


def command_line(given: Sequence[str]) -> str:
    """As a user would type it."""
    return shlex.join(["python", "-m", MODULE, *given])


@contextlib.contextmanager
def launched(given: Sequence[str], log: Path) -> Iterator[str]:
    """The URL of a server with these arguments, from the time it is healthy to the end of the block, also by an error.
    What it prints goes to `log`. Raises EngineError where it does not get that far."""
    url = f"http://{HOST}:{_free_port()}"
    place = ["--host", HOST, "--port", url.rpartition(":")[2]]
    say(escape(f"$ {command_line([*given, *place])}"))
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", MODULE, *given, *place],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,  # a process group of its own, which Ctrl-C does not reach: we end it
        )
    try:
        _wait(process, url, log)
        yield url
    finally:
        _end(process)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    began = time.monotonic()
    with console.status("the server starts") as shown:
        while True:
            seconds = time.monotonic() - began
            code = process.poll()
            if code is not None or seconds > START_LIMIT:
                what = f"ended while it started, with code {code}" if code is not None else "does not get ready"
                raise EngineError(
                    f"the server {what}; the end of its log:\n    " + "\n    ".join(_last_lines(log)),
                    where=str(log),
                    fix="mend what it says there; further arguments for it go behind --launch-args",
                )
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health", timeout=30).status_code == 200:
                    break
            newest = "".join(_last_lines(log)[-1:])[:100]
            shown.update(escape(f"the server starts, {seconds:.0f} s: {newest}"))
            time.sleep(0.5)
    say(f"the server is ready after {time.monotonic() - began:.0f} s; its log: {escape(str(log))}")


def _last_lines(log: Path) -> list[str]:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 16384))
        lines = file.read().decode("utf-8", "replace").splitlines()
    return [line.rstrip()[:300] for line in lines if line.strip()][-LOG_LINES:]


def _end(process: subprocess.Popen[bytes]) -> None:
    """The whole process group: SIGTERM, then SIGKILL for what is left of it."""
    try:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_LIMIT)
    finally:  # also where a second Ctrl-C ends the wait
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
