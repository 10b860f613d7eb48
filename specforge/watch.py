"""Ends a run in which a rank has failed, died or hangs, and names the rank: the others would wait for it for ever."""

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, NoReturn, TypeVar

from torch.distributed import Store  # type: ignore[attr-defined]  # its stubs leave it out

from specforge.errors import TOLD, UNTOLD, EngineError, SpecforgeError

Item = TypeVar("Item")

# A rank whose stack is in here waits for others; it is not the one that hangs. NCCL's work runs beside Python: there a
# rank may also wait where it reads a result, so it can be named together with the one that hangs.
WAITING = ("torch/distributed/", "sglang/srt/distributed/", "specforge/launch.py")
TICKS = 25  # looks at the others in one timeout
PATIENCE = 20  # of them without progress; the rest is to notice, to tell, and for all ranks to write their stacks
GRACE = 2  # for a rank that failed to tell of it itself


class Watch:
    """With it as a context, each rank must call `beat` at least every `timeout_s` seconds, or wait for others.

    One thread in each rank writes down on a board (a key-value store that rank 0 serves) how it fares, and reads how
    the others do; another one judges. Where a rank is silent, or has left with an error, or stands still without
    waiting, or where all wait for one another, every rank writes its Python stacks to its log, one of them tells the
    user by `tell`, and all end.

    Time is counted in looks, not read from a clock: it stands still while the whole job is suspended."""

    def __init__(
        self, ranks: tuple[int, int], board: Store, timeout_s: float, tell: Callable[[EngineError, bool], None]
    ) -> None:
        """ranks: (own rank, world); board: a connection for this object alone. `tell` gets whether this rank must speak
        without asking on the board whether another one has."""
        (self._rank, self._world), self._board, self._timeout_s, self._tell = ranks, board, timeout_s, tell
        self._tick_s = timeout_s / TICKS
        self._looks = self._beat = self._answered = 0  # looks so far; at the last beat, at the board's last answer
        self._process = {"host": socket.gethostname(), "pid": os.getpid()}
        self._states: dict[int, dict[str, Any]] = {}  # what each rank wrote last
        self._heard = dict.fromkeys(range(self._world), (0, 0))  # rank -> (its last tick, the look that first saw it)
        self._failure, self._told, self._lost = "", False, False
        self._main = threading.main_thread().ident or 0
        self._over = threading.Event()
        self._asker = threading.Thread(target=self._ask, daemon=True, name="watch-board")
        self._judge = threading.Thread(target=self._look, daemon=True, name="watch")

    def beat(self) -> None:
        """There was progress."""
        self._beat = self._looks

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items; each one is progress."""
        for item in items:
            self.beat()
            yield item

    def __enter__(self) -> Watch:
        if self._world > 1:
            self._asker.start()
            self._judge.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._failure = error.what if isinstance(error, SpecforgeError) else f"{type(error).__name__}: {error}"
        self._over.set()
        if self._world > 1:
            self._judge.join()

    def _ask(self) -> None:
        """A thread of its own: a stopped rank 0 answers nothing, and no call of the board then comes back."""
        tick = 0
        try:
            while True:
                tick, over = tick + 1, self._over.is_set()
                self._publish(tick, over)
                if over:
                    return
                keys = {rank: f"watch/{rank}" for rank in range(self._world)}
                begun = {rank: key for rank, key in keys.items() if self._board.check([key])}
                self._states = {rank: json.loads(self._board.get(key)) for rank, key in begun.items()}
                self._told = self._board.check(["watch/over"])
                self._answered = self._looks
                self._over.wait(self._tick_s)
        except RuntimeError:
            self._lost = True

    def _publish(self, tick: int, over: bool) -> None:
        where, waits = _standing(self._main)
        state = {"tick": tick, "idle": self._looks - self._beat, "where": where, "waits": waits}
        state |= {"done": over, "failure": self._failure if over else ""} | self._process
        self._board.set(f"watch/{self._rank}", json.dumps(state))

    def _look(self) -> None:
        while True:
            self._asker.join(self._tick_s)
            if not self._asker.is_alive():
                break
            self._looks += 1
            if self._told:
                self._write_stacks("another rank has ended the run")
                os._exit(TOLD)
            if self._looks - self._answered > PATIENCE:
                self._end_without_board(_silent([0], self._patience_s))
            self._judge_others()
        if self._lost and not self._over.is_set():  # its launcher tells of a rank that died, itself of an error
            self._write_stacks("rank 0 has ended")
            os._exit(UNTOLD)

    @property
    def _patience_s(self) -> float:
        return PATIENCE * self._tick_s

    def _judge_others(self) -> None:
        """Ends the run where something is wrong, naming the ranks."""
        states = self._states
        for rank, state in states.items():
            if state["tick"] != self._heard[rank][0]:
                self._heard[rank] = state["tick"], self._looks
        age = {rank: self._looks - seen for rank, (_, seen) in self._heard.items()}
        failed = {r: s["failure"] for r, s in states.items() if s["failure"] and age[r] > GRACE}
        if failed:
            rank, failure = min(failed.items())
            self._end(f"rank {rank} failed: {failure.splitlines()[0]}")
        going = [rank for rank in self._heard if not (rank in states and states[rank]["done"])]
        silent = [rank for rank in going if age[rank] > PATIENCE]
        if silent:
            self._end(_silent(silent, self._patience_s), silent)
        idle = [rank for rank in going if rank in states and states[rank]["idle"] > PATIENCE]
        stuck = [rank for rank in idle if not states[rank]["waits"]]
        if stuck:
            places = "; ".join(f"rank {rank} at {states[rank]['where']}" for rank in stuck)
            self._end(f"{_named(stuck)} made no progress for {self._patience_s:.0f} s ({places})")
        if going and len(idle) == len(going):
            self._end(f"all ranks wait for one another since {self._patience_s:.0f} s")

    def _end(self, what: str, silent: Sequence[int] = ()) -> NoReturn:
        """A stopped process would not heed its launcher's request to end: it is woken, to see on the board that the
        run is over, and killed if it does not."""
        self._write_stacks(what)
        self._tell(self._explained(what), False)
        with contextlib.suppress(RuntimeError):
            self._board.set("watch/over", "1")
        self._send(signal.SIGCONT, silent)
        time.sleep(1.5 * self._tick_s)  # the others write their stacks; a launcher kills them after
        self._send(signal.SIGKILL, silent)
        os._exit(TOLD)

    def _end_without_board(self, what: str) -> NoReturn:
        """Rank 0 is stopped, so that the others cannot agree on who tells of it: rank 1 does."""
        self._write_stacks(what)
        if self._rank > 1:
            time.sleep(2 * self._tick_s)
            os._exit(UNTOLD)
        self._tell(self._explained(what), True)
        self._send(signal.SIGKILL, [0])
        os._exit(TOLD)

    def _write_stacks(self, what: str) -> None:
        print(f"ended by the watch: {what}; Python stacks of rank {self._rank}:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)

    def _explained(self, what: str) -> EngineError:
        return EngineError(
            what,
            where="the stacks of each rank are in specforge.log and specforge-rank*.log in the output folder",
            fix="run the same command again: capture, training and regenerate go on where they were; "
            f"if a rank was only slow, give more than --rank-timeout {self._timeout_s:g}",
        )

    def _send(self, which: signal.Signals, ranks: Sequence[int]) -> None:
        """To those of the ranks that are on this machine."""
        for state in [self._states[rank] for rank in ranks if rank in self._states]:
            if state["host"] == self._process["host"]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(state["pid"], which)


def is_of_others(error: BaseException) -> bool:
    """Whether the error came out of a call that waits for other ranks: most likely one of them has gone."""
    return any(part in entry.filename for entry in traceback.extract_tb(error.__traceback__)[-1:] for part in WAITING)


def _silent(ranks: Sequence[int], seconds: float) -> str:
    return f"{_named(ranks)} did not answer for {seconds:.0f} s: stopped, or dead"


def _named(ranks: Sequence[int]) -> str:
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
