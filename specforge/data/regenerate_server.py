"""Answers through a running OpenAI-compatible server (SGLang, vLLM, ...). Imports no torch and starts no ranks."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx

from specforge.data.dialogue import Dialogue, Outcome, seed_of
from specforge.errors import EngineError
from specforge.records import Conversation, Message, Sampling

TRIES = 5  # of one request, where the connection or the server fails
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds before the second try; doubled for each further one
FAILED_IN_A_ROW = 10  # requests that the server fails, all tries spent, with no answer between: it is broken
TIMEOUT = httpx.Timeout(900, connect=10)  # seconds; an answer arrives whole, when it has ended
GO_ON = "the same command goes on where it was"


def model_name(url: str, wanted: str | None) -> str:
    """Of the model that is served; `wanted` chooses where there are several. Raises EngineError where none answers."""
    try:
        found = [
            str(model["id"])
            for model in httpx.get(f"{_base(url)}/models", timeout=10).raise_for_status().json()["data"]
        ]
    except httpx.HTTPStatusError as error:
        raise _unusable(url, f"GET /v1/models gives HTTP {error.response.status_code}") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise _unusable(url, f"no answer: {error}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise _unusable(url, "GET /v1/models gives no list of models") from error
    if len(found) > 1 and wanted not in found:
        raise EngineError(
            f"the server has {len(found)} models: {', '.join(found[:5])}",
            where=f"--server {url}",
            fix="name one of them with --model-path",
        )
    if not found:
        raise _unusable(url, "it serves no model")
    return str(wanted) if wanted in found else found[0]


def _base(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1") + "/v1"


def _unusable(url: str, why: str) -> EngineError:
    return EngineError(
        f"the server cannot be used: {why}",
        where=f"--server {url}",
        fix=f"start it, or give the URL of an OpenAI-compatible server; {GO_ON}",
    )


class ServerRegenerator:
    """Lets a server answer dialogues, many at once."""

    def __init__(self, url: str, model: str, sampling: Sampling, seed: int, special: Sequence[str] | None) -> None:
        self._url, self._model, self._sampling, self._seed, self._special = url, model, sampling, seed, special
        self._failed_in_a_row = 0

    async def run(self, dialogues: Sequence[Dialogue], at_once: int, take: Callable[[Outcome], None]) -> None:
        """`take` gets each outcome as soon as the dialogue has ended. Raises EngineError where the server is gone."""
        limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=at_once)
        todo = iter(dialogues)
        async with httpx.AsyncClient(base_url=_base(self._url), timeout=TIMEOUT, limits=limits) as client:
            workers = [asyncio.create_task(self._work(client, todo, take)) for _ in range(at_once)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()

    async def _work(self, client: httpx.AsyncClient, todo: Iterator[Dialogue], take: Callable[[Outcome], None]) -> None:
        for dialogue in todo:
            while (history := dialogue.asked()) is not None:
                seed = seed_of(self._seed, dialogue.index, dialogue.turn)
                response = await self._post(client, self._request(history, seed))
                self._read(dialogue, response)
            take(dialogue.outcome())

    def _request(self, history: Conversation, seed: int) -> dict[str, Any]:
        sampling = self._sampling
        tools = {"tools": list(history.tools)} if history.tools else {}
        draws = {"seed": seed & 0x7FFFFFFF, "top_p": sampling.top_p} if sampling.temperature else {}
        return {
            "model": self._model,
            "messages": [message.as_dict() for message in history.messages],
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "skip_special_tokens": False,  # those inside an answer must be seen; SGLang and vLLM know the key
            **tools,
            **draws,
        }

    async def _post(self, client: httpx.AsyncClient, request: dict[str, Any]) -> httpx.Response:
        """The response, after some tries; the last one where the server failed each time."""
        response, problem = None, None
        for number in range(TRIES):
            if number:
                await asyncio.sleep(_wait(number, response))
            try:
                response, problem = await client.post("/chat/completions", json=request), None
            except httpx.TransportError as error:
                response, problem = None, error
                continue
            if response.status_code != 429 and response.status_code < 500:
                break
        if response is None:
            raise _unusable(self._url, f"{TRIES} tries without an answer: {problem or 'timeout'}") from problem
        if response.status_code in (401, 403, 404):
            raise _unusable(self._url, f"POST /v1/chat/completions gives HTTP {response.status_code}")
        return response

    def _read(self, dialogue: Dialogue, response: httpx.Response) -> None:
        if 400 <= response.status_code < 500 and response.status_code != 429:
            self._failed_in_a_row = 0
            dialogue.fail("failed", f"the server refused it: {_error(response)}")
            return
        try:
            choice = response.raise_for_status().json()["choices"][0]
            message, finish = dict(choice["message"]), choice["finish_reason"]
        except (httpx.HTTPStatusError, ValueError, LookupError, TypeError):
            self._failed(dialogue, response)
            return
        self._failed_in_a_row = 0
        produced = str(message.get("content") or "")
        if finish == "length":
            dialogue.truncate(self._sampling.max_new_tokens, produced)
        elif message.get("tool_calls"):
            dialogue.fail("failed", "the target called a tool", produced)
        elif finish != "stop":
            dialogue.fail("failed", f"the answer ended with '{finish}'", produced)
        else:
            dialogue.answer(_answer(message), _tokens(response), self._special)

    def _failed(self, dialogue: Dialogue, response: httpx.Response) -> None:
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= FAILED_IN_A_ROW:
            raise _unusable(self._url, f"{FAILED_IN_A_ROW} requests in a row failed; the last: {_error(response)}")
        dialogue.fail("failed", f"the server failed: {_error(response)}", again=True)


def _answer(message: dict[str, Any]) -> Message:
    """What of a server's message becomes part of the conversation."""
    reasoning = message.get("reasoning_content")  # what the server's reasoning parser, if it has one, took out
    return Message(role="assistant", content=str(message.get("content") or ""), reasoning=reasoning or None)


def _wait(number: int, response: httpx.Response | None) -> float:
    """Seconds before try `number`: doubled each time, spread, and not less than the server asked for."""
    asked = response.headers.get("retry-after", "") if response is not None else ""
    wait = FIRST_WAIT * 2 ** (number - 1) * random.uniform(1, 1.5)
    return min(LONGEST_WAIT, max(wait, float(asked) if asked.isdigit() else 0.0))


def _tokens(response: httpx.Response) -> int:
    usage = response.json().get("usage")
    return int(usage.get("completion_tokens") or 0) if isinstance(usage, dict) else 0


def _error(response: httpx.Response) -> str:
    """HTTP status and the server's own words, in whatever of the usual forms they come."""
    try:
        content = response.json()
        content = content.get("error", content)
        words = content.get("message", content) if isinstance(content, dict) else content
    except (ValueError, AttributeError):
        words = response.text
    return f"HTTP {response.status_code}: {' '.join(str(words).split())[:200]}"
