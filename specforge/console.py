"""What the user sees: rich output of rank 0 on the real terminal, everything the engines say in a log file."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # controls, but tab and newline
console = Console(highlight=False, soft_wrap=True)


def is_main_rank() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def say(message: str) -> None:
    """Print on rank 0."""
    if is_main_rank():
        console.print(harmless(message))


def show_error(message: str) -> None:
    console.print("[bold red]error[/] ", end="")
    console.print(harmless(message), markup=False)


def harmless(text: str) -> str:
    """Without what a terminal obeys: text of data, models and servers gets into messages."""
    return OBEYED.sub("\ufffd", text)


def quiet(log_file: Path) -> None:
    """Send what libraries print (file descriptors 1 and 2, so C++ too) to `log_file`; ours stays on the terminal."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    if console.file is sys.stdout:
        console.file = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    with open(log_file, "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)


@contextmanager
def progress(title: str, total: int, unit: str) -> Iterator[Progress]:
    """A live bar with count, rate and time left; one plain line at the end where the output is no terminal."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(unit + "  {task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not is_main_rank(),
    )
    bar.add_task(title, total=total, rate="")
    if console.is_terminal:
        with bar:
            yield bar
    else:
        began = time.monotonic()
        yield bar
        say(f"{title}: {total:,} {unit} in {time.monotonic() - began:.0f} s  {bar.tasks[0].fields['rate']}")


def advance(bar: Progress, amount: int, note: str = "") -> None:
    """Move the only task of `bar` on; `note` stands behind the count (default: units a second)."""
    task = bar.tasks[0]
    bar.update(task.id, advance=amount, rate=note or (f"{task.speed:,.0f}/s" if task.speed else ""))


def tracked(items: Iterable[Item], title: str, total: int, unit: str) -> Iterator[Item]:
    with progress(title, total, unit) as bar:
        for item in items:
            yield item
            advance(bar, 1)
