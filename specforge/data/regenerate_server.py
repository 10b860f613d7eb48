"""Answers through a running OpenAI-compatible server (SGLang, vLLM, ...). Imports no torch and starts no ranks."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
from pydantic import BaseModel, Field

from specforge.data.dialogue import Dialogue, Outcome, seed_of
from specforge.endpoint import CHAT, body_of, posted, side_by_side, unusable, words_of
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
                self._read(dialogue, *await self._post(client, self._request(history, seed)))
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
            **({"chat_template_kwargs": dict(history.kwargs)} if history.kwargs else {}),
            **draws,
        }

    async def _post(self, client: httpx.AsyncClient, request: dict[str, Any]) -> tuple[int, bytes]:
        """Status and body of the response, after some tries; the last one where the server failed each time."""
        asked, problem, found = "", None, None
        for number in range(TRIES):
            if number:
                await asyncio.sleep(_wait(number, asked))
            try:
                async with posted(client, CHAT, request) as response:
                    found, problem = (response.status_code, await body_of(response)), None
                    asked = response.headers.get("retry-after", "")
            except httpx.RequestError as error:
                found, problem, asked = None, error, ""
                continue
            if found[0] != 429 and found[0] < 500:
                break
        if found is None:
            raise unusable(self._url, f"{TRIES} tries without an answer: {problem or 'timeout'}", GO_ON) from problem
        if found[0] in (401, 403, 404):
            raise unusable(self._url, f"POST /v1{CHAT} gives HTTP {found[0]}", GO_ON)
        return found

    def _read(self, dialogue: Dialogue, status: int, body: bytes) -> None:
        if 400 <= status < 500 and status != 429:
            self._failed_in_a_row = 0
            dialogue.fail("failed", f"the server refused it: {words_of(status, body)}")
            return
        try:
            reply = _Reply.model_validate_json(body) if status < 400 else None
        except ValueError:
            reply = None
        if reply is None:
            self._failed(dialogue, words_of(status, body))
            return
        self._failed_in_a_row = 0
        choice = reply.choices[0]
        message, finish = choice.message, choice.finish_reason
        produced = message.content or ""
        if finish == "length":
            dialogue.truncate(self._sampling.max_new_tokens, produced)
        elif message.tool_calls:
            dialogue.fail("failed", "the target called a tool", produced)
        elif finish != "stop":
            dialogue.fail("failed", f"the answer ended with '{finish}'", produced)
        else:
            # what the server's reasoning parser, if it has one, took out; vLLM calls it `reasoning`
            thought = message.reasoning_content or message.reasoning or None
            answer = Message(role="assistant", content=produced, reasoning=thought)
            dialogue.answer(answer, reply.usage.completion_tokens if reply.usage else 0, self._special)

    def _failed(self, dialogue: Dialogue, words: str) -> None:
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= FAILED_IN_A_ROW:
            reason = f"{FAILED_IN_A_ROW} requests in a row failed; the last: {words}"
            raise unusable(self._url, reason, GO_ON)
        dialogue.fail("failed", f"the server failed: {words}", again=True)


def _wait(number: int, asked: str) -> float:
    """Seconds before try `number`: doubled each time, spread, and not less than the server `asked` for."""
    wait = FIRST_WAIT * 2 ** (number - 1) * random.uniform(1, 1.5)
    return min(LONGEST_WAIT, max(wait, float(asked) if asked.isdigit() else 0.0))


# Of a reply, what is read. Anything of another type, or too deep, or no text, is a failure of the server.


class _Message(BaseModel):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None


class _Usage(BaseModel):
    completion_tokens: int = 0


class _Reply(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None
