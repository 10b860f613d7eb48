"""The target's own chat template, one tokenization, and the loss mask by character offsets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from jinja2 import TemplateError, TemplateSyntaxError
from transformers import AutoTokenizer

from specforge.errors import ConfigError, DataError
from specforge.records import Conversation, Example

ALIASES = {"llama3", "llama4", "qwen", "qwen3", "phi3", "phi4", "mistral", "gemma", "deepseek", "gpt-oss"}


MARK = "\u2042mark\u2042"


class ChatTokenizer:
    """A target's tokenizer and chat template."""

    def __init__(self, model_path: str, chat_template: str | None = None, trust_remote_code: bool = False) -> None:
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(model_path, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"the target's tokenizer cannot be loaded: {str(error).splitlines()[0]}",
                where=f"--model-path {model_path}",
                fix="give a model folder with tokenizer files, or the name of a model on the hub",
            ) from error
        if not self.tokenizer.is_fast:
            raise ConfigError(
                "the target has no fast tokenizer, so tokens have no character offsets",
                where=f"--model-path {model_path}",
                fix="add its tokenizer.json to the folder",
            )
        if chat_template in ALIASES and self.tokenizer.chat_template:
            chat_template = None  # a short name: what ships with the target is that template, exactly
        if chat_template is not None:
            self.tokenizer.chat_template = _template_text(chat_template)
        if not self.tokenizer.chat_template:
            raise ConfigError(
                "the target has no chat template",
                where=f"--model-path {model_path}",
                fix="give one with --chat-template FILE",
            )

    @property
    def fingerprint(self) -> str:
        """Of vocabulary and rules: a store made with another tokenizer is refused."""
        return xxhash.xxh3_128_hexdigest(self.tokenizer.backend_tokenizer.to_str().encode())

    @property
    def template_fingerprint(self) -> str:
        return xxhash.xxh3_128_hexdigest(str(self.tokenizer.chat_template).encode())

    def render(self, messages: Sequence[dict[str, str]], open_turn: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=open_turn)
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"the chat template has a fault in line {error.lineno}: {error.message}",
                where="--chat-template",
                fix="mend the Jinja file, or leave the flag out to use the target's own template",
            ) from error
        return str(text)

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """Tokens up to and including the header of the first assistant turn."""
        before = []
        for message in conversation.messages:
            if message.role == "assistant":
                break
            before.append({"role": message.role, "content": message.content})
        return list(self.tokenizer(self.render(before, open_turn=True), add_special_tokens=False)["input_ids"])

    def stop_ids(self) -> list[int]:
        """The tokens that end an assistant turn in this template."""
        spans, text = self._spans([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        ids = self.tokenizer(text[: spans[0][1]], add_special_tokens=False)["input_ids"] if spans else []
        found = {self.tokenizer.eos_token_id, *ids[-1:]} if ids else {self.tokenizer.eos_token_id}
        return sorted(token for token in found if token is not None)

    def example(self, conversation: Conversation, sample_id: int, max_length: int) -> Example | str:
        """Exactly the tokens that the target would be fed, and which of them it would have written.

        Returns the reason instead where no assistant turn can be located beyond doubt."""
        messages = [{"role": message.role, "content": message.content} for message in conversation.messages]
        try:
            spans, text = self._spans(messages)
        except TemplateError as error:  # raised by the template itself, for roles in an order that it does not know
            return f"the template refuses it: {str(error)[:80]}"
        if not spans:
            return "the template hides or rewrites a turn"
        return self._masked(text, spans, sample_id, max_length)

    def preformatted(self, text: str, sample_id: int, max_length: int) -> Example | str:
        """The same for text that already went through the template. A turn stands between the template's assistant
        header and its end of turn; text without both is refused."""
        turn = [{"role": "user", "content": "a"}]
        closed, opened = self.render(turn), self.render(turn, open_turn=True)
        header = opened[len(closed) :] if opened.startswith(closed) else ""
        spans, special, at = list[tuple[int, int]](), self._special_texts(), 0
        while header and (at := text.find(header, at)) >= 0:
            start = at + len(header)
            at = _end_of_turn(text, start, special)
            if at > start:
                spans.append((start, at))
        return self._masked(text, spans, sample_id, max_length) if spans else "text without a whole assistant turn"

    def _masked(self, text: str, spans: list[tuple[int, int]], sample_id: int, max_length: int) -> Example | str:
        """One tokenization; a token is supervised where it lies wholly inside a span."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        start_T, end_T = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
        # Some tokenizers trim spaces off their offsets: a token begins where the one before it ended.
        start_T = np.minimum(start_T, np.concatenate([[0], np.maximum.accumulate(end_T)[:-1]]))
        mask_T = np.zeros(len(start_T), dtype=np.bool_)
        for first, last in spans:
            mask_T |= (start_T >= first) & (start_T < last) & (end_T <= last)
        mask_T = mask_T[:max_length]
        if not mask_T.any():
            return "no assistant token within the maximum length"
        ids = np.asarray(encoded["input_ids"][:max_length], dtype=np.int32)
        return Example(sample_id=sample_id, token_ids=ids, loss_mask=mask_T)

    def _spans(self, messages: list[dict[str, str]]) -> tuple[list[tuple[int, int]], str]:
        """Character spans of what the target writes in each assistant turn, and the rendered text.

        A turn starts where the render of the turns before it, with the generation prompt, ends: there serving would
        hand over to the model. What the template writes behind the content is found by rendering a mark in its place;
        the turn ends with the first special token there. Every render must be a prefix of the whole; where one is not
        (a template that rewrites earlier turns), no span is returned at all."""
        text = self.render(messages)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if number == 0:
                return [], text  # nobody asked for it: no header is known
            before = self.render(messages[:number], open_turn=True)
            through = self.render(messages[: number + 1])
            marked = self.render([*messages[:number], {"role": "assistant", "content": MARK}])
            _, found, closing = marked.rpartition(MARK)
            if not (found and text.startswith(through) and through.startswith(before) and through.endswith(closing)):
                return [], text
            spans.append((len(before), _end_of_turn(through, len(through) - len(closing), self._special_texts())))
        return spans, text

    def special_ids(self) -> list[int]:
        """Special tokens and ends of turn: always in the draft vocabulary."""
        return sorted({*self.tokenizer.all_special_ids, *self.stop_ids()})

    def _special_texts(self) -> list[str]:
        return [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]


def _end_of_turn(text: str, content_end: int, special_texts: Sequence[str]) -> int:
    """End of the first special token behind the content; the content's own end where the template writes none."""
    ends = [
        (at, -len(token)) for token in special_texts if token and (at := text.find(token, content_end)) >= content_end
    ]
    if not ends:
        return content_end
    at, negative_length = min(ends)
    return at - negative_length


def _template_text(chat_template: str) -> str:
    try:
        return Path(chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the chat template cannot be read: {error}",
            where=f"--chat-template {chat_template}",
            fix="give a Jinja file, or leave it out to use the target's own template",
        ) from error


def require_supervised(examples: Sequence[Example], where: str) -> None:
    """Raises DataError where nothing could be learned."""
    if not any(example.loss_mask.any() for example in examples):
        raise DataError(
            "no token is supervised: the loss mask is empty",
            where=where,
            fix="check the chat template: its assistant turns must contain the assistant's text",
        )
