"""Conversations in, exact tokens and masks out."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from rich.markup import escape

from specforge.config import PrepareDataSettings
from specforge.console import advance, console, progress, say
from specforge.data import preparation, show, split, vocab
from specforge.data.formats import ReadReport, read_rows
from specforge.data.sources import Source, dataset_name, resolve
from specforge.data.tokenize import DATE, ChatTokenizer
from specforge.errors import ConfigError, DataError
from specforge.files import digest, new_folder, read_json, replacing, replacing_bytes, write_json
from specforge.pipeline.shared import refuse_foreign

MOST_WORKERS = 16
SIDES = ("train", "test")
RULES = "serving view 1"  # by which rows are made: those of other rules are made again


def prepare_data(settings: PrepareDataSettings) -> int | None:
    if settings.html and not settings.show_mask:
        raise ConfigError("--html shows masked rows", where="--html", fix="say how many: --show-mask 20")
    if settings.show_mask and not settings.model_path:
        raise ConfigError("masks need the target's template", where="--show-mask", fix="name it with --model-path")
    output = settings.output or Path("cache/dataset") / dataset_name(settings.dataset)
    refuse_foreign(output, "report.json")
    sources = resolve(settings.dataset)
    if any(path.resolve().parent == output.resolve() for source in sources for path in source.files):
        raise ConfigError(
            "the data set lies in the output folder and could be written over",
            where=f"--dataset {' '.join(settings.dataset)}, --output {output}",
            fix="choose another folder",
        )
    tokenizer = preparation.tokenizer_of(settings)
    if settings.show_mask:
        assert tokenizer is not None
        _show(settings, sources, tokenizer)
        return None
    made_from = _made_from(settings, sources, tokenizer)
    if _is_made(output, made_from):
        say(f"up to date: {output} was made from these rows with these settings")
    else:
        report, content = _prepare(settings, sources, tokenizer, output, made_from)
        _say(report, content, tokenizer is not None)
    say(f"next: specforge prepare-hidden --model-path {settings.model_path or 'TARGET'} --data {output}")
    return None


def _prepare(
    settings: PrepareDataSettings,
    sources: list[Source],
    tokenizer: ChatTokenizer | None,
    output: Path,
    made_from: dict[str, Any],
) -> tuple[ReadReport, dict[str, Any]]:
    """Write the report and both files; all three take their places when everything is done, the report first: it says
    whose folder this is, and by the files' hashes whether they are the ones that it tells of."""
    report, parts = ReadReport(), {side: preparation.Part() for side in SIDES}
    with ExitStack() as stack:
        stack.enter_context(new_folder(output))
        for stale in output.glob(".prepare-*"):  # of a run that was killed
            shutil.rmtree(stale)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".prepare-", dir=output)))
        file = stack.enter_context((folder / "spool.jsonl").open("wb+"))
        with progress(
            "reading", sum(path.stat().st_size for source in sources for path in source.files), "bytes"
        ) as bar:
            spool = preparation.scan(sources, file, settings, report, lambda size: advance(bar, size))
        rows = preparation.sides(spool, sources, settings, report)
        held_out = (preparation.shingles_of(row, settings) for row in spool.rows(rows["test"]))
        split.HeldOutIndex.of(held_out).save(folder)
        workers = settings.workers or min(len(os.sched_getaffinity(0)), MOST_WORKERS)
        workers = min(workers, 1 + len(spool.prompt_n) // preparation.WORTH_A_WORKER)
        digests = {side: xxhash.xxh3_128() for side in SIDES}
        files = {side: stack.enter_context(replacing_bytes(output / f"{side}.jsonl")) for side in SIDES}
        pool = stack.enter_context(preparation.converting(settings, folder, tokenizer, workers))
        with progress("preparing", len(spool.prompt_n), "rows") as bar:
            for side in SIDES:
                for part in pool.parts(side, spool.rows(rows[side])):
                    files[side].write(part.lines)
                    digests[side].update(part.lines)
                    parts[side].add(part)
                    advance(bar, part.rows)
        for side in SIDES:
            report.add(parts[side].report)
            if not parts[side].conversations:
                raise DataError(
                    f"no {side} row is left: {preparation.listed(report)}",
                    where=", ".join(source.origin for source in sources),
                    fix="give more rows, or mend what they were dropped for; --show-mask 5 shows what the mask sees",
                )
        content = _content(settings, sources, tokenizer, report, parts) | {"made_from": made_from}
        content["files"] = {f"{side}.jsonl": digest.hexdigest() for side, digest in digests.items()}
        write_json(output / "report.json", content)
    return report, content


def _content(
    settings: PrepareDataSettings,
    sources: list[Source],
    tokenizer: ChatTokenizer | None,
    report: ReadReport,
    parts: dict[str, preparation.Part],
) -> dict[str, Any]:
    content: dict[str, Any] = {
        "rows": report.rows,
        "kept": sum(part.conversations for part in parts.values()),
        "dropped": dict(report.dropped.most_common()),
        "dropped_at": report.where,
        "formats": dict(report.formats),
        "sources": [{"name": s.name, "origin": s.origin, "weight": s.weight} for s in sources],
    }
    for side, part in parts.items():
        content[side] = {"conversations": part.conversations}
        if tokenizer:
            content[side] |= {
                "rows": part.prepared,
                "tokens": part.tokens,
                "supervised_tokens": part.supervised,
                "supervised_share": part.supervised / part.tokens,
                "lengths": {f"<= {b:,}" if b < 1 << 30 else "more": n for b, n in sorted(part.lengths.items())},
            }
    if tokenizer:
        sides = parts.values()
        content["further_rows"] = dict(sum((part.more for part in sides), Counter[str]()).most_common())
        content["turns_left_out"] = dict(sum((part.left_out for part in sides), Counter[str]()).most_common())
        if tokenizer.reads_the_clock:
            content["date_in_prompts"] = f"{DATE:%Y-%m-%d}"
        counts_V = parts["train"].counts_V
        total_V = np.sum(list(counts_V.values()), axis=0)
        kept_D = vocab.choose(total_V, settings.draft_vocab_size, tokenizer.special_ids())
        by_source = {name: vocab.coverage(counted, kept_D) for name, counted in sorted(counts_V.items())}
        content["draft_vocabulary"] = {
            "size": len(kept_D),
            "coverage": vocab.coverage(total_V, kept_D),
            "coverage_by_source": by_source,
        }
    return content


def _say(report: ReadReport, content: dict[str, Any], tokenized: bool) -> None:
    for side in SIDES:
        found = content[side]
        masked = f", {found['tokens']:,} tokens, {found['supervised_share']:.1%} supervised" if tokenized else ""
        rows = f" in {found['rows']:,} rows" if tokenized and found["rows"] != found["conversations"] else ""
        say(f"{side:>5}: {found['conversations']:,} conversations{rows}{masked}")
    say(f"of {report.rows:,} rows ({', '.join(report.formats)}); dropped: {escape(preparation.listed(report))}")
    if tokenized:
        for reason, rows in content["further_rows"].items():
            say(f"{rows:,} further rows: {reason}")
        _say_turns(content["turns_left_out"])
        if "date_in_prompts" in content:
            say(f"note: the template writes the date; in these rows it is always {content['date_in_prompts']}")
        words = content["draft_vocabulary"]
        by_source = "; ".join(f"{name} {share:.2%}" for name, share in words["coverage_by_source"].items())
        said = f"{words['size']:,} says {words['coverage']:.2%} of the supervised tokens"
        say(f"a draft vocabulary of {said} ({by_source})")


def _say_turns(left_out: Mapping[str, int]) -> None:
    if left_out:
        listed = "; ".join(f"{turns:,} {reason}" for reason, turns in left_out.items())
        say(f"turns of the assistant that are read and not learned from: {escape(listed)}")


def _made_from(settings: PrepareDataSettings, sources: list[Source], tokenizer: ChatTokenizer | None) -> dict[str, Any]:
    """All that the result depends on: where it is the same, the files need not be made again."""
    free = {"output", "workers", "show_mask", "html"}
    return {
        "rules": RULES,
        "settings": settings.model_dump(mode="json", exclude=free),
        "files": {str(path): digest(path) for source in sources for path in source.files},
        "tokenizer_hash": tokenizer.fingerprint if tokenizer else None,
        "template_hash": tokenizer.template_fingerprint if tokenizer else None,
    }


def _is_made(output: Path, made_from: dict[str, Any]) -> bool:
    try:
        before = read_json(output / "report.json")
        return before["made_from"] == made_from and all(
            digest(output / name) == check for name, check in before["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _show(settings: PrepareDataSettings, sources: list[Source], tokenizer: ChatTokenizer) -> None:
    """The first rows as the draft will see them, on the terminal or as a page. Nothing else is written."""
    report, shown, left_out = ReadReport(), list[show.Row](), Counter[str]()
    for source in sources:
        for path in source.files:
            for number, row in read_rows(path, report, max_bad=1.0):
                place = f"{path.name}:{number}"
                entry = preparation.usable(row, source.name, place, settings, report)
                if entry is None:
                    continue
                [rows] = tokenizer.examples([entry], settings)
                if isinstance(rows, str):
                    report.drop(rows, place)
                    continue
                left_out += rows.left_out
                for masked in rows.masked:
                    shown.append(show.Row(place, entry.id, show.pieces(tokenizer.tokenizer, *masked)))
                if len(shown) >= settings.show_mask:
                    break
    if not shown:
        raise DataError(
            f"no row to show: {preparation.listed(report)}", where=settings.dataset[0], fix="mend what is named"
        )
    if settings.html:
        with replacing(settings.html) as file:
            file.write(show.page(shown, settings.model_path or ""))
        say(f"written: {settings.html}")
    else:
        for one in shown:
            console.print(show.coloured(one, brackets=not console.is_terminal))
    say(f"{len(shown)} rows of the first {report.rows} given; dropped: {escape(preparation.listed(report))}")
    _say_turns(left_out)
    say("next: the same command without --show-mask")
