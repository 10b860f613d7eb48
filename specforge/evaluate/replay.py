"""Which shape of tree is fastest, from one plain run of the target.

At temperature 0 the text does not depend on the draft. So any shape can be walked over texts that plain decoding wrote,
with the aux states recorded there: its acceptance length, and its seconds in the draft, without the target. What a pass
of the target costs that verifies such trees is measured apart. Then

    speed-up = length * plain pass / (draft + verifying pass)

With several texts at once it holds while all of them are being written; they end at different times."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch

from specforge.evaluate.decode import GREEDY, Decoded, Limits, Live, Standing, Text, decode
from specforge.evaluate.drafter import Drafter, Drafting
from specforge.evaluate.rules import Rule
from specforge.evaluate.shape import Shape
from specforge.evaluate.tree import Tree, root_only
from specforge.records import TargetEngine

REPEATS = 9  # timed passes of each shape; the median counts
SHAPES = (
    *(Shape.chain(steps) for steps in range(1, 8)),
    *(Shape(steps=s, top_k=k, draft_tokens=n) for s, k, n in ((2, 2, 4), (3, 2, 6), (3, 4, 8), (4, 4, 16), (5, 8, 32))),
)


class Recorded:
    """A target that says again what it said: the token behind a node is the text's own. Keeps the trees."""

    def __init__(self, texts: Sequence[Text]) -> None:
        self.rules, self.trees = dict[int, Rule](), list[Tree]()
        self._texts, self._done = texts, dict[int, int]()
        self._aux = [torch.cat(text.aux) for text in texts]

    def begin(self, prompts: Mapping[int, Sequence[int]]) -> dict[int, Standing]:
        self.rules |= dict.fromkeys(prompts, GREEDY)
        self._done |= dict.fromkeys(prompts, 1)
        return {
            number: Standing(
                tokens=self._texts[number].tokens[:1], aux_nA=self._aux[number][: len(prompt)], near_tie=False
            )
            for number, prompt in prompts.items()
        }

    def verify(self, trees: Mapping[int, Tree]) -> dict[int, Standing]:
        self.trees += trees.values()
        found = {}
        for number, tree in trees.items():
            text, done = self._texts[number], self._done[number]
            verdict = tree.descend(_follows(text.tokens[done:]))
            drafts = [tree.tokens[node] for node in verdict.nodes[1:]]
            aux_nA = self._aux[number][len(text.prompt) + done - 1 :]
            found[number] = Standing(tokens=[*drafts, verdict.token], aux_nA=aux_nA, near_tie=False)
        return found

    def keep(self, number: int, count: int) -> None:
        self._done[number] += count

    def drop(self, number: int) -> None:
        del self.rules[number]


def _follows(tokens: Sequence[int]) -> Callable[[int], int]:
    """One token after the other, and at the end one that no draft is."""
    ahead = iter([*tokens, -1])
    return lambda node: next(ahead)


def walk(drafting: Drafting, texts: Sequence[Text], limits: Limits) -> tuple[Decoded, list[Tree]]:
    """As speculative decoding would go through what plain decoding recorded within these limits; and its trees."""
    target = Recorded(texts)
    return decode(target, Drafter(drafting), [text.prompt for text in texts], limits), target.trees


def pass_seconds(
    engine: TargetEngine, contexts: Sequence[Sequence[int]], kinds: Sequence[Sequence[Tree]]
) -> list[float]:
    """For each kind of tree what a pass of the target costs that verifies one behind each context: the median of
    REPEATS passes behind the same contexts. The kinds take turns, in another order each time, so that neither a slow
    moment of the machine nor what a large pass leaves behind meets always the same."""
    target = Live(engine, GREEDY)
    numbered = dict(enumerate(contexts))
    target.begin(numbered)
    seconds: list[list[float]] = [[] for _ in kinds]
    for repeat in range(-1, REPEATS):  # the first is for warming up
        for kind in random.Random(repeat).sample(range(len(kinds)), len(kinds)):
            trees, found = kinds[kind], seconds[kind]
            first = (repeat + 1) * len(trees) // (REPEATS + 1)  # from all over the texts
            some = {number: trees[(first + number) % len(trees)] for number in numbered}
            began = time.perf_counter()
            target.verify(some)
            for number in numbered:
                target.keep(number, 0)
            found.append(time.perf_counter() - began)
    target.close()
    return [median(found[1:]) for found in seconds]


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """Of one shape. Seconds are those of a round: all texts that are written at once."""

    shape: Shape
    length: float
    draft_seconds: float
    target_seconds: float
    plain_seconds: float  # a round of plain decoding
    tokens_per_second: float

    @property
    def speed_up(self) -> float:
        return self.length * self.plain_seconds / (self.draft_seconds + self.target_seconds)


def sweep(
    engine: TargetEngine, drafting: Drafting, texts: Sequence[Text], limits: Limits, shapes: Iterable[Shape]
) -> list[Expected]:
    """What each shape promises for these recorded texts."""
    walked = [(shape, *walk(replace(drafting, shape=shape), texts, limits)) for shape in shapes]
    middle = sorted(texts, key=lambda text: len(text.prompt) + len(text.tokens))[len(texts) // 2]
    context = [*middle.prompt, *middle.tokens[: len(middle.tokens) // 2]]
    kinds = [[root_only(middle.tokens[0])], *(trees for _, _, trees in walked)]
    count = min(limits.batch_size, len(texts))
    plain, *verifying = pass_seconds(engine, [context] * count, kinds)
    found = []
    for (shape, decoded, _), seconds in zip(walked, verifying, strict=True):
        draft = decoded.draft_seconds / max(decoded.rounds, 1)
        found.append(
            Expected(
                shape=shape,
                length=decoded.length,
                draft_seconds=draft,
                target_seconds=seconds,
                plain_seconds=plain,
                tokens_per_second=count * decoded.length / (draft + seconds),
            )
        )
    return found
