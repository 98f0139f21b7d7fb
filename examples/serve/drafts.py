"""Speculative decoding without a second model: what followed the same few tokens before may follow them again.

Prompt lookup (github.com/apoorvumang/prompt-lookup-decoding); several continuations are one tree, which one step
checks (SpecInfer, arXiv 2305.09781). Node 0 is the last sure token; each other node is a guess, after its parent.
"""

from typing import NamedTuple

import numpy as np

LONGEST, SHORTEST = 3, 1  # of the tokens that are looked up
CONTINUATIONS = 3


class Tree(NamedTuple):
    """Drafts; `parents[i]` and `depths[i]` are those of node i, and node 0 has parent -1 and depth 0."""

    tokens: list[int]
    parents: list[int]
    depths: list[int]


def lookup(tokens: list[int], nodes: int, depth: int) -> Tree:
    """A tree of at most `nodes` nodes and paths of at most `depth` drafts, from where the last tokens stood before."""
    tree = Tree([tokens[-1]], [-1], [0])
    if nodes > 1 and depth > 0:
        for start in _continuations(np.asarray(tokens)):
            _grow(tree, tokens[start : start + depth], nodes)
    return tree


def _continuations(tokens) -> list[int]:
    """Where the latest of those places go on that end in the same tokens as the whole, in as many as possible."""
    for length in range(min(LONGEST, len(tokens) - 1), SHORTEST - 1, -1):
        ends = np.arange(length, len(tokens))  # a place ends before the token of this number
        same = np.ones(len(ends), bool)
        for back in range(1, length + 1):
            same &= tokens[ends - back] == tokens[-back]
        if same.any():
            return ends[same][-CONTINUATIONS:][::-1].tolist()
    return []


def _grow(tree: Tree, path: list[int], nodes: int) -> None:
    """Adds a path from the root, as far as it is not there and there is room."""
    here = 0
    for token in path:
        below = [node for node, parent in enumerate(tree.parents) if parent == here and tree.tokens[node] == token]
        if not below and len(tree.tokens) == nodes:
            return
        if not below:
            tree.tokens.append(token)
            tree.parents.append(here)
            tree.depths.append(tree.depths[here] + 1)
        here = below[0] if below else len(tree.tokens) - 1


def accepted(tree: Tree, following: list[int]) -> list[int]:
    """The path of nodes from the root on which each is what the model says, `following`, after the one before."""
    path = [0]
    for node in range(1, len(tree.tokens)):  # parents stand before their children
        if tree.parents[node] == path[-1] and tree.tokens[node] == following[path[-1]]:
            path.append(node)
    return path
