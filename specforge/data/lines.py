"""Files to JSON values, one at a time: JSONL, a JSON array, Parquet. Memory does not grow with the file.

What a value means is not decided here (`formats`): the lines of JSONL are passed on as they are, valid or not.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import ijson
import orjson
import pyarrow
import pyarrow.parquet

from specforge.errors import DataError, first_line

SUFFIXES = (".parquet", ".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")  # the best first
CODECS = {".gz": "gzip", ".zst": "zstd"}
MAGIC = {b"PAR1": "Parquet", b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "a ZIP archive"}
LONG_NUMBER = re.compile(rb"\d{19}")
BOM = b"\xef\xbb\xbf"
MAX_VALUE = 16 * 2**20  # bytes; a longer value is never held in memory
CHUNK = 2**20  # bytes read at once
PARQUET_ROWS = 16  # decoded at once; more are hardly faster, and a row may be large


def lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """(number from 1, one JSON value without a newline) of a file, streaming.

    Numbers are lines of JSONL (blank ones count, but are not yielded), elements of a JSON array, rows of Parquet. The
    value is None for a line or row that is longer than MAX_VALUE. The format is told by the suffix; `.json` holds an
    array or JSONL, told by its first byte.

    Raises DataError for a file that cannot be read, breaks off, is not what its name says, changes while it is read,
    or is an array with an element longer than MAX_VALUE.
    """
    read = _parquet_rows if suffix_of(path) == ".parquet" else _json_values
    number = 0
    with _unchanged(path):
        try:
            for number, value in read(path):
                yield number, value
        except (
            OSError, pyarrow.ArrowException, ijson.JSONError, orjson.JSONEncodeError, UnicodeDecodeError
        ) as error:  # fmt: skip
            raise DataError(
                f"the file breaks off or is damaged: {_first_line(error)}",
                where=f"{path}, after number {number:,}",
                fix="fetch or write the file again",
            ) from error


def suffix_of(path: Path) -> str:
    """One of SUFFIXES; DataError where the file has another."""
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return suffix
    raise DataError(
        f"files of this kind ('{path.suffix}') are not read",
        where=str(path),
        fix=f"write it as one of {', '.join(SUFFIXES)}",
    )


@contextmanager
def _unchanged(path: Path) -> Iterator[None]:
    """DataError if the file is another one at the end of the block, even where the block fails: that is the reason."""
    before = _identity(path)
    try:
        yield
    except DataError as error:
        if _identity(path) == before:
            raise
        raise _changed(path) from error
    if _identity(path) != before:
        raise _changed(path)


def parsed(line: bytes) -> Any:
    """A JSON value. orjson makes another number of an integer over 64 bits."""
    return json.loads(line) if LONG_NUMBER.search(line) else orjson.loads(line)


def dumped(value: Any) -> bytes:
    """The value as one line of JSON; decimals and the like, which hold no conversation, as text."""
    try:
        return orjson.dumps(value, default=str, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError as error:
        if "Integer" not in str(error):
            raise
        return json.dumps(value, default=str, ensure_ascii=False, separators=(",", ":")).encode()


def _without_nulls(value: Any) -> Any:
    """Structs of a column have the same keys: those that a row does not have are null. None means what its absence
    means."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _identity(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _changed(path: Path) -> DataError:
    return DataError(
        "the file changed while it was read", where=str(path), fix="wait until it is written, and start again"
    )


def _first_line(error: Exception) -> str:
    return getattr(error, "strerror", None) or first_line(error)


def _parquet_rows(path: Path) -> Iterator[tuple[int, bytes | None]]:
    number = 0
    # without pre_buffer and with a buffer size, columns stream page by page
    with pyarrow.parquet.ParquetFile(
        path, pre_buffer=False, buffer_size=CHUNK, page_checksum_verification=True
    ) as file:
        for batch in file.iter_batches(PARQUET_ROWS, use_threads=False):
            for row in batch.to_pylist():
                number += 1
                value = dumped(_without_nulls(row))
                yield number, value if len(value) <= MAX_VALUE else None


def _json_values(path: Path) -> Iterator[tuple[int, bytes | None]]:
    suffix = suffix_of(path)
    with _opened(path) as file:
        if file.peek(len(BOM)).startswith(BOM):
            file.read(len(BOM))
        head = file.peek(CHUNK).lstrip()
        is_array = head.startswith(b"[")
        content = next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)
        if is_array and suffix.startswith(".jsonl"):
            content = "a JSON array"
        elif not is_array and not suffix.startswith(".jsonl") and not _is_json_lines(head):
            content = content or "neither a JSON array nor one JSON object a line"
        if content:
            raise DataError(
                f"the file is named {suffix} and holds {content}",
                where=str(path),
                fix=f"name it as what it is: {', '.join(SUFFIXES[:3])}; an array or JSONL of conversations is needed",
            )
        yield from _array(path, file) if is_array else _json_lines(file)


def _is_json_lines(head: bytes) -> bool:
    """Whether the first line is a JSON object by itself, as far as it can be seen; an empty file is JSONL too."""
    line, newline, _ = head.partition(b"\n")
    if not newline:
        return head[:1] in (b"{", b"")
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _opened(path: Path) -> io.BufferedReader:
    codec = CODECS.get(path.suffix.lower())
    if codec is None:
        return io.BufferedReader(path.open("rb", buffering=0), CHUNK)
    return io.BufferedReader(pyarrow.input_stream(str(path), compression=codec), CHUNK)


def _json_lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    for number in count(1):
        line = file.readline(MAX_VALUE + 1)
        if not line:
            return
        if len(line) > MAX_VALUE and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = file.readline(CHUNK)
            yield number, None
        elif line.strip():
            yield number, line.rstrip(b"\r\n")


class _Bounded:
    """A file that raises where one array element goes on for more than MAX_VALUE: the parser would hold all of it."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.element, self.since = 1, 0

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.since += len(data)
        if self.since > MAX_VALUE + size:
            raise DataError(
                f"an element of the array is longer than {MAX_VALUE // 2**20} MiB",
                where=f"{self.path}, element {self.element:,}",
                fix="remove it, or write the file as JSONL, where only that line is left out",
            )
        return data


def _array(path: Path, file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    bounded = _Bounded(path, file)
    for number, element in enumerate(ijson.items(bounded, "item", use_float=True), start=1):
        bounded.element, bounded.since = number + 1, 0
        yield number, dumped(element)
