"""What may be changed in place in a tree, and what a function changed of what it was given.

A function is given trees that are rebuilt for it. What it changes in them in place is not
seen by the caller, as in JAX:

1. A list or a dict of an argument is a copy. Its entries may be replaced, added and
   removed; only the refs in it must stay, because what becomes of a ref is carried back.
2. A list or a dict in a module or in a closure is state. So is a static field, and a closure
   variable. A change of it would be lost, so it is refused.
3. What is returned is carried by the result, however it was changed.

Only what could have changed is looked at again.
"""

import copy
import functools
import types
from collections import defaultdict, OrderedDict
from operator import is_
from typing import Any, NamedTuple

import equinox as eqx
import jax.tree_util as jtu
import numpy as np

from ._cells import carried_cells, may_carry, reachable
from ._equality import ByValue, is_same_tree, Shared
from ._paths import path_text


__tracebackhide__ = True


_CHANGEABLE = frozenset((list, dict, OrderedDict, defaultdict))


def _may_change(x: Any) -> bool:
    return type(x) in _CHANGEABLE or is_writeable(x)


def is_writeable(leaf: Any) -> bool:
    return type(leaf) is np.ndarray and leaf.flags.writeable


def containers(value: Any) -> dict[int, Any]:
    """What in a value may be changed in place, by its `id`."""
    found: dict[int, Any] = {}

    def visit(x: Any) -> bool:
        if _may_change(x):
            found[id(x)] = x
        return False

    jtu.tree_leaves(value, is_leaf=visit)
    return found


def owned(value: Any) -> Any:
    """The value with lists, dicts and NumPy arrays of its own; itself if it has none."""
    return copied(value) if containers(value) else value


def copied(value: Any) -> Any:
    return jtu.tree_map(_copied_one, value, is_leaf=_may_change)


def _copied_one(x: Any) -> Any:
    if type(x) is list:
        return list(map(copied, x))
    if type(x) in _CHANGEABLE:
        # Not by JAX, which puts the keys in order.
        new = copy.copy(x)
        new.update((key, copied(item)) for key, item in x.items())
        return new
    # A NumPy array that its giver cannot change: a change there would be no write.
    return x.copy() if is_writeable(x) else x


def is_same_value(a: Any, b: Any) -> bool:
    """Whether nothing was changed in place since `b` was copied from `a`."""

    def is_same(a: Any, b: Any) -> bool:
        both = type(a) is type(b) is np.ndarray
        return a is b or (both and a.dtype == b.dtype and a.tobytes() == b.tobytes())

    return is_same_tree(is_same, a, b)


class _Node(NamedTuple):
    """Something that may be changed in place, and what was in it."""

    obj: Any
    part: int
    is_copy: bool
    children: list[Any]
    rest: Any


class Changes:
    """What is changed in place in some trees from now on."""

    __slots__ = ("_nodes",)

    def __init__(self, trees: list[Any]):
        self._nodes: list[_Node] = []
        seen: set[int] = set()
        todo = [(tree, part, True) for part, tree in enumerate(trees)]
        while todo:
            obj, part, is_copy = todo.pop()
            opened = _open(obj)
            if opened is None or id(obj) in seen:
                continue
            children, rest = opened
            if not isinstance(obj, tuple):
                seen.add(id(obj))
                is_copy = is_copy and type(obj) in _CHANGEABLE
                node = _Node(obj, part, is_copy, children, rest)
                # What makes its children when it is flattened has others each time.
                if type(obj) in _CHANGEABLE or not _differs(node):
                    self._nodes.append(node)
            todo.extend((child, part, is_copy) for child in children)

    def any(self) -> bool:
        return any(map(_differs, self._nodes))

    def lost(self, result: Any) -> _Node | None:
        """Something whose change would be lost, of a function that returns `result`."""
        found = [x for x in self._nodes if _differs(x) and _matters(x)]
        if found:
            returned = _nodes_in(result)
            found = [node for node in found if id(node.obj) not in returned]
        return found[0] if found else None


# An `equinox.nn.State` is consumed by a function that is given one, and may not be
# flattened then.
_OPAQUE = (Shared, ByValue, eqx.nn.State)


def _open(obj: Any) -> tuple[list[Any], Any] | None:
    """What is in `obj`, and what else it has; `None` if nothing in it can change."""
    if obj is None or isinstance(obj, _OPAQUE):
        return None
    if may_carry(obj):
        return _open_callable(obj)
    children, rest = jtu.tree_flatten(obj, is_leaf=lambda x: x is not obj)
    if len(children) == 1 and children[0] is obj:
        return None
    return children, rest


def _differs(node: _Node) -> bool:
    children, rest = _open(node.obj) or ([], None)
    same = len(children) == len(node.children) and rest == node.rest
    return not (same and all(map(is_, children, node.children)))


def _matters(node: _Node) -> bool:
    """Whether a change of `node` is more than one of a copy."""
    now, _ = _open(node.obj) or ([], None)
    return not node.is_copy or _refs(node.children) != _refs(now)


def _open_callable(fn: Any) -> tuple[list[Any], Any] | None:
    if type(fn) is types.MethodType:
        return [fn.__func__, fn.__self__], None
    if type(fn) is functools.partial:
        return [fn.func, *fn.args, *fn.keywords.values()], tuple(fn.keywords)
    # The cells that were made for it; all others are the user's own.
    cells = carried_cells(fn)
    return [cell.cell_contents for cell in cells] + [fn.__kwdefaults__], None


def _refs(trees: list[Any]) -> list[int]:
    """The refs in some trees, as often as they are in them."""
    leaves = reachable(trees)
    return sorted(id(leaf) for leaf in leaves if isinstance(leaf, Shared))


def _nodes_in(tree: Any) -> set[int]:
    found: set[int] = set()

    def visit(x: Any) -> bool:
        found.add(id(x))
        return False

    jtu.tree_leaves(tree, is_leaf=visit)
    return found


def place_of(node: _Node, trees: list[Any]) -> str:
    """Which of the trees of a call it is that was changed, and where; for a message."""
    last = len(trees) - 1
    if node.part == last:
        return "the callable, or what it closes over,"
    which = "a keyword argument" if node.part == last - 1 else f"argument {node.part}"

    def is_leaf(x: Any) -> bool:
        return x is node.obj or isinstance(x, eqx.nn.State)

    pairs, _ = jtu.tree_flatten_with_path(trees[node.part], is_leaf=is_leaf)
    for path, leaf in pairs:
        if leaf is node.obj and path:
            return f"{which} at {path_text(path)}"
    return which
