"""Answers by the target in our own process: the text that serving will produce, and so the best text to learn from."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from jinja2 import TemplateError

from specforge.data.dialogue import Dialogue, Outcome, seed_of, special_texts
from specforge.data.tokenize import ChatTokenizer
from specforge.records import Message, Prompt, Sampling, TargetEngine


class Regenerator:
    """Lets an engine answer dialogues, many at once."""

    def __init__(
        self, engine: TargetEngine, tokenizer: ChatTokenizer, sampling: Sampling, seed: int, longest: int
    ) -> None:
        """`longest`: most tokens of a history and its answer together."""
        self._engine, self._tokenizer, self._sampling = engine, tokenizer, sampling
        self._seed, self._longest = seed, longest
        self._special = special_texts(tokenizer.tokenizer.backend_tokenizer)

    def outcomes(self, dialogues: Sequence[Dialogue], at_once: int) -> Iterator[Outcome]:
        """In the order in which they end. At most `at_once` are open; each of them waits or runs with one turn."""
        todo, opened, waiting = iter(dialogues), dict[int, Dialogue](), deque[Prompt]()
        answers = self._engine.generate(waiting, self._sampling, at_once)
        while True:
            while len(opened) < at_once and (dialogue := next(todo, None)) is not None:
                if self._ask(dialogue, waiting):
                    opened[dialogue.index] = dialogue
                else:
                    yield dialogue.outcome()
            if not opened:
                return
            key, ids = next(answers)
            self._take(opened[key], ids)
            if not self._ask(opened[key], waiting):
                yield opened.pop(key).outcome()

    def _ask(self, dialogue: Dialogue, waiting: deque[Prompt]) -> bool:
        """Queues the turn that is to be answered; False where there is none."""
        history = dialogue.asked()
        if history is None:
            return False
        try:
            turns = [message.as_dict() for message in history.messages]
            text = self._tokenizer.render(turns, history.tools, open_turn=True)
        except (
            TemplateError,
            TypeError,
            KeyError,
            ValueError,
        ) as error:  # by the template itself: order of roles, fields
            dialogue.fail("failed", f"the template refuses it: {str(error)[:80]}")
            return False
        ids = self._tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) + self._sampling.max_new_tokens > self._longest:
            dialogue.fail("failed", f"too long: {len(ids)} tokens leave no room for an answer", again=True)
            return False
        seed = seed_of(self._seed, dialogue.index, dialogue.turn)
        waiting.append(Prompt(key=dialogue.index, token_ids=ids, seed=seed))
        return True

    def _take(self, dialogue: Dialogue, ids: list[int]) -> None:
        whole = ids[-1] in self._sampling.stop_ids
        text = self._tokenizer.tokenizer.decode(
            ids[:-1] if whole else ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if whole:
            dialogue.answer(Message(role="assistant", content=text), len(ids), self._special)
        else:
            dialogue.truncate(len(ids), text)
