"""Writing a store. A shard is written under a temporary name, fsynced, renamed, and then committed by a line in the
index. What is not committed does not exist; what is committed is never written again."""

from __future__ import annotations

import errno
import threading
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType

import numpy as np

from specforge.console import say
from specforge.errors import StoreError
from specforge.features.codec import CODECS, compress
from specforge.features.index import DISK_BLOCK, Manifest, append_line, existing, give_up, lock, read_index
from specforge.features.shard import HEAD, OpenShard, quick_damage
from specforge.features.staging import Staged, Staging
from specforge.records import FeatureRecord

SHARD_BYTES = 1 << 30
SHARD_OWN = HEAD + 2 * DISK_BLOCK  # of a shard, besides its records: header, rest of its last block, line
FOLDER_OWN = 8 * DISK_BLOCK  # folder, manifest, locks
RING_BYTES = 1 << 29  # two passes of 8,192 tokens of an 8B target in bf16


class StoreWriter:
    """One writer of a store (one a rank). `add` records in any order; `close` commits the last shard.

    Writer 0 must be opened before the run's others: it locks the folder, makes the manifest, and clears away what a
    kill left behind. Opening a store again goes on with it: `committed` holds the sample ids that need no work. Raises
    StoreError where the folder holds something else, naming the field, or where another run writes to it.

    Records are written by a thread of its own. After a failed write every call raises the StoreError that names file
    and errno; what was committed before stays."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        writer: int = 0,
        shard_bytes: int = SHARD_BYTES,
        ring_bytes: int = RING_BYTES,
    ) -> None:
        self.folder, self.writer, self._shard_bytes, self._ring_bytes = folder, writer, shard_bytes, ring_bytes
        existing(folder, manifest)  # refused before anything is written
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock(folder, writer)
        found = existing(folder, manifest)
        if found is None:
            assert writer == 0, "writer 0 comes first"
            manifest.write(folder)
        self.manifest = found or manifest
        if writer == 0:
            _drop_damaged(folder, self.manifest.hidden_size)
        lines = read_index(folder)
        if writer == 0:
            _clear(folder, {line["file"] for line in lines})
        self.committed = {record["sample_id"] for line in lines for record in line["records"]}
        self._taken = set(self.committed)
        names = [line["file"] for line in lines if line["writer"] == writer]
        self._number = 1 + max((int(name.removesuffix(".safetensors").split("-")[2]) for name in names), default=-1)
        self._codec = CODECS[self.manifest.codec]
        self._shard: OpenShard | None = None
        self._staging: Staging | None = None  # made for the device of the first record
        self._queue: SimpleQueue[Staged | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def add(self, record: FeatureRecord) -> None:
        """Returns as soon as the record is on its way to host memory; its tensors must not be written over. Waits
        where the disk is behind by more than `ring_bytes`."""
        self.check()
        if record.sample_id in self._taken:
            return
        self._taken.add(record.sample_id)
        if self._staging is None:
            self._staging = Staging(self._codec, record.aux.device, self._ring_bytes)
            self._thread = threading.Thread(target=self._write_staged, name=f"store-writer-{self.writer}", daemon=True)
            self._thread.start()
        self._queue.put(self._staging.put(record))

    def check(self) -> None:
        """Raises what went wrong since."""
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Commit what was added, and give the store free."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        self._lock.close()
        self.check()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """What was added is committed also where the run ends in an error; that error is the one that is told."""
        try:
            self.close()
        except Exception:
            if error is None:
                raise

    def _write_staged(self) -> None:
        """The thread. After a failure it only empties the queue, so that `add` never waits for it in vain."""
        assert self._staging is not None
        while (staged := self._queue.get()) is not None:
            if self._failure is None:
                self._guarded(staged)
            self._staging.ring.give_back()
        if self._failure is None:
            self._guarded(None)

    def _guarded(self, staged: Staged | None) -> None:
        """Write a record, or commit the open shard; what fails is kept for the caller's thread."""
        shard = self.folder / f"shard-{self.writer}-{self._number}.safetensors"
        try:
            if staged is not None:
                self._write(staged)
            if self._shard is not None and (staged is None or self._shard.bytes >= self._shard_bytes):
                self._commit(self._shard)
        except Exception as error:
            if self._shard is not None:
                self._shard.discard()
                self._shard = None
            self._failure = _explained(error, shard) if isinstance(error, OSError) else error

    def _write(self, staged: Staged) -> None:
        states, small = staged.parts()
        if self._codec.zstd:
            states = compress(self._codec, states)
        if self._shard is None:
            self._shard = OpenShard(self.folder, self.writer, self._number)
        self._shard.append(staged.sample_id, len(staged.token_ids), len(staged.teacher_top1), states, small)

    def _commit(self, shard: OpenShard) -> None:
        line = shard.finish()
        self._shard = None
        append_line(self.folder, line)
        self.committed.update(record["sample_id"] for record in line["records"])
        self._number += 1


def fitting(batch_bytes: Sequence[int], room: int, writers: int, shard_bytes: int) -> int:
    """How many of the batches, in their order, can be written into `room` bytes of disk.

    batch_bytes  sum of `shard.record_bytes` over each batch's records"""
    room -= SHARD_OWN * (writers + room // shard_bytes) + FOLDER_OWN
    return int(np.searchsorted(np.cumsum(batch_bytes, dtype=np.int64), room, side="right"))


def _drop_damaged(folder: Path, hidden_size: int) -> None:
    """Damaged shards are given up, so that their records are captured again."""
    damaged = set()
    for line in read_index(folder):
        what = quick_damage(folder, line, hidden_size)
        if what:
            damaged.add(line["file"])
            count = len(line["records"])
            say(f"[yellow]warning[/] {folder / line['file']}: {what}; its {count:,} records are captured again")
    if damaged:
        give_up(folder, damaged)


def _clear(folder: Path, committed: set[str]) -> None:
    """Remove what a kill left behind: parts of files, and shards whose line was never written."""
    for stray in [*folder.glob("shard-*.safetensors"), *folder.glob(".*.tmp")]:
        if stray.name not in committed:
            stray.unlink()


def _explained(error: OSError, shard: Path) -> StoreError:
    name = errno.errorcode.get(error.errno or 0, "no errno")
    explained = StoreError(
        f"the shard cannot be written: {error.strerror or error} ({name})",
        where=error.filename or str(shard),
        fix="free disk space or choose another --output; the same command goes on from the last committed shard",
    )
    explained.__cause__ = error
    return explained
