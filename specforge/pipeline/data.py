"""Conversations in, exact tokens and masks out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from specforge.config import PrepareDataSettings
from specforge.console import say
from specforge.data import formats, prepared
from specforge.data import split as splitting
from specforge.data.tokenize import ChatTokenizer, require_supervised
from specforge.errors import ConfigError, DataError
from specforge.files import replacing, write_json
from specforge.pipeline.shared import refuse_foreign


def prepare_data(settings: PrepareDataSettings) -> int | None:
    refuse_foreign(settings.output, "report.json")
    if Path(settings.dataset).resolve().parent == settings.output.resolve():
        raise ConfigError(
            "the data set lies in the output folder and could be written over",
            where=f"--dataset {settings.dataset}, --output {settings.output}",
            fix="choose another folder",
        )
    tokenizer = None
    if settings.model_path:
        tokenizer = ChatTokenizer(settings.model_path, settings.chat_template, settings.trust_remote_code)
    report = formats.ReadReport()
    read = formats.read_conversations(Path(settings.dataset), report)
    unique = splitting.without_exact_duplicates(read)
    train, test = splitting.split(unique, settings.test_share, settings.seed)
    if not (train and test):
        raise DataError(
            "one prompt is too little: one must be held out", where=settings.dataset, fix="give at least two prompts"
        )
    clean = splitting.without_leaks(train, test)
    report.dropped["exact duplicate"] = len(read) - len(unique)
    report.dropped["near-duplicate of a held-out conversation"] = len(train) - len(clean)
    content: dict[str, Any] = {}
    ready: dict[str, list[dict[str, Any]]] = {}
    for name, conversations in (("train", clean), ("test", test)):
        if tokenizer is None:
            ready[name] = [formats.to_row(conversation) for conversation in conversations]
            content[name] = {"conversations": len(conversations)}
            continue
        pairs = prepared.tokenize(conversations, tokenizer, settings.max_length, report)
        require_supervised([example for example, _ in pairs], settings.dataset)
        ready[name] = [prepared.example_row(example, conversation) for example, conversation in pairs]
        tokens = sum(len(example.token_ids) for example, _ in pairs)
        supervised = sum(int(example.loss_mask.sum()) for example, _ in pairs)
        content[name] = {"conversations": len(pairs), "tokens": tokens, "supervised_tokens": supervised}
    content |= {
        "rows": report.rows,
        "dropped": report.dropped,
        "broken_lines": report.broken_lines,
        "tokenizer_hash": tokenizer.fingerprint if tokenizer else None,
        "template_hash": tokenizer.template_fingerprint if tokenizer else None,
        "settings": settings.model_dump(mode="json"),
    }
    write_json(settings.output / "report.json", content)
    for name, rows in ready.items():  # the report comes first: it says whose folder this is
        with replacing(settings.output / f"{name}.jsonl") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    for name in ("train", "test"):
        say(f"{name:>5}: " + ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in content[name].items()))
    dropped = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items() if count)
    say(f"of {report.rows:,} rows; dropped: {dropped or 'none'}")
    say(f"next: specforge prepare-hidden --model-path {settings.model_path or 'TARGET'} --data {settings.output}")
    return None
