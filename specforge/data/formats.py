"""Rows of a JSONL file to conversations or examples. What a row is, it says itself; nothing is guessed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specforge.errors import DataError
from specforge.records import Conversation, Message

ROLES = {"system", "user", "assistant", "tool"}
HUB_NAMES = {"ultrachat", "sharegpt", "mix"}
MAX_BROKEN_SHARE = 0.01


@dataclass
class ReadReport:
    """What reading met: rows by fate, and where the first broken ones are."""

    rows: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    broken_lines: list[int] = field(default_factory=list)

    def drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1


def read_rows(path: Path, report: ReadReport) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, line by line. Broken lines are counted; over 1 % of them raises DataError."""
    if str(path) in HUB_NAMES:
        raise DataError(
            f"'{path}' names a data set on the hub; fetching by name is not built yet",
            where=f"--dataset {path}",
            fix="download it and give it as JSONL of conversations",
        )
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(
            f"the data file cannot be read: {error.strerror}",
            where=str(path),
            fix="give a readable JSONL file, one conversation a line",
        ) from error
    with file:
        number = 0
        while True:
            number += 1
            try:
                line = file.readline()
                if not line:
                    break
                if not line.strip():
                    continue
                report.rows += 1
                row = json.loads(line.decode("utf-8"))
                if not isinstance(row, dict):
                    raise ValueError("not an object")
            except ValueError:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
                report.drop("broken line")
                report.broken_lines.append(number)
                continue
            yield row
    if len(report.broken_lines) > MAX_BROKEN_SHARE * max(report.rows, 1):
        raise DataError(
            f"{len(report.broken_lines)} of {report.rows} lines are not JSON objects, more than 1 %",
            where=f"{path}, line {', '.join(map(str, report.broken_lines[:5]))}",
            fix="mend or remove these lines; the file must hold one JSON object a line, in UTF-8",
        )


def to_conversation(row: dict[str, Any], default_id: str, needed: str = "assistant") -> Conversation | str:
    """A conversation, or the reason why the row is none: it must have a turn of the role `needed`."""
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        return "no 'conversations' list"
    messages = []
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or turn["role"] not in ROLES:
            return "a turn without a known role"
        if not is_text(turn.get("content")):
            return "a turn without text"
        messages.append(Message(role=turn["role"], content=turn["content"]))
    if not any(message.role == needed for message in messages):
        return f"no {needed} turn"
    own_id = str(row.get("id", default_id))
    return Conversation(id=own_id if is_text(own_id) else default_id, messages=tuple(messages))


def is_text(value: object) -> bool:
    """A string that can be written as UTF-8: JSON may hold half a surrogate pair."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def to_row(conversation: Conversation) -> dict[str, Any]:
    turns = [{"role": message.role, "content": message.content} for message in conversation.messages]
    return {"id": conversation.id, "conversations": turns}


def read_conversations(path: Path, report: ReadReport, needed: str = "assistant") -> list[Conversation]:
    """All conversations of a file that have a turn of the role `needed`; raises DataError where none is left."""
    kept = []
    for row in read_rows(path, report):
        conversation = to_conversation(row, str(report.rows), needed)
        if isinstance(conversation, str):
            report.drop(conversation)
        else:
            kept.append(conversation)
    if not kept:
        raise DataError(
            f"no conversation with such a turn ({needed}) among {report.rows} rows ({report.dropped})",
            where=str(path),
            fix='each line: {"conversations": [{"role": "user", "content": ...}, ...]}',
        )
    return kept
