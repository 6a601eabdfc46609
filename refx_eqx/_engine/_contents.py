"""The flat list of arrays of a call whose refs do not all hold a single array."""

import enum
from collections.abc import Callable, Sequence
from operator import is_, itemgetter
from typing import Any

import jax.tree_util as jtu
import numpy as np

from .._core import _jax
from .._core._nodes import split_value
from .._trees._cells import holds_itself
from .._trees._keys import static_key, static_keys


Picker = Callable[[Sequence[Any]], tuple[Any, ...]]


def picker(positions: Sequence[int]) -> Picker:
    """A function that picks the items at these positions; implemented in C for several."""
    if len(positions) > 1:
        return itemgetter(*positions)
    return lambda items: tuple(items[i] for i in positions)


class Contents:
    """The values of refs of a call that are not single JAX arrays: trees of arrays,
    numbers, strings, functions, `None`, ...

    They are flattened at each call, all at once, as trees of their known structure: JAX
    does that in a quarter of the time needed to determine and compare a structure. Values
    that cannot change in place are not read again until something other than the plan
    itself writes a ref. `None` instead of an object if all refs hold one array each.

    **Arguments:**

    - `values`: the values of the refs.
    - `treedefs`: the treedef of the arrays in each.
    - `n_outside`: the number of arrays outside refs.
    """

    __slots__ = (
        "_are_leaves",
        "_arrange",
        "_arrange_leaves",
        "_is_fixed",
        "_same",
        "_static_keys",
        "_statics",
        "_take",
        "_take_statics",
        "_treedef",
        "_treedefs",
        "_types",
        "numbers",
    )

    def __init__(self, values: list[Any], treedefs: list[Any], n_outside: int):
        # The numbers of these refs.
        self.numbers = [i for i, x in enumerate(values) if not is_one_array(x)]
        self._take = tuple if len(self.numbers) == len(values) else picker(self.numbers)
        leaves, self._treedef = jtu.tree_flatten(self._take(values))
        self._types = [list(map(type, leaves))]
        self._treedefs = [treedefs[i] for i in self.numbers]
        split = [split_value(values[i]) for i in self.numbers]
        self._static_keys = [static_keys(statics) for _, statics in split]
        is_array = [
            x is not None
            for i, (arrays, _) in zip(self.numbers, split)
            for x in jtu.tree_structure(values[i]).flatten_up_to(arrays)
        ]
        # For the static leaves: the position and the key; and the leaves for which identity
        # is enough.
        self._statics = [
            (k, static_key(x))
            for k, (x, mine) in enumerate(zip(leaves, is_array))
            if not mine
        ]
        self._take_statics = picker([k for k, _ in self._statics])
        statics = self._take_statics(leaves)
        self._same = [x if isinstance(x, _OF_ONE_KEY) else _NOTHING for x in statics]
        # Picks all arrays, in program order, from the arrays outside refs, the values and
        # the leaves of these refs. `None` if it is just the first and the last.
        first = n_outside + len(values)
        in_trees = iter([first + k for k, mine in enumerate(is_array) if mine])
        order = [*range(n_outside)]
        for i, treedef in enumerate(treedefs):
            is_here = i in self.numbers
            n = treedef.num_leaves
            order += [next(in_trees) if is_here else n_outside + i for _ in range(n)]
        in_order = [*range(n_outside), *range(first, first + len(leaves))]
        self._arrange = None if order == in_order else picker(order)
        # If no value is a tree, the same from just the arrays outside refs and the values.
        mine = list(self._take(values))
        self._are_leaves = all(x is None or jtu.all_leaves([x]) for x in mine)
        order = [*range(n_outside)]
        order += [n_outside + i for i, x in enumerate(treedefs) if x.num_leaves]
        in_order = [*range(n_outside + len(values))]
        self._arrange_leaves = None if order == in_order else picker(order)
        self._is_fixed = _is_fixed(mine) and _NOTHING not in self._same

    def flat(
        self, arrays: list[Any], values: list[Any], is_known: bool
    ) -> list[Any] | None:
        """All arrays of a call; `None` if a value has another structure. `is_known`: no
        value has changed since the last call, except those that `are_kept`."""
        is_known = is_known and self._is_fixed
        if is_known and self._are_leaves:
            both = arrays + values
            arrange = self._arrange_leaves
            return both if arrange is None else list(arrange(both))
        trees = self._take(values)
        try:
            leaves = self._treedef.flatten_up_to(trees)
        except ValueError:
            return None
        if not is_known and not self._are_alike(trees, leaves):
            return None
        if self._arrange is None:
            return arrays + leaves
        return list(self._arrange([*arrays, *values, *leaves]))

    def _are_alike(self, trees: tuple[Any, ...], leaves: list[Any]) -> bool:
        # Anything with more below it than a leaf has another type.
        types = list(map(type, leaves))
        if types not in self._types:
            # A number instead of an array is the same to `jax.jit`, but a string is not.
            if not self._is_split_alike(trees):
                return False
            self._types = [types, *self._types[: _MAX_TYPES - 1]]
        if self._statics and not all(map(is_, self._take_statics(leaves), self._same)):
            return all(static_key(leaves[k]) == key for k, key in self._statics)
        return True

    def are_kept(self, numbers: Sequence[int], values: Sequence[Any]) -> bool:
        """Whether new values of the refs with these numbers have the structure of the old
        ones."""
        new = {i: x for i, x in zip(numbers, values) if i in self.numbers}
        if not self._is_fixed or not _is_fixed(list(new.values())):
            return False
        trees = [new.get(i, _NOTHING) for i in self.numbers]
        return self._is_split_alike(trees)

    def _is_split_alike(self, trees: Sequence[Any]) -> bool:
        for value, treedef, keys in zip(trees, self._treedefs, self._static_keys):
            if value is _NOTHING:
                continue
            if holds_itself(value):
                return False
            arrays, statics = split_value(value)
            if jtu.tree_structure(arrays) != treedef or static_keys(statics) != keys:
                return False
        return True


def _is_fixed(values: list[Any]) -> bool:
    """Whether these values cannot change in place, except for the numbers in an array."""

    def may_change(x: Any) -> bool:
        return not isinstance(x, tuple | None) and not jtu.all_leaves([x])

    return not any(map(may_change, jtu.tree_leaves((*values,), is_leaf=may_change)))


def is_one_array(value: Any) -> bool:
    return type(value) is _jax.ConcreteArray


_MAX_TYPES = 8
_NOTHING = object()
# Types whose instances always equal themselves.
_OF_ONE_KEY = (bool, int, str, bytes, type, enum.Enum, np.dtype)
