r"""What is verified in one pass of the target: a tree of drafts behind the newest token. A chain is a tree of one path.

    steps 3, top-k 2, draft tokens 6        every beam node (*) proposes its 2 best children; the best 2 of them by
                                            cumulative probability are the next beam; the best 6 - 1 drafts of all
            root                            (letters) are verified
           /    \
         a*      b*                         paths: root a c f, root a d, root b
        /  \    /  \                        they share what is kept of the text and are computed side by side: root
      c*   d*  .    .                       and a on each path
     / \  / \
    f   . .  .
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a pass of the target made of a tree."""

    nodes: list[int]  # that stand, from the root on
    token: int  # the target's own, behind the last of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """Node 0 is the newest token; every other node is a draft, and stands behind its parent in the lists."""

    tokens: tuple[int, ...]
    parents: tuple[int, ...]  # nodes; -1 for the root
    drawn_from: tuple[Tensor, ...] = ()  # [V] for each draft of a chain that was drawn, not chosen

    def paths(self) -> list[list[int]]:
        """The nodes from the root to each leaf."""
        paths = []
        for leaf in sorted(set(range(len(self.tokens))) - set(self.parents)):
            path = [leaf]
            while path[-1]:
                path.append(self.parents[path[-1]])
            paths.append(path[::-1])
        return paths

    def descend(self, own: Callable[[int], int]) -> Verdict:
        """Down the tree while the target's own token behind a node (`own`, asked once a node) is a child of it."""
        child = {(self.parents[node], self.tokens[node]): node for node in range(1, len(self.tokens))}
        nodes = [0]
        while True:
            token = own(nodes[-1])
            if (nodes[-1], token) not in child:
                return Verdict(nodes=nodes, token=token)
            nodes.append(child[nodes[-1], token])


def best_nodes(scores_M: Tensor, count: int) -> list[int]:
    """The best of M candidates, ascending. Where candidates come behind their parents and score no more than them, as
    cumulative probabilities do, this is a tree: of equals, the sort leaves the earlier first."""
    return sorted(scores_M.sort(descending=True, stable=True).indices[:count].tolist())


def pruned(root: int, tokens_M: Sequence[int], parents_M: Sequence[int], scores_M: Tensor, count: int) -> Tree:
    """The tree of the best `count` of M candidates. A candidate's parent is another one's index, or -1: the root."""
    chosen = best_nodes(scores_M, count)
    node_of = {-1: 0} | {candidate: node for node, candidate in enumerate(chosen, 1)}
    return Tree(
        tokens=(root, *(int(tokens_M[candidate]) for candidate in chosen)),
        parents=(-1, *(node_of[int(parents_M[candidate])] for candidate in chosen)),
    )


def root_only(token: int) -> Tree:
    """Nothing is drafted: plain decoding."""
    return Tree(tokens=(token,), parents=(-1,))


def by_node(paths: Sequence[Sequence[int]], of_path: Sequence[Tensor]) -> Tensor:
    """[nodes, ...] of what was computed path by path; a node on several paths was computed alike on each."""
    first = dict[int, int]()
    for row, node in enumerate(node for path in paths for node in path):
        first.setdefault(node, row)
    rows = [first[node] for node in range(len(first))]
    return torch.cat(list(of_path))[rows]
