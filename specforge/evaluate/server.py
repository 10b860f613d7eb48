"""What a running server does with questions: its own accepted length, its throughput, its latencies. Answers are
streamed. No torch, and no retries: a request that was tried again would be in the figures."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import httpx
import numpy as np

from specforge.endpoint import CHAT, body_of, get, lines_of, posted, root, side_by_side, unusable, words_of
from specforge.files import parse_json
from specforge.records import Conversation, Message, Sampling

# The servers' own names. SGLang 0.5.21: entrypoints/openai/protocol.py (SpecTokensDetails, SglExt), http_server.py
# (/server_info), managers/scheduler.py (internal states). vLLM: v1/spec_decode/metrics.py.
SGLANG_INFO = ("/server_info", "/get_server_info")  # the second in older releases
SGLANG_ASK = "return_spec_tokens_details"  # key of a request
WRITTEN = ("content", "reasoning_content", "reasoning", "tool_calls")  # of a stream's delta: tokens have come
SGLANG_DETAILS = ("sglext", "spec_tokens_details")  # keys of a chunk of the stream, one in the other
SGLANG_PASSES = "spec_verify_ct"  # in those details: passes of the target that verified drafts
SGLANG_STATES, SGLANG_AVERAGE = "internal_states", "avg_spec_accept_length"  # in the info, since the server's start
SGLANG_SETUP = {
    "algorithm": "speculative_algorithm",
    "steps": "speculative_num_steps",
    "topk": "speculative_eagle_topk",
    "draft_tokens": "speculative_num_draft_tokens",
}
VLLM_METRICS = "/metrics"
VLLM_ACCEPTED, VLLM_PASSES = "vllm:spec_decode_num_accepted_tokens_total", "vllm:spec_decode_num_drafts_total"
VLLM_PREFIX = "vllm:"

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """Drafts that stood, and the passes of the target that verified them; each pass adds a token of its own. The first
    token of an answer comes with its prompt's pass, and is not counted."""

    drafts: float = 0
    passes: float = 0

    def __add__(self, other: Accepted) -> Accepted:
        return Accepted(drafts=self.drafts + other.drafts, passes=self.passes + other.passes)

    def __sub__(self, other: Accepted) -> Accepted:
        return Accepted(drafts=self.drafts - other.drafts, passes=self.passes - other.passes)

    @property
    def length(self) -> float | None:
        """Tokens for each pass; None where nothing was drafted."""
        return 1 + self.drafts / self.passes if self.passes > 0 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One request. Seconds count from the moment it was sent; of a failed one only `failure` means something."""

    domain: str
    tokens: int = 0
    first: float = 0.0  # until the first text arrived
    seconds: float = 0.0  # until the last did
    accepted: Accepted | None = None  # where the server tells it of each request
    failure: str = ""

    @property
    def per_token(self) -> float | None:
        """Seconds a token after the first; None for a single token."""
        return (self.seconds - self.first) / (self.tokens - 1) if self.tokens > 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """What answers behind a URL."""

    url: str
    model: str
    kind: Literal["sglang", "vllm", "other"]
    version: str = ""
    setup: Mapping[str, Any] | None = None  # SGLang's speculative settings, where it has a draft


def recognise(url: str, model: str) -> Server:
    """Which server it is: SGLang tells of itself, vLLM by its metrics, others cannot be told apart."""
    info = _info(url)
    if info is not None:
        setup = (
            {name: info.get(key) for name, key in SGLANG_SETUP.items()} if info.get(SGLANG_SETUP["algorithm"]) else None
        )
        return Server(url=url, model=model, kind="sglang", version=str(info.get("version", "")), setup=setup)
    return Server(url=url, model=model, kind="vllm" if VLLM_PREFIX.encode() in _get(url, VLLM_METRICS) else "other")


def counted(server: Server) -> Accepted | None:
    """vLLM's counters since its start; None where it has none, which is where it drafts nothing."""
    return read_counters(_get(server.url, VLLM_METRICS).decode(errors="replace")) if server.kind == "vllm" else None


def read_counters(metrics: str) -> Accepted | None:
    """Out of the Prometheus text, summed over engines."""
    found = dict[str, float]()
    for line in metrics.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name in (VLLM_ACCEPTED, VLLM_PASSES):
            with suppress(ValueError, IndexError):
                found[name] = found.get(name, 0) + float(line.rsplit(" ", 1)[1])
    return Accepted(drafts=found.get(VLLM_ACCEPTED, 0), passes=found[VLLM_PASSES]) if VLLM_PASSES in found else None


def average(server: Server) -> float | None:
    """Of SGLang's accepted length since its start, the mean over its data-parallel copies: for releases that tell
    nothing of each request."""
    info = (_info(server.url) if server.kind == "sglang" else None) or {}
    states = info.get(SGLANG_STATES)
    found = (
        [state.get(SGLANG_AVERAGE) for state in states if isinstance(state, dict)] if isinstance(states, list) else []
    )
    known = [value for value in found if isinstance(value, int | float) and math.isfinite(value)]
    return float(np.mean(known)) if known else None


def _info(url: str) -> dict[str, Any] | None:
    for path in SGLANG_INFO:
        try:
            found = parse_json(_get(url, path) or b"null")
        except ValueError:
            continue
        if isinstance(found, dict) and SGLANG_STATES in found:
            return found
    return None


def _get(url: str, path: str) -> bytes:
    """What is there, nothing where there is none."""
    try:
        return get(root(url) + path, timeout=30)
    except httpx.HTTPError:
        return b""


class _RefusedError(Exception):
    """The server's own words on why it did not answer."""


async def ask(
    server: Server,
    questions: Iterable[Conversation],
    at_once: int,
    sampling: Sampling,
    seed: int,
    take: Callable[[Reply], None],
) -> None:
    """Every turn of each question, `at_once` questions at a time; `take` gets each reply as soon as it has ended.
    Raises EngineError where the connection is lost; what was taken until then stays good."""
    todo = iter(questions)

    async def work(client: httpx.AsyncClient) -> None:
        for question in todo:
            history = list[Message]()
            for message in question.messages:
                history.append(message)
                if message.role != "user":
                    continue
                try:
                    reply, text = await _stream(client, _request(server, history, sampling, seed), question.domain)
                except _RefusedError as error:
                    take(Reply(domain=question.domain, failure=str(error)))
                    break
                except httpx.RequestError as error:
                    why = str(error) or type(error).__name__
                    raise unusable(server.url, f"the connection was lost ({why})") from error
                take(reply)
                history.append(Message(role="assistant", content=text))

    await side_by_side(server.url, at_once, work)


def _request(server: Server, history: Sequence[Message], sampling: Sampling, seed: int) -> dict[str, Any]:
    return {
        "model": server.model,
        "messages": [message.as_dict() for message in history],
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
        **({"seed": seed & 0x7FFFFFFF} if sampling.temperature else {}),
        **({SGLANG_ASK: True} if server.kind == "sglang" else {}),
    }


async def _stream(client: httpx.AsyncClient, request: Mapping[str, Any], domain: str) -> tuple[Reply, str]:
    """(figures, text) of one answer."""
    began, first, last = time.perf_counter(), None, 0.0
    text, tokens, passes = "", None, 0
    async with posted(client, CHAT, request) as response:
        if response.status_code != 200:
            raise _RefusedError(words_of(response.status_code, await body_of(response)))
        async for line in lines_of(response):
            chunk = _chunk(line)
            if chunk is None:
                continue
            if "error" in chunk:
                raise _RefusedError(" ".join(str(chunk["error"]).split())[:200])
            try:
                for choice in chunk.get("choices") or ():
                    delta, last = choice.get("delta") or {}, time.perf_counter()
                    if any(delta.get(name) for name in WRITTEN):
                        first = first or last
                    text += delta.get("content") or ""
                tokens = _tokens(chunk, tokens)
                passes = _passes(chunk) or passes
            except (AttributeError, TypeError, ValueError, OverflowError) as error:
                raise _RefusedError(f"a part of the stream is malformed: {line[:80]}") from error
    if tokens is None:
        raise _RefusedError("the stream told no number of tokens (stream_options.include_usage)")
    if not last:
        raise _RefusedError("the stream held no text")
    reply = Reply(
        domain=domain,
        tokens=tokens,
        first=(first or last) - began,
        seconds=last - began,
        accepted=Accepted(drafts=max(0, tokens - 1 - passes), passes=passes) if passes else None,
    )
    return reply, text


def _chunk(line: str) -> dict[str, Any] | None:
    """The JSON object of a line of a stream; None for blank lines, comments and the end mark."""
    if not line.startswith("data:") or line.removeprefix("data:").strip() == "[DONE]":
        return None
    try:
        found = parse_json(line.removeprefix("data:").encode())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise _RefusedError(f"the stream is no stream of JSON objects: {line[:80]}")
    return found


def _tokens(chunk: Mapping[str, Any], before: int | None) -> int | None:
    found = (chunk.get("usage") or {}).get("completion_tokens")
    return before if found is None else int(found)


def _passes(chunk: Mapping[str, Any]) -> int:
    outer, inner = SGLANG_DETAILS
    return int(((chunk.get(outer) or {}).get(inner) or {}).get(SGLANG_PASSES) or 0)


def summary(replies: Sequence[Reply], seconds: float, counters: Accepted | None = None) -> dict[str, Any]:
    """For JSON: of the requests of one concurrency, which took `seconds` together. `counters`: what the server's own
    grew by meanwhile. Times are in seconds."""
    whole = [reply for reply in replies if not reply.failure]
    tokens = sum(reply.tokens for reply in whole)
    return {
        "requests": len(whole),
        "failed": len(replies) - len(whole),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds > 0 else 0.0,
        "first_token": percentiles([reply.first for reply in whole]),
        "per_token": percentiles([reply.per_token for reply in whole if reply.per_token is not None]),
        "acceptance_length": (counters or total(whole)).length,
    }


def total(replies: Iterable[Reply]) -> Accepted:
    return sum((reply.accepted for reply in replies if reply.accepted), Accepted())


def by_domain(replies: Sequence[Reply]) -> dict[str, dict[str, Any]]:
    """Accepted length of each domain, where the server tells it of each request and domains are named; else {}."""
    found = dict[str, dict[str, Any]]()
    for name in dict.fromkeys(reply.domain for reply in replies if reply.domain):
        own = [reply for reply in replies if reply.domain == name and reply.accepted]
        if own:
            found[name] = {"acceptance_length": total(own).length, "requests": len(own)}
    return found


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """{"p50": .., "p90": .., "p99": ..}, linear between neighbours; None of nothing."""
    if not values:
        return None
    return {f"p{at}": float(value) for at, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}
