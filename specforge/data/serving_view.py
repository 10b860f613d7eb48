"""What the server has in its context when the target writes, and what the target writes: for each assistant turn.

    prompt       render(the turns before, tools, kwargs, with the generation prompt): exactly what serving feeds
    completion   what the target itself writes, up to and with the token that stops it

    ...<|im_start|>assistant\\n<think>\\n I count.\\n</think>\\n\\nTwo cats.<|im_end|> \\n<|im_start|>user...
                                         |                                        |
    prompt: up to here, where serving    completion: up to here                   what only the template writes
    hands over

The completion comes from a second render, that of the turn as the last one. A template can show thoughts and calls in
several ways, or only if they are given under its own key, so a turn is tried in several forms. The first form counts
whose render holds all that the turn says. What a template writes into its history, but the target never would (an
empty thought before a thought, a header), is not taken for an answer.

A turn whose completion is not certain is not supervised, for a reason that is counted. If the template leaves out a
call, the conversation ends before it: what follows would answer something that the target never reads.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, product
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from specforge.data.formats import THOUGHT_KEYS, arguments_of
from specforge.data.limits import TemplateLimitError
from specforge.errors import first_line
from specforge.records import Conversation, Message

RENDERING = (TemplateError, TypeError, LookupError, ValueError, ArithmeticError, AttributeError, RecursionError)
MOST_RENDERED = 400_000  # messages that rendering a conversation's turns may cost: some ten seconds

HIDDEN = "the template hides or rewrites a turn"
UNASKED = "a turn of the assistant that nobody asked for"
NO_TURN = "no assistant turn to learn from"
THOUGHTLESS = "the template leaves out what the turn thought, which the target would write"
CALLLESS = "the template leaves out a tool call, or writes its arguments otherwise"
OPENED = "the prompt opens a thought, and the turn has none"
TWICE = "the template writes a second thought beside the turn's own"
UNOPENED = "the turn closes a thought that nothing opened"
STOPS = "the turn holds the text of a token that ends what the target writes"
REFUSALS = ("the template refuses it", "the template cannot take it")  # and why
NO_STOP = "no token is known that ends what the target writes"

THOUGHTS = (  # how thoughts are opened and closed
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|channel>thought", "<channel|>"),
)
SWITCHES = ("enable_thinking", "thinking")  # variables of templates that turn thoughts on and off
MARK = "\u2042mark\u2042"

Render = Callable[[Sequence[dict[str, Any]], Sequence[Any], bool, Mapping[str, Any]], str]


@dataclass(frozen=True, slots=True)
class Template:
    """What the serving view needs of a chat template."""

    render: Render  # messages, tools, with generation prompt, kwargs
    source: str
    switches: tuple[str, ...] = ()  # of SWITCHES, those that the template reads
    stops: tuple[str, ...] = ()  # texts of the tokens that end what the target writes
    tokens: tuple[str, ...] = ()  # texts of all added tokens
    eos: str = ""  # of them, the one for a turn whose end the template does not show
    as_parts: bool = False  # content must be a list of parts

    @property
    def calls_tools_environment(self) -> bool:
        return "environment" in self.source and not re.search(r"""['"]tool['"]""", self.source)


@dataclass(frozen=True, slots=True)
class Turn:
    """An assistant turn to learn from."""

    prompt: str
    completion: str
    behind: str = ""  # what the template writes behind the stop; nobody reads it if the conversation ends here
    kwargs: Mapping[str, Any] = field(default_factory=dict)  # with which the prompt was rendered
    before: int = 0  # turns of the conversation in the prompt


@dataclass(slots=True)
class View:
    turns: list[Turn] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)  # turns that are not supervised, by reason


def serving_view(template: Template, conversation: Conversation, train_on: str = "all-turns") -> View | str:
    """The turns to learn from, or the reason why there is none."""
    budget = _Budget(template)
    view, before, new_ids = View(), list[dict[str, Any]](), dict[str, str]()
    last = max((at for at, m in enumerate(conversation.messages) if m.role == "assistant"), default=-1)
    for at, message in enumerate(conversation.messages):
        if message.role != "assistant":
            given = as_given(message.as_dict(), template)
            if "tool_call_id" in given:
                given["tool_call_id"] = new_ids.get(given["tool_call_id"], given["tool_call_id"])
            before.append(given)
            continue
        wanted = message.trained and (at == last or train_on == "all-turns")
        if not before:
            view.left_out[UNASKED] += wanted
            before.append(as_given(message.as_dict(), template))
            continue
        following = conversation.messages[at + 1] if at + 1 < len(conversation.messages) else None
        attempts = _Attempts(template, budget.render, conversation, tuple(before), message, following)
        found = attempts.best()
        if isinstance(found, str):
            context = attempts.as_context()
            view.left_out[found if context or found.startswith(REFUSALS) else CALLLESS] += wanted
            if context is None:
                break
            before.append(context)
            continue
        if wanted:
            view.turns.append(found.turn)
        before.append(found.history)
        for call, shown in zip(message.tool_calls, found.history.get("tool_calls") or (), strict=False):
            if "id" in call:
                new_ids[call["id"]] = shown["id"]
    view.left_out = +view.left_out
    return view if view.turns else next(iter(view.left_out), NO_TURN)


class _Budget:
    """Renders for one conversation, and no more of them than MOST_RENDERED messages cost."""

    def __init__(self, template: Template) -> None:
        self._template, self._rendered = template, 0

    def spent(self) -> bool:
        return self._rendered > MOST_RENDERED

    def render(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[Any], open_turn: bool, kwargs: Mapping[str, Any]
    ) -> str:
        self._rendered += len(messages)
        if self.spent():
            raise TemplateLimitError(f"more turns than can be rendered one by one ({MOST_RENDERED:,} messages)")
        return self._template.render(messages, tools, open_turn, kwargs)


@dataclass(frozen=True, slots=True)
class _Found:
    turn: Turn
    history: dict[str, Any]  # the turn as later prompts hold it
    empty: bool  # the target writes an empty thought first


@dataclass(frozen=True, slots=True)
class _Form:
    """A turn in one of the ways in which a template can be given it."""

    given: dict[str, Any]
    served: dict[str, Any]  # the same as a server would hold it in the history


@dataclass(frozen=True, slots=True)
class _Attempts:
    """The ways to show one turn to its template."""

    template: Template
    render: Render
    conversation: Conversation
    before: tuple[dict[str, Any], ...]
    message: Message
    following: Message | None

    def best(self) -> _Found | str:
        thought, said = self._thought_and_rest()
        fallback: _Found | None = None
        reasons = list[str]()
        prompts = [
            (kwargs, self.render(self.before, self.conversation.tools, True, kwargs))
            for kwargs in self._modes(bool(thought))
        ]
        for forms in self._forms(thought, said):
            for (kwargs, prompt), form in product(prompts, forms):
                found = self._attempt(prompt, form, kwargs, thought, said)
                if isinstance(found, str):
                    reasons.append(found)
                elif not found.empty:
                    return found
                else:
                    fallback = fallback or found
        return fallback or max(reasons, key=_weight)

    def as_context(self) -> dict[str, Any] | None:
        """The turn as later prompts hold it if it is not learned from; None if the template does not show its calls."""
        thought, said = self._thought_and_rest()
        if not self.message.tool_calls and "function_calls" not in self.message.more:
            return as_given(self.message.as_dict(), self.template)
        for form in chain(*self._forms(thought, said)):
            try:
                closed = self.render(
                    [*self.before, form.given], self.conversation.tools, False, self.conversation.kwargs
                )
            except TemplateLimitError:
                raise
            except RENDERING:
                continue
            if self._shows_calls(closed):
                return form.given
        return None

    def _shows_calls(self, text: str) -> bool:
        calls, squashed = self.message.tool_calls, _squash(text)
        extra = self.message.more.get("function_calls")
        return (
            all(_shows(text, squashed, leaf) for call in calls for leaf in _leaves(call["function"]))
            and not _is_escaped(text, calls)
            and (not isinstance(extra, str) or _squash(extra) in squashed)
        )

    def _thought_and_rest(self) -> tuple[str, str]:
        """(what the turn thinks, the rest of its text); a thought stands apart, or at the start of the content."""
        if self.message.reasoning:
            return self.message.reasoning, self.message.content
        content = self.message.content
        for opener, closer in THOUGHTS:
            inside, found, rest = content.partition(closer)
            if found and (inside.lstrip().startswith(opener) or opener not in inside):
                return inside.lstrip().removeprefix(opener), rest
        return "", content

    def _modes(self, thinks: bool) -> Iterator[Mapping[str, Any]]:
        """The row's own arguments for the template; then, unless they say so already, with thoughts on or off."""
        kwargs = self.conversation.kwargs
        yield kwargs
        if self.template.switches and not any(name in kwargs for name in self.template.switches):
            yield {**kwargs, **dict.fromkeys(self.template.switches, thinks)}

    def _forms(self, thought: str, said: str) -> tuple[list[_Form], list[_Form]]:
        """(the likely ones, a last resort), each the likeliest first."""
        own = self.message.as_dict()
        if not thought:
            return self._with_calls([own]), []
        inline = not self.message.reasoning
        rest = said.lstrip("\n") if inline else said
        apart = {name: value for name, value in own.items() if name not in THOUGHT_KEYS} | {"content": rest}
        key = thought.strip("\n") if inline else thought
        keyed = [apart | {"reasoning_content": key}, apart | dict.fromkeys(THOUGHT_KEYS, key)]
        if "thinking" in self.template.source:
            parts = [{"type": "thinking", "thinking": thought}, {"type": "text", "text": rest}]
            keyed.append(apart | {"content": parts})
        if not inline:
            return self._with_calls(keyed), []
        if not any(name in self.template.source for name in THOUGHT_KEYS):
            return self._with_calls([own]), self._with_calls(keyed[:1])
        if any(closer in self.message.content and closer in self.template.source for _, closer in THOUGHTS):
            return self._with_calls([own, *keyed]), []
        return self._with_calls(keyed), self._with_calls([own])  # the template would write the tags as text

    def _with_calls(self, shown: list[dict[str, Any]]) -> list[_Form]:
        """Arguments as they were given, as an object, as text; no content as "" or as null; Kimi's names of calls.

        A server reads arguments given as text and hands the object to the template: so they stand in the history."""
        forms = [as_given(form, self.template) for form in shown]
        # a server knows one key for thoughts
        servable = [
            {name: value for name, value in form.items() if name not in THOUGHT_KEYS[1:]}
            if "thinking" in form
            else form
            for form in forms
        ]
        calls = list(self.message.tool_calls)
        if not calls:
            return [_Form(form, other) for form, other in zip(forms, servable, strict=True)]
        read = [_with_arguments(call, as_text=False) for call in calls]
        objects = [call for call in read if call is not None] if None not in read else calls
        texts = [call for call in (_with_arguments(call, as_text=True) for call in objects) if call is not None]
        variants = [(calls, objects), (objects, objects), (texts, texts)]
        contents = {id(form): [form["content"], None] if form["content"] == "" else [form["content"]] for form in forms}
        takes_ids = re.search(r"""(\.id\b|\[['"]id['"]\])""", self.template.source)
        return [
            _Form(
                form | {"content": content, "tool_calls": self._named(given) if named else given},
                other | {"content": content, "tool_calls": self._named(served) if named else served},
            )
            for named in ([False, True] if takes_ids else [False])
            for form, other in zip(forms, servable, strict=True)
            for given, served in variants
            for content in contents[id(form)]
        ]

    def _named(self, calls: Sequence[Any]) -> list[Any]:
        """With ids such as functions.NAME:0, counted through the conversation, which is how Kimi-K2 writes a name."""
        earlier = sum(len(message.get("tool_calls") or ()) for message in self.before)
        return [
            {**call, "id": f"functions.{call['function']['name']}:{earlier + number}"}
            for number, call in enumerate(calls)
        ]

    def _attempt(self, prompt: str, form: _Form, kwargs: Mapping[str, Any], thought: str, said: str) -> _Found | str:
        try:
            closed = self.render([*self.before, form.given], self.conversation.tools, False, kwargs)
        except TemplateLimitError:
            raise
        except RENDERING as error:
            if isinstance(error, TemplateSyntaxError):
                raise
            return refusal(error)
        opened = _opens(self._generation_prompt(prompt, kwargs))
        rest = self._written(prompt, closed, kwargs, bool(thought), opened)
        stopped = _stopped(rest, self.template.stops) if rest is not None else None
        if rest is not None and stopped is None:
            stopped = self._with_stop(rest, closed, form, kwargs, said)
            if stopped is None:
                return NO_STOP
        if stopped is not None and _is_dumped(form.given["content"], stopped):
            return HIDDEN
        if stopped is None:
            return OPENED if opened and not thought else HIDDEN
        behind = rest[len(stopped) :] if rest is not None else ""
        reason = self._wrong(stopped, opened, thought, said)
        if reason in (THOUGHTLESS, TWICE) and not self.message.tool_calls:
            for other in self._restored(stopped, prompt, opened, thought, said):
                if self._wrong(other, opened, thought, said) is None:
                    stopped, reason = other, None
                    break
        if reason:
            return reason
        history = form.given if form.served is form.given else self._served(form, kwargs)
        return _Found(
            Turn(prompt, stopped, behind, kwargs, len(self.before)), history, not thought and _thinks_nothing(stopped)
        )

    def _served(self, form: _Form, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        try:
            self.render([*self.before, form.served], self.conversation.tools, False, kwargs)
        except TemplateLimitError:
            raise
        except RENDERING:
            return form.given
        return form.served

    def _generation_prompt(self, prompt: str, kwargs: Mapping[str, Any]) -> str:
        """What the prompt says behind the last turn, as far as a thought could be opened in it."""
        asked = self.before[-1].get("content")
        behind = prompt
        if isinstance(asked, str) and asked.strip() and asked.strip() in prompt:
            behind = prompt[prompt.rindex(asked.strip()) + len(asked.strip()) :]
        elif any(opener in prompt for opener, _ in THOUGHTS):
            closed = self.render(self.before, self.conversation.tools, False, kwargs)
            behind = prompt[shared(prompt, closed) :]
        return behind

    def _written(self, prompt: str, closed: str, kwargs: Mapping[str, Any], thinks: bool, opened: str) -> str | None:
        """What stands behind the hand-over in the render with the turn; None if that is not certain."""
        if closed.startswith(prompt):
            return closed[len(prompt) :]
        base = self.render(self.before, self.conversation.tools, False, kwargs)
        alike = self._border(prompt, closed)
        if prompt.startswith(base) and alike >= len(base) and prompt != base:
            left, rest = prompt[alike:], closed[alike:]
            if opened:
                return rest.lstrip("\n") if thinks else None
            if not left.strip() or any(closer in left for _, closer in THOUGHTS):
                return rest
            return None
        # Earlier parts differ: what stands between the last question and the hand-over must be the same.
        answer = as_given({"role": "assistant", "content": MARK}, self.template)
        marked = self.render([*self.before, answer], self.conversation.tools, False, kwargs)
        head, found, _ = marked.partition(MARK)
        asked = self.before[-1].get("content")
        if not found or not closed.startswith(head) or not isinstance(asked, str) or not asked.strip():
            return None
        at = prompt.rfind(asked.strip())
        tail = prompt[at:] if at >= 0 else ""
        return closed[head.rfind(tail) + len(tail) :] if tail and tail in head else None

    def _border(self, prompt: str, closed: str) -> int:
        """Up to where both are alike, and in no token's middle."""
        alike = shared(prompt, closed)
        for token in self.template.tokens:
            for text in (prompt, closed):
                at = text.find(token, max(0, alike - len(token) + 1), alike + len(token) - 1)
                if 0 <= at < alike:
                    return at
        return alike

    def _with_stop(self, rest: str, closed: str, form: _Form, kwargs: Mapping[str, Any], said: str) -> str | None:
        """The template leaves the last turn open: the stop is what it writes before the next turn, or the target's."""
        role = self.following.role if self.following else "assistant"
        if role == "assistant":
            role = "tool" if self.message.tool_calls else "user"
        follower = Message(role=role, content=MARK, tool_call_id=_first_id(form.given))
        try:
            turns = [*self.before, form.given, as_given(follower.as_dict(), self.template)]
            longer = self.render(turns, self.conversation.tools, False, kwargs)
        except TemplateLimitError:
            raise
        except RENDERING:
            longer = ""
        ended, told = longer.rfind(MARK), said.strip()
        at = longer.rfind(told, 0, ended) + len(told) if told and told in rest else -1
        behind = rest[rest.rfind(told) + len(told) :]
        if longer.startswith(closed) or (at >= 0 and longer.startswith(behind, at)):
            tail = longer[len(closed) if longer.startswith(closed) else at + len(behind) :]
            space = tail[: len(tail) - len(tail.lstrip())]
            for stop in sorted(self.template.stops, key=len, reverse=True):
                if tail[len(space) :].startswith(stop):
                    return rest + space + stop
        if not self.template.eos:
            return None
        at = rest.rfind(said.strip()) + len(said.strip()) if said.strip() else len(rest)
        end = at if said.strip() in rest and not rest[at:].strip() else len(rest)
        return rest[:end] + self.template.eos

    def _restored(self, stopped: str, prompt: str, opened: str, thought: str, said: str) -> Iterator[str]:
        """The template takes the thought out of the turn. If it writes an empty thought in its place, the thought
        belongs there. If the turn's text holds it in the tags that the prompt opens, or that the template knows, the
        text is what the target wrote, less what the prompt already holds."""
        at = stopped.rfind(said.strip()) + len(said.strip())
        for opener, closer in THOUGHTS:
            empty = re.match(rf"\s*{re.escape(opener)}(\s*){re.escape(closer)}", stopped[:200])
            if empty:
                middle = empty.start(1) + len(empty[1]) // 2
                yield stopped[:middle] + thought.strip() + stopped[middle:]
            content = self.message.content
            inside, found, _ = content.partition(closer)
            if not found or self.message.reasoning or opened not in ("", opener):
                continue
            if opened and inside.lstrip().startswith(opener):
                content = content.lstrip().removeprefix(opener)
                content = content.lstrip("\n") if prompt.endswith("\n") else content
            if opened or (not empty and closer in self.template.source and not self.template.switches):
                yield content.rstrip() + stopped[at:]

    def _wrong(self, completion: str, opened: str, thought: str, said: str) -> str | None:
        """Why the completion is not what the turn says, or None."""
        stop = next((stop for stop in self.template.stops if completion.endswith(stop)), "")
        inside = completion[: len(completion) - len(stop)]
        told = [thought, said, *(text for call in self.message.tool_calls for text in _leaves(call["function"]))]
        if any(stop in text for stop in self.template.stops for text in told):
            return STOPS
        if not self._shows_calls(inside):
            return CALLLESS
        squashed = _squash(inside)
        if _squash(thought) not in squashed:
            return THOUGHTLESS
        if _squash(said) not in squashed[squashed.find(_squash(thought)) + len(_squash(thought)) :]:
            return HIDDEN
        for opener, closer in THOUGHTS:
            closers = inside.count(closer) - said.count(closer) - thought.count(closer)
            openers = inside.count(opener) - said.count(opener) - thought.count(opener) + (opened == opener)
            if max(closers, openers) > 1:
                return TWICE
            if closers > openers:
                return UNOPENED
        return OPENED if opened and not thought else None


def shared(one: str, other: str) -> int:
    """Characters that two texts begin with alike."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def refusal(error: Exception) -> str:
    """Why a template cannot render a conversation."""
    if isinstance(
        error, TemplateError
    ):  # raised by the template itself, as for roles in an order that it does not know
        return f"{REFUSALS[0]}: {str(error)[:80]}"
    return f"{REFUSALS[1]}: {type(error).__name__}: {first_line(error)[:60]}"


def _weight(reason: str) -> int:
    """Of several attempts, the reason of the one that came furthest counts."""
    order = (NO_STOP, HIDDEN, CALLLESS, THOUGHTLESS, UNOPENED, TWICE, OPENED, STOPS)
    return order.index(reason) if reason in order else -1


def as_given(message: dict[str, Any], template: Template) -> dict[str, Any]:
    """The turn for a template that reads content as parts, or that has another name for the role of tools."""
    if message["role"] == "tool" and template.calls_tools_environment:
        message = message | {"role": "environment"}
    if not template.as_parts or not isinstance(message["content"], str):
        return message
    return message | {"content": [{"type": "text", "text": message["content"]}]}


def _first_id(message: Mapping[str, Any]) -> str | None:
    return next((call["id"] for call in message.get("tool_calls") or () if "id" in call), None)


def _with_arguments(call: Mapping[str, Any], as_text: bool) -> dict[str, Any] | None:
    """The call with its arguments as an object, or as text; None if they are no object."""
    function = call["function"]
    arguments = function["arguments"]
    if isinstance(arguments, str) and not as_text:
        arguments = arguments_of(arguments)
        if not isinstance(arguments, dict):
            return None
    elif as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def _opens(text: str) -> str:
    """The tag with which the end of a prompt leaves a thought open, or ""."""
    return next((opener for opener, closer in THOUGHTS if text.rfind(opener) > text.rfind(closer)), "")


def _thinks_nothing(completion: str) -> bool:
    """Whether an answer begins with a thought without words."""
    text = completion.lstrip()
    return any(text.removeprefix(opener).lstrip().startswith(closer) for opener, closer in THOUGHTS)


def _stopped(rest: str, stops: Sequence[str]) -> str | None:
    """Up to and with the first stop; None without one."""
    found = [(at, -len(stop)) for stop in stops if (at := rest.find(stop)) >= 0]
    if not found:
        return None
    at, length = min(found)
    return rest[: at - length]


def _squash(text: str) -> str:
    return "".join(text.split())


NUMBER = re.compile(r'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?')


def _is_dumped(content: Any, text: str) -> bool:
    """Whether a template that does not know parts wrote the list of them."""
    return isinstance(content, list) and any(dump in text for dump in (str(content), json.dumps(content)))


def _leaves(function: Mapping[str, Any]) -> list[str]:
    """What a render of the call must hold: its name, and the names and values of its arguments, numbers as given."""
    arguments = function["arguments"]
    found = [function["name"]]
    if isinstance(arguments, str):
        numbers = [token for token in NUMBER.findall(arguments) if not token.startswith('"')]
        read = arguments_of(arguments)
        return [*found, arguments] if read is None else [*found, *_texts(read, numbers=False), *numbers]
    return [*found, *_texts(arguments)]


def _texts(value: Any, numbers: bool = True) -> list[str]:
    """Names, texts and numbers of a JSON value, in whatever order."""
    found, open_values = list[str](), [value]
    while open_values:
        inner = open_values.pop()
        if isinstance(inner, dict):
            found += map(str, inner)
            open_values += inner.values()
        elif isinstance(inner, list | tuple):
            open_values += inner
        elif isinstance(inner, str):
            found.append(inner)
        elif numbers and isinstance(inner, int | float) and not isinstance(inner, bool):
            found.append(json.dumps(inner))
    return found


def _shows(inside: str, squashed: str, text: str) -> bool:
    """As it is, or escaped as JSON writes it."""
    if text in inside or _squash(text) in squashed:
        return True
    return any(json.dumps(text, ensure_ascii=ascii_only)[1:-1] in inside for ascii_only in (False, True))


def _is_escaped(inside: str, calls: Sequence[Mapping[str, Any]]) -> bool:
    """Whether arguments given as text were written as a JSON string, with quotes escaped."""
    given = (call["function"]["arguments"] for call in calls)
    texts = [text if isinstance(text, str) else json.dumps(text, ensure_ascii=False) for text in given]
    return any('"' in text and json.dumps(text, ensure_ascii=False)[1:-1] in inside for text in texts)
