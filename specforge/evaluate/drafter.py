"""The draft beside its target while texts are written: what it has seen of each, and the trees that it proposes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge.draft.attention import attend
from specforge.draft.model import Eagle3Draft
from specforge.evaluate.rules import Rule
from specforge.evaluate.shape import Shape
from specforge.evaluate.tree import Tree, pruned


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafting:
    """A draft with what it shares with its target, and the shape of its trees."""

    draft: Eagle3Draft
    embedding_VH: Tensor
    kept_D: Tensor
    shape: Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Of one text, from the target's real states: step-0 keys and values of every position, and the newest row."""

    keys_TKE: Tensor
    values_TKE: Tensor
    feature_1H: Tensor
    x_12H: Tensor
    token: int  # that follows the newest row: the root of the next tree


class Drafter:
    """Several texts side by side, each under a number of its own. Here B is texts and w nodes of the beam of each."""

    def __init__(self, drafting: Drafting) -> None:
        self._draft, self._embedding_VH, self._kept_D = drafting.draft, drafting.embedding_VH, drafting.kept_D
        self._shape, self._seen = drafting.shape, dict[int, Seen]()

    @torch.no_grad()
    def see(self, new: Mapping[int, tuple[Tensor, Sequence[int]]]) -> None:
        """For each text the target's aux states [n, A] of newly accepted positions, and the token that follows each."""
        draft, counts = self._draft, [len(tokens) for _, tokens in new.values()]
        aux_RA = torch.cat([aux_nA for aux_nA, _ in new.values()])
        starts = [len(self._seen[number].keys_TKE) if number in self._seen else 0 for number in new]
        ranges = [torch.arange(start, start + count) for start, count in zip(starts, counts, strict=True)]
        feature_RH = draft.fuse(aux_RA.to(draft.fc.weight.dtype))
        x_R2H = draft.attention_input(self._embed([t for _, tokens in new.values() for t in tokens]), feature_RH)
        keys_RKE, values_RKE = draft.keys_values(x_R2H, torch.cat(ranges).to(aux_RA.device))
        pieces = zip(*(x.split(counts) for x in (feature_RH, x_R2H, keys_RKE, values_RKE)), strict=True)
        for (number, (_, tokens)), (feature_nH, x_n2H, keys, values) in zip(new.items(), pieces, strict=True):
            before = self._seen.get(number)
            self._seen[number] = Seen(
                keys_TKE=torch.cat([before.keys_TKE, keys]) if before else keys,
                values_TKE=torch.cat([before.values_TKE, values]) if before else values,
                feature_1H=feature_nH[-1:],
                x_12H=x_n2H[-1:],
                token=tokens[-1],
            )

    def forget(self, number: int) -> None:
        del self._seen[number]

    @torch.no_grad()
    def grow(self, rules: Mapping[int, Rule]) -> dict[int, Tree]:
        """For each of these texts the tree behind its newest token."""
        seen = [self._seen[number] for number in rules]
        steps = _Steps(self._draft, seen)
        chains = self._shape.top_k == 1
        trees = self._chains(steps, seen, list(rules.values())) if chains else self._trees(steps, seen)
        return dict(zip(rules, trees, strict=True))

    def _chains(self, steps: _Steps, seen: Sequence[Seen], rules: Sequence[Rule]) -> list[Tree]:
        """Each rule says the next token itself: it may draw it."""
        vocab_size = self._draft.config.vocab_size
        drafts: list[list[tuple[int, Tensor | None]]] = [[] for _ in rules]
        itself_B = torch.arange(len(rules), device=self._kept_D.device)
        for i in range(self._shape.depth):
            if i > 0:
                steps.advance(itself_B, self._embed([chain[-1][0] for chain in drafts]))
            for chain, rule, logits_D in zip(drafts, rules, steps.logits(), strict=True):
                chain.append(rule.draft(logits_D, self._kept_D, vocab_size))
        return [
            Tree(
                tokens=(one.token, *(token for token, _ in chain)),
                parents=tuple(range(-1, len(chain))),
                drawn_from=tuple(q_V for _, q_V in chain if q_V is not None),
            )
            for one, chain in zip(seen, drafts, strict=True)
        ]

    def _trees(self, steps: _Steps, seen: Sequence[Seen]) -> list[Tree]:
        """Candidates are all children of beam nodes, in order of their steps; `beam_Bw` are the beam's indices among
        them, -1 for the root."""
        k, count = self._shape.top_k, len(seen)
        device = self._kept_D.device
        beam_Bw = torch.full((count, 1), -1, device=device)
        score_Bw = torch.zeros(count, 1, device=device)  # log of the cumulative probability
        tokens, parents, scores = list[Tensor](), list[Tensor](), list[Tensor]()  # [B, candidates] of each step
        before = 0
        for i in range(self._shape.depth):
            logits_RD, width = steps.logits(), beam_Bw.shape[1]
            own_Rk, id_Rk = logits_RD.to(torch.promote_types(logits_RD.dtype, torch.float32)).log_softmax(-1).topk(k)
            scores.append((score_Bw[:, :, None] + own_Rk.view(count, width, k)).flatten(1))
            tokens.append(self._kept_D[id_Rk].view(count, -1))
            parents.append(beam_Bw.repeat_interleave(k, 1))
            score_Bw, best_Bw = scores[-1].topk(k)
            beam_Bw = before + best_Bw
            before += width * k
            if i + 1 < self._shape.depth:
                row_Bw = best_Bw // k + torch.arange(count, device=device)[:, None] * width
                steps.advance(row_Bw.flatten(), self._embed(tokens[-1].gather(1, best_Bw).flatten()))
        chosen = self._shape.draft_tokens - 1
        every = zip(torch.cat(tokens, 1).tolist(), torch.cat(parents, 1).tolist(), torch.cat(scores, 1), strict=True)
        return [pruned(one.token, *of_one, chosen) for one, of_one in zip(seen, every, strict=True)]

    def _embed(self, tokens: Sequence[int] | Tensor) -> Tensor:
        return F.embedding(torch.as_tensor(tokens, device=self._embedding_VH.device), self._embedding_VH)


class _Steps:
    """The draft's steps for a beam of w nodes a text. The rows of a text are its nodes; all of a text's nodes share its
    step-0 keys, and what a node's ancestors (and itself) made since are its own columns."""

    def __init__(self, draft: Eagle3Draft, seen: Sequence[Seen]) -> None:
        self._draft, self._texts = draft, seen
        self._feature_RH = torch.cat([one.feature_1H for one in seen])
        self._x_R2H = torch.cat([one.x_12H for one in seen])
        self._row_R = torch.tensor([len(one.keys_TKE) - 1 for one in seen], device=self._x_R2H.device)
        self._own_keys, self._own_values = list[Tensor](), list[Tensor]()

    def logits(self) -> Tensor:
        """[R, D] of the children of each node."""
        draft, width = self._draft, len(self._row_R) // len(self._texts)
        q_RNE = draft.queries(self._x_R2H, self._row_R + len(self._own_keys))
        pieces = []
        for at, text in enumerate(self._texts):
            rows = slice(at * width, (at + 1) * width)
            own_keys, own_values = ([x[rows] for x in own] for own in (self._own_keys, self._own_values))
            segments = [(slice(0, width), slice(0, len(text.keys_TKE)))]
            keys_values = (text.keys_TKE, text.values_TKE, own_keys, own_values)
            pieces.append(attend(q_RNE[rows], *keys_values, self._row_R[rows], segments))
        hidden_RH = draft.finish(self._feature_RH, torch.cat(pieces))
        self._next_RH = draft.feed_back(hidden_RH)
        return draft.lm_head(draft.norm(hidden_RH))

    def advance(self, parent_R: Tensor, embedding_RH: Tensor) -> None:
        """The next beam: each node's parent among the rows so far, and its token's embedding."""
        self._feature_RH, self._row_R = self._next_RH[parent_R], self._row_R[parent_R]
        self._own_keys = [keys[parent_R] for keys in self._own_keys]
        self._own_values = [values[parent_R] for values in self._own_values]
        self._x_R2H = self._draft.attention_input(embedding_RH, self._feature_RH)
        keys_RKE, values_RKE = self._draft.keys_values(self._x_R2H, self._row_R + len(self._own_keys) + 1)
        self._own_keys.append(keys_RKE)
        self._own_values.append(values_RKE)
