"""Answers by the target itself: the text that serving will produce, and so the best text to learn from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from specforge.data.tokenize import ChatTokenizer
from specforge.records import Conversation, Message, TargetEngine


def answer(
    engine: TargetEngine,
    tokenizer: ChatTokenizer,
    conversations: Sequence[Conversation],
    max_new_tokens: int,
    batch_size: int,
) -> Iterator[list[Conversation | None]]:
    """Batches of conversations with the target's greedy answer to the first user turn; None where it did not end
    within `max_new_tokens`, or where the prompt leaves no room for it in one pass of the target."""
    stop_ids = tokenizer.stop_ids()
    for start in range(0, len(conversations), batch_size):
        batch = conversations[start : start + batch_size]
        prompts = [tokenizer.prompt_ids(conversation) for conversation in batch]
        answered: list[Conversation | None] = []
        fits = [len(ids) + max_new_tokens <= engine.tokens_per_batch for ids in prompts]
        answers = iter(
            engine.generate([p for p, ok in zip(prompts, fits, strict=True) if ok], max_new_tokens, stop_ids)
        )
        for conversation, ok in zip(batch, fits, strict=True):
            ids = next(answers) if ok else [-1]
            if ids[-1] not in stop_ids:
                answered.append(None)
                continue
            text = str(tokenizer.tokenizer.decode(ids[:-1], skip_special_tokens=True))
            before = tuple(m for m in conversation.messages if m.role != "assistant")[: _first_user(conversation) + 1]
            answered.append(
                Conversation(id=conversation.id, messages=(*before, Message(role="assistant", content=text)))
            )
        yield answered


def _first_user(conversation: Conversation) -> int:
    return next(at for at, message in enumerate(conversation.messages) if message.role == "user")
