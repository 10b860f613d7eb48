"""Questions to measure acceptance and speed with: our own set, a file, or a known set of the hub. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.markup import escape

from specforge.console import say
from specforge.data.formats import ReadReport, read_rows, to_conversation
from specforge.data.lines import SUFFIXES
from specforge.data.sources import choose_matching
from specforge.errors import ConfigError, DataError
from specforge.records import Conversation, Message

BUILTIN = "builtin"
OWN = Path(__file__).with_name("questions.jsonl")
PROMPTS = ("turns", "prompt", "question", "instruction", "problem")  # columns that hold what is asked, the first found
DOMAINS = ("domain", "category")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSet:
    """A data set of the hub as questions. Names of files and columns, and licences, as its page there shows them."""

    repo: str
    file: str  # pattern
    prompt: str  # column: text, or a list of turns
    licence: str
    domain: str | None = None  # column; None: the name of the set
    lead: str = ""  # put before the text, which by itself asks nothing


HUB = {
    "mt_bench": HubSet(
        repo="HuggingFaceH4/mt_bench_prompts",
        file="raw/question.jsonl",
        prompt="prompt",
        licence="Apache-2.0",
        domain="category",
    ),
    "humaneval": HubSet(
        repo="openai/openai_humaneval",
        file="openai_humaneval/test-*.parquet",
        prompt="prompt",
        licence="MIT",
        lead="Complete this Python function:\n\n",
    ),
    "gsm8k": HubSet(repo="openai/gsm8k", file="main/test-*.parquet", prompt="question", licence="MIT"),
    "math500": HubSet(
        repo="HuggingFaceH4/MATH-500", file="test.jsonl", prompt="problem", licence="MIT (MATH)", domain="subject"
    ),
    "alpaca": HubSet(
        repo="tatsu-lab/alpaca", file="data/train-*.parquet", prompt="instruction", licence="CC-BY-NC-4.0"
    ),
    "cnn_dm": HubSet(
        repo="abisee/cnn_dailymail",
        file="3.0.0/test-*.parquet",
        prompt="article",
        licence="Apache-2.0",
        lead="Summarise this article:\n\n",
    ),
}


def load(name: str, count: int) -> list[Conversation]:
    """`count` questions of the set `name` (fewer where it has fewer), spread evenly over it, in order. Each is the
    turns of the system and the user; answers are not part of it.

    Raises ConfigError for a name that is no set and no file, DataError for a set that cannot be had, and for a row
    without a prompt.
    """
    if name == BUILTIN:
        found = _read(OWN, "", None)
    elif name in HUB:
        found = _from_hub(name, HUB[name])
    else:
        found = _read(_path(name), Path(name).stem, None)
    return [found[at * len(found) // count] for at in range(count)] if count < len(found) else found


def first_turn(question: Conversation) -> Conversation:
    """Up to the first turn of the user."""
    first = next(at for at, message in enumerate(question.messages) if message.role == "user")
    return replace(question, messages=question.messages[: first + 1])


def _path(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if name.lower().endswith(SUFFIXES) or "/" in name:
        raise DataError(
            "the file of questions is not there", where=f"--questions {name}", fix="give a JSONL file, or a set's name"
        )
    near = difflib.get_close_matches(name.lower(), [BUILTIN, *HUB], n=1)
    raise ConfigError(
        f"'{name}' is no set of questions that is known, and no file",
        where=f"--questions {name}",
        fix=f"did you mean {near[0]}?" if near else f"give a file, or one of {BUILTIN}, {', '.join(HUB)}",
    )


def _from_hub(name: str, place: HubSet) -> list[Conversation]:
    from specforge.data import hub  # here, because it takes a second to import

    got = hub.fetch(place.repo, partial(choose_matching, place.repo, [place.file]))
    say(escape(f"questions: {name} is {place.repo}@{got.commit[:8]}, licence: {place.licence}"))
    return [question for file in got.files for question in _read(file, name, place)]


def _read(path: Path, domain: str, place: HubSet | None) -> list[Conversation]:
    found = list[Conversation]()
    for number, row in read_rows(path, ReadReport(), max_bad=0):
        messages = _asked(row, place)
        if not messages:
            keys = [place.prompt] if place else [*PROMPTS, "conversations", "messages"]
            raise DataError(
                f"the row has no prompt: none of {', '.join(keys)} holds text (columns: {', '.join(sorted(row)[:6])})",
                where=f"{path}, line {number}",
                fix='write {"prompt": "..."}, or {"turns": ["...", "..."]}, with "domain" where it has one',
            )
        columns = [place.domain] if place and place.domain else DOMAINS
        named = next((row[key] for key in columns if isinstance(row.get(key), str) and row[key].strip()), domain)
        own_id = row.get("id", row.get("question_id", number))
        found.append(Conversation(id=str(own_id), messages=messages, domain=named))
    if not found:
        raise DataError("there is no question in the file", where=str(path), fix='write rows of {"prompt": "..."}')
    return found


def _asked(row: Mapping[str, Any], place: HubSet | None) -> tuple[Message, ...]:
    """The turns of system and user; () where nothing is asked."""
    if place is None and ("conversations" in row or "messages" in row):
        found = to_conversation(row, "", needed="user")
        return () if isinstance(found, str) else _without_answers(found.messages)
    columns = [place.prompt] if place else PROMPTS
    given = next((row[key] for key in columns if row.get(key)), None)
    turns = given if isinstance(given, list) else [given]
    if not all(isinstance(turn, str) and turn.strip() for turn in turns):
        return ()
    more = f"\n\n{row['input']}" if isinstance(row.get("input"), str) and row["input"] else ""
    lead = place.lead if place else ""
    return tuple(Message(role="user", content=f"{lead}{turn}{more}") for turn in turns)


def _without_answers(messages: Sequence[Message]) -> tuple[Message, ...]:
    kept = tuple(message for message in messages if message.role in ("system", "user"))
    return kept if all(message.content.strip() for message in kept if message.role == "user") else ()
