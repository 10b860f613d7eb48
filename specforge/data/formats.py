"""Rows of a file to conversations, text or tokens. What a row is, it says itself; nothing is guessed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from specforge.data.lines import lines
from specforge.errors import DataError
from specforge.records import Conversation, Message

ROLES = {
    **{name: name for name in ("system", "user", "assistant", "tool")},
    "human": "user",
    "gpt": "assistant",
    **dict.fromkeys(("chatgpt", "bing", "bard", "model"), "assistant"),
    "developer": "system",
    **dict.fromkeys(("function", "observation", "function_response"), "tool"),
}
TURN_LISTS = ("conversations", "messages")
PAIRS = (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
NAMED_LINES = 5  # of each reason, the report names the first few
DEEPEST = 100  # levels of a call's arguments, or of tools
DOMAIN_LETTERS = 64  # a domain is a name; of a longer text its beginning


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A conversation that already went through the template (--is-preformatted)."""

    id: str
    text: str
    source: str = ""
    domain: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """A conversation that is already tokens with a loss mask."""

    id: str
    token_ids: NDArray[np.int32]  # [T]
    loss_mask: NDArray[np.bool_]  # [T]
    source: str = ""
    domain: str = ""


Entry = Conversation | Text | Tokens


@dataclass
class ReadReport:
    """What reading met: rows by fate and format, and where the first of each fate are."""

    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    where: dict[str, list[str]] = field(default_factory=dict)  # reason -> "rows.jsonl:12", the first few
    bad: int = 0  # of them, rows in no known format; the other reasons are a choice
    bad_where: list[str] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)

    def drop(self, reason: str, place: str = "", rows: int = 1) -> None:
        self.dropped[reason] += rows
        named = self.where.setdefault(reason, [])
        if place and len(named) < NAMED_LINES:
            named.append(place)

    def drop_bad(self, reason: str, place: str) -> None:
        """A row in no known format: too many of them end the run."""
        self.drop(reason, place)
        self.bad += 1
        if len(self.bad_where) < NAMED_LINES:
            self.bad_where.append(place)

    def add(self, other: ReadReport) -> None:
        """Take over what another part of the same work met."""
        self.rows += other.rows
        self.bad += other.bad
        self.formats += other.formats
        for reason, rows in other.dropped.items():
            self.drop(reason, rows=rows)
            self.where[reason] = [*self.where[reason], *other.where[reason]][:NAMED_LINES]


def read_rows(path: Path, report: ReadReport, max_bad: float = 0.01) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, JSON object) of a file. Broken lines are counted, with the rows that the caller reports as bad;
    raises DataError where together they are more than a share `max_bad` of the file."""
    before, first = report.bad, report.rows
    for number, line in lines(path):
        report.rows += 1
        try:
            if line is None:
                raise ValueError("longer than 16 MiB")
            row = orjson.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"a JSON {type(row).__name__}, not an object")
        except ValueError as error:  # cut lines, invalid UTF-8, half surrogate pairs
            reason = str(error) if not isinstance(error, orjson.JSONDecodeError) else "not JSON in UTF-8"
            report.drop_bad(f"broken line: {reason}", f"{path.name}:{number}")
            continue
        yield number, row
    bad, rows = report.bad - before, report.rows - first
    if bad > max_bad * max(rows, 1):
        raise DataError(
            f"{bad:,} of {rows:,} rows are broken or in no known format, more than {max_bad:.2g} of them",
            where=f"{path}, first at {', '.join(report.bad_where)}; {dict(report.dropped)}",
            fix="mend or remove these rows (one JSON object a line, in UTF-8; docs/data.md has the formats), or allow "
            "more with --max-bad-rows",
        )


def parse(
    row: Mapping[str, Any], default_id: str, preformatted: bool = False, source: str = ""
) -> tuple[str, Entry] | str:
    """(name of the format, entry), or the reason why the row is none of the known formats.

    A list of turns comes first: data sets often repeat its first turn in a column `prompt`."""
    own_id, own_source = row.get("id", row.get("prompt_id", default_id)), row.get("source")
    source = own_source if isinstance(own_source, str) and own_source else source
    own_id = str(own_id) if isinstance(own_id, str | int) else default_id
    domain = _domain(row.get("domain"))
    if "input_ids" in row:
        found = _tokens(row)
        return found if isinstance(found, str) else ("tokens", Tokens(id=own_id, source=source, domain=domain, **found))
    if preformatted:
        text = row.get("text")
        if not isinstance(text, str):
            return "no 'text'"
        return "text", Text(id=own_id, text=text, source=source, domain=domain)
    lists = [name for name in TURN_LISTS if row.get(name) is not None]
    if len(lists) > 1:
        return f"both '{lists[0]}' and '{lists[1]}'"
    if lists:
        name, turns = lists[0], row[lists[0]]
        if not isinstance(turns, list) or not turns:
            return f"'{name}' is no list of turns"
    else:
        pairs = [pair for pair in PAIRS if all(row.get(key) is not None for key in pair)]
        if len(pairs) != 1:
            return _unknown(row)
        name, turns = "/".join(pairs[0]), _pair(row, *pairs[0])
    messages = list[Message]()
    for turn in turns:
        message = _message(turn)
        if isinstance(message, str):
            return message
        messages.append(message)
    tools = _tools(row.get("tools"))
    if isinstance(tools, str):
        return tools
    style = "from/value" if isinstance(turns[0], dict) and "from" in turns[0] else "role/content"
    return f"{name} ({style})", Conversation(
        id=own_id, messages=tuple(messages), tools=tools, source=source, domain=domain
    )


def to_conversation(row: Mapping[str, Any], default_id: str, needed: str = "assistant") -> Conversation | str:
    """A conversation with a turn of the role `needed`, or the reason why the row is none."""
    found = parse(row, default_id)
    if isinstance(found, str):
        return found
    if not isinstance(found[1], Conversation):
        return "tokens, not a conversation"
    return lacking(found[1], needed) or found[1]


def lacking(conversation: Conversation, needed: str = "assistant") -> str | None:
    return None if any(m.role == needed for m in conversation.messages) else f"no {needed} turn"


def to_row(entry: Entry) -> dict[str, Any]:
    """As prepared files hold it; `parse` reads it back."""
    shared = labels(entry)
    if isinstance(entry, Tokens):
        return shared | {"input_ids": entry.token_ids, "loss_mask": entry.loss_mask.astype(np.uint8)}
    if isinstance(entry, Text):
        return shared | {"text": entry.text}
    tools = {"tools": list(entry.tools)} if entry.tools else {}
    return shared | {"conversations": [message.as_dict() for message in entry.messages]} | tools


def labels(entry: Entry) -> dict[str, Any]:
    """What a row says of itself, beside its text or tokens; what is absent is left out."""
    named = {name: value for name in ("source", "domain") if (value := getattr(entry, name))}
    return {"id": entry.id} | named


def as_line(row: Mapping[str, Any]) -> bytes:
    return orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)


def read_conversations(path: Path, report: ReadReport, needed: str = "assistant") -> list[Conversation]:
    """All conversations of a file that have a turn of the role `needed`; raises DataError where none is left."""
    kept = []
    for number, row in read_rows(path, report):
        conversation = to_conversation(row, str(report.rows), needed)
        if isinstance(conversation, str):
            report.drop(conversation, f"{path.name}:{number}")
        else:
            kept.append(conversation)
    if not kept:
        raise DataError(
            f"no conversation with such a turn ({needed}) among {report.rows} rows ({dict(report.dropped)})",
            where=str(path),
            fix='each line: {"conversations": [{"role": "user", "content": ...}, ...]}',
        )
    return kept


def _unknown(row: Mapping[str, Any]) -> str:
    if isinstance(row.get("text"), str):
        return "text that is already formatted (give --is-preformatted)"
    return "no known format: columns " + ", ".join(sorted(map(str, row))[:6])


def _pair(row: Mapping[str, Any], asked: str, answered: str) -> list[Any]:
    """The turns of a row of two columns; either may be text, or a list of turns itself."""
    question, answer = row[asked], row[answered]
    if isinstance(question, str) and isinstance(row.get("input"), str) and row["input"] and asked == "instruction":
        question = f"{question}\n\n{row['input']}"
    first = question if isinstance(question, list) else [{"role": "user", "content": question}]
    system = [{"role": "system", "content": row["system"]}] if isinstance(row.get("system"), str) else []
    return [*system, *first, *(answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}])]


def _message(turn: Any) -> Message | str:
    if not isinstance(turn, dict):
        return "a turn that is no object"
    role, content = (turn.get("from"), turn.get("value")) if "from" in turn else (turn.get("role"), turn.get("content"))
    if not isinstance(role, str) or role.lower() not in ROLES:
        return f"a turn of unknown role {role!r}"[:60]
    calls = turn.get("tool_calls") or ()
    found = _calls(calls) if isinstance(calls, list | tuple) else None
    if found is None:
        return "tool calls without a function's name and arguments"
    if isinstance(content, list):  # the parts that newer APIs write
        parts = [p.get("text") for p in content if isinstance(p, dict) and p.get("type", "text") == "text"]
        texts = [text for text in parts if isinstance(text, str)]
        if len(texts) != len(content):
            return "a turn that is not only text"
        content = "".join(texts)
    if content is None and found:
        content = ""
    if not isinstance(content, str):
        return "a turn without text"
    reasoning = turn.get("reasoning_content", turn.get("reasoning", turn.get("thinking")))
    if not isinstance(reasoning, str | None):
        return "thoughts that are no text"
    return Message(
        role=ROLES[role.lower()],
        content=content,
        reasoning=reasoning or None,
        tool_calls=found,
        tool_call_id=_optional(turn.get("tool_call_id")),
        name=_optional(turn.get("name")),
    )


def _domain(value: Any) -> str:
    return value.strip()[:DOMAIN_LETTERS] if isinstance(value, str) else ""


def _optional(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _calls(calls: list[Any] | tuple[Any, ...]) -> tuple[Mapping[str, Any], ...] | None:
    """Tool calls with their arguments as an object (many data sets hold them as a string of JSON), or None."""
    found = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return None
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = orjson.loads(arguments)
            except ValueError:
                return None
        if not isinstance(arguments, dict) or _too_deep(arguments):
            return None
        own_id = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        found.append(own_id | {"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return tuple(found)


def _tools(tools: Any) -> tuple[Mapping[str, Any], ...] | str:
    if isinstance(tools, str) and tools.strip():
        try:
            tools = orjson.loads(tools)
        except ValueError:
            return "tools that are not JSON"
    if not tools:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        return "tools that are no list of schemas"
    return "tools that are nested too deeply" if _too_deep(tools) else tuple(tools)


def _too_deep(value: Any) -> bool:
    """Deeper than it could be written again; a schema has about ten levels."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)


def _tokens(row: Mapping[str, Any]) -> dict[str, Any] | str:
    ids, mask = row["input_ids"], row.get("loss_mask")
    if not isinstance(ids, list) or not isinstance(mask, list) or len(mask) != len(ids) or not ids:
        return "input_ids without a loss_mask of the same length"
    if set(map(type, ids)) != {int} or not set(map(type, mask)) <= {int, bool}:
        return "input_ids or loss_mask that are no numbers"
    if min(ids) < 0 or max(ids) > np.iinfo(np.int32).max:
        return "input_ids that no vocabulary has"
    if not set(mask) <= {0, 1}:
        return "a loss_mask of other numbers than 0 and 1"
    return {"token_ids": np.asarray(ids, dtype=np.int32), "loss_mask": np.asarray(mask, dtype=np.bool_)}
