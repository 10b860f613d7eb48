"""What every client of an OpenAI-compatible server shares (regenerate, benchmark): its address, its model, its errors,
requests side by side. Imports no torch."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import httpx

from specforge.errors import EngineError

TIMEOUT = httpx.Timeout(900, connect=10)  # seconds; an answer may arrive whole, when it has ended
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
        found = [
            str(model["id"]) for model in httpx.get(f"{base(url)}/models", timeout=10).raise_for_status().json()["data"]
        ]
    except httpx.HTTPStatusError as error:
        raise unusable(url, f"GET /v1/models gives HTTP {error.response.status_code}") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise unusable(url, f"no answer: {error}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise unusable(url, "GET /v1/models gives no list of models") from error
    if len(found) > 1 and wanted not in found:
        raise EngineError(
            f"the server has {len(found)} models: {', '.join(found[:5])}",
            where=f"--server {url}",
            fix="name one of them with --model-path",
        )
    if not found:
        raise unusable(url, "it serves no model")
    return str(wanted) if wanted in found else found[0]


def unusable(url: str, why: str, after: str = "") -> EngineError:
    """`after`: what may be done when the server is there again."""
    fix = "start it, or give the URL of an OpenAI-compatible server" + (f"; {after}" if after else "")
    return EngineError(f"the server cannot be used: {why}", where=f"--server {url}", fix=fix)


def words_of(response: httpx.Response) -> str:
    """HTTP status and the server's own words, in whatever of the usual forms they come. The body must be read."""
    try:
        content = response.json()
        content = content.get("error", content)
        words = content.get("message", content) if isinstance(content, dict) else content
    except (ValueError, AttributeError):
        words = response.text
    return f"HTTP {response.status_code}: {' '.join(str(words).split())[:200]}"


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
