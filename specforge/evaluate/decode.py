"""Real speculative decoding in process: a chain of drafts, verified by the target in one pass.

KV caches on both sides. A pass of the target takes the newest token and the drafts, and says what it would have chosen
after each; a rule (rules.py) decides which drafts stand and which token follows them. The text is the target's own,
whatever the draft says: at temperature 0 token for token, which `compare` holds against plain greedy decoding.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge.draft.attention import attend
from specforge.draft.model import Eagle3Draft
from specforge.evaluate.rules import Draft, Greedy, Rule
from specforge.records import TargetEngine

GREEDY = Greedy()


@dataclass(kw_only=True)
class Decoded:
    """What decoding one prompt gave."""

    tokens: list[int]
    passes: int  # of the target, the prefill not counted
    seconds: float
    near_ties: list[bool] = field(default_factory=list)  # plain decoding: whether the two best logits almost tie


def plain(
    engine: TargetEngine,
    prompt: Sequence[int],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    rule: Rule = GREEDY,
) -> Decoded:
    """One token a pass."""
    began, tokens, ties = time.perf_counter(), list[int](), list[bool]()
    session = engine.session(len(prompt) + max_new_tokens)
    logits_nV, _ = session.extend(prompt)
    while True:
        tokens.append(rule.choose(logits_nV[-1]))
        ties.append(is_near_tie(logits_nV[-1], engine.dtype))
        if tokens[-1] in stop_ids or len(tokens) == max_new_tokens:
            break
        logits_nV, _ = session.extend(tokens[-1:])
    session.close()
    return Decoded(tokens=tokens, passes=len(tokens) - 1, seconds=time.perf_counter() - began, near_ties=ties)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafting:
    """A draft with what it shares with its target, and the length of its chain."""

    draft: Eagle3Draft
    embedding_VH: Tensor
    kept_D: Tensor
    steps: int


def speculative(
    engine: TargetEngine,
    drafting: Drafting,
    prompt: Sequence[int],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    rule: Rule = GREEDY,
) -> Decoded:
    """A chain of up to `drafting.steps` drafts a pass."""
    began, passes, steps = time.perf_counter(), 0, drafting.steps
    session = engine.session(len(prompt) + max_new_tokens * (steps + 1))
    drafter = ChainDrafter(drafting)
    logits_nV, aux_nA = session.extend(prompt)
    tokens = [rule.choose(logits_nV[-1])]
    drafter.see(aux_nA, [*prompt[1:], tokens[0]])
    while tokens[-1] not in stop_ids and len(tokens) < max_new_tokens:
        drafts = drafter.propose(min(steps, max_new_tokens - len(tokens) - 1), rule)
        logits_nV, aux_nA = session.extend([tokens[-1], *(draft.token for draft in drafts)])
        passes += 1
        new = rule.verify(drafts, logits_nV)
        stop = next((at for at, token in enumerate(new) if token in stop_ids), None)
        new = new if stop is None else new[: stop + 1]
        session.keep(len(prompt) + len(tokens) + len(new) - 1)
        drafter.see(aux_nA[: len(new)], new)
        tokens += new
    session.close()
    return Decoded(tokens=tokens, passes=passes, seconds=time.perf_counter() - began)


class ChainDrafter:
    """The draft beside its target: step-0 keys and values of every token seen, made from the target's real states."""

    def __init__(self, drafting: Drafting) -> None:
        self._draft, self._embedding_VH, self._kept_D = drafting.draft, drafting.embedding_VH, drafting.kept_D
        self._keys_TKE: Tensor | None = None
        self._values_TKE: Tensor | None = None

    @torch.no_grad()
    def see(self, aux_nA: Tensor, next_tokens: Sequence[int]) -> None:
        """The target's aux states of newly accepted positions, and the token that follows each."""
        draft, start = self._draft, 0 if self._keys_TKE is None else len(self._keys_TKE)
        positions_n = torch.arange(start, start + len(next_tokens), device=aux_nA.device)
        feature_nH = draft.fuse(aux_nA.to(draft.fc.weight.dtype))
        x_n2H = draft.attention_input(self._embed(next_tokens), feature_nH)
        keys_nKE, values_nKE = draft.keys_values(x_n2H, positions_n)
        if self._keys_TKE is not None and self._values_TKE is not None:
            keys_nKE = torch.cat([self._keys_TKE, keys_nKE])
            values_nKE = torch.cat([self._values_TKE, values_nKE])
        self._keys_TKE, self._values_TKE = keys_nKE, values_nKE
        self._feature_1H, self._x_12H, self._row_1 = feature_nH[-1:], x_n2H[-1:], positions_n[-1:]

    @torch.no_grad()
    def propose(self, steps: int, rule: Rule = GREEDY) -> list[Draft]:
        """The chain that follows the newest token, up to `steps` drafts."""
        assert self._keys_TKE is not None
        assert self._values_TKE is not None
        draft, feature_1H, x_12H = self._draft, self._feature_1H, self._x_12H
        segments = [(slice(0, 1), slice(0, len(self._keys_TKE)))]
        own_keys: list[Tensor] = []
        own_values: list[Tensor] = []
        proposed: list[Draft] = []
        for i in range(steps):
            if i > 0:
                x_12H = draft.attention_input(self._embed([proposed[-1].token]), feature_1H)
                key_1KE, value_1KE = draft.keys_values(x_12H, self._row_1 + i)
                own_keys.append(key_1KE)
                own_values.append(value_1KE)
            q_1NE = draft.queries(x_12H, self._row_1 + i)
            attended_1NE = attend(q_1NE, self._keys_TKE, self._values_TKE, own_keys, own_values, self._row_1, segments)
            hidden_1H = draft.finish(feature_1H, attended_1NE)
            feature_1H = draft.feed_back(hidden_1H)
            logits_D = draft.lm_head(draft.norm(hidden_1H))[0]
            proposed.append(rule.draft(logits_D, self._kept_D, draft.config.vocab_size))
        return proposed

    def _embed(self, tokens: Sequence[int]) -> Tensor:
        return F.embedding(torch.tensor(tokens, device=self._embedding_VH.device), self._embedding_VH)


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


def compare(pairs: Sequence[tuple[Decoded, Decoded]], dtype: torch.dtype) -> Comparison:
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
