"""Answers by the target in our own process: the text that serving will produce, and so the best text to learn from."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from specforge.data.dialogue import Dialogue, Outcome, seed_of, special_texts
from specforge.data.serving_view import RENDERING, refusal
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
        self._special = special_texts(tokenizer.backend)
        self._asked = dict[int, list[int]]()  # by dialogue, the tokens of the turn that is being answered

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
            ids = self._tokenizer.asked(turns, history.tools, history.kwargs)
        except RENDERING as error:  # by the template itself: order of roles, fields
            dialogue.fail("failed", refusal(error))
            return False
        if len(ids) + self._sampling.max_new_tokens > self._longest:
            dialogue.fail("failed", f"too long: {len(ids)} tokens leave no room for an answer", again=True)
            return False
        seed = seed_of(self._seed, dialogue.index, dialogue.turn)
        self._asked[dialogue.index] = ids
        waiting.append(Prompt(key=dialogue.index, token_ids=ids, seed=seed))
        return True

    def _take(self, dialogue: Dialogue, ids: list[int]) -> None:
        asked = self._asked.pop(dialogue.index)
        whole = ids[-1] in self._sampling.stop_ids
        text = self._tokenizer.tokenizer.decode(
            ids[:-1] if whole else ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if whole:
            answer = Message(role="assistant", content=text)
            dialogue.answer(answer, len(ids), self._special, (asked, list(ids)))
        else:
            dialogue.truncate(len(ids), text)
