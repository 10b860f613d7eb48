"""Answers through a running OpenAI-compatible server (SGLang, vLLM, ...). Imports no torch and starts no ranks."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx

from specforge.data.dialogue import Dialogue, Outcome, seed_of
from specforge.endpoint import CHAT, side_by_side, unusable, words_of
from specforge.records import Conversation, Message, Sampling

TRIES = 5  # of one request, where the connection or the server fails
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds before the second try; doubled for each further one
FAILED_IN_A_ROW = 10  # requests that the server fails, all tries spent, with no answer between: it is broken
GO_ON = "the same command goes on where it was"


class ServerRegenerator:
    """Lets a server answer dialogues, many at once."""

    def __init__(self, url: str, model: str, sampling: Sampling, seed: int, special: Sequence[str] | None) -> None:
        self._url, self._model, self._sampling, self._seed, self._special = url, model, sampling, seed, special
        self._failed_in_a_row = 0

    async def run(self, dialogues: Sequence[Dialogue], at_once: int, take: Callable[[Outcome], None]) -> None:
        """`take` gets each outcome as soon as the dialogue has ended. Raises EngineError where the server is gone."""
        todo = iter(dialogues)
        await side_by_side(self._url, at_once, lambda client: self._work(client, todo, take))

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
                response, problem = await client.post(CHAT, json=request), None
            except httpx.TransportError as error:
                response, problem = None, error
                continue
            if response.status_code != 429 and response.status_code < 500:
                break
        if response is None:
            raise unusable(self._url, f"{TRIES} tries without an answer: {problem or 'timeout'}", GO_ON) from problem
        if response.status_code in (401, 403, 404):
            raise unusable(self._url, f"POST /v1{CHAT} gives HTTP {response.status_code}", GO_ON)
        return response

    def _read(self, dialogue: Dialogue, response: httpx.Response) -> None:
        if 400 <= response.status_code < 500 and response.status_code != 429:
            self._failed_in_a_row = 0
            dialogue.fail("failed", f"the server refused it: {words_of(response)}")
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
            reason = f"{FAILED_IN_A_ROW} requests in a row failed; the last: {words_of(response)}"
            raise unusable(self._url, reason, GO_ON)
        dialogue.fail("failed", f"the server failed: {words_of(response)}", again=True)


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
