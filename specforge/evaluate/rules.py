"""How tokens are chosen, and which drafts stand: greedily, or drawn at a temperature. The text is the target's own.

Chosen drafts, a chain or a tree: at a node the target's own token is taken (greedily) or drawn from p; if it is one of
the node's children it stands and we go down, else it ends the pass. Every token of the text is the target's own by
construction, so nothing is left to correct. (It is what rejection comes to where each child in turn is a proposal of
probability one: it stands with p(x), the residual is p without x, and so on through the children.)

Drawn drafts, a chain at a temperature: a draft x ~ q stands with probability min(1, p(x) / q(x)), and the token after
the last that stands is drawn from p where all do, else from max(p - q, 0), normalised. The text then is the target's
own, whatever q is (Leviathan et al., 2023, theorem 3.5). p and q are both at the temperature; q is zero outside the
draft vocabulary."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from specforge.evaluate.tree import Tree, Verdict


class Rule(Protocol):
    def of(self, number: int) -> Rule:
        """For one prompt: what it draws does not depend on the prompts beside it."""

    def choose(self, logits_V: Tensor) -> int:
        """The target's own next token."""

    def draft(self, logits_D: Tensor, kept_D: Tensor, vocab_size: int) -> tuple[int, Tensor | None]:
        """The next token of a chain, and the distribution [V] that it was drawn from (None where it was chosen)."""

    def verify(self, tree: Tree, logits_nV: Tensor) -> Verdict:
        """Row i of the logits is what the target says after node i."""


class Greedy:
    """Always the most likely token."""

    def of(self, number: int) -> Rule:
        return self

    def choose(self, logits_V: Tensor) -> int:
        return int(logits_V.argmax())

    def draft(self, logits_D: Tensor, kept_D: Tensor, vocab_size: int) -> tuple[int, Tensor | None]:
        return int(kept_D[logits_D.argmax()]), None

    def verify(self, tree: Tree, logits_nV: Tensor) -> Verdict:
        return tree.descend(logits_nV.argmax(-1).tolist().__getitem__)


class Drawn:
    """Drawn at a temperature above 0, from a seed."""

    def __init__(self, temperature: float, seed: int) -> None:
        self._temperature, self._seed = temperature, seed
        self._generator = torch.Generator().manual_seed(seed)

    def of(self, number: int) -> Rule:
        return Drawn(self._temperature, int(np.random.SeedSequence((self._seed, number)).generate_state(1)[0]))

    def choose(self, logits_V: Tensor) -> int:
        return self._draw(self._shares(logits_V))

    def draft(self, logits_D: Tensor, kept_D: Tensor, vocab_size: int) -> tuple[int, Tensor | None]:
        q_V = torch.zeros(vocab_size, dtype=torch.float64)
        q_V[kept_D.cpu()] = self._shares(logits_D)
        return self._draw(q_V), q_V

    def verify(self, tree: Tree, logits_nV: Tensor) -> Verdict:
        if not tree.drawn_from:
            return tree.descend(lambda node: self.choose(logits_nV[node]))
        for node, (draft, q_V) in enumerate(zip(tree.tokens[1:], tree.drawn_from, strict=True)):
            p_V = self._shares(logits_nV[node])
            if not torch.rand((), generator=self._generator, dtype=torch.float64) * q_V[draft] < p_V[draft]:
                return Verdict(nodes=list(range(node + 1)), token=self._draw(residual(p_V, q_V)))
        return Verdict(nodes=list(range(len(tree.tokens))), token=self.choose(logits_nV[-1]))

    def _shares(self, logits: Tensor) -> Tensor:
        return (logits.double().cpu() / self._temperature).softmax(-1)

    def _draw(self, p_V: Tensor) -> int:
        return int(torch.multinomial(p_V, 1, generator=self._generator))


def residual(p_V: Tensor, q_V: Tensor) -> Tensor:
    """What is left to draw from once the draft was refused; not normalised."""
    left_V = (p_V - q_V).clamp(min=0)
    return left_V if left_V.sum() > 0 else p_V  # p = q but for rounding
