"""What a store's two index files say, and the lock of its writers.

    manifest.json   what the features came from
    shards.jsonl    a line for each committed shard, appended and never changed

Both are sealed: a checksum of the text stands at its end, so a changed byte is found wherever it is.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic takes that of Python from 3.12 on only

from specforge.errors import StoreError
from specforge.features.codec import CODECS
from specforge.files import HeldError, held, parse_json, replacing, seal, sign, sync_folder, unseal

FORMAT_VERSION = 2
MANIFEST, INDEX = "manifest.json", "shards.jsonl"
DISK_BLOCK = 4096
LOCK, OTHERS_LOCK = ".lock", ".lock-others"  # files that are only locked

Count = Annotated[int, Field(ge=0, lt=1 << 62)]


class RecordLine(TypedDict):
    """A record in its shard's line, in the order in which the records lie in the shard."""

    sample_id: Count
    tokens: Count
    teachers: Count  # teacher rows
    supervised: Count  # tokens of the loss mask
    bytes: Count  # of its encoded states
    xxh3: str  # of its encoded states, token ids, teacher_top1, teacher_lse and loss mask


class ShardLine(TypedDict):
    file: Annotated[str, Field(pattern=r"^shard-[0-9]+-[0-9]+\.safetensors$")]  # in this folder
    writer: Count
    bytes: Count  # of the file
    xxh3: str  # of all bytes of the file but the records' states
    records: Annotated[list[RecordLine], Field(min_length=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What the features came from. Two stores with equal manifests hold the same records."""

    target: str  # as the user named it; for messages only
    target_fingerprint: str
    tokenizer_hash: str
    template_hash: str
    aux_layers: tuple[int, ...]
    data_hash: str
    max_length: Count
    codec: str
    dtype: str  # in which the target ran
    hidden_size: Annotated[int, Field(gt=0, lt=1 << 32)]
    num_records: Count
    tokens_per_batch: Count  # the capture's batches follow from it and the data; a resume keeps them
    engine: str
    format_version: int = FORMAT_VERSION

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        path = folder / MANIFEST
        try:
            text = path.read_bytes()
        except OSError as error:
            raise StoreError(
                "there is no feature store here", where=str(path), fix="make one with `specforge prepare-hidden`"
            ) from error
        raw = unseal(text.removesuffix(b"\n")) if text.endswith(b"\n") else None
        version = (raw or _unsealed(text)).get("format_version")
        if version is not None and version != FORMAT_VERSION:
            raise StoreError(
                f"the store has format {version}, this version of specforge reads format {FORMAT_VERSION}",
                where=str(path),
                fix="read it with the specforge that wrote it, or capture again with `specforge prepare-hidden "
                "--output` another folder",
            )
        try:
            found = MANIFESTS.validate_json(json.dumps(raw), strict=True)
            if found.codec not in CODECS:
                raise ValueError(f"no codec '{found.codec}'")
        except ValueError as error:  # pydantic's is one
            raise StoreError("the manifest is damaged", where=str(path), fix="bring it back from a copy") from error
        return found

    def write(self, folder: Path) -> None:
        with replacing(folder / MANIFEST) as file:
            file.write(seal(asdict(self), indent=2) + "\n")

    def differences(self, other: Manifest, but: Sequence[str] = ()) -> list[str]:
        free = {"target", "tokens_per_batch", *but}
        mine, theirs = asdict(self), asdict(other)
        return [name for name in mine if name not in free and mine[name] != theirs[name]]


MANIFESTS, SHARD_LINES = TypeAdapter(Manifest), TypeAdapter(ShardLine)


def existing(folder: Path, manifest: Manifest) -> Manifest | None:
    """The manifest of the store in `folder`, None where the folder is new or empty. Writes nothing. Raises StoreError
    where it holds something else, or a store made from something else, naming the field."""
    if not (folder / MANIFEST).exists():
        if folder.exists() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise StoreError(
                "the output folder is not empty and holds no feature store",
                where=str(folder),
                fix="choose another folder",
            )
        return None
    found = Manifest.read(folder)
    different = found.differences(manifest)
    if different:
        name = different[0]
        raise StoreError(
            f"the store in the output folder was made with another {name}: "
            f"{getattr(found, name)}, now {getattr(manifest, name)}",
            where=f"{folder}/{MANIFEST}, '{name}'",
            fix="choose another folder, or remove this one",
        )
    return found


def read_index(folder: Path) -> list[ShardLine]:
    """The lines of the committed shards. A last line that a kill cut short was never committed; it is ignored."""
    path = folder / INDEX
    *whole, rest = path.read_bytes().split(b"\n") if path.exists() else [b""]
    lines: list[Any] = [_shard_line(text) for text in whole]
    if unseal(rest[:-1]) is not None:  # all is there but the line's end, which is another character: not cut short
        lines.append(None)
    if None in lines:
        number = lines.index(None) + 1
        raise StoreError(
            f"line {number} of the index is damaged",
            where=f"{path}, line {number}",
            fix="bring the file back from a copy, or delete that line: the same `specforge prepare-hidden` command "
            "then captures its records anew",
        )
    return lines


def _shard_line(text: bytes) -> ShardLine | None:
    """None where the line is damaged, or names what is no shard of this folder."""
    try:
        return SHARD_LINES.validate_python(unseal(text), strict=True)
    except ValidationError:
        return None


def give_up(folder: Path, files: set[str]) -> None:
    """Takes the lines of these shards back: their records count as missing."""
    lines = [line for line in read_index(folder) if line["file"] not in files]
    with replacing(folder / INDEX) as index:
        index.writelines(seal(line) + "\n" for line in lines)


def committed_ids(folder: Path) -> set[int]:
    return {record["sample_id"] for line in read_index(folder) for record in line["records"]}


def append_line(folder: Path, line: ShardLine) -> None:
    """Commit a shard. Append and fsync under a lock: several writers share the index. What a kill or a full disk left
    of a line is cut off."""
    path = folder / INDEX
    with path.open("ab+", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                end = file.read().rfind(b"\n") + 1
                file.truncate(end)
        text = memoryview(seal(line).encode() + b"\n")
        try:
            while text:
                text = text[file.write(text) or 0 :]
            os.fsync(file.fileno())
        except OSError as error:
            file.truncate(end)
            raise OSError(error.errno, error.strerror, str(path)) from error
    sync_folder(folder)


def lock(folder: Path, writer: int) -> IO[str]:
    """A writer's lock on the store, held until the file is closed or the process ends, however it ends.

    Writer 0 comes first and excludes every other run, and what is left of one that lost its writer 0; the run's other
    writers join it. Raises StoreError where another run holds the lock."""
    if writer > 0:
        return _held(folder / OTHERS_LOCK, shared=True)
    file = _held(folder / LOCK)
    if (folder / OTHERS_LOCK).exists():
        _held(folder / OTHERS_LOCK).close()
    sign(file)
    return file


def refuse_busy(folder: Path) -> None:
    """Raises StoreError where a run is writing to the store in `folder`."""
    for name in (LOCK, OTHERS_LOCK):
        if (folder / name).exists():
            _held(folder / name).close()


def _held(path: Path, shared: bool = False) -> IO[str]:
    try:
        return held(path, shared)
    except HeldError as error:
        raise StoreError(
            f"the store is being written by {error}",
            where=str(path.parent),
            fix="wait for it or stop it; or choose another folder",
        ) from error


def held_bytes(folder: Path) -> int:
    """What the committed shards and the index take on the disk, in whole blocks."""
    index = folder / INDEX
    sizes = [line["bytes"] for line in read_index(folder)] + ([index.stat().st_size] if index.exists() else [])
    return sum(-(-size // DISK_BLOCK) * DISK_BLOCK for size in sizes)


def check_space(folder: Path, needed: int) -> None:
    """Raises StoreError where the disk cannot hold `needed` more bytes."""
    place = next(parent for parent in [folder, *folder.resolve().parents] if parent.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise StoreError(
            f"the features need {needed / 1e9:,.1f} GB, the disk has {free / 1e9:,.1f} GB free",
            where=str(folder),
            fix="choose another --output, --codec fp8, fewer --num-samples, --max-disk, or `specforge train --online`, "
            "which needs no disk",
        )


def _unsealed(text: bytes) -> dict[str, Any]:
    """What a manifest without a seal says (format 1 had none); of a damaged one, nothing."""
    try:
        raw = parse_json(text)
    except ValueError:
        return {}
    return raw if isinstance(raw, dict) and "check" not in raw else {}
