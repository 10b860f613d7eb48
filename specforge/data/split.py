"""Removal of duplicates, and the split into train and test by prompt, without leaks."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import xxhash

from specforge.records import Conversation

SHINGLE = 3  # words
COMMON = 50  # held-out conversations: a run of words in more of them is a phrase, and no sign of a duplicate
LEAK_SHARE = 0.5  # of a training conversation's shingles inside one held-out conversation


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def prompt_key(conversation: Conversation) -> str:
    """The first user turn, without case and punctuation: conversations with the same key go to the same side."""
    return " ".join(next((words(m.content) for m in conversation.messages if m.role == "user"), []))


def without_exact_duplicates(conversations: Sequence[Conversation]) -> list[Conversation]:
    seen: dict[int, Conversation] = {}
    for conversation in conversations:
        text = "\x1e".join(f"{m.role}\x1f{m.content.strip()}" for m in conversation.messages)
        seen.setdefault(xxhash.xxh3_128_intdigest(text.encode()), conversation)
    return list(seen.values())


def split(
    conversations: Sequence[Conversation], test_share: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """(train, test): by a seeded hash of the prompt, so a row's side does not depend on the other rows."""
    bound = int(test_share * 2**64)
    train, test = list[Conversation](), list[Conversation]()
    for conversation in conversations:
        held_out = xxhash.xxh3_64_intdigest(prompt_key(conversation).encode(), seed=seed) < bound
        (test if held_out else train).append(conversation)
    prompts = sorted({prompt_key(conversation) for conversation in conversations})
    if len(prompts) > 1 and not (train and test):  # few rows: each side gets one prompt at least
        held_out_prompts = set(prompts[:1] if not test else prompts[1:])
        test = [conversation for conversation in conversations if prompt_key(conversation) in held_out_prompts]
        train = [conversation for conversation in conversations if prompt_key(conversation) not in held_out_prompts]
    return train, test


def shingles(conversation: Conversation) -> set[int]:
    """Hashes of every run of three words of the user and assistant turns."""
    found = set()
    for message in conversation.messages:
        if message.role in ("user", "assistant"):
            tokens = words(message.content)
            for start in range(max(1, len(tokens) - SHINGLE + 1)):
                found.add(xxhash.xxh3_64_intdigest(" ".join(tokens[start : start + SHINGLE]).encode()))
    return found


def without_leaks(train: Sequence[Conversation], test: Sequence[Conversation]) -> list[Conversation]:
    """The training conversations that are no near-duplicate of a held-out one. Linear in both sides."""
    index: dict[int, list[int]] = defaultdict(list)
    for row, conversation in enumerate(test):
        for shingle in shingles(conversation):
            index[shingle].append(row)
    phrases = {shingle for shingle, rows in index.items() if len(rows) > COMMON}
    kept = []
    for conversation in train:
        own = shingles(conversation) - phrases
        shared = Counter(row for shingle in own for row in index.get(shingle, ()))
        if not shared or max(shared.values()) <= LEAK_SHARE * len(own):
            kept.append(conversation)
    return kept
