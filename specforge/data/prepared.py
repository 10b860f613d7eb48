"""A prepared data folder: train.jsonl and test.jsonl of exact tokens, and a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from specforge.alignment import prediction_depth
from specforge.data.formats import ReadReport, is_text, read_rows, to_conversation
from specforge.data.tokenize import ChatTokenizer, require_supervised
from specforge.errors import DataError
from specforge.records import Conversation, Example

HOLD_OUT_EVERY = 20


def example_row(example: Example, conversation: Conversation) -> dict[str, Any]:
    return {
        "id": conversation.id,
        "input_ids": example.token_ids.tolist(),
        "loss_mask": example.loss_mask.astype(int).tolist(),
    }


def tokenize(
    conversations: Sequence[Conversation], tokenizer: ChatTokenizer, max_length: int, report: ReadReport
) -> list[tuple[Example, Conversation]]:
    pairs = list[tuple[Example, Conversation]]()
    for conversation in conversations:
        example = predictable(tokenizer.example(conversation, len(pairs), max_length))
        if isinstance(example, str):
            report.drop(example)
        else:
            pairs.append((example, conversation))
    return pairs


def load_examples(path: Path, tokenizer: ChatTokenizer, max_length: int, limit: int | None = None) -> list[Example]:
    """Examples of a JSONL file whose rows are tokens with masks, preformatted text, or conversations."""
    report, examples = ReadReport(), list[Example]()
    for row in read_rows(path, report):
        if limit is not None and len(examples) == limit:
            break
        example = predictable(_to_example(row, tokenizer, len(examples), max_length, str(report.rows)))
        if isinstance(example, str):
            report.drop(example)
        else:
            examples.append(example)
    if not examples:
        raise DataError(
            f"no usable conversation among {report.rows} rows ({report.dropped})",
            where=str(path),
            fix="each row needs an assistant turn: make the file with `specforge prepare-data`",
        )
    require_supervised(examples, str(path))
    return examples


def _to_example(
    row: dict[str, Any], tokenizer: ChatTokenizer, sample_id: int, max_length: int, default_id: str
) -> Example | str:
    if "input_ids" in row:
        ids, mask = row["input_ids"], row.get("loss_mask")
        if not isinstance(ids, list) or not isinstance(mask, list) or len(mask) != len(ids) or not ids:
            return "input_ids without a loss_mask of the same length"
        if any(type(token) is not int for token in ids) or any(type(m) not in (int, bool) for m in mask):
            return "input_ids or loss_mask that are no numbers"
        if min(ids) < 0 or max(ids) >= len(tokenizer.tokenizer):
            return "input_ids outside the target's vocabulary"
        mask_T = np.asarray(mask[:max_length], dtype=np.bool_)
        return Example(sample_id=sample_id, token_ids=np.asarray(ids[:max_length], dtype=np.int32), loss_mask=mask_T)
    if is_text(row.get("text")):
        return tokenizer.preformatted(row["text"], sample_id, max_length)
    conversation = to_conversation(row, default_id)
    return conversation if isinstance(conversation, str) else tokenizer.example(conversation, sample_id, max_length)


def predictable(example: Example | str) -> Example | str:
    """The example, or a reason where its mask leaves a draft nothing to predict: no two assistant tokens in a row."""
    if isinstance(example, Example) and not prediction_depth(example.loss_mask).any():
        return "the loss mask leaves nothing to predict within the maximum length"
    return example


def load_splits(
    path: Path, tokenizer: ChatTokenizer, max_length: int, limit: int | None = None, test: Path | None = None
) -> dict[str, list[Example]]:
    """{"train": ..., "test": ...} of a prepared folder, or of two files. Of a single file, every 20th is held out."""
    if path.is_dir() or test is not None:
        files = {"train": path, "test": test} if test else {name: path / f"{name}.jsonl" for name in ("train", "test")}
        return {name: load_examples(file, tokenizer, max_length, limit) for name, file in files.items() if file}
    examples = load_examples(path, tokenizer, max_length, limit)
    held_out = range(min(HOLD_OUT_EVERY, len(examples)) - 1, len(examples), HOLD_OUT_EVERY)
    train = [example for at, example in enumerate(examples) if at not in held_out]
    if not train:
        raise DataError(
            "one conversation is too little: one must be held out", where=str(path), fix="give at least two"
        )
    return {"train": train, "test": [examples[at] for at in held_out]}


def data_hash(examples: Sequence[Example]) -> str:
    """Of all tokens and masks in order: what a store or run was made from."""
    digest = xxhash.xxh3_128()
    for example in examples:
        digest.update(np.int64(len(example.token_ids)).tobytes())
        digest.update(example.token_ids.tobytes())
        digest.update(example.loss_mask.tobytes())
    return digest.hexdigest()
