"""The feature store: manifest.json, shards.jsonl (append-only), shard-<writer>-<number>.safetensors.

A shard is written to a temporary name, fsynced, renamed, and then committed by a line in shards.jsonl. What is not
committed does not exist; what is committed is never written again. No padding anywhere.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from specforge.errors import StoreError
from specforge.features.codec import CODECS, encode
from specforge.files import sync_file, sync_folder, write_json
from specforge.records import FeatureRecord

FORMAT_VERSION = 1
BLOCK = 1 << 24
SET_ASIDE = "set-aside.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What the features came from. Two stores with equal manifests hold the same records."""

    target: str  # as the user named it; for messages only
    target_fingerprint: str
    tokenizer_hash: str
    template_hash: str
    aux_layers: tuple[int, ...]
    data_hash: str
    max_length: int
    codec: str
    hidden_size: int
    num_records: int
    tokens_per_batch: int  # the capture's batches follow from it and the data; a resume keeps them
    engine: str
    format_version: int = FORMAT_VERSION

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        path = folder / "manifest.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StoreError(
                "there is no feature store here", where=str(path), fix="make one with `specforge prepare-hidden`"
            ) from error
        if not isinstance(raw, dict):
            raise StoreError("the manifest is damaged", where=str(path), fix="capture again")
        if raw.get("format_version") != FORMAT_VERSION:
            raise StoreError(
                f"the store has format {raw.get('format_version')}, this version reads format {FORMAT_VERSION}",
                where=str(path),
                fix="capture again with `specforge prepare-hidden --output` another folder",
            )
        try:
            return cls(**(raw | {"aux_layers": tuple(raw["aux_layers"])}))
        except (KeyError, TypeError) as error:
            raise StoreError(f"the manifest is damaged: {error}", where=str(path), fix="capture again") from error

    def differences(self, other: Manifest, but: Sequence[str] = ()) -> list[str]:
        free = {"target", "tokens_per_batch", *but}
        mine, theirs = asdict(self), asdict(other)
        return [name for name in mine if name not in free and mine[name] != theirs[name]]


class StoreWriter:
    """One writer of a store (one a rank). `add` records in any order; `close` commits the last shard.

    Opening a store again goes on with it: `committed` holds the sample ids that need no work. Raises StoreError where
    the folder holds something else, naming the field."""

    def __init__(self, folder: Path, manifest: Manifest, writer: int = 0, shard_bytes: int = 1 << 30) -> None:
        self.folder, self.writer, self._shard_bytes = folder, writer, shard_bytes
        found = existing(folder, manifest)
        if found is None:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "manifest.json", asdict(manifest))
        self.manifest = found or manifest
        lines, self.committed = read_index(folder), committed_ids(folder)
        self.aside = set(aside_reasons(folder))
        self._number = sum(1 for line in lines if line["writer"] == writer)
        strays = [*folder.glob(f"*shard-{writer}-*"), *(folder.glob(".tmp*") if writer == 0 else ())]
        for stray in strays:  # what a kill left behind; .tmp*: safetensors' own
            if stray.name not in {line["file"] for line in lines}:
                stray.unlink()
        self._pending: list[dict[str, Tensor]] = []
        self._bytes = 0

    def add(self, record: FeatureRecord) -> None:
        if record.sample_id in self.committed:
            return
        codec = self.manifest.codec
        tensors = {
            "input_ids": record.token_ids.to("cpu", torch.int32).clone(),
            "loss_mask": record.loss_mask.to("cpu", torch.uint8),
            "aux": encode(codec, record.aux),
            "last": encode(codec, record.last),
            "teacher_top1": record.teacher_top1.to("cpu", torch.int32),
            "teacher_lse": record.teacher_lse.to("cpu", torch.float32),
            "sample_ids": torch.tensor([record.sample_id]),
        }
        self._pending.append(tensors)
        self._bytes += sum(tensor.nbytes for tensor in tensors.values())
        if self._bytes >= self._shard_bytes:
            self._commit()

    def set_aside(self, sample_id: int, reason: str) -> None:
        """The record will not come: it is listed in the store's folder, and the store is complete without it."""
        if sample_id not in self.aside:
            _append_line(self.folder / SET_ASIDE, json.dumps({"sample_id": sample_id, "reason": reason}))
            self.aside.add(sample_id)

    def close(self) -> None:
        if self._pending:
            self._commit()

    def _commit(self) -> None:
        while (self.folder / f"shard-{self.writer}-{self._number}.safetensors").exists():
            self._number += 1  # the same command was started twice: what the other wrote stays
        name = f"shard-{self.writer}-{self._number}.safetensors"
        pending = self._pending
        content = {key: torch.cat([record[key] for record in pending]) for key in pending[0]}
        content["offsets"] = _offsets([len(record["input_ids"]) for record in pending])
        content["teacher_offsets"] = _offsets([len(record["last"]) for record in pending])
        beside = self.folder / f".{name}.{os.getpid()}.tmp"
        try:
            save_file(content, beside)
            sync_file(beside)
            beside.rename(self.folder / name)
            sync_folder(self.folder)
            line = {
                "file": name,
                "writer": self.writer,
                "bytes": (self.folder / name).stat().st_size,
                "xxh3": _file_hash(self.folder / name),
                "records": [_describe(record) for record in pending],
            }
            _append_line(self.folder / "shards.jsonl", json.dumps(line))
        except (OSError, SafetensorError) as error:
            raise StoreError(
                f"the shard cannot be written: {error}",
                where=str(self.folder / name),
                fix="free disk space or choose another --output; the same command goes on from the last shard",
            ) from error
        self.committed.update(record["sample_id"] for record in line["records"])  # type: ignore[attr-defined]
        self._number += 1
        self._pending, self._bytes = [], 0


class Store:
    """A finished store, memory-mapped, random access by record. Opening reads the two index files only.

    Record k is the record of the k-th smallest sample id. A shard's size and checksum are verified at first touch."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, Manifest.read(folder)
        self._lines = read_index(folder)
        entries = sorted(
            (record["sample_id"], shard, at, record["tokens"])
            for shard, line in enumerate(self._lines)
            for at, record in enumerate(line["records"])
        )
        held = len({sample_id for sample_id, *_ in entries})
        due = self.manifest.num_records - len(aside_reasons(folder))
        if held != due or len(entries) != held:
            raise StoreError(
                f"the store is unfinished: {held} of {due} records",
                where=str(folder),
                fix="run the same `specforge prepare-hidden` command again; it goes on where it was",
            )
        self._places = [(shard, at) for _, shard, at, _ in entries]
        self.lengths: NDArray[np.int64] = np.array([tokens for *_, tokens in entries], dtype=np.int64)
        self._files: dict[int, tuple[Any, Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def _shard(self, number: int) -> tuple[Any, Tensor, Tensor]:
        if number not in self._files:
            line = self._lines[number]
            path = self.folder / line["file"]
            if not path.is_file() or path.stat().st_size != line["bytes"] or _file_hash(path) != line["xxh3"]:
                raise StoreError(
                    "a shard is missing or damaged",
                    where=str(path),
                    fix="remove the store and capture again, or bring the file back from a copy",
                )
            file = safe_open(path, framework="pt")
            self._files[number] = (file, file.get_tensor("offsets"), file.get_tensor("teacher_offsets"))
        return self._files[number]

    def record(self, index: int) -> FeatureRecord:
        shard, at = self._places[index]
        file, offsets, teacher_offsets = self._shard(shard)
        tokens = slice(int(offsets[at]), int(offsets[at + 1]))
        teachers = slice(int(teacher_offsets[at]), int(teacher_offsets[at + 1]))
        return FeatureRecord(
            sample_id=int(file.get_slice("sample_ids")[at : at + 1][0]),
            token_ids=file.get_slice("input_ids")[tokens],
            loss_mask=file.get_slice("loss_mask")[tokens].bool(),
            aux=file.get_slice("aux")[tokens],
            last=file.get_slice("last")[teachers],
            teacher_top1=file.get_slice("teacher_top1")[teachers],
            teacher_lse=file.get_slice("teacher_lse")[teachers],
        )

    def tokens_and_masks(self) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
        """(token_ids, loss_mask) of whole shards, for counting."""
        for number in range(len(self._lines)):
            file, *_ = self._shard(number)
            yield file.get_tensor("input_ids").numpy(), file.get_tensor("loss_mask").bool().numpy()

    @property
    def dtype(self) -> torch.dtype:
        return CODECS[self.manifest.codec]

    def bytes(self) -> int:
        return sum(int(line["bytes"]) for line in self._lines)


def existing(folder: Path, manifest: Manifest) -> Manifest | None:
    """The manifest of the store in `folder`, None where the folder is new or empty. Writes nothing. Raises StoreError
    where it holds something else, or a store made from something else, naming the field."""
    if not (folder / "manifest.json").exists():
        if folder.exists() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise StoreError(
                "the output folder is not empty and holds no feature store",
                where=str(folder),
                fix="choose another folder with --output",
            )
        return None
    found = Manifest.read(folder)
    different = found.differences(manifest)
    if different:
        name = different[0]
        raise StoreError(
            f"the store in the output folder was made with another {name}: "
            f"{getattr(found, name)}, now {getattr(manifest, name)}",
            where=f"{folder}/manifest.json, '{name}'",
            fix="choose another folder with --output, or remove this one",
        )
    return found


def committed_ids(folder: Path) -> set[int]:
    return {record["sample_id"] for line in read_index(folder) for record in line["records"]}


def aside_reasons(folder: Path) -> dict[int, str]:
    """{sample id: reason} of the records that could not be captured. Without the file a resume tries them again."""
    path = folder / SET_ASIDE
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return {entry["sample_id"]: entry["reason"] for entry in found}


def read_index(folder: Path) -> list[dict[str, Any]]:
    """The commit lines. A last line that a kill cut short was never committed; it is ignored."""
    path = folder / "shards.jsonl"
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []:
        if text.endswith("\n"):
            try:
                lines.append(json.loads(text))
            except ValueError as error:
                raise StoreError("the index is damaged", where=str(path), fix="remove the store") from error
    return lines


def check_space(folder: Path, needed: int) -> None:
    """Raises StoreError where the disk cannot hold `needed` more bytes."""
    place = next(parent for parent in [folder, *folder.resolve().parents] if parent.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise StoreError(
            f"the features need {needed / 1e9:,.1f} GB, the disk has {free / 1e9:,.1f} GB free",
            where=str(folder),
            fix="choose another --output, fewer --num-samples, or `specforge train --online`, which needs no disk",
        )


def _offsets(counts: Sequence[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


def _describe(record: dict[str, Tensor]) -> dict[str, Any]:
    digest = xxhash.xxh3_64()
    for key in sorted(record):
        digest.update(record[key].reshape(-1).view(torch.uint8).numpy().tobytes())
    return {
        "sample_id": int(record["sample_ids"][0]),
        "tokens": len(record["input_ids"]),
        "supervised": int(record["loss_mask"].sum()),
        "xxh3": digest.hexdigest(),
    }


def _file_hash(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _append_line(path: Path, line: str) -> None:
    """Append and fsync under a lock: several writers share the index. A part line left by a kill is cut off first."""
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(max(0, end - 1))
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)
