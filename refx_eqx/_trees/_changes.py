"""What can be changed in place in a tree, and what a function changed in its inputs.

A function is given trees that are rebuilt for it. As in JAX, the caller does not see
in-place changes to them:

1. A list or a dict in an argument is a copy. Its entries may be replaced, added and
    removed; only the refs in it must stay, because writes to them are carried back.
2. A list or a dict in a module or a closure is state, as are static fields and closure
    variables. A change to it would be lost, so it is refused.
3. Anything returned is carried by the result, however it was changed.

Only objects that could have changed are examined again.
"""

import copy
import functools
import types
from collections.abc import Callable
from operator import is_
from typing import Any, NamedTuple

import equinox as eqx
import jax.tree_util as jtu
import numpy as np

from ._cells import (
    carried_cells,
    DICTS,
    flatten_one_level,
    holds_itself,
    may_carry,
    reachable,
)
from ._equality import ByValue, is_same_tree, Shared
from ._paths import path_text


_CHANGEABLE = DICTS | {list}


def _may_change(x: Any) -> bool:
    return type(x) in _CHANGEABLE or is_writeable(x)


def is_writeable(leaf: Any) -> bool:
    return type(leaf) is np.ndarray and leaf.flags.writeable


def containers(value: Any) -> dict[int, Any]:
    """The parts of a value that can be changed in place, by `id`."""
    found: dict[int, Any] = {}

    def visit(x: Any) -> bool:
        if _may_change(x):
            found[id(x)] = x
        return False

    jtu.tree_leaves(value, is_leaf=visit)
    return found


def owned(value: Any) -> Any:
    """The value with its own copies of lists, dicts and NumPy arrays; the value itself if
    it has none."""
    return copied(value) if containers(value) else value


def copied(value: Any) -> Any:
    return jtu.tree_map(_copied_one, value, is_leaf=_may_change)


def _copied_one(x: Any) -> Any:
    if type(x) is list:
        return list(map(copied, x))
    if type(x) in _CHANGEABLE:
        # Not by JAX, which sorts the keys.
        new = copy.copy(x)
        new.update((key, copied(item)) for key, item in x.items())
        return new
    # A NumPy array that the caller cannot change: a change there would not be a write.
    return x.copy() if is_writeable(x) else x


def try_leaves(
    value: Any, is_leaf: Callable[[Any], bool] | None = None
) -> list[Any] | None:
    """The leaves of a value; `None` if it cannot be flattened: it holds itself, or an
    `eqx.nn.State` that a layer has consumed. Such a state has no arrays anymore, and raises.
    """
    if holds_itself(value):
        return None
    try:
        return jtu.tree_leaves(value, is_leaf)
    except ValueError:
        states = jtu.tree_leaves(value, is_leaf=_is_state)
        if any(_is_state(x) and type(x._state) is not dict for x in states):
            return None
        raise


def _is_state(x: Any) -> bool:
    return isinstance(x, eqx.nn.State)


def is_same_value(a: Any, b: Any) -> bool:
    """Whether nothing was changed in place since `b` was copied from `a`."""
    if try_leaves(a) is None:
        return False

    def is_same(a: Any, b: Any) -> bool:
        both = type(a) is type(b) is np.ndarray
        return a is b or (both and a.dtype == b.dtype and a.tobytes() == b.tobytes())

    return is_same_tree(is_same, a, b)


class _Node(NamedTuple):
    """Something that can be changed in place, and its contents at the time."""

    obj: Any
    part: int
    is_copy: bool
    children: list[Any]
    rest: Any


class Changes:
    """Tracks in-place changes to some trees from now on."""

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
                # A node that makes its children when it is flattened has new ones each
                # time.
                if type(obj) in _CHANGEABLE or not _differs(node):
                    self._nodes.append(node)
            todo.extend((child, part, is_copy) for child in children)

    def any(self) -> bool:
        return any(map(_differs, self._nodes))

    def lost(self, result: Any) -> _Node | None:
        """A change that would be lost when the function returns `result`."""
        found = [x for x in self._nodes if _differs(x) and _matters(x)]
        if found:
            returned = _nodes_in(result)
            found = [node for node in found if id(node.obj) not in returned]
        return found[0] if found else None


# A state is consumed by the layer it is given to: see `try_leaves`.
_OPAQUE = (Shared, ByValue, eqx.nn.State)


def _open(obj: Any) -> tuple[list[Any], Any] | None:
    """The contents of `obj`, and its other attributes; `None` if nothing in it can
    change."""
    if obj is None or isinstance(obj, _OPAQUE):
        return None
    if may_carry(obj):
        return _open_callable(obj)
    # By one level: a body may have made it hold itself.
    parts = flatten_one_level(obj)
    if parts is None:
        return None
    children, rest = parts
    return list(children), rest  # those of a list are the list itself


def _differs(node: _Node) -> bool:
    children, rest = _open(node.obj) or ([], None)
    same = len(children) == len(node.children) and rest == node.rest
    return not (same and all(map(is_, children, node.children)))


def _matters(node: _Node) -> bool:
    """Whether a change to `node` affects more than a copy."""
    now, _ = _open(node.obj) or ([], None)
    return not node.is_copy or _refs(node.children) != _refs(now)


def _open_callable(fn: Any) -> tuple[list[Any], Any] | None:
    if type(fn) is types.MethodType:
        return [fn.__func__, fn.__self__], None
    if type(fn) is functools.partial:
        return [fn.func, *fn.args, *fn.keywords.values()], tuple(fn.keywords)
    # The cells made for it; all others are the user's own.
    cells = carried_cells(fn)
    return [cell.cell_contents for cell in cells] + [fn.__kwdefaults__], None


def _refs(trees: list[Any]) -> list[int]:
    """The refs in some trees, with repetitions."""
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
    """Which tree of a call was changed, and where; for a message."""
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
