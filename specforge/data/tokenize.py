"""Conversations to the rows that a draft learns from: the tokens that serving feeds, and those that the target writes.

Prompt and completion of each turn (`serving_view`) are tokenized apart, as in serving. Turn n goes on in the row of
turn n-1 if that row's tokens are the beginning of its prompt; otherwise a new row begins."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from jinja2 import TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig
from transformers.utils import cached_file

from specforge.alignment import prediction_depth
from specforge.config import DataSettings
from specforge.console import say
from specforge.data.formats import Entry, Text, Tokens
from specforge.data.limits import CHARACTERS, TemplateLimitError, limited
from specforge.data.serving_view import (
    MARK,
    RENDERING,
    SWITCHES,
    Template,
    Turn,
    View,
    as_given,
    refusal,
    serving_view,
    shared,
)
from specforge.errors import ConfigError, first_line
from specforge.records import Conversation

TEMPLATES = Path(__file__).parent / "templates"
SYNONYMS = {"qwen": "chatml", "qwen2": "chatml", "smollm2": "chatml", "llama-3": "llama3", "phi-3": "phi3"}
ASKED = {"role": "user", "content": "\u2042asked\u2042"}
ANSWERED = {"role": "assistant", "content": MARK}
TOOL = {"type": "function", "function": {"name": "a", "description": "a", "parameters": {"type": "object"}}}
DATE = datetime(2026, 1, 1, 12)  # what templates are told of the time: a restart next day goes on with the same rows

CHANGED = "the template renders earlier turns otherwise once the next one is asked"
FUSED = "the tokens of an earlier answer are others inside a prompt"
LONGER = "longer than the maximum length"
NO_WHOLE_TURN = "no whole turn within the maximum length"
NOTHING = "the loss mask leaves nothing to predict within the maximum length"

Masked = tuple[NDArray[np.int32], NDArray[np.bool_]]  # token_ids [T], loss_mask [T]


@dataclass(frozen=True, slots=True)
class Rows:
    """What became of a conversation."""

    masked: tuple[Masked, ...]
    left_out: Counter[str] = field(default_factory=Counter)  # turns that are not supervised, by reason
    more: Counter[str] = field(default_factory=Counter)  # rows behind the first, by reason


class ChatTokenizer:
    """A target's tokenizer and chat template."""

    def __init__(self, model_path: str, chat_template: str | None = None, trust_remote_code: bool = False) -> None:
        self._model_path = model_path
        self.tokenizer: Any = _load(model_path, trust_remote_code)
        self.backend: Tokenizer = self.tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        own = self.tokenizer.chat_template
        if chat_template is not None:
            self.tokenizer.chat_template = _template_text(chat_template)
        self._sources = _named(self.tokenizer.chat_template)
        if not any(self._sources.values()):
            raise ConfigError(
                "the target has no chat template",
                where=f"--model-path {model_path}",
                fix=f"give one with --chat-template: a Jinja file, or one of {', '.join(template_names())}",
            )
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self.size = max(vocabulary.values()) + 1  # ids may have holes
        self._config = _config(model_path, trust_remote_code)
        self._refuse_ids_without_rows(max(vocabulary, key=vocabulary.__getitem__))
        self._added = {
            index: token for index, token in self.backend.get_added_tokens_decoder().items() if token.content
        }
        self._templates = dict[str, Template]()
        self._start()
        if chat_template is not None and own:
            self._compare(own, chat_template)

    def _start(self) -> None:
        """Learn by rendering what the templates show of themselves. Raises ConfigError if two turns are too much."""
        stops = set(self._stated_stops())
        eos = self.tokenizer.eos_token or next(iter(sorted(stops)), "")
        for name, source in self._sources.items():
            found = Template(self.render, source, _switches(source), as_parts=self._wants_parts(source))
            stops |= self._shown_stops(found, stops)
            self._templates[name] = found
        ordered, tokens = tuple(sorted(stops)), tuple(token.content for token in self._added.values())
        self._templates = {
            name: replace(found, stops=ordered, tokens=tokens, eos=eos) for name, found in self._templates.items()
        }

    def _template_for(self, tools: Sequence[Any]) -> Template:
        """As transformers, and so a server, chooses among named templates."""
        named = self._templates
        return named["tool_use"] if tools and "tool_use" in named else named["default"]

    def _refuse_ids_without_rows(self, text: str) -> None:
        rows = (self._config.get("text_config") or self._config).get("vocab_size")
        if isinstance(rows, int) and self.size > rows:
            raise ConfigError(
                f"the tokenizer's highest id is {self.size - 1:,} ({text!r}), and the model has {rows:,} rows in its "
                "embedding",
                where=f"--model-path {self._model_path}",
                fix="use the tokenizer that belongs to the model, or resize the model's embedding",
            )

    def _compare(self, own: Any, chat_template: str) -> None:
        """Note another template than the target's own if it gives another text."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            source = _named(own).get("default", "")
            if source and self._limited(source, turns, (), False, {}) == self.render(turns):
                return
        except (*RENDERING, ConfigError):
            pass
        say(
            f"note: --chat-template {chat_template} renders otherwise than the template that ships with the target; "
            "serve with it, too, or leave the flag out"
        )

    @property
    def fingerprint(self) -> str:
        """Of vocabulary and rules: a store made with another tokenizer is refused."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        if self.size != self.backend.get_vocab_size(with_added_tokens=True):  # the library warns of holes as of damage
            told = [sorted(self.backend.get_vocab().items()), *map(repr, (self.backend.normalizer, self._added))]
            return xxhash.xxh3_128_hexdigest(repr(told).encode())
        return xxhash.xxh3_128_hexdigest(self.backend.to_str().encode())

    @property
    def template_fingerprint(self) -> str:
        sources = (
            self._sources["default"] if list(self._sources) == ["default"] else repr(sorted(self._sources.items()))
        )
        return xxhash.xxh3_128_hexdigest(sources.encode())

    @property
    def reads_the_clock(self) -> bool:
        """Whether the template writes a date: it is always DATE."""
        return any("strftime_now" in source for source in self._sources.values())

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[Any] = (),
        open_turn: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text; with `open_turn` up to where serving hands over to the target."""
        found = self._template_for(tools)
        return self._rendered_by(found.source, messages, tools, open_turn, kwargs or {})

    def _rendered_by(
        self,
        source: str,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[Any],
        open_turn: bool,
        kwargs: Mapping[str, Any],
    ) -> str:
        """As SGLang's server does: if the template cannot take the tools as they were sent, it gets the functions."""
        sent = [_sent(tool) for tool in tools]
        try:
            return self._limited(source, messages, sent, open_turn, kwargs)
        except TemplateLimitError:
            raise
        except RENDERING:
            if not sent:
                raise
            return self._limited(source, messages, [tool["function"] for tool in sent], open_turn, kwargs)

    def _limited(
        self,
        source: str,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[Any],
        open_turn: bool,
        kwargs: Mapping[str, Any],
    ) -> str:
        try:
            with limited():
                text = str(
                    self.tokenizer.apply_chat_template(
                        list(messages),
                        **{
                            "strftime_now": DATE.strftime,
                            **kwargs,
                            "tools": list(tools) or None,
                            "chat_template": source,
                            "tokenize": False,
                            "add_generation_prompt": open_turn,
                        },
                    )
                )
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"the chat template has a fault in line {error.lineno}: {error.message}",
                where="--chat-template",
                fix="correct the Jinja file, or leave the flag out to use the target's own template",
            ) from error
        if len(text) > CHARACTERS:
            raise TemplateLimitError(f"it gives a text of {len(text):,} characters")
        return text

    def asked(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Tokens of the prompt that serving feeds for these turns."""
        template = self._template_for(tools)
        return self._encode(self.render([as_given(turn, template) for turn in messages], tools, True, kwargs))

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """Tokens up to and including the header of the first assistant turn."""
        before = []
        for message in conversation.messages:
            if message.role == "assistant":
                break
            before.append(message.as_dict())
        return self.asked(before, conversation.tools, conversation.kwargs)

    def _encode(self, text: str) -> list[int]:
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    # What the files and the template say of stops

    def stop_ids(self) -> list[int]:
        """The tokens that end what the target writes: the template's end of turn, and those its files name."""
        by_text = {self._text_of(index): index for index in self._stated_ids()}
        by_text |= {token.content: index for index, token in self._added.items()}
        return sorted({by_text[text] for text in self._templates["default"].stops if text in by_text})

    def special_ids(self) -> list[int]:
        """Special tokens and ends of turn: always in the draft vocabulary."""
        named = {token for token in self.tokenizer.all_special_ids if token is not None}  # one may not be in it
        return sorted(named | set(self.stop_ids()))

    def _stated_ids(self) -> list[int]:
        """The ends that config.json, generation_config.json and the tokenizer name."""
        try:
            generation = GenerationConfig.from_pretrained(self._model_path).eos_token_id
        except (OSError, ValueError, TypeError):
            generation = None
        inner = self._config.get("text_config")
        stated = [self.tokenizer.eos_token_id, generation, self._config.get("eos_token_id")]
        stated.append(inner.get("eos_token_id") if isinstance(inner, dict) else None)
        ids = {one for given in stated for one in (given if isinstance(given, list) else [given])}
        return sorted(one for one in ids if type(one) is int and 0 <= one < self.size)

    def _stated_stops(self) -> list[str]:
        return [text for index in self._stated_ids() if (text := self._text_of(index))]

    def _text_of(self, index: int) -> str:
        return self._added[index].content if index in self._added else str(self.backend.decode([index]))

    def _shown_stops(self, template: Template, known: set[str]) -> set[str]:
        """The token behind an answer, the template's own end of turn, if no stop that is known stands there, either in
        the last turn or between it and the next."""
        special = [token.content for token in self._added.values() if token.special]

        def behind(*more: dict[str, Any]) -> str:
            text = self._probe(template, [ASKED, ANSWERED, *more])
            return text.partition(MARK)[2].partition(ASKED["content"])[0]

        def first(text: str) -> set[str]:
            text = text.lstrip()
            found = [token for token in special if text.startswith(token)]
            return {max(found, key=len)} if found else set()

        last, earlier = behind(), behind(ASKED)
        if first(last) & known or any(stop in (earlier or last) for stop in known):
            return set()
        return first(last) or first(earlier) - first(self._probe(template, [ASKED]))

    def _probe(
        self, template: Template, turns: Sequence[dict[str, Any]], open_turn: bool = False, **kwargs: Any
    ) -> str:
        """A render of a few turns, with a tool for a template that needs one; "" if the template takes neither."""
        parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        for tools in ((), (TOOL,)):
            try:
                return self._rendered_by(
                    template.source, parts if template.as_parts else turns, tools, open_turn, kwargs
                )
            except TemplateLimitError as error:
                raise ConfigError(
                    f"the chat template cannot be used: {error}",
                    where="the target's tokenizer, or --chat-template",
                    fix="look at the template; it was made by whoever made the tokenizer",
                ) from error
            except RENDERING:
                continue
        return ""

    def _wants_parts(self, source: str) -> bool:
        """Whether texts are shown only if they are given as parts."""
        turns = [ASKED, ANSWERED]
        if all(turn["content"] in self._probe(Template(self.render, source), turns) for turn in turns):
            return False
        shown = self._probe(Template(self.render, source, as_parts=True), turns)
        return all(turn["content"] in shown for turn in turns)

    # Conversations to rows

    def examples(self, entries: Sequence[Entry], rules: DataSettings) -> list[Rows | str]:
        """For each entry exactly the tokens that the target is fed when it is served, and those that it writes.

        A string instead is the reason why there are none: no assistant turn whose text is certain, nothing left within
        the maximum length, or nothing that a draft could predict."""
        found = [self._view(entry, rules.train_on) for entry in entries]
        encoded = self._encoded([view for view in found if isinstance(view, View)])
        results = list[Rows | str]()
        for view in found:
            if isinstance(view, str):
                results.append(view)
            elif isinstance(view, View):
                results.append(_cut(self._rows(view, encoded), view.left_out, rules))
            else:
                results.append(_cut([(row, "") for row in view], Counter(), rules))
        return results

    def _view(self, entry: Entry, train_on: str) -> View | list[_Row] | str:
        if isinstance(entry, Tokens):
            return self._given([(entry.token_ids, entry.loss_mask)])
        if isinstance(entry, Text):
            return self._headed(entry.text, train_on)
        if entry.rows and entry.tokenizer_hash == self.fingerprint:
            exact = [(np.asarray(row.token_ids, np.int32), np.asarray(row.loss_mask, np.bool_)) for row in entry.rows]
            return self._given(exact if train_on == "all-turns" else [_last_turn(*exact[-1])])
        try:
            return serving_view(self._template_for(entry.tools), entry, train_on)
        except TemplateSyntaxError:
            raise
        except RENDERING as error:
            return refusal(error)

    def _given(self, rows: Sequence[Masked]) -> list[_Row] | str:
        found = list[_Row]()
        for ids_T, mask_T in rows:
            if len(ids_T) and ids_T.max() >= self.size:
                return "input_ids outside the target's vocabulary"
            ends = np.flatnonzero(mask_T & ~np.append(mask_T[1:], False)) + 1
            found.append(_Row(ids_T.tolist(), mask_T.tolist(), ends.tolist()))
        return found

    def _headed(self, text: str, train_on: str) -> View | str:
        """Text that already went through the template. A turn stands between a header of the assistant and a stop. A
        header inside a user's own text cannot be told from a real one."""
        headers, user = self._headers
        stops = self._templates["default"].stops
        if not headers or not stops:
            return "text whose assistant turns the template does not mark"
        header = re.compile("|".join(re.escape(one) for one in sorted(headers, key=len, reverse=True)))
        stop = re.compile("|".join(re.escape(one) for one in sorted(stops, key=len, reverse=True)))
        spans, at = list[tuple[int, int]](), 0
        while (opened := header.search(text, at)) is not None:
            ended = stop.search(text, opened.end())
            if ended is None:
                break
            at = ended.end()
            asked = text.find(user, opened.end()) if user else -1
            if 0 <= asked < ended.start():  # the turn has no stop of its own
                at = asked
            else:
                spans.append((opened.end(), ended.end()))
        if not spans:
            return "text without a whole assistant turn"
        if train_on != "all-turns":
            spans = spans[-1:]
        space = re.compile(r"\s*")
        return View([Turn(text[:a], text[a:b], space.match(text, b).group()) for a, b in spans])  # type: ignore[union-attr]

    @cached_property
    def _headers(self) -> tuple[set[str], str]:
        """(what stands before an assistant's text, what stands before a user's) in text that the template wrote."""
        template = self._templates["default"]
        base = self._probe(template, [ASKED])
        prompts = [self._probe(template, [ASKED], open_turn=True)]
        if template.switches:
            prompts += [
                self._probe(template, [ASKED], True, **dict.fromkeys(template.switches, on)) for on in (True, False)
            ]
        opened = {prompt[len(base) :] for prompt in prompts if prompt.startswith(base)} - {""}
        if not opened:  # no generation prompt: what stands behind the question
            opened = {prompts[0].partition(ASKED["content"])[2]} - {""}
        history = self._probe(template, [ASKED, ANSWERED, ASKED])
        earlier = history.partition(ASKED["content"])[2].partition(MARK)[0] if MARK in history else ""
        behind = base.partition(ASKED["content"])[2]
        earlier = earlier.removeprefix(behind)
        if earlier and any(one.startswith(earlier) for one in opened):
            opened.add(earlier)
        heads = (base.partition(ASKED["content"])[0], history.partition(MARK)[2].partition(ASKED["content"])[0])
        alike = shared(*(head[::-1] for head in heads))
        return opened, heads[0][len(heads[0]) - alike :]

    # Tokens of prompts and completions

    @cached_property
    def _clean(self) -> tuple[str, ...]:
        """Added tokens that cut a text in two whatever stands around them: what is behind one is tokenized apart."""
        texts = [token.content for token in self._added.values()]
        rendered = "".join(
            self._probe(template, [ASKED, ANSWERED, ASKED], open_turn=True) for template in self._templates.values()
        )
        wanted = {text for text in texts if text in rendered} | set(self._templates["default"].stops)
        wanted |= set(texts[:1])
        return tuple(
            token.content
            for token in self._added.values()
            if token.content in wanted
            and not (token.normalized or token.lstrip or token.rstrip or token.single_word)
            and not any(other != token.content and _overlap(other, token.content) for other in texts)
        )

    @cached_property
    def _prefixes(self) -> bool:
        """Whether the tokenizer puts a space before a text behind a special token, as SentencePiece does."""
        if not self._clean:
            return False
        tokens = self.backend.encode(self._clean[0] + "a", add_special_tokens=False).tokens
        return len(tokens) > 1 and tokens[1][:1] in ("\u2581", "\u0120")

    def _encoded(self, views: Sequence[View]) -> dict[str, list[int]]:
        """Tokens of all that the rows need, in one call of the tokenizer."""
        wanted = dict[str, None]()
        for view in views:
            for piece in self._pieces(view):
                wanted[piece] = None
        texts = list(wanted)
        found = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return {text: one.ids for text, one in zip(texts, found, strict=True)}

    def _pieces(self, view: View) -> Iterator[str]:
        for number, turn in enumerate(view.turns):
            before = view.turns[number - 1] if number else None
            if before is None or not self._goes_on(before, turn):
                yield turn.prompt
            else:
                yield self._behind_stop(before, turn)
                yield self._border(before)
            yield self._alone(turn)
            if turn.behind and self._clean:
                yield self._clean[0] + turn.behind

    def _goes_on(self, before: Turn, turn: Turn) -> bool:
        """Whether the prompt begins with all of the turn before, which ends where tokenization is cut anyway."""
        return before.completion.endswith(self._clean) and turn.prompt.startswith(before.prompt + before.completion)

    def _behind_stop(self, before: Turn, turn: Turn) -> str:
        return self._clean[0] + turn.prompt[len(before.prompt) + len(before.completion) :]

    def _alone(self, turn: Turn) -> str:
        """The completion, behind a token that it does not touch: at the start of a text some tokenizers add a space."""
        text = turn.completion
        if self._prefixes and text.startswith(" "):
            text = text[1:]
        return self._clean[0] + text if self._clean else text

    def _border(self, turn: Turn) -> str:
        """The end of a prompt together with the completion, as a later prompt holds them, from the last token on that
        cuts the text. Only a turn that ends in such a token has one."""
        ends = [(turn.prompt.rfind(text) + len(text), text) for text in self._clean if text in turn.prompt]
        if not ends:
            return self._clean[0] + turn.prompt + turn.completion
        at, text = max(ends)
        return text + turn.prompt[at:] + turn.completion

    def _rows(self, view: View, encoded: Mapping[str, list[int]]) -> list[tuple[_Row, str]]:
        """The rows of a conversation, each with the reason why it did not go on in the one before."""
        skip = 1 if self._clean else 0
        rows, before = list[tuple[_Row, str]](), None
        for turn in view.turns:
            written = encoded[self._alone(turn)][skip:]
            if before is None:
                rows.append((_Row(list(encoded[turn.prompt])), ""))
            else:
                row, goes_on = rows[-1][0], self._goes_on(before, turn)
                if goes_on and _ends_with(row.ids, encoded[self._border(before)][skip:]):
                    row.extend(encoded[self._behind_stop(before, turn)][1:], False)
                else:
                    prompt = self._encode(turn.prompt) if goes_on else list(encoded[turn.prompt])
                    if prompt[: len(row.ids)] == row.ids:
                        row.extend(prompt[len(row.ids) :], False)
                    else:
                        rows.append((_Row(prompt), FUSED if goes_on else CHANGED))
            rows[-1][0].extend(written, True)
            if turn.behind and turn.completion.endswith(self._clean):
                rows[-1][0].behind = encoded[self._clean[0] + turn.behind][1:]
            before = turn
        for row, _ in rows:
            row.extend(row.behind, False)
        return rows


@dataclass(slots=True)
class _Row:
    ids: list[int]
    mask: list[bool] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)  # where each supervised turn ends
    behind: list[int] = field(default_factory=list)  # what the template writes behind it

    def extend(self, ids: list[int], supervised: bool) -> None:
        self.mask += [False] * (len(self.ids) - len(self.mask))
        self.ids += ids
        self.mask += [supervised] * len(ids)
        if supervised:
            self.behind = []
            self.ends.append(len(self.ids))


def _last_turn(ids_T: NDArray[np.int32], mask_T: NDArray[np.bool_]) -> Masked:
    """The row with no more than its last run of supervised tokens."""
    last = np.flatnonzero(mask_T)[-1] if mask_T.any() else 0
    context = np.flatnonzero(~mask_T[: last + 1])
    return ids_T, mask_T & (np.arange(len(mask_T)) > (context[-1] if len(context) else -1))


def _ends_with(ids: list[int], end: list[int]) -> bool:
    return ids[len(ids) - len(end) :] == end


def _cut(rows: Sequence[tuple[_Row, str]], left_out: Counter[str], rules: DataSettings) -> Rows | str:
    """Within the maximum length, by the rule that `overlong` names."""
    kept, reasons, more = list[Masked](), Counter(left_out), Counter[str]()
    for row, reason in rows:
        length = len(row.ids)
        if length > rules.max_length:
            length = rules.max_length
            if rules.overlong == "drop":
                reasons[LONGER] += len(row.ends)
                continue
            if rules.overlong == "truncate-turn":
                length = max((end for end in row.ends if end <= length), default=0)
                if not length:
                    reasons[NO_WHOLE_TURN] += len(row.ends)
                    continue
                reasons[LONGER] += sum(end > length for end in row.ends)
        mask_T = np.asarray(row.mask[:length], dtype=np.bool_)
        if not prediction_depth(mask_T).any():
            reasons[NOTHING] += len(row.ends)
            continue
        if kept:
            more[reason] += 1
        kept.append((np.asarray(row.ids[:length], dtype=np.int32), mask_T))
    if not kept:
        return reasons.most_common(1)[0][0] if reasons else NOTHING
    return Rows(tuple(kept), +reasons, more)


def _overlap(one: str, other: str) -> bool:
    """Whether two added tokens could share characters of a text."""
    if other in one or one in other:
        return True
    most = min(len(one), len(other))
    return any(one.endswith(other[:n]) or other.endswith(one[:n]) for n in range(1, most))


def _sent(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool as SGLang's server hands it to the template: with all keys of its protocol, and in their order."""
    function = tool.get("function", tool)
    if not isinstance(function, Mapping):
        function = tool
    known = {
        "description": function.get("description"),
        "name": function.get("name"),
        "parameters": function.get("parameters", function.get("input_schema")),
        "strict": bool(function.get("strict", False)),
    }
    return {"type": "function", "function": known, "defer_loading": tool.get("defer_loading")}


def _switches(source: str) -> tuple[str, ...]:
    """The variables of a template that turn thoughts on and off."""
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", source)
    try:
        with limited():  # it folds constants
            undeclared = meta.find_undeclared_variables(environment.parse(plain))
    except RENDERING:
        return ()
    return tuple(name for name in SWITCHES if name in undeclared)


def _named(template: Any) -> dict[str, str]:
    """{name: source} of the templates that a tokenizer has."""
    if isinstance(template, Mapping):
        found = {str(name): str(source) for name, source in template.items()}
        if "default" not in found and found:
            found["default"] = next(iter(found.values()))
        return {name: found[name] for name in ("default", "tool_use") if name in found}
    return {"default": str(template)} if template else {}


def _load(model_path: str, trust_remote_code: bool) -> Any:
    """The tokenizer as transformers has it, over what tokenizer.json says: that is what a server tokenizes by, and the
    class that tokenizer_config.json names may put other rules in its place."""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model_path, trust_remote_code=trust_remote_code)
        file = cached_file(model_path, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
        stated = Tokenizer.from_file(file) if file else None
    except BaseException as error:  # of many kinds; a panic in Rust, as of the tokenizers library, is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ConfigError(
            f"the target's tokenizer cannot be loaded: {first_line(error)}",
            where=f"--model-path {model_path}",
            fix="give a model folder with tokenizer files, or the name of a model on the hub",
        ) from error
    if not tokenizer.is_fast:
        raise ConfigError(
            "the target has no fast tokenizer, and rows are made by the rules of its tokenizer.json",
            where=f"--model-path {model_path}",
            fix="add its tokenizer.json to the folder",
        )
    if stated is not None:
        here, backend = stated.get_vocab(with_added_tokens=True), tokenizer.backend_tokenizer
        known = stated.get_added_tokens_decoder()
        missing = [
            (index, token)
            for index, token in sorted(backend.get_added_tokens_decoder().items())
            if index not in known and token.content not in here
        ]
        if all(index == len(here) + at for at, (index, _) in enumerate(missing)):  # those of tokenizer_config.json
            stated.add_tokens([token for _, token in missing])
            tokenizer._tokenizer = stated
        else:
            backend.normalizer, backend.pre_tokenizer = stated.normalizer, stated.pre_tokenizer
            backend.decoder = stated.decoder
    return tokenizer


def _config(model_path: str, trust_remote_code: bool) -> dict[str, Any]:
    """config.json, or nothing."""
    try:
        found = PretrainedConfig.get_config_dict(model_path, trust_remote_code=trust_remote_code)[0]
    except (OSError, ValueError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def template_names() -> list[str]:
    return sorted({*(path.stem for path in TEMPLATES.glob("*.jinja")), *SYNONYMS})


def _template_text(chat_template: str) -> str:
    named = TEMPLATES / f"{SYNONYMS.get(chat_template, chat_template)}.jinja"
    path = named if chat_template in template_names() else Path(chat_template)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the chat template cannot be read: {error}",
            where=f"--chat-template {chat_template}",
            fix=f"give a Jinja file or one of {', '.join(template_names())}, or leave it out to use the target's own",
        ) from error
