"""Any number of rows to train.jsonl and test.jsonl, in memory that does not grow with the text.

    scan      every source is read once; usable rows go to a spool file, of each only hashes and its place are kept
    held_out  the held-out rows' shingles become an index on disk
    convert   the spool, row by row in order: near-duplicates out, tokens and masks made, by one process or many

The result does not depend on the number of processes."""

from __future__ import annotations

import multiprocessing
import os
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from specforge.config import PrepareDataSettings
from specforge.data import split, vocab
from specforge.data.formats import OTHER_PARTS, Entry, ReadReport, as_line, labels, lacking, parse, read_rows, to_row
from specforge.data.lines import parsed
from specforge.data.sources import Source
from specforge.data.tokenize import ChatTokenizer
from specforge.errors import DataError
from specforge.records import Conversation

CHUNK_ROWS = 256
WORTH_A_WORKER = 5000  # rows: for fewer, starting a process takes longer than the work
LENGTH_BUCKETS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)  # upper ends, tokens


@dataclass(frozen=True, slots=True)
class Spool:
    """The usable rows in a file, and what is known of each."""

    file: BinaryIO
    offset_n: NDArray[np.int64]  # n + 1 offsets
    prompt_n: NDArray[np.uint64]

    def rows(self, which: NDArray[np.int64]) -> Iterator[bytes]:
        for at in which:
            first, last = int(self.offset_n[at]), int(self.offset_n[at + 1])
            yield os.pread(self.file.fileno(), last - first, first)


def scan(
    sources: Sequence[Source],
    file: BinaryIO,
    settings: PrepareDataSettings,
    report: ReadReport,
    told: Callable[[int], None],
) -> Spool:
    """Write the usable rows of all sources to `file`. `told` hears now and then how many bytes more it holds."""
    offsets, prompts, seen = array("q", [0]), array("Q"), set[int]()
    read = said = 0
    for source in sources:
        for path in source.files:
            for number, row in read_rows(path, report, settings.max_bad_rows):
                read += 1
                place = f"{path.name}:{number}"
                entry = usable(row, source.name, place, settings, report)
                if entry is None:
                    continue
                content = split.content_hash(entry)
                if content in seen:
                    report.drop("exact duplicate", place)
                elif (content & (2**64 - 1)) >= source.weight * 2**64:
                    report.drop(f"left out by the weight of {source.name}")
                else:
                    seen.add(content)
                    file.write(as_line(to_row(entry)))
                    offsets.append(file.tell())
                    prompts.append(split.prompt_hash(entry, settings.seed))
                if read % CHUNK_ROWS == 0:
                    told(file.tell() - said)
                    said = file.tell()
    file.flush()
    return Spool(file, np.array(offsets, dtype=np.int64), np.array(prompts, dtype=np.uint64))


def usable(
    row: dict[str, object], source: str, place: str, settings: PrepareDataSettings, report: ReadReport
) -> Entry | None:
    """The entry of a row; None, and counted with its place, where it is none that anything could be learned from."""
    found = parse(row, f"{source}-{report.rows}", settings.is_preformatted, source)
    if isinstance(found, str):
        (report.drop if found == OTHER_PARTS else report.drop_bad)(found, place)
        return None
    form, entry = found
    if isinstance(entry, Conversation):
        named = source in ("ultrachat", "sharegpt")
        least = settings.min_exchanges or (2 if named else 1)
        answers = sum(message.role == "assistant" for message in entry.messages)
        reason = lacking(entry) or (f"fewer than {least} exchanges" if answers < least else None)
        if reason:
            report.drop(reason, place)
            return None
    report.formats[form] += 1
    return entry


def sides(
    spool: Spool, sources: Sequence[Source], settings: PrepareDataSettings, report: ReadReport
) -> dict[str, NDArray[np.int64]]:
    """{"train", "test"}: rows of the spool in the order in which they are written: as read, or of several sources
    mixed."""
    rows = np.arange(len(spool.prompt_n))
    if len(sources) > 1:
        rows = np.random.default_rng(settings.seed).permutation(rows)
    test_n = split.held_out(spool.prompt_n, settings.test_share)
    found = {"train": rows[~test_n[rows]], "test": rows[test_n[rows]]}
    if not all(len(side) for side in found.values()):
        raise DataError(
            f"of {report.rows:,} rows {len(rows):,} are left, too few to hold a prompt out: {listed(report)}",
            where=", ".join(source.origin for source in sources),
            fix="give at least two different prompts",
        )
    return found


def shingles_of(row: bytes, settings: PrepareDataSettings) -> NDArray[np.uint64]:
    found = parse(parsed(row), "", settings.is_preformatted)
    assert not isinstance(found, str), found  # it was parsed before it was spooled
    return split.shingles(found[1])


def listed(report: ReadReport) -> str:
    """The dropped rows by reason, each with the place of the first, for a person."""
    named = [
        f"{rows:,} {reason}" + (f" (first: {report.where[reason][0]})" if report.where[reason] else "")
        for reason, rows in report.dropped.most_common()
    ]
    return "; ".join(named) or "none"


@dataclass
class Part:
    """What became of some rows: their lines, and what is counted over them."""

    rows: int = 0  # before any of them was dropped
    lines: bytes = b""
    report: ReadReport = field(default_factory=ReadReport)
    conversations: int = 0
    tokens: int = 0
    supervised: int = 0
    prepared: int = 0  # rows of tokens; a conversation becomes several if the template rewrites earlier turns
    more: Counter[str] = field(default_factory=Counter)  # of them, those behind a conversation's first, by reason
    left_out: Counter[str] = field(default_factory=Counter)  # turns that are not supervised, by reason
    lengths: Counter[int] = field(default_factory=Counter)  # bucket -> rows
    counts_V: dict[str, NDArray[np.int64]] = field(default_factory=dict)  # source -> supervised tokens

    def add(self, other: Part) -> None:
        self.report.add(other.report)
        self.conversations += other.conversations
        self.tokens += other.tokens
        self.supervised += other.supervised
        self.prepared += other.prepared
        self.more += other.more
        self.left_out += other.left_out
        self.lengths += other.lengths
        for source, counts_V in other.counts_V.items():
            self.counts_V[source] = self.counts_V.get(source, 0) + counts_V


@dataclass(frozen=True)
class Converter:
    """Rows of the spool to lines of a prepared file."""

    settings: PrepareDataSettings
    index: split.HeldOutIndex
    tokenizer: ChatTokenizer | None

    def __call__(self, side: str, spooled: Sequence[bytes]) -> Part:
        part, entries = Part(rows=len(spooled)), list[Entry]()
        for row in spooled:
            found = parse(parsed(row), "", self.settings.is_preformatted)
            assert not isinstance(found, str), found  # it was parsed before it was spooled
            if side == "train" and self.index.leaks(split.shingles(found[1])):
                part.report.drop("near-duplicate of a held-out conversation", found[1].id)
            else:
                entries.append(found[1])
        if self.tokenizer is None:
            part.lines = b"".join(as_line(to_row(entry)) for entry in entries)
            part.conversations = part.prepared = len(entries)
            return part
        written, vocab_size = [], self.tokenizer.size
        masked_by_source: dict[str, list[tuple[NDArray[np.int32], NDArray[np.bool_]]]] = {}
        for entry, rows in zip(entries, self.tokenizer.examples(entries, self.settings), strict=True):
            if isinstance(rows, str):
                part.report.drop(rows, entry.id)
                continue
            part.conversations += 1
            part.more += rows.more
            part.left_out += rows.left_out
            for number, (ids_T, mask_T) in enumerate(rows.masked):
                own = labels(entry) | ({"id": f"{entry.id}#{number + 1}"} if number else {})
                written.append(as_line(own | {"input_ids": ids_T, "loss_mask": mask_T.astype(np.uint8)}))
                part.tokens += len(ids_T)
                part.supervised += int(mask_T.sum())
                part.lengths[next((b for b in LENGTH_BUCKETS if len(ids_T) <= b), 1 << 30)] += 1
            masked_by_source.setdefault(entry.source, []).extend(rows.masked)
        part.lines, part.prepared = b"".join(written), len(written)
        part.counts_V = {name: vocab.count_supervised(found, vocab_size) for name, found in masked_by_source.items()}
        return part


_converter: Converter  # of a worker process


def _start_worker(settings: PrepareDataSettings, index: Path) -> None:
    global _converter
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _converter = Converter(settings, split.HeldOutIndex.load(index), tokenizer_of(settings))


def _work(side: str, rows: Sequence[bytes]) -> Part:
    return _converter(side, rows)


def tokenizer_of(settings: PrepareDataSettings) -> ChatTokenizer | None:
    if settings.model_path is None:
        return None
    return ChatTokenizer(settings.model_path, settings.chat_template, settings.trust_remote_code)


@contextmanager
def converting(
    settings: PrepareDataSettings, index: Path, tokenizer: ChatTokenizer | None, workers: int
) -> Iterator[Pool]:
    if workers == 1:
        yield Pool(None, Converter(settings, split.HeldOutIndex.load(index), tokenizer), workers)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (settings, index)) as executor:
        yield Pool(executor, None, workers)


@dataclass(frozen=True)
class Pool:
    """Converts chunk after chunk, by other processes or by this one; the parts come in order."""

    executor: ProcessPoolExecutor | None
    here: Converter | None
    workers: int

    def parts(self, side: str, rows: Iterator[bytes]) -> Iterator[Part]:
        waiting = deque[Future[Part]]()
        for chunk in _chunks(rows):
            if self.executor is None:
                assert self.here is not None
                yield self.here(side, chunk)
                continue
            waiting.append(self.executor.submit(_work, side, chunk))
            if len(waiting) > 2 * self.workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _chunks(rows: Iterator[bytes]) -> Iterator[list[bytes]]:
    chunk = list[bytes]()
    for row in rows:
        chunk.append(row)
        if len(chunk) == CHUNK_ROWS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
