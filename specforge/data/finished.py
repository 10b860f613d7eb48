"""Finished conversations of an unfinished run, in a file beside the output: what a killed run goes on from."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

from specforge.data.dialogue import Outcome
from specforge.data.formats import to_row
from specforge.errors import ConfigError
from specforge.files import parse_json, replacing, sync_folder

SYNC_SECONDS = 1.0  # what a machine that loses power may lose; a process that is killed loses nothing


@dataclass
class Summary:
    """Conversations by fate."""

    asked: int = 0
    kept: int = 0
    cut_short: int = 0  # of those kept: they end before a turn that has no answer
    truncated: int = 0
    failed: int = 0
    answers: int = 0

    def count(self, content: dict[str, Any]) -> None:
        kept, failure = content["conversation"] is not None, content["failure"]
        self.asked += 1
        self.answers += content["answers"]
        self.kept += kept
        self.cut_short += kept and failure is not None
        if failure is not None:
            self.truncated += failure["kind"] == "truncated"
            self.failed += failure["kind"] == "failed"


class Finished:
    """The progress file: a line that says what it belongs to, then a line for each conversation that has ended, in the
    order of ending. One process appends; any may read."""

    def __init__(self, path: Path, made_from: dict[str, Any], resume: bool) -> None:
        """Raises ConfigError where the file belongs to a run with other inputs or settings."""
        self.path, self._made_from = path, made_from
        self._lines = dict[int, int]()  # index of the conversation: where its line begins
        self._again = set[int]()
        self._end, self._synced = 0, 0.0
        self._file: IO[bytes] | None = None
        if resume and path.exists():
            self._read()

    def is_done(self, index: int) -> bool:
        return index in self._lines and index not in self._again

    def done(self) -> int:
        return len(self._lines) - len(self._again)

    def open(self) -> None:
        """Begins to append. Raises ConfigError where another process does."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                "another process is writing to the same output",
                where=str(self.path),
                fix="wait for it, or choose another --output",
            ) from error
        file.truncate(self._end)  # a line that was torn, or with --no-resume everything
        self._file = file
        if self._end == 0:
            self._append({"made_from": self._made_from})
        sync_folder(self.path.parent)

    def add(self, outcome: Outcome) -> None:
        failure = outcome.failure
        self._lines[outcome.index] = self._end
        (self._again.add if failure and failure.again else self._again.discard)(outcome.index)
        row = to_row(outcome.conversation) if outcome.conversation else None
        content = {field.name: getattr(outcome, field.name) for field in fields(outcome)}
        content |= {"conversation": row, "failure": asdict(failure) if failure else None}
        self._append(content)

    def close(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def write(self, output: Path, failures: Path) -> Summary:
        """The conversations in the order of the prompts, and beside them what failed; the progress file goes. Where
        nothing was kept there is no output, and what stands in its place stays."""
        summary = Summary()
        with replacing(failures) as file:
            for content in self._contents():
                failure = content["failure"]
                summary.count(content)
                if failure is not None:
                    del failure["again"]
                    file.write(json.dumps({"id": content["id"], **failure}, ensure_ascii=False) + "\n")
        if not summary.truncated + summary.failed:
            failures.unlink()
        if summary.kept:
            with replacing(output) as file:
                for content in self._contents():
                    if content["conversation"] is not None:
                        file.write(json.dumps(content["conversation"], ensure_ascii=False) + "\n")
        self.path.unlink()
        return summary

    def _append(self, content: dict[str, Any]) -> None:
        assert self._file is not None
        line = json.dumps(content, ensure_ascii=False).encode() + b"\n"
        self._file.write(line)
        self._file.flush()
        self._end += len(line)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def _contents(self) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as file:
            for index in sorted(self._lines):
                file.seek(self._lines[index])
                yield json.loads(file.readline())

    def _read(self) -> None:
        with self.path.open("rb") as file:
            content = _parsed(file.readline())
            if content is not None:
                self._check(content.get("made_from"))
            while content is not None:
                self._end = file.tell()
                content = _parsed(file.readline())
                if content is not None:
                    index, failure = content["index"], content["failure"]
                    self._lines[index] = self._end
                    (self._again.add if failure and failure["again"] else self._again.discard)(index)
            if file.read(1):
                raise ConfigError(
                    "the progress of the unfinished run is damaged",
                    where=f"{self.path}, byte {self._end}",
                    fix="start anew with --no-resume, or cut the file off there to keep what stands before",
                )

    def _check(self, found: Any) -> None:
        if not isinstance(found, dict):
            found = {}
        for name, value in self._made_from.items():
            if found.get(name) != value:
                raise ConfigError(
                    f"the unfinished run in this place has another {name}: {found.get(name)}, now {value}",
                    where=str(self.path),
                    fix="give the same again, choose another --output, or start anew with --no-resume",
                )


def _parsed(line: bytes) -> dict[str, Any] | None:
    """None for a line that is torn."""
    try:
        content = parse_json(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return content if isinstance(content, dict) else None
