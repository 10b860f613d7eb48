"""Trees of drafts against brute force: what a node says, which nodes are chosen, what they cost to verify at most."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specforge.evaluate import drafter as drafters
from specforge.evaluate.decode import GREEDY
from specforge.evaluate.drafter import Drafter, Drafting
from specforge.evaluate.shape import Shape
from specforge.evaluate.tree import Tree, best_nodes, by_node, pruned
from tests.unit.test_draft_step import CONFIG, H, V, make

ADVANCE = drafters._Steps.advance
D = 8  # draft vocabulary, so small that all nodes can be looked at
SHAPES = [
    Shape(steps=3, top_k=2, draft_tokens=6),
    Shape(steps=3, top_k=2, draft_tokens=11),  # all of them
    Shape(steps=3, top_k=3, draft_tokens=12),
    Shape(steps=3, top_k=8, draft_tokens=9),  # the beam is as wide as the choice: the best of the whole tree
]


class Path:
    """A rule whose chain says the given tokens; keeps what the draft would say behind each."""

    def __init__(self, tokens) -> None:
        self._tokens, self.logits = [*tokens], []

    def draft(self, logits_D, kept_D, vocab_size):
        self.logits.append(logits_D)
        return self._tokens.pop(0) if self._tokens else int(kept_D[0]), None


def seen(drafting: Drafting, seed: int, *lengths: int) -> Drafter:
    """A drafter that has seen a text of each length."""
    drafter, source = Drafter(drafting), torch.Generator().manual_seed(seed)
    for number, length in enumerate(lengths):
        ids = torch.randint(0, V, (length,), generator=source).tolist()
        dtype = drafting.embedding_VH.dtype
        drafter.see({number: (torch.randn(length, 3 * H, generator=source, dtype=dtype), ids)})
    return drafter


def drafting_of(seed: int, shape: Shape) -> Drafting:
    draft, head, kept, *_ = make(1.0, torch.float64, seed, replace(CONFIG, draft_vocab_size=D))
    return Drafting(draft=draft, embedding_VH=head.embedding_VH, kept_D=kept, shape=shape)


def said_behind(drafting: Drafting, seed: int, path: tuple[int, ...]) -> torch.Tensor:
    """[D] logits of the chain drafter, forced along the path."""
    chain = Path(path)
    seen(replace(drafting, shape=Shape.chain(len(path) + 1)), seed, 9).grow({0: chain})
    return chain.logits[-1]


def scores_of_all(drafting: Drafting, seed: int, steps: int) -> dict[tuple[int, ...], float]:
    """The log of the cumulative probability of every path of at most so many tokens."""
    found = {(): 0.0}
    for depth in range(steps):
        for path in [path for path in found if len(path) == depth]:
            own_D = said_behind(drafting, seed, path).log_softmax(-1)
            found |= {(*path, int(t)): found[path] + float(p) for t, p in zip(drafting.kept_D, own_D, strict=True)}
    return found


def token_paths(tree: Tree) -> set[tuple[int, ...]]:
    """Of all nodes but the root."""
    return {tuple(tree.tokens[n] for n in path[1:end]) for path in tree.paths() for end in range(2, len(path) + 1)}


def by_brute_force(drafting: Drafting, every: dict[tuple[int, ...], float]) -> set[tuple[int, ...]]:
    """EAGLE-2's choice, from its words."""
    shape, beam, candidates = drafting.shape, [()], []
    for _ in range(shape.steps):
        children = []
        for node in beam:
            of_node = sorted(((*node, int(t)) for t in drafting.kept_D), key=every.__getitem__)[-shape.top_k :]
            children += of_node
        candidates += children
        beam = sorted(children, key=every.__getitem__)[-shape.top_k :]
    return set(sorted(candidates, key=every.__getitem__)[-(shape.draft_tokens - 1) :])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_chosen_nodes_are_the_best(seed, shape):
    drafting = drafting_of(seed, shape)
    every = scores_of_all(drafting, seed, shape.steps)
    tree = seen(drafting, seed, 9).grow({0: GREEDY})[0]
    assert len(tree.tokens) == shape.draft_tokens
    assert token_paths(tree) == by_brute_force(drafting, every)
    if shape.top_k >= shape.draft_tokens - 1:
        del every[()]
        assert token_paths(tree) == set(sorted(every, key=every.__getitem__)[-(shape.draft_tokens - 1) :])


def keys_of_others(steps, parent_R, embedding_RH) -> None:
    """Broken: a node keeps the keys of its place in the beam, not those of its ancestors."""
    keys = steps._own_keys
    ADVANCE(steps, parent_R, embedding_RH)
    steps._own_keys[:-1] = keys


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("seed", range(1, 4))  # of seed 0 each node of a beam has the one in its place as parent
def test_a_node_says_what_the_chain_says_behind_its_path(seed, broken, monkeypatch):
    """In fp64: 1e-12 is rounding; with another node's keys it is far more."""
    shape = Shape(steps=4, top_k=3, draft_tokens=Shape(steps=4, top_k=3, draft_tokens=2).capacity)
    if broken:
        monkeypatch.setattr(drafters._Steps, "advance", keys_of_others)
    said, own = [], drafters._Steps.logits
    monkeypatch.setattr(drafters._Steps, "logits", lambda steps: said.append(own(steps)) or said[-1])
    drafting = drafting_of(seed, shape)
    tree = seen(drafting, seed, 9).grow({0: GREEDY})[0]  # all candidates
    monkeypatch.undo()
    paths = token_paths(tree) | {()}
    inner = {path for path in paths if any(other[:-1] == path for other in paths if other)}
    rows = [row for of_step in said for row in of_step]
    assert len(rows) == len(inner) == 1 + 3 * 3
    wanted = [said_behind(drafting, seed, path) for path in inner]
    apart = max(min(float((row - want).abs().max()) for row in rows) for want in wanted)
    assert apart > 1e-3 if broken else apart < 1e-12


def test_texts_side_by_side_grow_the_trees_that_each_grows_alone():
    for shape in (Shape.chain(4), SHAPES[2]):
        drafting = drafting_of(0, shape)
        together = seen(drafting, 0, 5, 40, 17)
        trees = together.grow(dict.fromkeys(range(3), GREEDY))
        for number in range(3):
            assert together.grow({number: GREEDY}) == {number: trees[number]}
        together.forget(1)
        assert together.grow({2: GREEDY, 0: GREEDY}) == {2: trees[2], 0: trees[0]}


def test_steps_that_no_chosen_draft_can_need_change_nothing():
    """A draft is verified with its ancestors, so 3 drafts are at most 3 deep."""
    for top_k in (1, 2):
        deep, flat = (drafting_of(0, Shape(steps=s, top_k=top_k, draft_tokens=4)) for s in (9, 3))
        assert seen(deep, 0, 9).grow({0: GREEDY}) == seen(flat, 0, 9).grow({0: GREEDY})


@given(st.integers(1, 6), st.integers(1, 4), st.data())
def test_ties_do_not_part_a_node_from_its_ancestors(steps, top_k, data):
    """Probabilities of exactly one give a child its parent's score."""
    parents, scores, beam = [], [], [-1]
    for _ in range(steps):
        children = [
            (parent, data.draw(st.sampled_from([0.0, 0.0, -0.5, -1.0]))) for parent in beam for _ in range(top_k)
        ]
        first = len(parents)
        parents += [parent for parent, _ in children]
        scores += [(scores[parent] if parent >= 0 else 0.0) + own for parent, own in children]
        beam = sorted(range(first, len(parents)), key=scores.__getitem__)[-top_k:]
    count = data.draw(st.integers(1, len(parents)))
    chosen = set(best_nodes(torch.tensor(scores), count))
    assert all(parents[node] in chosen | {-1} for node in chosen)
    tree = pruned(7, range(len(parents)), parents, torch.tensor(scores), count)
    assert len(tree.tokens) == count + 1
    assert all(parent < node for node, parent in enumerate(tree.parents))
    shape = Shape(steps=steps, top_k=top_k, draft_tokens=count + 1)
    assert count + 1 <= shape.capacity
    assert len(tree.paths()) <= shape.most_paths
    assert sum(map(len, tree.paths())) <= shape.most_tokens


def test_paths_and_the_way_down():
    #     0 -> 1 -> 3,  1 -> 4,  0 -> 2
    tree = Tree(tokens=(50, 11, 12, 13, 14), parents=(-1, 0, 0, 1, 1))
    assert tree.paths() == [[0, 2], [0, 1, 3], [0, 1, 4]]
    follows = {0: 11, 1: 14, 4: 99, 2: 77}
    verdict = tree.descend(follows.__getitem__)
    assert (verdict.nodes, verdict.token) == ([0, 1, 4], 99)
    assert tree.descend({0: 13}.__getitem__).nodes == [0]  # 13 is a node, but no child of the root
    values = [torch.tensor([node * 1.0 for node in path]) for path in tree.paths()]
    assert by_node(tree.paths(), values).tolist() == [0, 1, 2, 3, 4]


def test_defaults_and_capacity():
    for steps, top_k in product(range(1, 8), range(1, 9)):
        shape = Shape.default(steps, top_k)
        assert 2 <= shape.draft_tokens <= shape.capacity
    assert Shape.default(5, 4).draft_tokens == 16
    assert Shape.default(7, 1) == Shape.chain(7)
