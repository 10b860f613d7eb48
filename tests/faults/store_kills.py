"""Kills a run of two writers at chosen instants, by SIGKILL, and finishes it: `python -m tests.faults.store_kills OUT`.

Each run is a fork of this process, which has imported everything once. What came of it goes to OUT/report.json."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from specforge.features import index, shard, staging, writer
from specforge.files import seal
from tests.stores import manifest, record

RECORDS, WRITERS, SHARD_BYTES = 120, 2, 3000
INSTANTS = [  # (what is about to happen, for the how manieth time)
    *(("encode", n) for n in (1, 30, 77, 120)),
    *(("write", n) for n in (2, 40, 119)),
    *(("half written", n) for n in (1, 61)),
    *(("fsync", n) for n in (1, 3, 4, 5, 50)),  # of the manifest, a shard, the folder, the index
    *(("rename", n) for n in (1, 2, 25)),
    *(("renamed", n) for n in (2, 20)),
    *(("commit", n) for n in (1, 15)),
    *(("half committed", n) for n in (1, 9, 24)),
    *(("time", n) for n in range(4)),
]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the signal comes before this ends


def at_call(number: int, function: Callable, before: Callable = lambda *_: kill()) -> Callable:
    """`function`, but at its `number`-th call `before` comes first."""
    calls = 0

    @functools.wraps(function)
    def wrapped(*given, **named):
        nonlocal calls
        calls += 1
        if calls == number:
            before(*given)
        return function(*given, **named)

    return wrapped


def half_a_record(opened, sample_id, tokens, teachers, states, small) -> None:
    opened._file.write(states[: len(states) // 2].data)
    opened._file.flush()
    kill()


def half_a_line(folder, line) -> None:
    text = seal(line)
    with (folder / index.INDEX).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as append_line does: the other writer waits
        file.write(text[: len(text) // 2])
        file.flush()
        kill()


def arm(what: str, number: int) -> None:
    """Patch this process so that it is killed at that instant."""
    if what == "encode":
        staging.encode = at_call(number, staging.encode)
    elif what == "write":
        shard.OpenShard.append = at_call(number, shard.OpenShard.append)
    elif what == "half written":
        shard.OpenShard.append = at_call(number, shard.OpenShard.append, half_a_record)
    elif what == "fsync":
        os.fsync = at_call(number, os.fsync)
    elif what == "rename":
        Path.rename = at_call(number, Path.rename)
    elif what == "renamed":
        shard.sync_folder = at_call(number, shard.sync_folder)  # right after the shard has its name
    elif what == "commit":
        writer.append_line = at_call(number, writer.append_line)
    elif what == "half committed":
        writer.append_line = at_call(number, writer.append_line, half_a_line)
    else:
        seconds = random.Random(number).uniform(0.02, 0.11)  # the pauses alone take 0.12
        threading.Timer(seconds, kill).start()


def capture(folder: Path, pause: float = 0) -> None:
    """As a rank does it: every record is offered, those in the store are left out."""
    writers = [writer.StoreWriter(folder, manifest(RECORDS), n, SHARD_BYTES) for n in range(WRITERS)]
    for sample_id in range(RECORDS):
        writers[sample_id % WRITERS].add(record(sample_id))
        time.sleep(pause)
    for one in writers:
        one.close()


def forked(work: Callable[[], None]) -> int:
    """Run it in a fork; returns how that ended, as os.waitstatus_to_exitcode says."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed(folder: Path, what: str, number: int) -> None:
    arm(what, number)
    capture(folder, pause=0.001 if what == "time" else 0)


def main(output: Path) -> None:
    report = {}
    assert forked(lambda: capture(output / "unbroken")) == 0
    for what, number in INSTANTS:
        folder = output / f"{what}-{number}".replace(" ", "-")
        ended = forked(functools.partial(killed, folder, what, number))
        left = [path.name for path in folder.iterdir()] if folder.exists() else []
        committed = index.read_index(folder) if folder.exists() else []
        report[folder.name] = {
            "ended": ended,
            "left": left,
            "committed": [line["file"] for line in committed],
            "resumed": forked(functools.partial(capture, folder)),
        }
    (output / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
