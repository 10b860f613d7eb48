"""Planned batches through the target; where memory runs out in smaller passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from specforge.errors import OutOfMemoryError
from specforge.records import Example, FeatureRecord, TargetEngine


class Passes:
    """Runs batches of `examples` through an engine. A batch that runs out of memory is halved until it fits.

    The ranks of a replica halve alike, for `engine.capture` fails on all of them or on none. What did not fit once is
    not tried again: later batches of as many tokens are halved beforehand."""

    def __init__(self, engine: TargetEngine, examples: Sequence[Example]) -> None:
        self._engine, self._examples = engine, examples
        self._limit: int | None = None  # tokens that did not fit

    def run(self, batch: Sequence[int]) -> Iterator[tuple[Sequence[int], list[FeatureRecord] | None]]:
        """(indices of examples, their records) of each pass; None for records where one example alone is too large."""
        parts = [batch]
        while parts:
            part = parts.pop()
            tokens = sum(len(self._examples[at].token_ids) for at in part)
            hopeless = len(part) > 1 and self._limit is not None and tokens >= self._limit
            records = None if hopeless else self._capture(part)
            if records is None and len(part) > 1:
                self._limit = tokens if self._limit is None else min(self._limit, tokens)
                parts += [part[1::2], part[0::2]]  # longest first: every second one makes halves of about equal weight
            else:
                yield part, records

    def _capture(self, part: Sequence[int]) -> list[FeatureRecord] | None:
        try:
            return self._engine.capture([self._examples[at] for at in part])
        except OutOfMemoryError:
            return None
