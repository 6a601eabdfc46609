"""The trees of a call, of other leaves: gradients, axes."""

from collections.abc import Iterator
from typing import Any

import jax.tree_util as jtu

from .._trees._carried import Carried, counts
from .._trees._closure import Closure, is_closure
from ._nodes import is_node


__tracebackhide__ = True


def tree_of(part: Carried, leaves: list[Any], of_all: bool = False) -> Any:
    """The derefed tree that has these leaves.

    In a call more functions are nodes than in a derefed tree: a partial is, whatever is bound
    in it, and in a result what holds an array of the trace. `None` is here for each that
    holds no refs, or also a node if `of_all`.
    """
    if not part.nodes:
        return jtu.tree_unflatten(part.treedef, leaves)
    return _tree(part, iter(leaves), of_all, set())


def _tree(part: Carried, leaves: Iterator[Any], of_all: bool, met: set[int]) -> Any:
    nodes = part.nodes or (None,) * part.treedef.num_leaves
    outer = [
        next(leaves) if node is None else _closure(node, leaves, of_all, met)
        for node in nodes
    ]
    return jtu.tree_unflatten(part.treedef, outer)


def _closure(
    node: Any, leaves: Iterator[Any], of_all: bool, met: set[int]
) -> Closure | None:
    """`met` are the functions that were made a node of, to know their later places."""
    if isinstance(node, int):
        return Closure(node, []) if int(node) in met else None
    head = type(node)(node[:-1])
    number = head[0] if head else -1
    # Before what is in it, where a recursive function is met again.
    met.add(number)
    closure = Closure(head, _tree(node[-1], leaves, of_all, met))
    if of_all or _has_refs(closure):
        return closure
    met.discard(number)
    return None


def _has_refs(closure: Closure) -> bool:
    return any(map(is_node, jtu.tree_leaves(closure.contents, is_leaf=is_node)))


def leaves_up_to(part: Carried, tree: Any) -> list[Any]:
    """The opposite of `tree_of`, for a tree of which `part` is a prefix. What is in a
    function has `None` where the tree has no node for it.

    **Raises:**

    - `ValueError`, `TypeError`: JAX's, if it is of another structure.
    """
    found = []
    outer = part.treedef.flatten_up_to(tree)
    nodes = part.nodes or (None,) * len(outer)
    for node, leaf, n in zip(nodes, outer, counts(part)):
        if node is None:
            found.append(leaf)
        elif n and is_closure(leaf):
            found += leaves_up_to(node[-1], leaf.contents)
        else:
            found += [None] * n
    return found
