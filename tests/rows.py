"""Conversations to rows, one at a time."""

from __future__ import annotations

import numpy as np

from specforge.config import DataSettings
from specforge.data.formats import Entry
from specforge.data.tokenize import ChatTokenizer, Masked
from specforge.records import Example

LONG = 100_000


def rows_of(chat: ChatTokenizer, entry: Entry, **rules: object) -> tuple[Masked, ...] | str:
    """The rows that a conversation becomes, or the reason why there is none."""
    [found] = chat.examples([entry], DataSettings(**({"max_length": LONG} | rules)))
    return found if isinstance(found, str) else found.masked


def one_row(chat: ChatTokenizer, entry: Entry, sample_id: int = 0, max_length: int = LONG) -> Example | str:
    """The row of a conversation that becomes no more than one; cut in mid-turn at `max_length`."""
    found = rows_of(chat, entry, max_length=max_length, overlong="truncate")
    if isinstance(found, str):
        return found
    [(ids_T, mask_T)] = found
    return Example(sample_id=sample_id, token_ids=ids_T, loss_mask=mask_T)


def shown(chat: ChatTokenizer, masked: Masked) -> str:
    """The row decoded, with brackets around what is supervised."""
    ids_T, mask_T = masked
    edges = np.flatnonzero(np.diff(mask_T.astype(int), prepend=0, append=0)).tolist()
    text, at = "", 0
    for first, last in zip(edges[::2], edges[1::2], strict=True):
        text += chat.tokenizer.decode(ids_T[at:first]) + "⟦" + chat.tokenizer.decode(ids_T[first:last]) + "⟧"
        at = last
    return text + chat.tokenizer.decode(ids_T[at:])
