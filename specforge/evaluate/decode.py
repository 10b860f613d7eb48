"""Real decoding in process: plain, and speculative, with drafts (a chain or a tree) that the target verifies at once.

KV caches on both sides. A pass of the target takes the newest token and the drafts of each text, and says what it would
have chosen after each; a rule (rules.py) decides which drafts stand and which token follows them. The text is the
target's own, whatever the draft says: at temperature 0 token for token, which `compare` holds against plain greedy
decoding. Plain decoding is the same loop with nothing drafted; replay.py runs it over recorded texts.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from specforge.evaluate.drafter import Drafter, Drafting
from specforge.evaluate.rules import Greedy, Rule
from specforge.evaluate.tree import Tree, by_node, root_only
from specforge.records import TargetEngine

GREEDY = Greedy()


@dataclass(kw_only=True)
class Text:
    """What one prompt became."""

    prompt: Sequence[int]
    tokens: list[int] = field(default_factory=list)
    passes: int = 0  # of the target, the prompt's not counted
    near_ties: list[bool] = field(default_factory=list)  # of each pass's first token; of plain decoding: of each token
    aux: list[Tensor] = field(default_factory=list)  # where recorded: [n, A] of the prompt, then of all tokens but one


@dataclass(kw_only=True)
class Decoded:
    """Some prompts' texts, and where the time went. The prompts' own passes are told apart."""

    texts: list[Text] = field(default_factory=list)
    rounds: int = 0  # joint passes of all texts that were going on
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    target_seconds: float = 0.0

    @property
    def passes(self) -> int:
        return sum(text.passes for text in self.texts)

    @property
    def made(self) -> int:
        """Tokens of all passes: the first token of a text comes with its prompt's."""
        return sum(len(text.tokens) - 1 for text in self.texts)

    @property
    def length(self) -> float:
        """Tokens for each pass of the target: the acceptance length."""
        return self.made / self.passes if self.passes else 1.0

    @property
    def tokens_per_second(self) -> float:
        seconds = self.draft_seconds + self.target_seconds
        return self.made / seconds if seconds else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When a text ends, and how many are written at once."""

    max_new_tokens: int
    stop_ids: Sequence[int] = ()
    batch_size: int = 1

    def ended(self, text: Text) -> bool:
        return len(text.tokens) >= self.max_new_tokens or text.tokens[-1] in self.stop_ids

    def cut(self, text: Text, new: Sequence[int]) -> list[int]:
        """Of new tokens those up to the end."""
        stop = next((at for at, token in enumerate(new, 1) if token in self.stop_ids), len(new))
        return list(new[: min(stop, self.max_new_tokens - len(text.tokens))])


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What a pass of the target made of one text's tree."""

    tokens: list[int]  # the drafts that stand, and the target's own token behind them
    aux_nA: Tensor  # of the newest token, then of the drafts that stand (and of others behind them)
    near_tie: bool  # whether the two best logits behind the newest token almost tied


class Target(Protocol):
    """Whom the loop asks: an engine, or texts that it wrote before (replay.py). Texts go by their numbers."""

    rules: dict[int, Rule]  # of the texts that are going on

    def begin(self, prompts: Mapping[int, Sequence[int]]) -> dict[int, Standing]:
        """The prompts' pass: its token, the first one, and aux states of the whole prompt."""

    def verify(self, trees: Mapping[int, Tree]) -> dict[int, Standing]:
        """One pass over all trees; `keep` follows for each text."""

    def keep(self, number: int, count: int) -> None:
        """The newest token and count - 1 of the drafts that stand are part of the text."""

    def drop(self, number: int) -> None:
        """The text has ended."""


class Live:
    """An engine's target. The paths of a tree are continuations side by side (`DecodeSession`)."""

    def __init__(self, engine: TargetEngine, rule: Rule) -> None:
        self._session, self._rule, self._dtype = engine.session(), rule, engine.dtype
        self.rules = dict[int, Rule]()
        self._path = dict[int, int]()  # of the last pass: which path holds the drafts that stand

    def begin(self, prompts: Mapping[int, Sequence[int]]) -> dict[int, Standing]:
        self.rules |= {number: self._rule.of(number) for number in prompts}
        states = self._session.extend({number: [prompt] for number, prompt in prompts.items()}, only_last=True)
        found = {}
        for number, ((logits_1V, aux_nA),) in states.items():
            self._session.keep(number, 0, len(aux_nA))
            first = self.rules[number].choose(logits_1V[0])
            near_tie = is_near_tie(logits_1V[0], self._dtype)
            found[number] = Standing(tokens=[first], aux_nA=aux_nA, near_tie=near_tie)
        return found

    def verify(self, trees: Mapping[int, Tree]) -> dict[int, Standing]:
        paths = {number: tree.paths() for number, tree in trees.items()}
        states = self._session.extend(
            {number: [[trees[number].tokens[n] for n in path] for path in of_one] for number, of_one in paths.items()}
        )
        found = {}
        for number, tree in trees.items():
            logits_NV = by_node(paths[number], [logits_nV for logits_nV, _ in states[number]])
            verdict = self.rules[number].verify(tree, logits_NV)
            self._path[number] = next(at for at, path in enumerate(paths[number]) if verdict.nodes[-1] in path)
            found[number] = Standing(
                tokens=[*(tree.tokens[node] for node in verdict.nodes[1:]), verdict.token],
                aux_nA=states[number][self._path[number]][1],
                near_tie=is_near_tie(logits_NV[0], self._dtype),
            )
        return found

    def keep(self, number: int, count: int) -> None:
        self._session.keep(number, self._path[number], count)

    def drop(self, number: int) -> None:
        self._session.drop(number)
        del self.rules[number]

    def close(self) -> None:
        self._session.close()


def plain(
    engine: TargetEngine, prompts: Iterable[Sequence[int]], limits: Limits, rule: Rule = GREEDY, record: bool = False
) -> Decoded:
    """One token a pass. With `record` the texts keep the target's aux states."""
    target = Live(engine, rule)
    found = decode(target, None, prompts, limits, record)
    target.close()
    return found


def speculative(
    engine: TargetEngine, drafting: Drafting, prompts: Iterable[Sequence[int]], limits: Limits, rule: Rule = GREEDY
) -> Decoded:
    """A tree of drafts a pass."""
    target = Live(engine, rule)
    found = decode(target, Drafter(drafting), prompts, limits)
    target.close()
    return found


def decode(
    target: Target, drafter: Drafter | None, prompts: Iterable[Sequence[int]], limits: Limits, record: bool = False
) -> Decoded:
    """Up to `batch_size` texts at once; each leaves when it ends, and the next prompt takes its place."""
    found, waiting, going = Decoded(), enumerate(prompts), dict[int, Text]()
    while True:
        for number in [number for number, text in going.items() if limits.ended(text)]:
            del going[number]
            target.drop(number)
            if drafter:
                drafter.forget(number)
        began = time.perf_counter()
        joining = {n: Text(prompt=prompt) for n, prompt in islice(waiting, limits.batch_size - len(going))}
        if joining:
            standing = target.begin({number: text.prompt for number, text in joining.items()})
            seen = {n: _add(text, standing[n], standing[n].tokens, record) for n, text in joining.items()}
            if drafter:
                drafter.see(seen)
            going |= joining
            found.texts += joining.values()
            found.prefill_seconds += time.perf_counter() - began
            continue  # a text may have ended with its first token
        if not going:
            return found
        began = time.perf_counter()
        trees = drafter.grow(target.rules) if drafter else {n: root_only(text.tokens[-1]) for n, text in going.items()}
        drafted = time.perf_counter()
        standing, seen = target.verify(trees), {}
        for number, text in going.items():
            new = limits.cut(text, standing[number].tokens)
            target.keep(number, len(new))
            seen[number] = _add(text, standing[number], new, record)
            text.passes += 1
        verified = time.perf_counter()
        if drafter:
            drafter.see(seen)
        found.rounds += 1
        found.draft_seconds += drafted - began + time.perf_counter() - verified
        found.target_seconds += verified - drafted


def _add(text: Text, standing: Standing, new: list[int], record: bool) -> tuple[Tensor, list[int]]:
    """New tokens become part of the text. Returns what the draft sees: aux states, and the token behind each."""
    aux_nA, behind = standing.aux_nA[: len(new)], new
    if not text.tokens:
        aux_nA, behind = standing.aux_nA, [*text.prompt[1:], *new]
    text.tokens += new
    text.near_ties.append(standing.near_tie)
    if record:
        text.aux.append(aux_nA)
    return aux_nA, behind


def is_near_tie(logits_V: Tensor, dtype: torch.dtype) -> bool:
    """Whether the two best logits lie within one step of the target's dtype: another batch size may swap them."""
    first, second = logits_V.float().topk(2).values.tolist()
    return first - second <= torch.finfo(dtype).eps * max(abs(first), abs(second))


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Speculative against plain text: equal, or apart at a near-tie of plain decoding, or (a fault) apart elsewhere."""

    equal: int
    apart_at_near_tie: int
    apart_otherwise: int

    @property
    def lossless(self) -> bool:
        return self.apart_otherwise == 0


def compare(pairs: Iterable[tuple[Text, Text]], dtype: torch.dtype) -> Comparison:
    """Of (plain, speculative) pairs. In fp32 texts must be equal; in lower precision the first difference may only
    stand where plain decoding's two best logits lie within one step of the dtype."""
    equal = tie = other = 0
    for one, two in pairs:
        if one.tokens == two.tokens:
            equal += 1
            continue
        shorter = min(len(one.tokens), len(two.tokens))
        first = next((at for at in range(shorter) if one.tokens[at] != two.tokens[at]), shorter)
        if dtype != torch.float32 and first < len(one.near_ties) and one.near_ties[first]:
            tie += 1
        else:
            other += 1
    return Comparison(equal=equal, apart_at_near_tie=tie, apart_otherwise=other)
