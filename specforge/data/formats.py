"""Rows of a file to conversations, text or tokens. What a row is, it says itself; nothing is guessed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from specforge.data.lines import dumped, lines, parsed
from specforge.errors import DataError
from specforge.records import Conversation, Exact, Message

ROLES = {
    **{name: name for name in ("system", "user", "assistant", "tool")},
    "human": "user",
    "gpt": "assistant",
    **dict.fromkeys(("chatgpt", "bing", "bard", "model"), "assistant"),
    "developer": "system",
    **dict.fromkeys(("function", "observation", "function_response", "environment"), "tool"),
}
TURN_LISTS = ("conversations", "messages")
PAIRS = (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")  # of a turn; the first that holds anything counts
THOUGHT_COLUMNS = (*THOUGHT_KEYS, "thought", "thoughts", "cot", "chain_of_thought", "rationale")  # beside an answer
TRAINING_MARKS = ("weight", "loss", "trainable", "train", "loss_weight")  # 0 or false: the turn is context
KNOWN_KEYS = {
    *(*THOUGHT_KEYS, *TRAINING_MARKS, "role", "content", "from", "value", "name"),
    *("tool_calls", "tool_call_id", "function_call", "reasoning_details", "refusal", "audio", "annotations"),
}
TAKEN_KWARGS = {  # of what renders a template
    *("messages", "tools", "conversation", "documents", "chat_template", "add_generation_prompt", "strftime_now"),
    *("continue_final_message", "tokenize", "tokenizer_kwargs", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask"),
}
OTHER_PARTS = "parts other than text (images and the like are not supported)"
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
            row = parsed(line)
            if not isinstance(row, dict):
                raise ValueError(f"a JSON {type(row).__name__}, not an object")
        except ValueError as error:  # cut lines, invalid UTF-8, half surrogate pairs
            decoding = isinstance(error, json.JSONDecodeError | UnicodeDecodeError)
            reason = "not JSON in UTF-8" if decoding else str(error)
            report.drop_bad(f"broken line: {reason}", f"{path.name}:{number}")
            continue
        yield number, row
    bad, rows = report.bad - before, report.rows - first
    if bad > max_bad * max(rows, 1):
        raise DataError(
            f"{bad:,} of {rows:,} rows are broken or in no known format, more than {max_bad:.2g} of them",
            where=f"{path}, first at {', '.join(report.bad_where)}; {dict(report.dropped)}",
            fix="change or remove these rows (one JSON object a line, in UTF-8; see docs/data.md), or allow "
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
    turns = _turns(row)
    if isinstance(turns, str):
        return turns
    messages = _messages(turns.turns)
    if isinstance(messages, str):
        return messages
    messages = _marked(messages, row.get("loss_mask"))
    if isinstance(messages, str):
        return messages
    tools, kwargs, exact = _tools(row.get("tools")), _kwargs(row.get("chat_template_kwargs")), _exact(row)
    for wrong in (tools, kwargs, exact):
        if isinstance(wrong, str):
            return wrong
    style = "from/value" if isinstance(turns.turns[0], dict) and "from" in turns.turns[0] else "role/content"
    return f"{turns.name} ({style})", Conversation(
        id=own_id,
        messages=tuple(messages),
        tools=tools,  # type: ignore[arg-type]  # strings were returned above
        kwargs=kwargs,  # type: ignore[arg-type]
        rows=exact,  # type: ignore[arg-type]
        tokenizer_hash=str(row.get("tokenizer_hash") or "") if exact else "",
        source=source,
        domain=domain,
    )


@dataclass(frozen=True, slots=True)
class _Turns:
    name: str  # of the columns that they came from
    turns: list[Any]


def _turns(row: Mapping[str, Any]) -> _Turns | str:
    lists = [name for name in TURN_LISTS if row.get(name) is not None]
    if len(lists) > 1:
        return f"both '{lists[0]}' and '{lists[1]}'"
    if lists:
        turns = row[lists[0]]
        return _Turns(lists[0], turns) if isinstance(turns, list) and turns else f"'{lists[0]}' is no list of turns"
    pairs = [pair for pair in PAIRS if all(row.get(key) is not None for key in pair)]
    if len(pairs) != 1:
        return _unknown(row)
    found = _pair(row, *pairs[0])
    return found if isinstance(found, str) else _Turns("/".join(pairs[0]), found)


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
    named: dict[str, Any] = {"conversations": [_as_turn(message) for message in entry.messages]}
    if entry.tools:
        named["tools"] = list(entry.tools)
    if entry.kwargs:
        named["chat_template_kwargs"] = dict(entry.kwargs)
    if entry.rows:
        rows = [{"input_ids": list(row.token_ids), "loss_mask": list(row.loss_mask)} for row in entry.rows]
        named |= {"rows": rows, "tokenizer_hash": entry.tokenizer_hash}
    return shared | named


def _as_turn(message: Message) -> dict[str, Any]:
    return message.as_dict() | ({} if message.trained else {"train": False})


def labels(entry: Entry) -> dict[str, Any]:
    """What a row says of itself, beside its text or tokens; what is absent is left out."""
    named = {name: value for name in ("source", "domain") if (value := getattr(entry, name))}
    return {"id": entry.id} | named


def as_line(row: Mapping[str, Any]) -> bytes:
    return dumped(row) + b"\n"


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


def _pair(row: Mapping[str, Any], asked: str, answered: str) -> list[Any] | str:
    """The turns of a row of two columns; either may be text, or a list of turns itself. Alpaca's `history` holds
    earlier exchanges; a column of thoughts belongs to the answer."""
    question, answer = row[asked], row[answered]
    if isinstance(question, str) and isinstance(row.get("input"), str) and row["input"] and asked == "instruction":
        question = f"{question}\n\n{row['input']}"
    first = question if isinstance(question, list) else [{"role": "user", "content": question}]
    system = [{"role": "system", "content": row["system"]}] if isinstance(row.get("system"), str) else []
    earlier = _history(row.get("history"))
    if earlier is None:
        return "a history that is no list of exchanges"
    if isinstance(answer, list):
        return [*system, *earlier, *first, *answer]
    thought = {key: row[key] for key in THOUGHT_COLUMNS if isinstance(row.get(key), str) and row[key].strip()}
    last = {"role": "assistant", "content": answer}
    if thought:
        last["reasoning_content"] = next(iter(thought.values()))
    return [*system, *earlier, *first, last]


def _history(history: Any) -> list[Any] | None:
    """The turns of [[question, answer], ...], or of a list of turns; None for anything else."""
    if not history:
        return []
    if not isinstance(history, list):
        return None
    if all(isinstance(turn, dict) for turn in history):
        return history
    if not all(isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair) for pair in history):
        return None
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in history for role, text in zip(roles, pair, strict=True)]


def _messages(turns: list[Any]) -> list[Message] | str:
    """The turns, with the calls of the older API (`function_call`, answered by a turn of the role function) as calls of
    the newer one."""
    messages = list[Message]()
    called = 0
    for turn in turns:
        if isinstance(turn, dict) and isinstance(turn.get("function_call"), dict) and not turn.get("tool_calls"):
            own_id = f"call{called:05d}"  # nine letters and digits: some templates want no other
            call = {"id": own_id, "type": "function", "function": turn["function_call"]}
            turn = {key: value for key, value in turn.items() if key != "function_call"} | {"tool_calls": [call]}
            called += 1
        elif called and isinstance(turn, dict) and turn.get("role") == "function" and not turn.get("tool_call_id"):
            turn = turn | {"tool_call_id": f"call{called - 1:05d}"}
        message = _message(turn)
        if isinstance(message, str):
            return message
        messages.append(message)
    return messages


def _marked(messages: list[Message], mask: Any) -> list[Message] | str:
    """Turns that a list beside them marks as context are not trained on."""
    if mask is None:
        return messages
    if not isinstance(mask, list) or len(mask) != len(messages) or not all(flag in (0, 1) for flag in mask):
        return "a loss_mask that has not one 0 or 1 for each turn"
    return [message if flag else replace(message, trained=False) for message, flag in zip(messages, mask, strict=True)]


def _message(turn: Any) -> Message | str:
    if not isinstance(turn, dict):
        return "a turn that is no object"
    named = ("from", "value") if "from" in turn else ("role", "content")
    role, content = (turn.get(name) for name in named)
    if not isinstance(role, str) or role.lower() not in ROLES:
        return f"a turn of unknown role {role!r}"[:60]
    role = ROLES[role.lower()]
    calls = turn.get("tool_calls") or ()
    found = _calls(calls) if isinstance(calls, list | tuple) else None
    if found is None:
        return "tool calls without a function's name and arguments"
    thoughts = [turn[key] for key in THOUGHT_KEYS if turn.get(key)]
    if not all(isinstance(thought, str) for thought in thoughts):
        return "thoughts that are no text"
    if isinstance(content, list):  # the parts that newer APIs write
        parts = _parts(content, role)
        if isinstance(parts, str):
            return parts
        content, thought = parts
        thoughts += [thought] if thought else []
    more = {key: value for key, value in turn.items() if key not in KNOWN_KEYS and value is not None}
    if content is None and (found or isinstance(more.get("function_calls"), str)):
        content = ""
    if not isinstance(content, str):
        return "a turn without text"
    if _too_deep(more):
        return "a turn that is nested too deeply"
    return Message(
        role=role,
        content=content,
        reasoning=thoughts[0] if thoughts else None,
        tool_calls=found,
        tool_call_id=_optional(turn.get("tool_call_id")),
        name=_optional(turn.get("name")),
        trained=not any(_is_no(turn[key]) for key in TRAINING_MARKS if key in turn),
        more=more,
    )


def _parts(content: list[Any], role: str) -> tuple[str, str] | str:
    """(text, thought) of parts, texts joined as servers do."""
    texts, thoughts = list[str](), list[str]()
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("thinking", "reasoning") and isinstance(text := _thinking(part, kind), str):
            thoughts.append(text)
        elif isinstance(kind, str) and kind not in ("text", "thinking"):
            return OTHER_PARTS
        else:
            return "a turn that is not only text"
    return ("" if role == "assistant" else " ").join(texts), "".join(thoughts)


def _thinking(part: Mapping[str, Any], kind: str) -> str | None:
    """A thought as text, or as a list of parts of text."""
    inside = part.get(kind, part.get("text"))
    if isinstance(inside, list):
        texts = [inner.get("text") if isinstance(inner, dict) else inner for inner in inside]
        return "".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else None
    return inside if isinstance(inside, str) else None


def _is_no(mark: Any) -> bool:
    """0, false or "no" as a mark at a turn; anything else is no mark."""
    return mark is False or (isinstance(mark, int | float) and mark == 0) or mark in ("false", "False", "no", "0")


def _domain(value: Any) -> str:
    return value.strip()[:DOMAIN_LETTERS] if isinstance(value, str) else ""


def _optional(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _calls(calls: list[Any] | tuple[Any, ...]) -> tuple[Mapping[str, Any], ...] | None:
    """Tool calls with their arguments as they were given, an object or a string of JSON; or None."""
    found = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return None
        arguments = function.get("arguments", {})
        if arguments is None or arguments == "":
            arguments = {}
        if not isinstance(arguments_of(arguments), dict) or _too_deep(arguments_of(arguments)):
            return None
        own_id = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        found.append(own_id | {"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return tuple(found)


def arguments_of(arguments: Any) -> Any:
    """Arguments as an object; None if they are text and no JSON."""
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return None


def _kwargs(kwargs: Any) -> dict[str, Any] | str:
    """Arguments for the template, as servers take them."""
    if isinstance(kwargs, str) and kwargs.strip():
        try:
            kwargs = orjson.loads(kwargs)
        except ValueError:
            return "chat_template_kwargs that are not JSON"
    if not kwargs:
        return {}
    if not isinstance(kwargs, dict) or _too_deep(kwargs):
        return "chat_template_kwargs that are no object"
    if taken := sorted(set(kwargs) & TAKEN_KWARGS):
        return f"chat_template_kwargs that name {taken[0]}"
    return {name: value for name, value in kwargs.items() if value is not None}


def _exact(row: Mapping[str, Any]) -> tuple[Exact, ...] | str:
    """The rows of tokens that `regenerate` keeps beside the text."""
    rows = row.get("rows")
    if not rows or not row.get("tokenizer_hash"):
        return ()
    if not isinstance(rows, list):
        return "rows that are no list of tokens"
    found = list[Exact]()
    for one in rows:
        checked = _tokens(one) if isinstance(one, dict) and "input_ids" in one else "rows without input_ids"
        if isinstance(checked, str):
            return checked
        found.append(Exact(token_ids=one["input_ids"], loss_mask=[int(flag) for flag in one["loss_mask"]]))
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
