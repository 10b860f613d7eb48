"""The target's own chat template, one tokenization, and the loss mask by character offsets."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from jinja2 import TemplateError, TemplateSyntaxError
from numpy.typing import NDArray
from tokenizers import Encoding
from transformers import AutoTokenizer, GenerationConfig
from transformers.utils.chat_template_utils import render_jinja_template

from specforge.alignment import prediction_depth
from specforge.config import DataSettings
from specforge.console import say
from specforge.data.formats import Entry, Text, Tokens
from specforge.data.limits import CHARACTERS, TemplateLimitError, limited
from specforge.data.spans import Span, Template, assistant_spans, end_of_turn, generation_spans
from specforge.errors import ConfigError, first_line
from specforge.records import Conversation, Example, Message

TEMPLATES = Path(__file__).parent / "templates"
SYNONYMS = {"qwen": "chatml", "qwen2": "chatml", "smollm2": "chatml", "llama-3": "llama3", "phi-3": "phi3"}
PROBE = Conversation(id="", messages=(Message(role="user", content="a"), Message(role="assistant", content="b")))
END = itemgetter(1)
RENDERING = (TemplateError, TypeError, LookupError, ValueError, ArithmeticError, AttributeError, RecursionError)
STATES_SPANS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTokenizer:
    """A target's tokenizer and chat template."""

    def __init__(self, model_path: str, chat_template: str | None = None, trust_remote_code: bool = False) -> None:
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(model_path, trust_remote_code=trust_remote_code)
        except BaseException as error:  # of many kinds; a panic in Rust, as of the tokenizers library, is no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ConfigError(
                f"the target's tokenizer cannot be loaded: {first_line(error)}",
                where=f"--model-path {model_path}",
                fix="give a model folder with tokenizer files, or the name of a model on the hub",
            ) from error
        if not self.tokenizer.is_fast:
            raise ConfigError(
                "the target has no fast tokenizer, so tokens have no character offsets",
                where=f"--model-path {model_path}",
                fix="add its tokenizer.json to the folder",
            )
        own = self.tokenizer.chat_template
        if isinstance(own, dict):  # several by name: this is the one that apply_chat_template takes
            own = self.tokenizer.chat_template = own.get("default")
        if chat_template is not None:
            self.tokenizer.chat_template = _template_text(chat_template)
        if not self.tokenizer.chat_template:
            raise ConfigError(
                "the target has no chat template",
                where=f"--model-path {model_path}",
                fix=f"give one with --chat-template: a Jinja file, or one of {', '.join(template_names())}",
            )
        self._model_path = model_path
        self._special = tuple(
            t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special and t.content
        )
        self._probe()
        self._template = Template(self.render, self._special)
        self._template = Template(self.render, self._special, tuple(self._stop_texts()), self._prompt())
        self.tokenizer.backend_tokenizer.no_truncation()
        self.tokenizer.backend_tokenizer.no_padding()
        if chat_template is not None and own:
            self._compare(own, chat_template)

    def _probe(self) -> None:
        """Raises ConfigError where two short turns are too much for the template."""
        try:
            self.render([message.as_dict() for message in PROBE.messages])
        except TemplateLimitError as error:
            raise ConfigError(
                f"the chat template cannot be used: {error}",
                where="the target's tokenizer, or --chat-template",
                fix="look at the template; it was made by whoever made the tokenizer",
            ) from error
        except RENDERING:
            pass

    def _compare(self, own: str, chat_template: str) -> None:
        """Say so where another template than the target's own gives another text."""
        turns = [message.as_dict() for message in PROBE.messages]
        try:
            served = self.tokenizer.apply_chat_template(turns, tokenize=False, chat_template=own)
            if served == self.render(turns):
                return
        except RENDERING:
            pass
        say(
            f"note: --chat-template {chat_template} renders otherwise than the template that ships with the target; "
            "serve with it, too, or leave the flag out"
        )

    @property
    def fingerprint(self) -> str:
        """Of vocabulary and rules: a store made with another tokenizer is refused."""
        return xxhash.xxh3_128_hexdigest(self.tokenizer.backend_tokenizer.to_str().encode())

    @property
    def template_fingerprint(self) -> str:
        return xxhash.xxh3_128_hexdigest(str(self.tokenizer.chat_template).encode())

    def render(self, messages: Sequence[dict[str, Any]], tools: Sequence[Any] = (), open_turn: bool = False) -> str:
        """The conversation as text; with `open_turn` up to where serving hands over to the target."""
        try:
            with limited():
                text = str(
                    self.tokenizer.apply_chat_template(
                        list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=open_turn
                    )
                )
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"the chat template has a fault in line {error.lineno}: {error.message}",
                where="--chat-template",
                fix="mend the Jinja file, or leave the flag out to use the target's own template",
            ) from error
        if len(text) > CHARACTERS:
            raise TemplateLimitError(f"it gives a text of {len(text):,} characters")
        return text

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """Tokens up to and including the header of the first assistant turn."""
        before = []
        for message in conversation.messages:
            if message.role == "assistant":
                break
            before.append(message.as_dict())
        text = self.render(before, conversation.tools, open_turn=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def stop_ids(self) -> list[int]:
        """The tokens that end what the target writes: the template's end of turn, and those its configuration names."""
        found = self.tokenizer.convert_tokens_to_ids(list(self._template.stops))
        return sorted(token for token in set(found) if token is not None)

    def _stop_texts(self) -> list[str]:
        texts = {self.tokenizer.eos_token} if self.tokenizer.eos_token else set()
        try:
            stated = GenerationConfig.from_pretrained(self._model_path).eos_token_id
        except (OSError, ValueError):
            stated = None
        ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
        texts |= {text for text in self.tokenizer.convert_ids_to_tokens(ids) if text in self._special}
        try:
            probe = assistant_spans(self._template, PROBE)
        except RENDERING:
            return sorted(texts)
        if not isinstance(probe, str):
            text, spans = probe
            texts |= {token for token in self._special if text[slice(*spans[0])].endswith(token)}
        return sorted(texts)

    def _prompt(self) -> str:
        """What the template writes to hand over to the target, "" where that is not simply put behind the rest."""
        turn = [{"role": "user", "content": "a"}]
        try:
            closed, opened = self.render(turn), self.render(turn, open_turn=True)
        except RENDERING:
            return ""
        return opened[len(closed) :] if opened.startswith(closed) else ""

    def special_ids(self) -> list[int]:
        """Special tokens and ends of turn: always in the draft vocabulary."""
        named = {
            token for token in self.tokenizer.all_special_ids if token is not None
        }  # one may not be in the vocabulary
        return sorted(named | set(self.stop_ids()))

    def example(self, conversation: Conversation, sample_id: int, max_length: int) -> Example | str:
        """One conversation, cut at `max_length`; see `examples`."""
        rules = DataSettings(max_length=max_length, overlong="truncate")
        [found] = self.examples([conversation], rules)
        if isinstance(found, str):
            return found
        return Example(sample_id=sample_id, token_ids=found[0], loss_mask=found[1])

    def examples(self, entries: Sequence[Entry], rules: DataSettings) -> list[Masked | str]:
        """For each entry exactly the tokens that the target would be fed, and which of them it would have written.

        A string instead is the reason why there is none: no assistant turn that can be located beyond doubt, nothing
        left within the maximum length, or nothing that a draft could predict."""
        located = [self._locate(entry) for entry in entries]
        texts = [found[0] for found in located if isinstance(found, tuple)]
        encodings = iter(self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False))
        results = list[Masked | str]()
        for entry, found in zip(entries, located, strict=True):
            if isinstance(found, tuple):
                encoded = next(encodings)
                masked = _mask(encoded, found[1], rules.train_on)
            elif isinstance(entry, Tokens) and found is None:
                masked = self._given(entry)
            else:
                masked = str(found)
            results.append(masked if isinstance(masked, str) else _cut(*masked, rules))
        return results

    def _locate(self, entry: Entry) -> tuple[str, list[Span]] | str | None:
        """Text and spans, or the reason why there are none; None for what is tokens already."""
        if isinstance(entry, Tokens):
            return None
        if isinstance(entry, Text):
            return self._headed(entry.text)
        try:
            if STATES_SPANS.search(self.tokenizer.chat_template):
                return self._stated(entry)
            return assistant_spans(self._template, entry)
        except TemplateError as error:  # raised by the template itself, for roles in an order that it does not know
            if isinstance(error, TemplateSyntaxError):
                raise
            return f"the template refuses it: {str(error)[:80]}"
        except RENDERING as error:  # a template that expects other fields
            return f"the template cannot take it: {type(error).__name__}: {str(error)[:60]}"

    def _stated(self, conversation: Conversation) -> tuple[str, list[Span]] | str:
        messages = [message.as_dict() for message in conversation.messages]
        with limited():
            [text], [blocks] = render_jinja_template(
                [messages],
                tools=list(conversation.tools) or None,
                chat_template=self.tokenizer.chat_template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        spans = generation_spans(text, blocks, conversation, self._special)
        return spans if isinstance(spans, str) else (text, spans)

    def _headed(self, text: str) -> tuple[str, list[Span]] | str:
        """Text that already went through the template. A turn stands between the template's assistant header and its
        end of turn. A header inside a user's own text cannot be told from a real one."""
        spans, at, header = list[Span](), 0, self._template.prompt
        while header and (at := text.find(header, at)) >= 0:
            start = at + len(header)
            ends = [end for token in self._special if (end := text.find(token, start)) >= 0]
            at = end_of_turn(text, min(ends), self._special) if ends else start
            if at > start:
                spans.append((start, at))
        return (text, spans) if spans else "text without a whole assistant turn"

    def _given(self, entry: Tokens) -> tuple[NDArray[np.int32], NDArray[np.bool_], list[int]] | str:
        if entry.token_ids.max() >= len(self.tokenizer):
            return "input_ids outside the target's vocabulary"
        mask_T = entry.loss_mask
        ends = np.flatnonzero(mask_T & ~np.append(mask_T[1:], False)) + 1
        return entry.token_ids, mask_T, ends.tolist()


Masked = tuple[NDArray[np.int32], NDArray[np.bool_]]  # token_ids [T], loss_mask [T]


def _mask(
    encoded: Encoding, spans: Sequence[Span], train_on: str
) -> tuple[NDArray[np.int32], NDArray[np.bool_], list[int]] | str:
    """(token_ids [T], loss_mask [T], token at which each turn ends): a token is supervised where it lies wholly
    inside a span. One that lies half inside belongs to nobody: the conversation is dropped.

    Some tokenizers trim spaces off their offsets: a token begins where the one before it ended."""
    ids = encoded.ids

    def first_behind(at: int) -> int:
        """The first token that ends behind the character `at`. Offsets as a list would cost a tenth of tokenization."""
        found = encoded.char_to_token(at)
        return bisect_right(encoded.offsets, at, key=END) if found is None else found

    def begins(token: int) -> int:
        return min(encoded.token_to_chars(token)[0], encoded.token_to_chars(token - 1)[1]) if token else 0

    mask_T = np.zeros(len(ids), dtype=np.bool_)
    ends = list[int]()
    for number, span in enumerate(spans):
        first, last = map(first_behind, span)
        if any(token < len(ids) and begins(token) < at for token, at in zip((first, last), span, strict=True)):
            return "a token lies across the border of an assistant turn"
        if train_on == "all-turns" or number == len(spans) - 1:
            mask_T[first:last] = True
        ends.append(last)
    return np.asarray(ids, dtype=np.int32), mask_T, ends


def _cut(ids_T: NDArray[np.int32], mask_T: NDArray[np.bool_], ends: Sequence[int], rules: DataSettings) -> Masked | str:
    """Within the maximum length, by the rule that `overlong` names."""
    length = len(ids_T)
    if length > rules.max_length:
        if rules.overlong == "drop":
            return "longer than the maximum length"
        length = rules.max_length
        if rules.overlong == "truncate-turn":
            length = max((end for end in ends if end <= length), default=0)
            if not length:
                return "no whole turn within the maximum length"
    if not prediction_depth(mask_T[:length]).any():
        return "the loss mask leaves nothing to predict within the maximum length"
    return ids_T[:length], mask_T[:length]


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
