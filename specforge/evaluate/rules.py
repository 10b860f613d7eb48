"""How tokens are chosen, and which drafts stand: greedily, or drawn at a temperature.

Drawn, a draft x ~ q stands with probability min(1, p(x) / q(x)), and the token after the last that stands is drawn from
p where all do, else from max(p - q, 0), normalised. The text then is the target's own, whatever q is (Leviathan et al.,
2023, theorem 3.5). p and q are both at the temperature; q is zero outside the draft vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """One drafted token, and the distribution it was drawn from over the target's vocabulary (greedily: none)."""

    token: int
    q_V: Tensor | None


class Rule(Protocol):
    def choose(self, logits_V: Tensor) -> int:
        """The target's own next token."""

    def draft(self, logits_D: Tensor, kept_D: Tensor, vocab_size: int) -> Draft:
        """The draft's next token."""

    def verify(self, drafts: Sequence[Draft], logits_nV: Tensor) -> list[int]:
        """The drafts that stand, and the token that follows them. Row i of the logits is what the target says after
        the newest token and i drafts: n is one more than there are drafts."""


class Greedy:
    """Always the most likely token."""

    def choose(self, logits_V: Tensor) -> int:
        return int(logits_V.argmax())

    def draft(self, logits_D: Tensor, kept_D: Tensor, vocab_size: int) -> Draft:
        return Draft(token=int(kept_D[logits_D.argmax()]), q_V=None)

    def verify(self, drafts: Sequence[Draft], logits_nV: Tensor) -> list[int]:
        own = logits_nV.argmax(-1).tolist()
        accepted = 0
        while accepted < len(drafts) and drafts[accepted].token == own[accepted]:
            accepted += 1
        return [int(token) for token in own[: accepted + 1]]


class Drawn:
    """Drawn at a temperature above 0, from a seed."""

    def __init__(self, temperature: float, seed: int) -> None:
        self._temperature, self._generator = temperature, torch.Generator().manual_seed(seed)

    def choose(self, logits_V: Tensor) -> int:
        return self._draw(self._shares(logits_V))

    def draft(self, logits_D: Tensor, kept_D: Tensor, vocab_size: int) -> Draft:
        q_V = torch.zeros(vocab_size, dtype=torch.float64)
        q_V[kept_D.cpu()] = self._shares(logits_D)
        return Draft(token=self._draw(q_V), q_V=q_V)

    def verify(self, drafts: Sequence[Draft], logits_nV: Tensor) -> list[int]:
        tokens = list[int]()
        for draft, logits_V in zip(drafts, logits_nV, strict=False):
            p_V, q_V = self._shares(logits_V), draft.q_V
            assert q_V is not None
            if torch.rand((), generator=self._generator, dtype=torch.float64) * q_V[draft.token] < p_V[draft.token]:
                tokens.append(draft.token)
                continue
            return [*tokens, self._draw(residual(p_V, q_V))]
        return [*tokens, self.choose(logits_nV[-1])]

    def _shares(self, logits: Tensor) -> Tensor:
        return (logits.double().cpu() / self._temperature).softmax(-1)

    def _draw(self, p_V: Tensor) -> int:
        return int(torch.multinomial(p_V, 1, generator=self._generator))


def residual(p_V: Tensor, q_V: Tensor) -> Tensor:
    """What is left to draw from once the draft was refused; not normalised."""
    left_V = (p_V - q_V).clamp(min=0)
    return left_V if left_V.sum() > 0 else p_V  # p = q but for rounding
