"""What a call carries: trees whose leaves may be functions that close over refs."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.tree_util as jtu

from ._cells import is_shared, may_carry, reaches
from ._functions import Again, head_of, rebuilt


__tracebackhide__ = True


class Carried:
    """The structure of a tree, with the functions in it that carry refs opened.

    Hashable and comparable. Holds no ref, no array and no function that carries refs.
    """

    __slots__ = ("_hash", "nodes", "num_leaves", "treedef")

    def __init__(self, treedef: Any, nodes: tuple):
        self.treedef = treedef
        # One for each leaf of `treedef`, `None` for an ordinary leaf; or none at all.
        self.nodes = nodes
        inside = [_num_leaves(node) for node in nodes]
        self.num_leaves: int = sum(inside) if nodes else treedef.num_leaves
        self._hash = hash((treedef, nodes))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: Any) -> bool:
        if self is other:
            return True
        return (
            isinstance(other, Carried)
            and self._hash == other._hash
            and self.treedef == other.treedef
            and self.nodes == other.nodes
        )


def _num_leaves(node: Any) -> int:
    if node is None:
        return 1
    return node[-1].num_leaves if isinstance(node, tuple) else 0


def counts(structure: Carried) -> list[int]:
    """For each leaf of the tree itself, how many there are in its place: one, or all those
    inside a function that is opened."""
    nodes = structure.nodes or (None,) * structure.treedef.num_leaves
    return list(map(_num_leaves, nodes))


def outside(structure: Carried, leaves: list[Any], inside: Any = None) -> list[Any]:
    """The leaves of the tree itself: `inside` for a function that is opened."""
    if not structure.nodes:
        return leaves
    rest, found = iter(leaves), []
    for node in structure.nodes:
        mine = list(itertools.islice(rest, _num_leaves(node)))
        found.append(mine[0] if node is None else inside)
    return found


def grouped(structure: Carried, leaves: list[Any]) -> list[Any]:
    """The leaves of the tree itself: the list of those inside for a function that is
    opened."""
    rest = iter(leaves)
    parts = [list(itertools.islice(rest, n)) for n in counts(structure)]
    nodes = structure.nodes or (None,) * len(parts)
    return [x[0] if node is None else x for x, node in zip(parts, nodes)]


def ungrouped(structure: Carried, outer: list[Any]) -> list[Any]:
    """The opposite of `grouped`."""
    nodes = structure.nodes or (None,) * len(outer)
    both = zip(outer, nodes)
    return [x for leaf, node in both for x in ([leaf] if node is None else leaf)]


class _Opening(NamedTuple):
    """What one `flatten` has found.

    - `out`: the leaves;
    - `numbers`: of the functions that were met, by their ids;
    - `is_wanted`: which leaves make it open the function that they are in.
    """

    out: list[Any]
    numbers: dict[int, int]
    is_wanted: Callable[[Any], bool]


def flatten(
    tree: Any, is_wanted: Callable[[Any], bool] = is_shared
) -> tuple[list[Any], Carried]:
    """The leaves of a tree, those inside functions that carry refs included.

    **Arguments:**

    - `is_wanted`: which leaves make a node of the function that they are in.
    """
    leaves, treedef = jtu.tree_flatten(tree)
    if not any(map(may_carry, leaves)):
        # `None` for every leaf, without making a tuple of them.
        return leaves, Carried(treedef, ())
    opening = _Opening([], {}, is_wanted)
    return opening.out, _flatten(leaves, treedef, opening)


def _flatten(leaves: list, treedef: Any, opening: _Opening) -> Carried:
    nodes = []
    for leaf in leaves:
        node = None
        # A partial is always opened: what was bound in it are arguments like others.
        if type(leaf) is functools.partial or (
            may_carry(leaf) and reaches(leaf, opening.is_wanted)
        ):
            node = _open(leaf, opening)
        else:
            opening.out.append(leaf)
        nodes.append(node)
    if all(node is None for node in nodes):
        nodes = []
    return Carried(treedef, tuple(nodes))


def _sub(tree: Any, opening: _Opening) -> Carried:
    leaves, treedef = jtu.tree_flatten(tree)
    return _flatten(leaves, treedef, opening)


def _open(leaf: Any, opening: _Opening) -> Any:
    head, contents = head_of(leaf, opening.numbers, opening.is_wanted)
    if isinstance(head, Again):
        return head
    return type(head)((*head, _sub(contents, opening)))


def unflatten(structure: Carried, leaves: list[Any]) -> Any:
    """The tree again. Each function that carries refs is a new one, with new cells."""
    if not structure.nodes:
        return jtu.tree_unflatten(structure.treedef, leaves)
    return _unflatten(structure, iter(leaves), {})


def _unflatten(structure: Carried, leaves: Iterator[Any], made: dict[int, Any]) -> Any:
    nodes = structure.nodes or (None,) * structure.treedef.num_leaves
    return jtu.tree_unflatten(
        structure.treedef,
        [
            next(leaves)
            if node is None
            else rebuilt(node, lambda: _unflatten(node[-1], leaves, made), made)
            for node in nodes
        ],
    )
