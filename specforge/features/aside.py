"""Records that could not be captured: listed in the store's folder, so that they do not count as missing."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

from specforge.errors import EngineError
from specforge.files import parse_json

SET_ASIDE = "set-aside.jsonl"  # a line for each: {"sample_id": 7, "reason": "out of memory"}
TOO_LARGE, NOT_FINITE = "out of memory", "states are not finite"
MOST_NOT_FINITE = 0.001  # of a split's records; more is a fault of the target, not of a record


def set_aside(folder: Path, sample_id: int, reason: str, records: int) -> None:
    """Writers of several ranks may call it at once. What a kill left of a line is closed by the next. Raises
    EngineError where too many of the split's `records` are not finite."""
    if sample_id not in reasons(folder):
        _write(folder, sample_id, reason)
    check_share(folder, records)


def check_share(folder: Path, records: int) -> None:
    found = list(reasons(folder).values()).count(NOT_FINITE)
    if found > MOST_NOT_FINITE * records:
        raise EngineError(
            f"the target's states are not finite for {found} of {records} records",
            where=f"{folder / SET_ASIDE} lists their sample ids",
            fix="try another --dtype (float16 overflows where bfloat16 does not) and another output folder; "
            "to try the same again remove that file",
        )


def _write(folder: Path, sample_id: int, reason: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / SET_ASIDE).open("ab+", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        content = file.read()
        gap = b"" if content.endswith(b"\n") or not content else b"\n"
        file.write(gap + json.dumps({"sample_id": sample_id, "reason": reason}).encode() + b"\n")
        os.fsync(file.fileno())


def reasons(folder: Path) -> dict[int, str]:
    """{sample id: reason}. Where the user removes the file, a resume tries its records again."""
    path, found = folder / SET_ASIDE, dict[int, str]()
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            entry = parse_json(line)
            found[int(entry["sample_id"])] = str(entry["reason"])
        except (ValueError, KeyError, TypeError, OverflowError):
            continue  # a part of a line: its record was never set aside, and is tried again
    return found
