"""Commands and workers in forks of a process that has imported what they need. An import of SGLang, transformers and
DeepSpeed takes about ten seconds, what a test asks for often one. A fork has a memory, files, signals and an exit code
of its own, as a process that a user starts. What a user's start adds is tested where commands start their ranks."""

from __future__ import annotations

import atexit
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from functools import lru_cache, partial
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socketpair

ROOT = Path(__file__).parents[1]


def run(
    command: list[str], folder: Path | str, environment: dict[str, str], timeout: float, ranks: int = 1
) -> subprocess.CompletedProcess:
    """`python -m specforge.cli ...` or `python tests/WORKER.py ...` in this folder, by as many ranks as torchrun would
    start; stdout holds all that was said. Another command gets a new process. Raises TimeoutExpired."""
    ours = command[1:3] == ["-m", "specforge.cli"]
    if not ours and not Path(command[1]).is_relative_to(ROOT / "tests"):
        both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.run(command, cwd=folder, env=environment, timeout=timeout, check=False, **both)
    script, arguments = (None, command[3:]) if ours else (command[1], command[2:])
    server = _server()
    with tempfile.NamedTemporaryFile("r", errors="replace") as said:
        server.send((script, arguments, str(folder), environment, said.name, ranks))
        child = server.recv()
        if not server.poll(timeout):
            os.killpg(child, 9)
            server.recv()
            raise subprocess.TimeoutExpired(command, timeout, said.read())
        return subprocess.CompletedProcess(command, server.recv(), said.read())


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


def _become(
    script: str | None, arguments: list[str], folder: str, environment: dict[str, str], said: str, ranks: int
) -> None:
    from specforge import cli
    from tests.parity.forked import run_ranks

    os.setsid()
    for number, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        os.dup2(os.open(said if number else os.devnull, flags | os.O_APPEND), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [script or str(cli.__file__), *arguments]
    work = partial(runpy.run_path, script, run_name="__main__") if script else cli.main
    try:
        if ranks > 1:
            run_ranks(ranks, work)
        else:
            work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else bool(end.code)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
