"""The flat list of arrays of a call in which some refs hold anything else than one array."""

import enum
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import jax.tree_util as jtu
import numpy as np

from .._core import _jax
from .._core._values import split_value
from .._trees._keys import static_key, static_keys


__tracebackhide__ = True


def picker(positions: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that takes what is at these positions; one of C where there are several."""
    if len(positions) > 1:
        return itemgetter(*positions)
    return lambda items: tuple(items[i] for i in positions)


class Contents:
    """What some refs of a call hold that is not one JAX array each: trees of arrays, numbers,
    texts, functions, `None`, ...

    They are flattened at each call, all at once, and found to be of the structure that they
    had. `None` instead of an object if all refs hold one array each.

    **Arguments:**

    - `values`: of the refs.
    - `treedefs`: of the arrays in each.
    - `n_outside`: the number of arrays outside refs.
    """

    __slots__ = (
        "_arrange",
        "_static_keys",
        "_statics",
        "_take",
        "_treedef",
        "_treedefs",
        "_types",
        "numbers",
    )

    def __init__(self, values: list[Any], treedefs: list[Any], n_outside: int):
        # The numbers of these refs.
        self.numbers = [i for i, x in enumerate(values) if not is_one_array(x)]
        self._take = picker(self.numbers)
        leaves, self._treedef = jtu.tree_flatten(self._take(values))
        self._types = {tuple(map(type, leaves))}
        self._treedefs = [treedefs[i] for i in self.numbers]
        split = [split_value(values[i]) for i in self.numbers]
        self._static_keys = [static_keys(statics) for _, statics in split]
        is_array = [
            x is not None
            for i, (arrays, _) in zip(self.numbers, split)
            for x in jtu.tree_structure(values[i]).flatten_up_to(arrays)
        ]
        # For the static leaves: the position, what it is equal by, and itself if that is
        # enough.
        self._statics = [
            (k, static_key(x), x if isinstance(x, _OF_ONE_KEY) else _NOTHING)
            for k, (x, mine) in enumerate(zip(leaves, is_array))
            if not mine
        ]
        # All arrays in the order of the program, of the arrays outside refs, the values and
        # the leaves of these refs.
        first = n_outside + len(values)
        in_trees = iter([first + k for k, mine in enumerate(is_array) if mine])
        order = [*range(n_outside)]
        for i, treedef in enumerate(treedefs):
            is_here = i in self.numbers
            n = treedef.num_leaves
            order += [next(in_trees) if is_here else n_outside + i for _ in range(n)]
        self._arrange = picker(order)

    def flat(self, arrays: list[Any], values: list[Any]) -> list[Any] | None:
        """All arrays of a call; `None` if a value has another structure."""
        trees = self._take(values)
        leaves, treedef = jtu.tree_flatten(trees)
        if treedef != self._treedef:
            return None
        types = tuple(map(type, leaves))
        if types not in self._types:
            # A number instead of an array is the same to `jax.jit`, and a text is not.
            if not self._is_split_alike(trees):
                return None
            if len(self._types) < _MAX_TYPES:
                self._types.add(types)
        for k, key, same in self._statics:
            if leaves[k] is not same and static_key(leaves[k]) != key:
                return None
        return list(self._arrange([*arrays, *values, *leaves]))

    def _is_split_alike(self, trees: tuple[Any, ...]) -> bool:
        for value, treedef, keys in zip(trees, self._treedefs, self._static_keys):
            arrays, statics = split_value(value)
            if jtu.tree_structure(arrays) != treedef or static_keys(statics) != keys:
                return False
        return True


def is_one_array(value: Any) -> bool:
    return type(value) is _jax.ConcreteArray


_MAX_TYPES = 100
_NOTHING = object()
# What is equal to itself, whatever happens to it.
_OF_ONE_KEY = (bool, int, str, bytes, type, enum.Enum, np.dtype)
