"""A conversation while the target answers it, turn by turn, and what has become of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import xxhash
from tokenizers import Tokenizer

from specforge.data.serving_view import THOUGHTS
from specforge.errors import ConfigError, first_line
from specforge.records import Conversation, Exact, Message

LOOKS_SPECIAL = re.compile(
    r"<[|｜][^<>\s]{1,40}[|｜]>"
)  # <|im_end|> and its like: all that is known without a tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a conversation ends at a turn."""

    turn: int  # the user turn that has no answer, from 1
    kind: str  # "truncated" or "failed"
    reason: str
    produced: str = ""  # what the target had written
    again: bool = False  # worth another try when the run is gone on with: the fault was not the conversation's


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A conversation as far as it was answered."""

    index: int  # among the conversations asked
    id: str
    conversation: Conversation | None  # None without one whole exchange
    failure: Failure | None
    answers: int
    tokens: int  # that the target wrote, kept or not


class Dialogue:
    """Asks one user turn after the other; the target's own answers are the history.

    What was said by others than user and assistant stays where it was. A turn that used tools cannot be answered anew
    (the target might call another tool, and nobody would run it): the conversation ends before it. So it does at any
    answer that failed: the exchanges before it are whole, and what comes behind would answer something unsaid."""

    def __init__(self, index: int, conversation: Conversation, tokenizer_hash: str = "") -> None:
        """`tokenizer_hash`: of the tokenizer that the exact tokens of `answer` belong to."""
        self.index, self._given, self._tokenizer_hash = index, conversation, tokenizer_hash
        self._rows = list[tuple[list[int], list[int]]]()
        self._exchanges = _exchanges(conversation)
        self._said = list[Message]()
        self._answers = self._tokens = 0
        self._failure: Failure | None = None

    @property
    def turn(self) -> int:
        """The user turn that is to be answered, from 1."""
        return self._answers + 1

    def asked(self) -> Conversation | None:
        """Everything up to the user turn that is to be answered; None where the dialogue has ended."""
        if self._failure is not None or self._answers == len(self._exchanges):
            return None
        exchange = self._exchanges[self._answers]
        if exchange.uses_tools:
            self.fail("failed", "the turn used tools, whose results the target cannot be given")
            return None
        return replace(self._given, messages=(*self._said, *exchange.messages))

    def answer(
        self,
        message: Message,
        tokens: int,
        special: Sequence[str] | None,
        exact: tuple[list[int], list[int]] | None = None,
    ) -> None:
        """The target's answer to the turn asked. `special`: texts that a chat template would read as special tokens;
        None if they are not known. `exact`: the tokens that the target was fed, and those that it wrote."""
        found = _special_text((message.reasoning or "") + message.content, special)
        if not message.content.strip():
            self.fail("failed", "the answer is empty")
        elif found is not None:
            reason = f"the answer holds {found}, which a chat template cannot carry as text"
            self.fail("failed", reason, message.content)
        else:
            self._said += [*self._exchanges[self._answers].messages, message]
            self._answers += 1
            if exact is not None:
                self._extend(*exact)
        self._tokens += tokens

    def _extend(self, asked: list[int], written: list[int]) -> None:
        """The tokens go on in the last row if that is the beginning of what the target was fed; else a row begins."""
        before = self._rows[-1] if self._rows else ([], [])
        if self._rows and asked[: len(before[0])] == before[0]:
            self._rows.pop()
        else:
            before = ([], [])
        fed = [0] * (len(asked) - len(before[0]))
        self._rows.append(([*asked, *written], [*before[1], *fed, *([1] * len(written))]))

    def truncate(self, tokens: int, produced: str) -> None:
        self.fail("truncated", f"no end of turn within {tokens} tokens", produced)
        self._tokens += tokens

    def fail(self, kind: str, reason: str, produced: str = "", again: bool = False) -> None:
        self._failure = Failure(turn=self.turn, kind=kind, reason=reason, produced=produced, again=again)

    def outcome(self) -> Outcome:
        return Outcome(
            index=self.index,
            id=self._given.id,
            conversation=self._answered() if self._said else None,
            failure=self._failure,
            answers=self._answers,
            tokens=self._tokens,
        )

    def _answered(self) -> Conversation:
        rows = tuple(Exact(token_ids=ids, loss_mask=mask) for ids, mask in self._rows)
        named = self._tokenizer_hash if rows else ""
        return replace(self._given, messages=tuple(self._said), rows=rows, tokenizer_hash=named)


@dataclass(frozen=True, slots=True)
class _Exchange:
    """A user turn, and what others than the assistant said around it."""

    messages: tuple[Message, ...]
    uses_tools: bool


def _exchanges(conversation: Conversation) -> list[_Exchange]:
    """One for each user turn; what stands before the first belongs to it."""
    starts = [at for at, message in enumerate(conversation.messages) if message.role == "user"]
    bounds = [0, *starts[1:], len(conversation.messages)]
    found = []
    for begin, end in pairwise(bounds):
        messages = conversation.messages[begin:end]
        kept = tuple(message for message in messages if message.role not in ("assistant", "tool"))
        found.append(_Exchange(kept, any(message.role == "tool" or message.tool_calls for message in messages)))
    return found


def seed_of(seed: int, index: int, turn: int) -> int:
    """63 bits for the draws of one answer: they depend on nothing else of the run."""
    return xxhash.xxh3_64_intdigest(f"{seed} {index} {turn}".encode()) >> 1


def special_texts(tokenizer: Tokenizer) -> list[str]:
    tags = {tag for pair in THOUGHTS for tag in pair}  # part of the answer's text
    added = tokenizer.get_added_tokens_decoder().values()
    return [token.content for token in added if token.special and token.content and token.content not in tags]


def read_special_texts(model_path: str) -> list[str]:
    """Of a model folder, or of a model on the hub; imports no torch."""
    from pathlib import Path

    try:
        file = Path(model_path) / "tokenizer.json"
        return special_texts(
            Tokenizer.from_file(str(file)) if file.is_file() else Tokenizer.from_pretrained(model_path)
        )
    except Exception as error:  # the library raises a bare Exception
        raise ConfigError(
            f"the target's tokenizer cannot be loaded: {first_line(error)}",
            where=f"--model-path {model_path}",
            fix="give a model folder with tokenizer.json, or the name of a model on the hub, or leave it out",
        ) from error


def _special_text(text: str, special: Sequence[str] | None) -> str | None:
    """The first special token that stands in the text, or None."""
    if special is None:
        found = LOOKS_SPECIAL.search(text)
        return found.group() if found else None
    return next((token for token in special if token in text), None)
