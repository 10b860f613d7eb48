"""Ends a run in which a rank has died or hangs, and names the rank: the others would wait for it for ever."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn

from torch.distributed import Store  # type: ignore[attr-defined]  # its stubs leave it out

from specforge.errors import EngineError

# A rank whose stack is in here waits for others; it is not the one that hangs. NCCL's work runs beside Python: there a
# rank may also wait where it reads a result, so it can be named together with the one that hangs.
WAITING = ("torch/distributed/", "sglang/srt/distributed/", "specforge/launch.py")
EXIT_CODE = 2
TICKS = 20  # looks at the others in one timeout
SPARE = 4 / TICKS  # of the timeout: to notice, to tell, and for all ranks to write their stacks


class Watch:
    """With it as a context, each rank must call `beat` at least every `timeout_s` seconds, or wait for others.

    A thread in each rank writes down on a board (a key-value store that all ranks share) how it fares, and reads how
    the others do. Where one rank is silent, or stands still without waiting, or where all wait for one another, every
    rank writes its Python stacks to its log, one of them tells the user by `tell`, and all end with code 2."""

    def __init__(
        self, ranks: tuple[int, int], board: Store, timeout_s: float, tell: Callable[[EngineError], None]
    ) -> None:
        """ranks: (own rank, world); board: a connection for this thread alone, with a timeout of its own."""
        (self._rank, self._world), self._board, self._timeout_s, self._tell = ranks, board, timeout_s, tell
        self._patience_s = timeout_s * (1 - SPARE)
        self._beat, self._ticks = time.monotonic(), 0
        self._process = {"host": socket.gethostname(), "pid": os.getpid()}
        self._heard: dict[int, tuple[int, float]] = {}  # rank -> (its last tick, when it was first seen here)
        self._main = threading.main_thread().ident or 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True, name="watch")

    def beat(self) -> None:
        """There was progress."""
        self._beat = time.monotonic()

    def __enter__(self) -> Watch:
        if self._world > 1:
            self._publish(done=False)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._world > 1:
            self._thread.join()

    def _look(self) -> None:
        for rank in range(self._world):
            self._heard[rank] = (-1, time.monotonic())
        while not self._over.wait(self._timeout_s / TICKS):
            self._ticks += 1
            try:
                self._publish(done=False)
                states = {rank: self._state(rank) for rank in range(self._world)}
                told = self._board.check(["watch/over"])
            except RuntimeError as error:
                self._end(f"rank 0 does not answer any more ({type(error).__name__})", tell=True)
            fault = self._judge(states)
            if fault or told:
                self._end(fault or "another rank has ended the run", tell=not told)
        with contextlib.suppress(RuntimeError):  # rank 0, which holds the board, may have ended before
            self._publish(done=True)

    def _publish(self, done: bool) -> None:
        where, waits = _standing(self._main)
        idle = time.monotonic() - self._beat
        state = {"tick": self._ticks, "idle": idle, "where": where, "waits": waits, "done": done} | self._process
        self._board.set(f"watch/{self._rank}", json.dumps(state))

    def _state(self, rank: int) -> dict[str, Any] | None:
        """What a rank wrote last; None where it has not begun."""
        key = f"watch/{rank}"
        state = json.loads(self._board.get(key)) if self._board.check([key]) else None
        tick = state["tick"] if state else -1
        if tick != self._heard[rank][0]:
            self._heard[rank] = tick, time.monotonic()
        return state

    def _judge(self, states: dict[int, dict[str, Any] | None]) -> str | None:
        """What is wrong, naming the ranks; None where all is well."""
        now, going = time.monotonic(), {r: s for r, s in states.items() if not (s and s["done"])}
        silent = [rank for rank in going if now - self._heard[rank][1] > self._patience_s]
        if silent:
            self._kill([state for rank, state in going.items() if rank in silent and state])
            return f"{_named(silent)} did not answer for {self._patience_s:.0f} s: stopped, or dead"
        idle = {r: s for r, s in going.items() if s and s["idle"] > self._patience_s}
        stuck = [rank for rank, state in idle.items() if not state["waits"]]
        if stuck:
            places = "; ".join(f"rank {rank} at {idle[rank]['where']}" for rank in stuck)
            return f"{_named(stuck)} made no progress for {self._patience_s:.0f} s ({places})"
        if going and len(idle) == len(going):
            return f"all ranks wait for one another since {self._patience_s:.0f} s"
        return None

    def _kill(self, states: list[dict[str, Any]]) -> None:
        """A stopped process would not heed its launcher's request to end."""
        for state in states:
            if state["host"] == self._process["host"]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(state["pid"], signal.SIGKILL)

    def _end(self, what: str, tell: bool) -> NoReturn:
        print(f"ended by the watch: {what}; Python stacks of rank {self._rank}:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        if tell:
            self._tell(
                EngineError(
                    what,
                    where="the stacks of each rank are in specforge.log and specforge-rank*.log in the output folder",
                    fix="run the same command again, it goes on where it was; "
                    f"if a pass only is slow, give more than --rank-timeout {self._timeout_s:g}",
                )
            )
            with contextlib.suppress(RuntimeError):
                self._board.set("watch/over", "1")
            time.sleep(1.5 * self._timeout_s / TICKS)  # the others write their stacks; a launcher kills them after
        os._exit(EXIT_CODE)


def _named(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def _standing(thread: int) -> tuple[str, bool]:
    """(file:line in function, whether it waits for other ranks) of a thread of this process."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "its end", False
    stack = traceback.extract_stack(frame, limit=None)
    waits = any(part in entry.filename for entry in stack for part in WAITING)
    last = stack[-1]
    return f"{last.filename}:{last.lineno} in {last.name}", waits
