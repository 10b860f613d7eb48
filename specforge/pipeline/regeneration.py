"""Answers by the target itself: in this process, or through a running server, which needs no torch here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.markup import escape

from specforge.config import RankSettings, RegenerateSettings, flags
from specforge.console import advance, is_main_rank, progress, say
from specforge.data import formats
from specforge.data.dialogue import Dialogue, Outcome, read_special_texts
from specforge.data.finished import Finished
from specforge.errors import ConfigError, DataError
from specforge.files import digest
from specforge.records import Conversation, Sampling

TIED = ("max_new_tokens", "temperature", "top_p", "seed")  # what a run that is gone on with must share


def regenerate(settings: RegenerateSettings) -> int | None:
    _check(settings)
    report = formats.ReadReport()
    asked = formats.read_conversations(settings.prompts, report, needed="user")
    if report.dropped:
        dropped = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items())
        say(f"of {report.rows:,} rows; dropped: {escape(dropped)}")
    if settings.server:
        _through_server(settings, asked)
        return None
    return _in_process(settings, asked)


def _through_server(settings: RegenerateSettings, asked: list[Conversation]) -> int | None:
    from specforge.data.regenerate_server import ServerRegenerator
    from specforge.endpoint import model_name, shown

    url = str(settings.server)
    special = read_special_texts(settings.model_path) if settings.model_path else None
    model = model_name(url, settings.model_path)
    finished = _finished(settings, {"engine": "server", "model": model})
    todo = _todo(asked, finished)
    say(escape(f"target {model} at {shown(url)}"))
    sampling = _sampling(settings, ())
    with _recording(finished, len(todo)) as take:
        asyncio.run(
            ServerRegenerator(url, model, sampling, settings.seed, special).run(todo, settings.concurrency, take)
        )
    _write(settings, finished, settings.model_path or model)
    return None


def _in_process(settings: RegenerateSettings, asked: list[Conversation]) -> int | None:
    import torch.distributed as dist

    from specforge import hardware, launch
    from specforge.data.regenerate import Regenerator
    from specforge.data.tokenize import ChatTokenizer
    from specforge.pipeline.shared import leave, start_engine, watched
    from specforge.target import engine as engines
    from specforge.target import weights

    model_path = str(settings.model_path)
    tokenizer = ChatTokenizer(model_path, trust_remote_code=settings.trust_remote_code)
    info = weights.describe(model_path, settings.trust_remote_code)
    engines.check_tp(info, settings.tp_size, settings.engine)
    longest = _longest(settings, info.config)
    made_from = {
        "engine": engines.choose(settings.engine),
        "target": info.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "template": tokenizer.template_fingerprint,
        "dtype": hardware.name(engines.dtype_of(settings, info)),
    }
    finished = _finished(settings, made_from)
    code = launch.start_ranks(settings.tp_size, replicas=False)
    if code is not None:
        return code
    ranks = launch.join(settings.tp_size)
    if ranks.replicas > 1:
        raise ConfigError(
            f"{ranks.world} ranks were started, but one copy of the target answers",
            where=f"--tp-size {settings.tp_size}",
            fix=f"start {settings.tp_size}, or start the command plainly; several copies: a server and --server URL",
        )
    dist.barrier()  # every rank has read the same progress before the first adds to it
    todo = _todo(asked, finished, tokenizer.fingerprint)
    if todo:
        engine = start_engine(settings, info, ranks, settings.output.parent)
        sampling = _sampling(settings, tokenizer.stop_ids())
        regenerator = Regenerator(engine, tokenizer, sampling, settings.seed, longest)
        with _recording(finished, len(todo)) as take, watched(ranks, settings.rank_timeout, engine):
            for outcome in regenerator.outcomes(todo, settings.concurrency):
                take(outcome)
    if is_main_rank():
        _write(settings, finished, model_path)
    leave(ranks)
    return None


def _check(settings: RegenerateSettings) -> None:
    """What can be seen before anything is read."""
    if settings.output.is_dir():
        raise ConfigError("the output is a folder", where=f"--output {settings.output}", fix="name a file in it")
    if settings.prompts.resolve() in {path.resolve() for path in (settings.output, *_beside(settings.output))}:
        raise ConfigError(
            "the answers would be written over the prompts",
            where=f"--output {settings.output}",
            fix="choose another file",
        )
    if settings.server is None and settings.model_path is None:
        raise ConfigError("no target is given", where="--model-path, --server", fix="give one of them")
    engine_only = settings.model_fields_set & set(RankSettings.model_fields) - {"model_path"}
    if settings.server and engine_only:
        raise ConfigError(
            "a server runs the target as it was started",
            where=flags(engine_only),
            fix="leave it out with --server",
        )


def _longest(settings: RegenerateSettings, config: dict[str, Any]) -> int:
    """Most tokens of a history and its answer together: what the target can attend, and what one batch holds."""
    longest = min(settings.tokens_per_batch, int(config.get("max_position_embeddings") or settings.tokens_per_batch))
    if settings.max_new_tokens >= longest:
        raise ConfigError(
            f"an answer of {settings.max_new_tokens} tokens leaves no room for a prompt: {longest} tokens are all",
            where=f"--max-new-tokens {settings.max_new_tokens}",
            fix="lower it, or raise --tokens-per-batch as far as the target's context allows",
        )
    return longest


def _sampling(settings: RegenerateSettings, stop_ids: Any) -> Sampling:
    return Sampling(
        max_new_tokens=settings.max_new_tokens,
        stop_ids=tuple(stop_ids),
        temperature=settings.temperature,
        top_p=settings.top_p,
    )


def _beside(output: Path) -> tuple[Path, Path]:
    """What failed, and the progress of an unfinished run."""
    return output.with_name(f"{output.name}.failed.jsonl"), output.with_name(f"{output.name}.progress.jsonl")


def _finished(settings: RegenerateSettings, target: dict[str, Any]) -> Finished:
    made_from = {"prompts": digest(settings.prompts)} | target | {name: getattr(settings, name) for name in TIED}
    return Finished(_beside(settings.output)[1], made_from, settings.resume)


def _todo(asked: list[Conversation], finished: Finished, tokenizer_hash: str = "") -> list[Dialogue]:
    if finished.done():
        say(f"going on: {finished.done():,} of {len(asked):,} conversations are done")
    left = ((at, conversation) for at, conversation in enumerate(asked) if not finished.is_done(at))
    return [Dialogue(at, conversation, tokenizer_hash) for at, conversation in left]


@contextmanager
def _recording(finished: Finished, count: int) -> Iterator[Callable[[Outcome], None]]:
    """Each outcome goes to the progress file and moves the bar on. Rank 0 writes."""
    began, answers, tokens, unanswered = time.monotonic(), 0, 0, 0

    def take(outcome: Outcome) -> None:
        nonlocal answers, tokens, unanswered
        answers, tokens = answers + outcome.answers, tokens + outcome.tokens
        unanswered += outcome.failure is not None
        if is_main_rank():
            finished.add(outcome)
            seconds = time.monotonic() - began
            rate = f"{answers / seconds:,.1f} answers/s, {tokens / seconds:,.0f} tokens/s"
            advance(bar, 1, f"{rate}, {unanswered:,} not whole")

    if is_main_rank():
        finished.open()
    try:
        with progress("answering", count, "conversations") as bar:
            yield take
    finally:
        finished.close()


def _write(settings: RegenerateSettings, finished: Finished, model: str) -> None:
    failures, _ = _beside(settings.output)
    summary = finished.write(settings.output, failures)
    unanswered = f"{summary.truncated:,} truncated at {settings.max_new_tokens} tokens, {summary.failed:,} failed"
    if not summary.kept:
        raise DataError(
            f"no conversation of {summary.asked:,} was answered: {unanswered}",
            where=f"{failures} has the reasons",
            fix="truncated: raise --max-new-tokens",
        )
    kept = f"{summary.kept:,} of {summary.asked:,} conversations kept with {summary.answers:,} answers"
    say(f"{kept} ({summary.cut_short:,} cut short); {unanswered}" + (f", see {failures}" * bool(unanswered)))
    say(f"next: specforge prepare-data --dataset {settings.output} --model-path {model}")
