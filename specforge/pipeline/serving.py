"""benchmark: in this process, through a server, or both; then the kinds of acceptance length stand side by side.

The server's part needs no torch. What is measured in process then runs as a command of its own, after the server has
been asked (and ended, where we started it), so that the two do not share a GPU."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from rich.markup import escape
from rich.table import Table

from specforge.config import BenchmarkSettings, flags
from specforge.console import advance, console, progress, say
from specforge.data import questions
from specforge.endpoint import model_name, root, shown, unusable, words_of
from specforge.errors import CheckpointError, ConfigError, EngineError
from specforge.evaluate import launched, server
from specforge.evaluate.kinds import side_by_side
from specforge.evaluate.server import Reply, Server
from specforge.evaluate.shape import Shape
from specforge.files import read_json, write_json
from specforge.records import Conversation, Sampling

SERVER_ONLY = {"server", "launch", "launch_args", "concurrency"}
HEARD = {"model_path", "output", "num_prompts", "questions", "max_new_tokens", "temperature", "seed"} | SERVER_ONLY
LAUNCHED_WITH = {"draft", "steps", "top_k", "draft_tokens", "tp_size", "mem_frac", "dtype", "trust_remote_code"}
NOT_REPORTED = "not reported"
FLUSH_LIMIT = 30.0  # seconds


def benchmark(settings: BenchmarkSettings) -> int | None:
    _check(settings)
    if not (settings.server or settings.launch):
        from specforge.pipeline import proof

        return proof.benchmark(settings)
    name = settings.questions or questions.BUILTIN
    asked = questions.load(name, settings.num_prompts)
    result: dict[str, Any] = {
        "draft": str(settings.draft or ""),
        "target": settings.model_path or "",
        "steps": settings.steps,
    }
    code = None
    with _kept(settings, result):
        with _server(settings) as (url, command):
            result["served"] = {"questions": name, "command": command}
            _measure(settings, url, asked, result["served"])
        if _in_process(settings):
            own, code = _own_part(settings, name)
            result |= own | result  # the keys that both have are the server's
            result |= side_by_side(result)
    return code


def _check(settings: BenchmarkSettings) -> None:
    """Which settings go together."""
    given = settings.model_fields_set

    def refuse(what: str, where: str, fix: str) -> None:
        raise ConfigError(what, where=where, fix=fix)

    if settings.server and settings.launch:
        refuse("a server is given, and another is to be started", "--server, --launch", "give one of them")
    if settings.launch and settings.model_path is None:
        refuse("no target is given", "--launch", "name it with --model-path")
    if settings.launch_args and not settings.launch:
        refuse("no server is started", "--launch-args", "give --launch, too, or leave it out")
    if not (settings.server or settings.launch):
        if "concurrency" in given:
            refuse("no server is asked", "--concurrency", "give --server URL or --launch, too, or leave it out")
        if not (settings.draft and settings.model_path):
            refuse("there is nothing to measure", "--draft, --model-path", "give both; or --server URL")
        return
    if settings.num_prompts == 0:
        refuse("no question is left for the server", "--num-prompts 0", "give at least 1")
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        refuse("each rank would ask the server", "torchrun, deepspeed", "start the command plainly")
    unheard = given - HEARD - (LAUNCHED_WITH if settings.launch else set())
    if unheard and not _in_process(settings):
        fix = "leave it out; or give --data or --features, too, to measure in this process as well"
        refuse("a server alone does not hear of all that is given", flags(unheard), fix)
    if _in_process(settings) and not (settings.draft and settings.model_path):
        fix = "give --draft and --model-path, too, or leave the text out to measure the server alone"
        refuse("held-out text is given, and no draft or target to measure on it", "--data, --features", fix)
    try:
        shlex.split(settings.launch_args)
    except ValueError as error:
        why = str(error).lower()
        refuse(
            f"the arguments cannot be split: {why}", f"--launch-args {settings.launch_args}", "quote them as in a shell"
        )
    if _in_process(settings):
        _check_own_part(settings)


def _check_own_part(settings: BenchmarkSettings) -> None:
    """What the part in process would refuse only after the server was measured."""
    store = settings.features / "test" if settings.features else None
    for name, path in (("draft", settings.draft), ("data", settings.data), ("features", store)):
        if path is not None and not path.exists():
            raise ConfigError("there is nothing at that path", where=f"--{name} {path}", fix="give one that exists")
    assert settings.draft is not None
    from specforge.pipeline.decoding import shape_of

    try:
        config = read_json(settings.draft / "config.json")
        vocab_size = int(config["draft_vocab_size"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"the draft's config.json cannot be read, or names no draft_vocab_size: {error}",
            where=str(settings.draft),
            fix="give a folder that `specforge train` wrote, such as runs/draft/best",
        ) from error
    shape_of(settings, vocab_size)


def _in_process(settings: BenchmarkSettings) -> bool:
    return bool(settings.data or settings.features)


@contextmanager
def _kept(settings: BenchmarkSettings, result: dict[str, Any]) -> Iterator[None]:
    """Writes the result at the end of the block, marked as partial where that is an error, Ctrl-C or another signal."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    ended_by = list[int]()

    def end(which: int, frame: FrameType | None) -> None:
        """As Ctrl-C: inside asyncio that cancels the work, where an exception would come out of any of its tasks."""
        ended_by.append(which)
        interrupt = signal.getsignal(signal.SIGINT)
        (interrupt if callable(interrupt) else signal.default_int_handler)(signal.SIGINT, frame)

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # nohup's
            signal.signal(number, end)
    try:
        yield
    except BaseException as error:
        if settings.output and result.get("served", {}).get("levels"):
            write_json(settings.output, result | {"partial": True})
            say(f"what was measured until then is in {escape(str(settings.output))}, marked as partial")
        if ended_by and isinstance(error, KeyboardInterrupt):
            sys.exit(128 + ended_by[0])
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if settings.output:
        write_json(settings.output, result)


@contextmanager
def _server(settings: BenchmarkSettings) -> Iterator[tuple[str, str | None]]:
    """(URL, command line) of the server that is asked; the command line where we start it."""
    if settings.server:
        yield settings.server, None
        return
    given = _launch_arguments(settings)
    folder = settings.output.parent if settings.output else Path(".")
    with launched.launched(given, folder / "server.log") as url:
        yield url, launched.command_line(given)


def _launch_arguments(settings: BenchmarkSettings) -> list[str]:
    assert settings.model_path
    shape = Shape.default(settings.steps, settings.top_k)
    if settings.draft_tokens:
        shape = replace(shape, draft_tokens=settings.draft_tokens)
    own = launched.arguments(settings.model_path, str(settings.draft) if settings.draft else None, shape)
    if settings.tp_size > 1:
        own += ["--tp-size", str(settings.tp_size)]
    if "mem_frac" in settings.model_fields_set:
        own += ["--mem-fraction-static", str(settings.mem_frac)]
    if settings.dtype != "auto":
        own += ["--dtype", settings.dtype]
    if settings.trust_remote_code:
        own += ["--trust-remote-code"]
    return [*own, *shlex.split(settings.launch_args)]


def _measure(settings: BenchmarkSettings, url: str, asked: list[Conversation], served: dict[str, Any]) -> None:
    """Fills `served` as it goes on: what is in it is measured, whatever happens next."""
    found = server.recognise(url, model_name(url, settings.model_path))
    served |= {
        "server": url,
        "kind": found.kind,
        "version": found.version,
        "model": found.model,
        "speculative": found.setup,
        "max_new_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "seed": settings.seed,
        "levels": [],
    }
    say(escape(f"server: {found.kind} {found.version} at {shown(url)}, model {found.model}"))
    _warm_up(settings, found, asked)
    replies, pooled = list[Reply](), server.Accepted()
    for at_once in settings.concurrency:
        _forget_prompts(settings, found)
        before = server.counted(found)
        own, began = list[Reply](), time.perf_counter()
        try:
            _ask(settings, found, asked, at_once, own)
        finally:
            seconds = time.perf_counter() - began
            after = server.counted(found)
            grown = after - before if after and before else None
            if own:
                served["levels"].append({"concurrency": at_once, **server.summary(own, seconds, grown)})
            replies += own
            pooled += grown or server.total(own)
            served |= _acceptance(found, pooled, replies)
    _show(served)


def _warm_up(settings: BenchmarkSettings, found: Server, asked: list[Conversation]) -> None:
    """One question that does not count: a first request compiles, allocates, and shows whether the server answers."""
    replies = list[Reply]()
    _run(settings, found, asked[:1], 1, replies.append)
    if failed := next((reply.failure for reply in replies if reply.failure), None):
        raise unusable(found.url, failed)


def _ask(settings: BenchmarkSettings, found: Server, asked: list[Conversation], at_once: int, own: list[Reply]) -> None:
    """All questions, and as many more of them again as it takes to keep `at_once` of them running."""
    chosen = list(islice(cycle(asked), max(len(asked), 2 * at_once)))
    turns = sum(message.role == "user" for question in chosen for message in question.messages)
    with progress(f"{at_once} at once", turns, "answers") as bar:

        def take(reply: Reply) -> None:
            own.append(reply)
            advance(bar, 1)

        _run(settings, found, chosen, at_once, take)
    if all(reply.failure for reply in own):
        raise unusable(found.url, f"every request failed; the last: {own[-1].failure}")


def _run(settings: BenchmarkSettings, found: Server, asked: list[Conversation], at_once: int, take: Any) -> None:
    sampling = Sampling(max_new_tokens=settings.max_new_tokens, temperature=settings.temperature)
    asyncio.run(server.ask(found, asked, at_once, sampling, settings.seed, take))


def _forget_prompts(settings: BenchmarkSettings, found: Server) -> None:
    """Of our own server: a prompt that it still knows from the run before would have its first token too soon."""
    if not settings.launch:
        return
    try:  # SGLang waits so many seconds until it is idle; else it refuses
        response = httpx.post(
            f"{root(found.url)}/flush_cache", params={"timeout": FLUSH_LIMIT}, timeout=2 * FLUSH_LIMIT
        )
    except httpx.HTTPError as error:
        raise unusable(found.url, f"POST /flush_cache: {str(error) or type(error).__name__}") from error
    if not response.is_success:
        raise unusable(found.url, f"POST /flush_cache gives {words_of(response.status_code, response.content)}")


def _acceptance(found: Server, pooled: server.Accepted, replies: list[Reply]) -> dict[str, Any]:
    """The accepted length, and where it comes from."""
    length, source = pooled.length, "counters" if found.kind == "vllm" else "requests"
    if length is None:
        length, source = server.average(found), "average since the server's start"
    if length is None:
        return {"acceptance_length": None, "acceptance_source": NOT_REPORTED}
    domains = server.by_domain(replies)
    return {"acceptance_length": length, "acceptance_source": source} | ({"by_domain": domains} if domains else {})


def _show(served: Mapping[str, Any]) -> None:
    """The server's figures, for a person."""
    table = Table("at once", title=f"through the server, {served['questions']}", title_justify="left")
    for name in ("answers", "tokens/s", "first token p50 / p90 / p99, ms", "a token p50 / p90 / p99, ms", "accepted"):
        table.add_column(name, justify="right")
    for level in served["levels"]:
        length = level["acceptance_length"]
        table.add_row(
            str(level["concurrency"]),
            str(level["requests"]) + (f" ({level['failed']} failed)" if level["failed"] else ""),
            f"{level['tokens_per_second']:,.1f}",
            _milliseconds(level["first_token"]),
            _milliseconds(level["per_token"]),
            f"{length:.3f}" if length else NOT_REPORTED,
        )
    console.print(table)
    if served["acceptance_length"] is None:
        say(
            "[yellow]warning[/] the server reports no accepted length: it serves without a draft, or does not tell; "
            "speed was measured, acceptance was not"
        )
        return
    say(f"the server's own accepted length: {served['acceptance_length']:.3f} ({served['acceptance_source']})")
    for name, part in served.get("by_domain", {}).items():
        say(escape(f"  {name}: {part['acceptance_length']:.3f} over {part['requests']} answers"))


def _milliseconds(times: Mapping[str, float] | None) -> str:
    return " / ".join(f"{1000 * value:,.1f}" for value in times.values()) if times else "-"


def _own_part(settings: BenchmarkSettings, name: str) -> tuple[dict[str, Any], int]:
    """(result, exit code) of the same benchmark in process, on the same questions, as a command of its own: code
    1 where the text was not that of plain decoding. Its log stays beside --output."""
    own = settings.model_dump(mode="json", include=settings.model_fields_set - SERVER_ONLY - {"output"})
    with tempfile.TemporaryDirectory() as folder:
        place = settings.output or Path(folder) / "benchmark.json"
        given, output = (place.with_name(f".{place.name}.{os.getpid()}.{kind}") for kind in ("given", "found"))
        try:
            write_json(given, own | {"questions": name, "output": str(output)})
            code = subprocess.run(
                [sys.executable, "-m", "specforge.cli", "benchmark", "--config", str(given)], check=False
            ).returncode
            if output.exists():
                return dict(json.loads(output.read_text(encoding="utf-8"))), code
        finally:
            given.unlink(missing_ok=True)
            output.unlink(missing_ok=True)
    raise EngineError(
        f"the part in process ended with code {code}, and no result",
        where="--data, --features",
        fix="its own message stands above; without them only the server is measured",
    )
