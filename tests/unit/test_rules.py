"""Drawn at temperature 1, decoding with a draft (a chain, a tree) gives the target's own distribution, whatever it is.

A real tiny target (64 tokens, transformers, fp32) and a real draft; what they say after a prefix is computed once, so
that 20,000 texts take seconds. The loop and the rule under test are the ones that decode."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

from specforge.draft.model import DraftConfig, Eagle3Draft
from specforge.evaluate import decode, rules
from specforge.evaluate.decode import Limits
from specforge.evaluate.drafter import Drafter, Drafting
from specforge.evaluate.rules import Drawn
from specforge.evaluate.shape import Shape
from specforge.evaluate.tree import Tree, Verdict, root_only
from specforge.records import Ranks
from specforge.target import weights
from specforge.target.hf_engine import HfEngine
from tests import tiny

V, SAMPLES, SEED, PROMPT, LENGTH, STEPS = 64, 20_000, 0, (5, 9, 33, 7), 4, 2
LAYERS = (1, 3, 4)
KEPT = torch.arange(0, V, 2)  # half of the tokens the draft cannot say
CHAIN, TREE = Shape.chain(STEPS), Shape(steps=STEPS, top_k=8, draft_tokens=30)
SOUND, BROKEN = 0.01, 1e-6  # probabilities of a chi-square at least as large


class Table:
    """An engine that has said beforehand what follows the prompt and every two tokens after it."""

    dtype = torch.float32

    def __init__(self, engine: HfEngine) -> None:
        two = torch.cartesian_prod(torch.arange(V), torch.arange(V))
        ids = torch.cat([torch.tensor(PROMPT).expand(len(two), -1), two], 1)
        with torch.no_grad():
            out = engine._model(ids, output_hidden_states=True)
        self._logits = out.logits.view(V, V, len(PROMPT) + 2, V)
        self._aux = torch.cat([out.hidden_states[k + 1] for k in LAYERS], -1).view(V, V, len(PROMPT) + 2, -1)

    def session(self) -> Table:
        self._kept: dict[int, list[int]] = {}
        return self

    def extend(self, paths, only_last=False):
        """What follows three tokens is the fourth: nobody looks at it, so its logits are anything."""
        self._passed = {n: [self._kept.get(n, []) + list(path) for path in of_one] for n, of_one in paths.items()}
        return {n: [self._behind(n, whole, only_last) for whole in of_one] for n, of_one in self._passed.items()}

    def _behind(self, number, whole, only_last):
        first, second = (*whole[len(PROMPT) :], 0, 0)[:2]
        more = max(0, len(whole) - len(PROMPT) - 2)
        start = len(self._kept.get(number, []))
        logits, aux = (F.pad(x[first, second], (0, 0, 0, more))[start : len(whole)] for x in (self._logits, self._aux))
        return logits[-1:] if only_last else logits, aux

    def keep(self, number, path, count) -> None:
        self._kept[number] = self._passed[number][path][: len(self._kept.get(number, [])) + count]

    def drop(self, number) -> None:
        del self._kept[number]

    def close(self) -> None:
        assert not self._kept

    def first_three(self) -> torch.Tensor:
        """[V, V, V] the target's probability of the three tokens after the prompt, exact."""
        p = self._logits.double().softmax(-1)
        first_V, second_VV, third_VVV = p[0, 0, -3], p[:, 0, -2], p[:, :, -1]
        return first_V[:, None, None] * second_VV[:, :, None] * third_VVV


class RememberingDrafter:
    """A drafter that asks a real one for what it has not seen yet: a tree depends on the text alone, and a chain that
    is drawn on what was drawn before too. Behind the third token anything will do."""

    known: ClassVar[dict] = {}

    def __init__(self, drafting: Drafting) -> None:
        self._drafting, self._aux, self._tokens = drafting, {}, {}

    def see(self, new) -> None:
        for number, (aux_nA, tokens) in new.items():
            self._aux.setdefault(number, []).append(aux_nA)
            self._tokens.setdefault(number, []).extend(tokens)

    def forget(self, number) -> None:
        del self._aux[number], self._tokens[number]

    def grow(self, rules) -> dict[int, Tree]:
        return {
            n: self._chain(n, rule) if self._drafting.shape == CHAIN else self._tree(n) for n, rule in rules.items()
        }

    def _tree(self, number) -> Tree:
        key = tuple(self._tokens[number])
        if self._new(number) >= 3:
            return root_only(key[-1])
        if key not in self.known:
            self.known[key] = self._asked(number, None)
        return self.known[key]

    def _chain(self, number, rule) -> Tree:
        kept_D, vocab_size = self._drafting.kept_D, self._drafting.draft.config.vocab_size
        tokens, drawn_from = [self._tokens[number][-1]], []
        for _ in range(STEPS):
            key = (tuple(self._tokens[number]), tuple(tokens))
            if self._new(number) + len(drawn_from) >= 3:
                self.known[key] = torch.zeros(len(kept_D))
            if key not in self.known:
                forced = Forced(tokens[1:])
                self._asked(number, forced)
                self.known[key] = forced.said[len(tokens) - 1]
            token, q_V = rule.draft(self.known[key], kept_D, vocab_size)
            tokens.append(token)
            drawn_from.append(q_V)
        return Tree(tokens=tuple(tokens), parents=tuple(range(-1, STEPS)), drawn_from=tuple(drawn_from))

    def _new(self, number) -> int:
        """Tokens behind the prompt, whose first token is not among those seen."""
        return len(self._tokens[number]) + 1 - len(PROMPT)

    def _asked(self, number, rule) -> Tree:
        real = Drafter(self._drafting)
        real.see({0: (torch.cat(self._aux[number]), self._tokens[number])})
        return real.grow({0: rule})[0]


class Forced:
    """Says the given tokens (then any), and keeps the logits of each step."""

    def __init__(self, tokens) -> None:
        self._tokens, self.said = [*tokens], []

    def draft(self, logits_D, kept_D, vocab_size):
        self.said.append(logits_D)
        return self._tokens.pop(0) if self._tokens else 0, None


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """(engine, drafting, probabilities of the first three tokens)."""
    folder = tiny.make_target(tmp_path_factory.mktemp("target") / "t", spread=0.2, vocab_size=V)
    info = weights.describe(str(folder))
    ranks = Ranks(rank=0, world=1, tp_size=1, device=torch.device("cpu"), tp_group=None)
    real = HfEngine(info, LAYERS, ranks, dtype=torch.float32, tokens_per_batch=64)
    head = weights.load_head(info, torch.float32)
    draft = Eagle3Draft(DraftConfig.for_target(info, LAYERS, len(KEPT))).eval()
    draft.initialise(head, KEPT, seed=0)
    drafting = Drafting(draft=draft, embedding_VH=head.embedding_VH, kept_D=KEPT, shape=CHAIN)
    engine = Table(real)
    return engine, drafting, engine.first_three()


def drawn(target, monkeypatch, count: int, shape: Shape = CHAIN) -> tuple[torch.Tensor, float]:
    """([count, 3] texts, accepted drafts a pass)."""
    engine, drafting, _ = target
    monkeypatch.setattr(decode, "Drafter", RememberingDrafter)
    drafting, limits = replace(drafting, shape=shape), Limits(max_new_tokens=LENGTH, batch_size=4)
    found = decode.speculative(engine, drafting, [PROMPT] * count, limits, Drawn(1.0, SEED))
    assert all(len(text.tokens) == LENGTH for text in found.texts)
    return torch.tensor([text.tokens[:3] for text in found.texts]), found.length - 1


def chance(seen: torch.Tensor, expected: torch.Tensor) -> float:
    """Pearson's chi-square: the probability of counts at least as far from the expected. Cells that expect fewer than
    five are one cell."""
    seen, expected = seen.flatten().double(), expected.flatten().double()
    large = expected >= 5
    seen, expected = (torch.cat([x[large], x[~large].sum()[None]]) for x in (seen, expected))
    if expected[-1] < 5:
        seen, expected = (torch.cat([x[:-2], x[-2:].sum()[None]]) for x in (seen, expected))
    statistic, freedom = ((seen - expected) ** 2 / expected).sum(), len(seen) - 1
    return float(torch.special.gammaincc(torch.tensor(freedom / 2.0).double(), statistic / 2))


def chances(texts_N3: torch.Tensor, target_VVV: torch.Tensor) -> dict[str, float]:
    """Of the marginals of the three tokens, and of all three together."""
    found = {}
    for place in range(3):
        others = [other for other in range(3) if other != place]
        seen_V = torch.bincount(texts_N3[:, place], minlength=V)
        found[f"token {place}"] = chance(seen_V, target_VVV.sum(others) * len(texts_N3))
    cell_N = (texts_N3[:, 0] * V + texts_N3[:, 1]) * V + texts_N3[:, 2]
    found["together"] = chance(torch.bincount(cell_N, minlength=V**3), target_VVV * len(texts_N3))
    return found


@pytest.mark.parametrize("shape", [CHAIN, TREE], ids=str)
def test_the_text_is_the_targets_own(target, monkeypatch, shape):
    texts_N3, accepted = drawn(target, monkeypatch, SAMPLES, shape)
    assert 0.1 < accepted < 2.5  # drafts that stand and drafts that do not were seen often
    assert min(chances(texts_N3, target[2]).values()) > SOUND


def test_the_comparison_notices_a_sampler_without_residual_distribution(target, monkeypatch):
    monkeypatch.setattr(rules, "residual", lambda p_V, q_V: p_V)
    texts_N3, _ = drawn(target, monkeypatch, 5000)
    assert min(chances(texts_N3, target[2]).values()) < BROKEN


def test_the_comparison_notices_a_draft_that_always_stands(target, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.zeros((), dtype=torch.float64) - 1)
    texts_N3, _ = drawn(target, monkeypatch, 2000)
    assert min(chances(texts_N3, target[2]).values()) < BROKEN


class EachChildAlone(Drawn):
    """Broken: each child in turn stands with probability p, and where none does the last token is drawn from p."""

    def of(self, number):
        return EachChildAlone(1.0, number)

    def verify(self, tree, logits_nV):
        nodes = [0]
        while True:
            p_V = self._shares(logits_nV[nodes[-1]])
            children = [node for node, parent in enumerate(tree.parents) if parent == nodes[-1]]
            tries = torch.rand(len(children), generator=self._generator, dtype=torch.float64)
            child = next((c for c, u in zip(children, tries, strict=True) if u < p_V[tree.tokens[c]]), None)
            if child is None:
                return Verdict(nodes=nodes, token=self._draw(p_V))
            nodes.append(child)


def test_the_comparison_notices_a_tree_whose_children_are_tried_one_by_one(target, monkeypatch):
    monkeypatch.setattr(f"{__name__}.Drawn", EachChildAlone)
    texts_N3, _ = drawn(target, monkeypatch, 2000, TREE)
    assert min(chances(texts_N3, target[2]).values()) < BROKEN
