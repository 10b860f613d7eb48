"""The command line in forks of a process that has imported what it needs. An import of SGLang, transformers and
DeepSpeed takes about ten seconds, the commands of the tests often one. A fork has a memory, files, signals and an exit
code of its own, as a process that a user starts; what a user's start adds is tested where ranks are started."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import tempfile
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socketpair

ROOT = Path(__file__).parents[1]
OURS = [sys.executable, "-m", "specforge.cli"]


def run(
    arguments: list[str], folder: Path | str, environment: dict[str, str], timeout: float
) -> subprocess.CompletedProcess:
    """A command in this folder; stdout holds all that was said. One that does not begin with `python -m specforge.cli`
    gets a new process. Raises TimeoutExpired."""
    if arguments[: len(OURS)] != OURS:
        both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.run(arguments, cwd=folder, env=environment, timeout=timeout, check=False, **both)
    server = _server()
    with tempfile.NamedTemporaryFile("r", errors="replace") as said:
        server.send((arguments[len(OURS) :], str(folder), environment, said.name))
        child = server.recv()
        if not server.poll(timeout):
            os.killpg(child, 9)
            server.recv()
            raise subprocess.TimeoutExpired(arguments, timeout, said.read())
        return subprocess.CompletedProcess(arguments, server.recv(), said.read())


@lru_cache(maxsize=1)
def _server() -> Connection:
    ours, theirs = socketpair()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "DS_ACCELERATOR": "cpu"}
    with theirs:
        command = [sys.executable, "-m", "tests.warm", str(theirs.fileno())]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()], stdout=subprocess.DEVNULL
        )
    connection = Connection(ours.detach())
    atexit.register(process.wait)
    atexit.register(connection.close)  # first; upon which it ends
    return connection


def _serve(connection: Connection) -> None:
    import deepspeed  # noqa: F401
    import sglang.srt.models.registry  # noqa: F401
    from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401

    from specforge.pipeline import capture, checking, proof, regeneration, training  # noqa: F401
    from specforge.target import hf_engine  # noqa: F401
    from specforge.target.sglang import engine  # noqa: F401

    threads = [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    assert set(threads[1:]) <= {"jemalloc_bg_thd"}  # a fork has only the thread that forks; jemalloc starts its own
    while True:
        try:
            asked = connection.recv()
        except EOFError:
            return
        child = os.fork()
        if child == 0:
            connection.close()
            _become(*asked)
        connection.send(child)
        connection.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _become(arguments: list[str], folder: str, environment: dict[str, str], said: str) -> None:
    from specforge import cli

    os.setsid()
    for number, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        os.dup2(os.open(said if number else os.devnull, flags | os.O_APPEND), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [str(cli.__file__), *arguments]
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
