"""Where in the rendered text the assistant speaks: character spans, found by rendering and never by guessing.

A turn, in ChatML:

    ...<|im_end|>\\n <|im_start|>assistant\\n <think>\\n\\n</think>\\n\\n Two cats. <|im_end|> \\n<|im_start|>user...
                                           |                                       |
                                           start: here serving hands over          end: with the token that stops it

- *start*: the render of the turns before, with the generation prompt, ends there. Where that render is no prefix of the
  whole (templates that move the system prompt, or whose generation prompt opens a thought that the history drops), the
  start is where the content begins: up to there the whole equals the render with a mark in the content's place.
- *end*: behind the content, the whole equals the render with the mark; the turn ends with the special token that
  follows the content there.

A turn whose span is not certain gives a reason, and then the whole conversation is dropped: a mask is never half.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from specforge.records import Conversation, Message

Span = tuple[int, int]  # [first, last) characters
MARK = "\u2042mark\u2042"
SPACE = re.compile(r"\s*")
HIDDEN = "the template hides or rewrites a turn"
MOST_RENDERED = 400_000  # messages that a conversation's turns may cost, found one by one: some ten seconds
THOUGHTLESS = "the template leaves out what the last turn thought, which the target would write when it is served"


@dataclass(frozen=True, slots=True)
class Template:
    """What finding the spans needs of a tokenizer's chat template."""

    render: Callable[[Sequence[dict[str, Any]], Sequence[Any], bool], str]  # messages, tools, with generation prompt
    special: tuple[str, ...]  # texts of the special tokens
    stops: tuple[str, ...] = ()  # of them, those that end what the target writes
    prompt: str = ""  # the generation prompt, where it is always the same


def assistant_spans(template: Template, conversation: Conversation) -> tuple[str, list[Span]] | str:
    """The rendered conversation and the span of each assistant turn, or the reason why one is not certain."""
    messages = [message.as_dict() for message in conversation.messages]
    text = template.render(messages, conversation.tools, False)
    spans = regular_spans(template, conversation, messages, text)
    return (text, spans) if spans else turn_by_turn(template, conversation, messages, text)


def regular_spans(
    template: Template, conversation: Conversation, messages: list[dict[str, Any]], text: str
) -> list[Span] | None:
    """The spans by one render instead of two a turn: that with a mark in place of every assistant's content. None
    unless the text is that render with the contents put in, whole, and the generation prompt stands before each."""
    turns = [m for m in conversation.messages if m.role == "assistant"]
    if not template.prompt or MARK in text or any(m.tool_calls or m.reasoning for m in turns):
        return None
    marked = [m | {"content": MARK} if m["role"] == "assistant" else m for m in messages]
    first, *pieces = template.render(marked, conversation.tools, False).split(MARK)
    if len(pieces) != len(turns) or not text.startswith(first):
        return None
    spans, at = list[Span](), len(first)
    for message, before, behind in zip(turns, [first, *pieces], pieces, strict=False):
        content = message.content if text.startswith(message.content + behind, at) else message.content.strip()
        if not before.endswith(template.prompt) or not text.startswith(content + behind, at):
            return None
        spans.append((at, end_of_turn(text, at + len(content), template.special)))
        at += len(content) + len(behind)
    return spans if at == len(text) else None


def turn_by_turn(
    template: Template, conversation: Conversation, messages: list[dict[str, Any]], text: str
) -> tuple[str, list[Span]] | str:
    """Find each turn separately, with two renders. This works for any template."""
    turns = sum(message.role == "assistant" for message in conversation.messages)
    if 2 * turns * len(messages) > MOST_RENDERED:
        return f"more turns than can be found one by one ({MOST_RENDERED:,} messages would be rendered)"
    spans = list[Span]()
    for number, message in enumerate(conversation.messages):
        if message.role == "assistant":
            span = _turn(template, conversation, messages, number, text)
            if span is None or (spans and span[0] < spans[-1][1]):
                return HIDDEN
            spans.append(span)
    if not spans:
        return "no assistant turn"
    return (text, spans) if _thinks(text[slice(*spans[-1])], conversation) else THOUGHTLESS


def _thinks(inside: str, conversation: Conversation) -> bool:
    """Whether the last assistant turn stands there with its thoughts. (Those of earlier turns many templates drop, and
    then the target does not read them when it is served, either.)"""
    message = next(m for m in reversed(conversation.messages) if m.role == "assistant")
    told = (message.reasoning or "", "" if message.tool_calls else message.content)
    return all("".join(part.split()) in "".join(inside.split()) for part in told)


def _turn(
    template: Template, conversation: Conversation, messages: list[dict[str, Any]], number: int, text: str
) -> Span | None:
    if number == 0:
        return None  # nobody asked for it: no header is known
    message, tools = conversation.messages[number], conversation.tools
    mark = MARK
    while mark in text:
        mark += MARK
    marked = template.render([*messages[:number], _marked(message, mark), *messages[number + 1 :]], tools, False)
    if marked.count(mark) != 1:
        return None
    at = marked.index(mark)
    tail = marked[at + len(mark) :]
    if message.tool_calls:  # the mark stands inside the last call: go on to the token that ends the turn
        stops = [found for stop in template.stops if (found := tail.find(stop)) >= 0]
        if not stops:
            return None
        tail = tail[min(stops) :]
    content_end = len(text) - len(tail)
    if not text.endswith(tail):
        return None
    start = len(before := template.render(messages[:number], tools, True))
    if not text.startswith(before) or start > content_end:
        apart = message.reasoning is not None and message.reasoning.strip() in text[:at]  # and would be left out
        if message.tool_calls or apart or text[:at] != marked[:at]:
            return None
        start = len(text[:at].rstrip(" "))  # "[/INST] two": the target writes the space too
    if not message.tool_calls and not _says(text[start:content_end], message):
        return None
    return start, end_of_turn(text, content_end, template.special)


def _marked(message: Message, mark: str) -> dict[str, Any]:
    """The turn with the mark where its own text ends."""
    found = message.as_dict()
    if not message.tool_calls:
        return found | {"content": mark}
    *others, last = message.tool_calls
    call = dict(last) | {"function": {"name": last["function"]["name"], "arguments": {"a": mark}}}
    return found | {"tool_calls": [*others, call]}


def _says(inside: str, message: Message) -> bool:
    """Is `inside` this turn? Its content stands there whole, or is what a template leaves of it that drops thoughts.
    White space is not compared: templates trim it."""
    inside, content = "".join(inside.split()), "".join(message.content.split())
    return inside.endswith(content) or (bool(inside) and content.endswith(inside))


def end_of_turn(text: str, content_end: int, special: Sequence[str]) -> int:
    """End of the special token that follows the content, white space between; the content's own end without one."""
    at = SPACE.match(text, content_end).end()  # type: ignore[union-attr]  # it matches nothing, too
    ends = [len(token) for token in special if text.startswith(token, at)]
    return at + max(ends) if ends else content_end


def generation_spans(
    text: str, blocks: Sequence[Span], conversation: Conversation, special: Sequence[str]
) -> list[Span] | str:
    """The spans that a template with {% generation %} states itself, one a turn, up to the token that ends the turn."""
    turns = [message for message in conversation.messages if message.role == "assistant"]
    if len(blocks) != len(turns):
        return f"the template's generation blocks are {len(blocks)} for {len(turns)} assistant turns"
    spans = list[Span]()
    for (first, last), message in zip(blocks, turns, strict=True):
        inside = text[first:last]
        written = inside.rstrip()  # white space behind the stop is the template's
        stopped = written.endswith(tuple(special)) and written.strip() != message.content.strip()  # by its own stop
        last = first + len(written) if stopped else end_of_turn(text, last, special)
        if not message.tool_calls and "".join(message.content.split()) not in "".join(inside.split()):
            return HIDDEN
        spans.append((first, last))
    return spans if _thinks(text[slice(*spans[-1])], conversation) else THOUGHTLESS
