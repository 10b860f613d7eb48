"""A prepared data folder, or any file of rows, to Examples."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import xxhash

from specforge.config import DataSettings
from specforge.data.formats import Entry, ReadReport, parse, read_rows
from specforge.data.tokenize import ChatTokenizer
from specforge.errors import DataError
from specforge.records import Example

HOLD_OUT_EVERY = 20
CHUNK_ROWS = 256


def load_examples(
    path: Path, tokenizer: ChatTokenizer, settings: DataSettings, limit: int | None = None
) -> list[Example]:
    """Examples of a file whose rows are tokens with masks, preformatted text, or conversations."""
    report, examples = ReadReport(), list[Example]()
    rows = read_rows(path, report)
    while chunk := list(islice(rows, CHUNK_ROWS)):
        entries = list[Entry]()
        for number, row in chunk:
            found = parse(row, f"{path.stem}-{number}", settings.is_preformatted)
            if isinstance(found, str):
                report.drop(found, f"{path.name}:{number}")
            else:
                entries.append(found[1])
        for entry, rows_or_reason in zip(entries, tokenizer.examples(entries, settings), strict=True):
            if isinstance(rows_or_reason, str):
                report.drop(rows_or_reason, entry.id)
                continue
            for ids_T, mask_T in rows_or_reason.masked:
                domain, place = entry.domain or entry.source, len(examples)
                examples.append(Example(sample_id=place, token_ids=ids_T, loss_mask=mask_T, domain=domain))
        del examples[len(examples) if limit is None else limit :]
        if limit is not None and len(examples) == limit:
            break
    if not examples:
        raise DataError(
            f"no usable conversation among {report.rows} rows ({dict(report.dropped)})",
            where=str(path),
            fix="see what the mask makes of them: `specforge prepare-data --dataset FILE --show-mask 3`",
        )
    return examples


def load_splits(
    path: Path,
    tokenizer: ChatTokenizer,
    settings: DataSettings,
    limit: int | None = None,
    test: Path | None = None,
) -> dict[str, list[Example]]:
    """{"train": ..., "test": ...} of a prepared folder, or of two files. Of a single file, every 20th is held out."""
    if path.is_dir() or test is not None:
        files = {"train": path, "test": test} if test else {name: path / f"{name}.jsonl" for name in ("train", "test")}
        return {name: load_examples(file, tokenizer, settings, limit) for name, file in files.items() if file}
    examples = load_examples(path, tokenizer, settings, limit)
    held_out = range(min(HOLD_OUT_EVERY, len(examples)) - 1, len(examples), HOLD_OUT_EVERY)
    train = [example for at, example in enumerate(examples) if at not in held_out]
    if not train:
        raise DataError(
            "one conversation is too little: one must be held out", where=str(path), fix="give at least two"
        )
    return {"train": train, "test": [examples[at] for at in held_out]}


def load_held_out(path: Path, tokenizer: ChatTokenizer, settings: DataSettings) -> list[Example]:
    """The "test" of `load_splits`; of a folder nothing else is read."""
    if path.is_dir():
        return load_examples(path / "test.jsonl", tokenizer, settings)
    return load_splits(path, tokenizer, settings)["test"]


def data_hash(examples: Sequence[Example]) -> str:
    """Of all tokens and masks in order: what a store or run was made from."""
    digest = xxhash.xxh3_128()
    for example in examples:
        digest.update(np.int64(len(example.token_ids)).tobytes())
        digest.update(example.token_ids.tobytes())
        digest.update(example.loss_mask.tobytes())
    return digest.hexdigest()
