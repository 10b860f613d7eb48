"""A shard: a safetensors file of whole records, without padding.

    offset 0       8 bytes, then JSON with spaces after it: safetensors' header, HEAD bytes in all
    offset HEAD    states         the records' encoded states, one after the other; up to 7 zero bytes fill the last 8
                   input_ids      int32    tokens of all records, one record after the other
                   teacher_top1   int32    teacher rows, likewise
                   teacher_lse    float32  teacher rows
                   loss_mask      uint8    tokens

Where a record begins follows from the counts in the shard's line (index.py). The checksum there covers all but the
states; a record's own checksum covers its part of each tensor, in this order. So tokens can be read and checked
without touching states, and one record without touching the others.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
from pathlib import Path

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from specforge.errors import StoreError
from specforge.features.codec import CODECS, Codec, decode, decompress, state_bytes
from specforge.features.index import RecordLine, ShardLine
from specforge.files import sync_folder
from specforge.records import FeatureRecord, sent

HEAD = 4096  # states begin on a page; room for the header of the largest shard
WRITE_BEHIND = 8 << 20  # bytes of a shard
DTYPES = {"input_ids": "I32", "teacher_top1": "I32", "teacher_lse": "F32", "loss_mask": "U8"}
DAMAGE = (
    "bring the file back from a copy; or delete its line from shards.jsonl: the same `specforge prepare-hidden` "
    "command then captures its records anew"
)


LOOKED_AT = 8  # records of a shard, at each start of a writer


class OpenShard:
    """A shard that is being written, under a name that no reader looks at. Records go to the disk as they come."""

    def __init__(self, folder: Path, writer: int, number: int) -> None:
        self.path = folder / f"shard-{writer}-{number}.safetensors"
        self._writer = writer
        self._beside = folder / f".{self.path.name}.tmp"
        self._file = self._beside.open("wb")
        self._file.seek(HEAD)
        self._records: list[RecordLine] = []
        self._small: dict[str, list[bytes]] = {name: [] for name in DTYPES}
        self.bytes = 0  # of its records
        self._begun = HEAD  # up to here the disk has been told to begin

    def append(
        self, sample_id: int, tokens: int, teachers: int, states: NDArray[np.uint8], small: dict[str, NDArray[np.uint8]]
    ) -> None:
        """A record: its encoded states, and the bytes of its part of each of the small tensors."""
        self._file.write(states.data)
        digest = xxhash.xxh3_64(states.data)
        for name in DTYPES:
            self._small[name].append(small[name].tobytes())  # a copy: what is given may be memory that is lent
            digest.update(self._small[name][-1])
        self._records.append(
            RecordLine(
                sample_id=sample_id,
                tokens=tokens,
                teachers=teachers,
                supervised=int(small["loss_mask"].sum()),
                bytes=states.nbytes,
                xxh3=digest.hexdigest(),
            )
        )
        self.bytes += states.nbytes + sum(part.nbytes for part in small.values())
        if self._file.tell() - self._begun >= WRITE_BEHIND:
            self._begin_writing()

    def _begin_writing(self) -> None:
        """Lets the disk begin with what is new, so that the fsync at the end need not wait for the whole shard. The
        advice makes Linux do so without waiting; it drops only pages that are on the disk already: none of these."""
        self._file.flush()
        stop = self._file.tell()
        with contextlib.suppress(AttributeError, OSError):  # not known to this system, or to its file system
            os.posix_fadvise(self._file.fileno(), self._begun, stop - self._begun, os.POSIX_FADV_DONTNEED)
        self._begun = stop

    def finish(self) -> ShardLine:
        """Complete the file, make it last, and give it its name. It counts once its line is in the index."""
        states = sum(record["bytes"] for record in self._records)
        filling = bytes(-states % 8)
        tail = {name: b"".join(parts) for name, parts in self._small.items()}
        head = _header(states + len(filling), {name: len(content) for name, content in tail.items()})
        digest = xxhash.xxh3_64(head)
        for content in (filling, *tail.values()):
            self._file.write(content)
            digest.update(content)
        self._file.seek(0)
        self._file.write(head)
        self._file.flush()
        os.fsync(self._file.fileno())
        size = os.fstat(self._file.fileno()).st_size
        self._file.close()
        self._beside.rename(self.path)
        sync_folder(self.path.parent)
        return ShardLine(
            file=self.path.name, writer=self._writer, bytes=size, xxh3=digest.hexdigest(), records=self._records
        )

    def discard(self) -> None:
        """Give the space back after a failed write."""
        self._beside.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it would write what it still holds
            self._file.close()


class Shard:
    """A committed shard, memory-mapped. Raises StoreError where it is missing, or not as long as its line says."""

    def __init__(self, folder: Path, line: ShardLine, hidden_size: int) -> None:
        self.path, self._line, self._hidden_size = folder / line["file"], line, hidden_size
        size = self.path.stat().st_size if self.path.is_file() else None
        if size != line["bytes"]:
            what = "is missing" if size is None else f"has {size:,} bytes, not the {line['bytes']:,} of its line"
            raise StoreError(f"a shard {what}", where=str(self.path), fix=DAMAGE)
        self._mapped = torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8)
        counts = np.array([[r["bytes"], r["tokens"], r["teachers"]] for r in line["records"]], dtype=np.int64)
        self._starts = np.concatenate([np.zeros((1, 3), np.int64), counts.cumsum(axis=0)])  # [records + 1, 3]
        states, tokens, teachers = self._starts[-1].tolist()
        self._tail = HEAD + states
        sizes = {"input_ids": tokens * 4, "teacher_top1": teachers * 4, "teacher_lse": teachers * 4}
        first = self._tail + -states % 8
        self._first = {name: first + sum(list(sizes.values())[:at]) for at, name in enumerate(DTYPES)}
        if first + sum(sizes.values()) + tokens != size:
            raise StoreError("a shard is not what its line says", where=str(self.path), fix=DAMAGE)

    def whole(self) -> bool:
        """Whether all but the states is as it was written."""
        digest = xxhash.xxh3_64(self._mapped[:HEAD].numpy().data)
        digest.update(self._mapped[self._tail :].numpy().data)
        return bool(digest.hexdigest() == self._line["xxh3"])

    def intact(self, at: int) -> bool:
        """Whether the record is as it was written."""
        digest = xxhash.xxh3_64(self._states(at).numpy().data)
        for name in DTYPES:
            digest.update(self._part(name, at, at + 1).view(torch.uint8).numpy().data)
        return bool(digest.hexdigest() == self._line["records"][at]["xxh3"])

    def record(self, at: int, codec: Codec, device: torch.device) -> FeatureRecord:
        line = self._line["records"][at]
        tokens, teachers = line["tokens"], line["teachers"]
        stored = self._states(at)
        size = state_bytes(codec, tokens, teachers, self._hidden_size)
        if codec.zstd:
            stored = torch.from_numpy(decompress(codec, stored.numpy(), size))
        if len(stored) != size:
            raise ValueError("the states are not as long as the record")
        aux_TA, last_SH = decode(codec, sent(stored, device), tokens, teachers, self._hidden_size)
        return FeatureRecord(
            sample_id=line["sample_id"],
            token_ids=self._part("input_ids", at, at + 1),
            loss_mask=self._part("loss_mask", at, at + 1).bool(),
            aux=aux_TA,
            last=last_SH,
            teacher_top1=self._part("teacher_top1", at, at + 1),
            teacher_lse=self._part("teacher_lse", at, at + 1),
        )

    def tokens_and_mask(self) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Of all records, one after the other."""
        count = len(self._line["records"])
        return self._part("input_ids", 0, count).numpy(), self._part("loss_mask", 0, count).bool().numpy()

    def _states(self, at: int) -> Tensor:
        return self._mapped[HEAD + int(self._starts[at, 0]) : HEAD + int(self._starts[at + 1, 0])]

    def _part(self, name: str, start: int, stop: int) -> Tensor:
        """Of a small tensor, what belongs to records start .. stop - 1."""
        column = 2 if name.startswith("teacher") else 1
        dtype = {"I32": torch.int32, "F32": torch.float32, "U8": torch.uint8}[DTYPES[name]]
        first, last = (int(self._starts[at, column]) * dtype.itemsize for at in (start, stop))
        return self._mapped[self._first[name] + first : self._first[name] + last].view(dtype)


def damage(folder: Path, line: ShardLine, hidden_size: int) -> list[str]:
    """What is wrong with a committed shard, a line for each damaged record; empty where it is as it was written."""
    try:
        shard = Shard(folder, line, hidden_size)
    except StoreError as error:
        return [f"{line['file']}: {error.what}"]
    bad = [at for at in range(len(line["records"])) if not shard.intact(at)]
    found = [f"{line['file']}, record {at} (sample {line['records'][at]['sample_id']}): damaged" for at in bad]
    if not found and not shard.whole():
        found = [f"{line['file']}: damaged outside its records"]
    return found


def quick_damage(folder: Path, line: ShardLine, hidden_size: int) -> str | None:
    """The same for a look at each start: existence, size, all but the states, and a few records. None: not seen."""
    try:
        shard = Shard(folder, line, hidden_size)
    except StoreError as error:
        return error.what
    sample = random.sample(range(len(line["records"])), k=min(LOOKED_AT, len(line["records"])))
    return None if shard.whole() and all(map(shard.intact, sample)) else "a shard is not as it was written"


def record_bytes(codec: str, hidden_size: int, tokens: int, teachers: int) -> int:
    """The most that a record takes on the disk, its part of the index included."""
    states = state_bytes(CODECS[codec], tokens, teachers, hidden_size)
    if CODECS[codec].zstd:
        states += (states >> 8) + 64  # zstd's own bound for what cannot be compressed
    return states + 5 * tokens + 8 * teachers + 200


def _header(states: int, small: dict[str, int]) -> bytes:
    """safetensors' header for the tensors in the order of the file, filled up to HEAD bytes with spaces."""
    content, at = {}, 0
    for name, size in {"states": states, **small}.items():
        dtype = DTYPES.get(name, "U8")
        shape = [size // (1 if dtype == "U8" else 4)]
        content[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return (HEAD - 8).to_bytes(8, "little") + json.dumps(content).encode().ljust(HEAD - 8)
