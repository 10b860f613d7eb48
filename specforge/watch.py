"""Ends a run in which a rank hangs, stops or vanishes, and names the rank: the others would wait for it for ever."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, TypeVar

from specforge.errors import TOLD, UNTOLD, EngineError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # its stubs leave it out

Item = TypeVar("Item")

# A rank whose stack is in here waits for others; it is not the one that hangs. NCCL's work runs beside Python: there a
# rank may also wait where it reads a result, so it can be named together with the one that hangs.
WAITING = ("torch/distributed/", "sglang/srt/distributed/", "specforge/launch.py")
TICKS = 25  # looks at the others in one timeout
PATIENCE = 20  # of them without progress; the rest is to notice, to tell, and for all ranks to write their stacks
LONGEST = 1000  # characters of a state that are read


@dataclass(frozen=True)
class State:
    """How a rank fares, as the others read it."""

    tick: int = 0
    idle: int = 0  # looks since its last progress
    where: str = ""
    waits: bool = False  # for other ranks
    done: bool = False

    @classmethod
    def read(cls, text: bytes) -> State | None:
        """None where the text is no state: whoever reaches the store can write into it."""
        try:
            found = cls(**json.loads(text[: LONGEST + 1]))
        except (ValueError, TypeError, RecursionError):
            return None
        right = all(type(value) is type(getattr(cls, name)) for name, value in asdict(found).items())
        return found if right and found.where.isprintable() else None


class Watch:
    """With it as a context, each rank must call `beat` at least every `timeout_s` seconds, or wait for others.

    One thread in each rank writes down on a board (a key-value store that the launcher serves) how it fares, and reads
    how the others do; another one judges. Where a rank is silent, or stands still without waiting, or where all wait
    for one another, every rank writes its Python stacks to its log, one of them tells the user by `tell`, and all end.
    Their launcher kills a rank that cannot.

    Time is counted in looks, not read from a clock: it stands still while the whole job is suspended."""

    def __init__(
        self, ranks: tuple[int, int], board: Store, timeout_s: float, tell: Callable[[EngineError, bool], None]
    ) -> None:
        """ranks: (own rank, world); board: a connection for this object alone. `tell` gets whether this rank must speak
        without asking on the board whether another one has."""
        (self._rank, self._world), self._board, self._timeout_s, self._tell = ranks, board, timeout_s, tell
        self._tick_s = timeout_s / TICKS
        self._looks = self._beat = self._answered = 0  # looks so far; at the last beat, at the board's last answer
        self._states = dict.fromkeys(range(self._world), State())  # what each rank wrote last
        self._heard = dict.fromkeys(range(self._world), (0, 0))  # rank -> (its last tick, the look that first saw it)
        self._told, self._lost = False, False
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
        self._over.set()
        if self._world > 1:
            self._judge.join()

    def _ask(self) -> None:
        """A thread of its own: where the board's server is stopped, a call never comes back."""
        tick, done = 0, False
        try:
            while not done:
                tick, done = tick + 1, self._over.is_set()
                where, waits = _standing(self._main)
                state = State(tick, self._looks - self._beat, where[-LONGEST // 2 :], waits, done)
                self._board.set(f"watch/{self._rank}", json.dumps(asdict(state)))
                for rank in range(self._world):
                    key = f"watch/{rank}"
                    state_or_none = State.read(self._board.get(key)) if self._board.check([key]) else None
                    self._states[rank] = state_or_none or self._states[rank]
                self._told = self._board.check(["watch/over"])
                self._answered = self._looks
                self._over.wait(self._tick_s)
        except RuntimeError:
            self._lost = True

    def _look(self) -> None:
        while self._asker.is_alive():
            self._asker.join(self._tick_s)
            self._looks += 1
            if self._told and not self._over.is_set():
                self._write_stacks("another rank has ended the run")
                os._exit(TOLD)
            if self._looks - self._answered > PATIENCE:
                self._lose_board(f"did not answer for {self._patience_s:.0f} s")
            fault = self._fault()
            if fault:
                self._end(fault)
        if self._lost and not self._over.is_set():
            self._lose_board("has ended")

    @property
    def _patience_s(self) -> float:
        return PATIENCE * self._tick_s

    def _fault(self) -> str | None:
        """What is wrong, naming the ranks; None where all is well."""
        states = self._states
        for rank, state in states.items():
            if state.tick != self._heard[rank][0]:
                self._heard[rank] = state.tick, self._looks
        going = [rank for rank, state in states.items() if not state.done]
        silent = [rank for rank in going if self._looks - self._heard[rank][1] > PATIENCE]
        if silent:
            return f"{_named(silent)} did not answer for {self._patience_s:.0f} s: stopped, or dead"
        idle = [rank for rank in going if states[rank].idle > PATIENCE]
        stuck = [rank for rank in idle if not states[rank].waits]
        if stuck:
            places = "; ".join(f"rank {rank} at {states[rank].where}" for rank in stuck)
            return f"{_named(stuck)} made no progress for {self._patience_s:.0f} s ({places})"
        if going and len(idle) == len(going):
            return f"all ranks wait for one another since {self._patience_s:.0f} s"
        return None

    def _end(self, what: str) -> NoReturn:
        self._write_stacks(what)
        self._tell(self._explained(what), False)
        try:
            self._board.set("watch/over", "1")
        except RuntimeError:
            self._lose_board("has ended")
        time.sleep(1.5 * self._tick_s)  # the others write their stacks; the launcher kills them after
        os._exit(TOLD)

    def _lose_board(self, what: str) -> NoReturn:
        """The ranks cannot agree on who tells of it. Rank 0 may be the one that serves the board."""
        at = f" at {os.environ['MASTER_ADDR']}" if "MASTER_ADDR" in os.environ else ""
        what = f"the launcher, which serves the ranks' common store{at}, {what}"
        self._write_stacks(what)
        here = int(os.environ.get("LOCAL_WORLD_SIZE", self._world))
        speaks = int(os.environ.get("LOCAL_RANK", self._rank)) == min(1, here - 1)
        if speaks:
            self._tell(self._explained(what), True)
        os._exit(TOLD if speaks else UNTOLD)

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


def is_of_others(error: BaseException) -> bool:
    """Whether the error came out of a call that waits for other ranks: most likely one of them has gone."""
    return any(part in entry.filename for entry in traceback.extract_tb(error.__traceback__)[-1:] for part in WAITING)


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
