"""Files that matter are written beside, fsynced and renamed: a reader sees the old content or the new, never a part."""

from __future__ import annotations

import fcntl
import io
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

import xxhash


@contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """A text file that takes the place of `path` when the block ends without an error."""
    with replacing_bytes(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8")
        yield text
        text.flush()
        text.detach()


@contextmanager
def replacing_bytes(path: Path) -> Iterator[BinaryIO]:
    """The same for bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.rename(path)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """`path`, made with its parents; of what was made, what is still empty goes where the block ends with an error."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield path
    except BaseException:
        with suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()
        raise


def write_json(path: Path, content: Any) -> None:
    with replacing(path) as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")


MOST_JSON = 64 << 20  # bytes of a file; none that we read is larger


def parse_json(text: bytes) -> Any:
    """Content of others. Raises ValueError, also where it is nested so deeply that Python gives up."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error


def read_json(path: Path) -> Any:
    """The same from a file that somebody else may have written. Raises ValueError and OSError."""
    with path.open("rb") as file:
        text = file.read(MOST_JSON + 1)
    if len(text) > MOST_JSON:
        raise ValueError(f"the file has more than {MOST_JSON >> 20} MiB")
    return parse_json(text)


def seal(content: Any, indent: int | None = None) -> str:
    """JSON with a last key "check": the xxh3 of all the text before `, "check"`, so that any changed byte is found."""
    body = json.dumps(content, indent=indent).removesuffix("}").rstrip()
    return f'{body}, "check": "{xxhash.xxh3_64_hexdigest(body.encode())}"}}'


def unseal(text: bytes) -> dict[str, Any] | None:
    """The content of a sealed text, None where it is not as it was written."""
    body, _, check = text.rpartition(b', "check": ')
    if check != f'"{xxhash.xxh3_64_hexdigest(body)}"}}'.encode():
        return None
    try:
        content: dict[str, Any] = parse_json(body + b"}")
    except ValueError:
        return None
    return content


def digest(path: Path) -> str:
    """xxh3 of a file's content."""
    found = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            found.update(piece)
    return found.hexdigest()


class HeldError(Exception):
    """Another process holds the lock; the text is what it wrote about itself."""


def held(path: Path, shared: bool = False) -> IO[str]:
    """A file that is only locked: until it is closed, or the process ends, however it ends. A symbolic link is not
    followed. Raises HeldError."""
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644), "r+")
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        with file:
            raise HeldError(file.read(1000) or "another process") from error
    return file


def sign(file: IO[str]) -> None:
    """Says in a locked file who holds it."""
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()


def sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Makes renames in `path` last."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def memory_bytes() -> int:
    """Of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
