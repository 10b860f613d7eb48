"""What every client of an OpenAI-compatible server shares (regenerate, benchmark): its address, its model, its errors,
requests side by side. Imports no torch."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx

from specforge.errors import EngineError
from specforge.files import parse_json

TIMEOUT = httpx.Timeout(900, connect=10)  # seconds; an answer may arrive whole, when it has ended
DEADLINE = 3600  # seconds for a request, however its body trickles in
MOST_LINE = 1 << 20  # characters of a stream's line; a token with its alternatives has a few thousand
MOST_BODY = 64 << 20  # bytes of a body; a long answer with its probabilities has a few
CHAT = "/chat/completions"

Worker = Callable[[httpx.AsyncClient], Awaitable[None]]


def root(url: str) -> str:
    """The server's own address, without the API's part of it."""
    return url.rstrip("/").removesuffix("/v1")


def base(url: str) -> str:
    return root(url) + "/v1"


def model_name(url: str, wanted: str | None) -> str:
    """Of the model that is served; `wanted` chooses where there are several. Raises EngineError where none answers."""
    try:
        found = [str(model["id"]) for model in parse_json(get(f"{base(url)}/models", timeout=10))["data"]]
    except httpx.HTTPStatusError as error:
        raise unusable(url, f"GET /v1/models gives HTTP {error.response.status_code}") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise unusable(url, f"no answer: {error}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise unusable(url, "GET /v1/models gives no list of models") from error
    if len(found) > 1 and wanted not in found:
        raise EngineError(
            f"the server has {len(found)} models: {', '.join(found[:5])}",
            where=f"--server {shown(url)}",
            fix="name one of them with --model-path",
        )
    if not found:
        raise unusable(url, "it serves no model")
    return str(wanted) if wanted in found else found[0]


def unusable(url: str, why: str, after: str = "") -> EngineError:
    """`after`: what may be done when the server is there again."""
    fix = "start it, or give the URL of an OpenAI-compatible server" + (f"; {after}" if after else "")
    return EngineError(f"the server cannot be used: {why}", where=f"--server {shown(url)}", fix=fix)


def shown(url: str) -> str:
    """Without what only the server may know."""
    return re.sub(r"//[^/@]*@", "//***@", url)


def get(url: str, timeout: float) -> bytes:
    """The body there. Raises httpx.HTTPError, also where it has no end."""
    body, until = bytearray(), time.monotonic() + timeout
    with httpx.stream("GET", url, timeout=timeout) as response:
        for piece in response.iter_bytes():
            body += piece
            if len(body) > MOST_BODY or time.monotonic() > until:
                raise httpx.ReadError("the answer has no end")
        response.raise_for_status()
    return bytes(body)


@asynccontextmanager
async def posted(client: httpx.AsyncClient, path: str, content: Any) -> AsyncIterator[httpx.Response]:
    """The response to a request, its body still to be read, in time. Raises httpx.RequestError."""
    try:
        async with asyncio.timeout(DEADLINE), client.stream("POST", path, json=content) as response:
            yield response
    except TimeoutError as error:
        raise httpx.ReadTimeout(f"the answer did not end within {DEADLINE} s") from error


async def body_of(response: httpx.Response) -> bytes:
    """Raises httpx.RequestError, also where it is too long."""
    body = bytearray()
    async for piece in response.aiter_bytes():
        body += piece
        if len(body) > MOST_BODY:
            raise httpx.ReadError("the answer has no end")
    return bytes(body)


async def lines_of(response: httpx.Response) -> AsyncIterator[str]:
    """Of a stream. Raises httpx.RequestError, also where it, or one of its lines, is too long."""
    size, rest = 0, ""
    async for piece in response.aiter_text():
        size += len(piece)
        *lines, rest = (rest + piece).split("\n")
        if size > MOST_BODY or len(rest) > MOST_LINE:
            raise httpx.ReadError("the stream has no end")
        for line in lines:
            yield line
    yield rest


def words_of(status: int, body: bytes) -> str:
    """HTTP status and the server's own words, in whatever of the usual forms they come."""
    try:
        content = parse_json(body)
        content = content.get("error", content)
        words = content.get("message", content) if isinstance(content, dict) else content
    except (ValueError, AttributeError):
        words = body[:1000].decode(errors="replace")
    return f"HTTP {status}: {' '.join(str(words).split())[:200]}"


async def side_by_side(url: str, at_once: int, work: Worker) -> None:
    """So many of `work`, each with the same client. The first error of one ends all of them, and is raised."""
    limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=at_once)
    async with httpx.AsyncClient(base_url=base(url), timeout=TIMEOUT, limits=limits) as client:
        workers = [asyncio.ensure_future(work(client)) for _ in range(at_once)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
