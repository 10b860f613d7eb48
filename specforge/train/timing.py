"""Where a run's time goes, and whether it was asked to end."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Sigterm:
    """Whether the process was asked to end, as schedulers do before they kill."""

    def __init__(self) -> None:
        self.asked = False

    def _ask(self, *_: object) -> None:
        self.asked = True

    def __enter__(self) -> Sigterm:
        self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)


class Clock:
    """Where the time of one optimizer step goes."""

    def __init__(self) -> None:
        self._began, self._spent = time.perf_counter(), dict[str, float]()

    def timed(self, name: str, work: Callable[[], T]) -> T:
        began = time.perf_counter()
        result = work()
        self._spent[name] = self._spent.get(name, 0.0) + time.perf_counter() - began
        return result

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def rates(self, row: dict[str, Any]) -> dict[str, Any]:
        seconds = self.seconds
        spent = {"target": 0.0, "data": 0.0} | self._spent
        shares = {name: round(value / seconds, 4) for name, value in spent.items()}
        return {
            "tokens_per_second": row["tokens"] / seconds,
            "supervised_tokens_per_second": row["supervised_tokens"] / seconds,
            "time_share": shares | {"draft": round(1 - sum(shares.values()), 4)},
        }
