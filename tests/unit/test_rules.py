"""Drawn at temperature 1, decoding with a draft gives the target's own distribution, whatever the draft is.

A real tiny target (64 tokens, transformers, fp32) and a real draft; what they say after a prefix is computed once, so
that 20,000 texts take seconds. The loop and the rule under test are the ones that decode."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

from specforge.draft.model import DraftConfig, Eagle3Draft
from specforge.evaluate import decode, rules
from specforge.evaluate.decode import ChainDrafter, Drafting
from specforge.evaluate.rules import Draft, Drawn
from specforge.records import Ranks
from specforge.target import weights
from specforge.target.hf_engine import HfEngine
from tests import tiny

V, SAMPLES, SEED, PROMPT, LENGTH, STEPS = 64, 20_000, 0, (5, 9, 33, 7), 4, 2
LAYERS = (1, 3, 4)
KEPT = torch.arange(0, V, 2)  # half of the tokens the draft cannot say
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
        self._tokens: list[int] = []

    def session(self, max_tokens: int) -> Table:
        self._tokens = []
        return self

    def extend(self, token_ids):
        """What follows three tokens is the fourth: nobody looks at it, so its logits are anything."""
        start = len(self._tokens)
        self._tokens += token_ids
        first, second = (*self._tokens[len(PROMPT) :], 0, 0)[:2]
        found = (x[first, second] for x in (self._logits, self._aux))
        more = len(self._tokens) - len(PROMPT) - 2
        return tuple(F.pad(x, (0, 0, 0, max(0, more)))[start : len(self._tokens)] for x in found)

    def keep(self, length: int) -> None:
        del self._tokens[length:]

    def close(self) -> None:
        pass

    def first_three(self) -> torch.Tensor:
        """[V, V, V] the target's probability of the three tokens after the prompt, exact."""
        p = self._logits.double().softmax(-1)
        first_V, second_VV, third_VVV = p[0, 0, -3], p[:, 0, -2], p[:, :, -1]
        return first_V[:, None, None] * second_VV[:, :, None] * third_VVV


class RememberingDrafter:
    """A drafter that asks a real one for what it has not seen yet."""

    known: ClassVar[dict] = {}

    def __init__(self, drafting: Drafting) -> None:
        self._drafting, self._aux, self._tokens = drafting, [], []

    def see(self, aux_nA, next_tokens) -> None:
        self._aux.append(aux_nA)
        self._tokens += next_tokens

    def propose(self, steps: int, rule) -> list[Draft]:
        kept_D, vocab_size = self._drafting.kept_D, self._drafting.draft.config.vocab_size
        proposed: list[Draft] = []
        for _ in range(steps):
            key = (tuple(self._tokens), tuple(draft.token for draft in proposed))
            if key not in self.known:
                real = ChainDrafter(self._drafting)
                real.see(torch.cat(self._aux), self._tokens)
                forced = Forced(key[1])
                real.propose(len(proposed) + 1, forced)
                self.known[key] = forced.last
            proposed.append(rule.draft(self.known[key], kept_D, vocab_size))
        return proposed


class Forced:
    """Says the given tokens, then keeps the logits."""

    def __init__(self, tokens) -> None:
        self._tokens = list(tokens)

    def draft(self, logits_D, kept_D, vocab_size) -> Draft:
        self.last = logits_D
        return Draft(token=self._tokens.pop(0) if self._tokens else 0, q_V=None)


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
    drafting = Drafting(draft=draft, embedding_VH=head.embedding_VH, kept_D=KEPT, steps=STEPS)
    engine = Table(real)
    return engine, drafting, engine.first_three()


def drawn(target, monkeypatch, count: int) -> tuple[torch.Tensor, float]:
    """([count, 3] texts, accepted drafts a pass)."""
    engine, drafting, _ = target
    monkeypatch.setattr(decode, "ChainDrafter", RememberingDrafter)
    rule = Drawn(1.0, SEED)
    found = [decode.speculative(engine, drafting, PROMPT, LENGTH, [], rule) for _ in range(count)]
    assert all(len(text.tokens) == LENGTH for text in found)
    passes = sum(text.passes for text in found)
    return torch.tensor([text.tokens[:3] for text in found]), count * (LENGTH - 1) / passes - 1


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


def test_the_text_is_the_targets_own(target, monkeypatch):
    texts_N3, accepted = drawn(target, monkeypatch, SAMPLES)
    assert 0.1 < accepted < 2.5  # both branches of the rule were taken often
    assert min(chances(texts_N3, target[2]).values()) > SOUND


def test_the_comparison_notices_a_sampler_without_residual_distribution(target, monkeypatch):
    monkeypatch.setattr(rules, "residual", lambda p_V, q_V: p_V)
    texts_N3, _ = drawn(target, monkeypatch, 5000)
    assert min(chances(texts_N3, target[2]).values()) < BROKEN


def test_the_comparison_notices_a_draft_that_always_stands(target, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.zeros((), dtype=torch.float64) - 1)
    texts_N3, _ = drawn(target, monkeypatch, 2000)
    assert min(chances(texts_N3, target[2]).values()) < BROKEN
