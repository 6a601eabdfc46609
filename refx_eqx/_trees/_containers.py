"""Lists, dicts and NumPy arrays in a tree: what may be changed in place."""

import copy
from collections import defaultdict, OrderedDict
from typing import Any

import jax.tree_util as jtu
import numpy as np


__tracebackhide__ = True


_CONTAINERS = frozenset((list, dict, OrderedDict, defaultdict))


def _may_change(x: Any) -> bool:
    return type(x) in _CONTAINERS or is_writeable(x)


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
    return jtu.tree_map(_copied_container, value, is_leaf=_may_change)


def _copied_container(x: Any) -> Any:
    if type(x) is list:
        return list(map(copied, x))
    if type(x) in _CONTAINERS:
        # Not by JAX, which puts the keys in order.
        new = copy.copy(x)
        new.update((key, copied(item)) for key, item in x.items())
        return new
    return _own(x)


def _own(leaf: Any) -> Any:
    """A NumPy array that its giver cannot change: a change there would be no write."""
    return leaf.copy() if is_writeable(leaf) else leaf


def is_same_value(a: Any, b: Any) -> bool:
    a_leaves, a_def = jtu.tree_flatten(a)
    b_leaves, b_def = jtu.tree_flatten(b)
    return a_def == b_def and all(map(_is_same_leaf, a_leaves, b_leaves))


def _is_same_leaf(a: Any, b: Any) -> bool:
    both = type(a) is type(b) is np.ndarray
    return a is b or (both and a.dtype == b.dtype and a.tobytes() == b.tobytes())
