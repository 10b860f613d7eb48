"""How far and how wide is drafted. No torch: it names a server's flags, too."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How far and how wide is drafted, as SGLang's --speculative-num-steps, -eagle-topk and -num-draft-tokens."""

    steps: int
    top_k: int
    draft_tokens: int  # tokens verified in a pass: the newest one and the drafts

    @classmethod
    def chain(cls, steps: int) -> Shape:
        return cls(steps=steps, top_k=1, draft_tokens=steps + 1)

    @classmethod
    def default(cls, steps: int, top_k: int) -> Shape:
        """Four verified tokens for each node of the beam, as far as there are so many."""
        chain = cls.chain(steps)
        if top_k == 1:
            return chain
        whole = cls(steps=steps, top_k=top_k, draft_tokens=0).capacity
        return cls(steps=steps, top_k=top_k, draft_tokens=min(4 * top_k, whole))

    @property
    def capacity(self) -> int:
        """Most draft tokens that steps and top-k give."""
        return 1 + self.top_k + (self.steps - 1) * self.top_k**2

    @property
    def depth(self) -> int:
        """Steps that can matter: a draft is verified with all its ancestors."""
        return min(self.steps, self.draft_tokens - 1)

    @property
    def most_paths(self) -> int:
        return 1 if self.top_k == 1 else self.draft_tokens - 1

    @property
    def most_tokens(self) -> int:
        """Of all paths of a tree together. A leaf at depth d has d - 1 drafts above it that are no leaves."""
        if self.top_k == 1:
            return self.draft_tokens
        return max((self.draft_tokens - d) * (d + 1) for d in range(1, self.depth + 1))

    def __str__(self) -> str:
        if self == Shape.chain(self.steps):
            return f"chain of {self.steps}"
        return f"{self.steps} steps, top-k {self.top_k}, {self.draft_tokens} tokens"
