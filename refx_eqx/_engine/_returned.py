"""How a plan uses the results of its program."""

from typing import Any

import jax.tree_util as jtu

from .._calls._structure import Outcome
from ._contents import Contents, is_one_array, picker
from ._program import Variant


class Returned:
    """How to use the results of a program.

    - `number`, `info`, `written`: those of the trace, as in the `Variant`;
    - `build`, `waits`, `is_one`: those of `info`;
    - `n`: the number of arrays in new values, which come first; `are_arrays`: whether these
        are the new values;
    - `are_kept`: whether the new values have the structure of the old ones, see `Contents`;
    - `in_general`: whether there are writes that a plan cannot make itself.

    **Arguments:**

    - `done`: the results of one call.
    - `contents`: of the refs of that call.
    """

    __slots__ = (
        "_arrange",
        "_statics",
        "_treedef",
        "_treedef_of_values",
        "are_arrays",
        "are_kept",
        "build",
        "in_general",
        "info",
        "is_one",
        "n",
        "number",
        "waits",
        "written",
    )

    def __init__(
        self, number: int, variant: Variant, contents: Contents | None, done: list[Any]
    ):
        self.number = number
        self.info, self.written, self._treedef = variant.traces[number]
        self.build, self.waits = self.info.build, self.info.waits
        self.n: int = self._treedef.children()[0].num_leaves
        self.is_one = self.info.is_one
        updates, _ = self._treedef.unflatten(done)
        values = list(map(self.info.value, self.written, updates))
        self.are_arrays = all(map(is_one_array, values))
        self.are_kept = bool(contents and contents.are_kept(self.written, values))
        # Non-array parts of the new values are the same each time.
        leaves, self._treedef_of_values = jtu.tree_flatten(values)
        self._statics: list[Any] = []
        order, k = [], 0
        for leaf in leaves:
            if k < self.n and leaf is done[k]:
                order.append(k)
                k += 1
            else:
                order.append(len(done) + len(self._statics))
                self._statics.append(leaf)
        self._arrange = picker(order)
        # A tree may replace a tree; if it replaces a single array, all plans must check
        # again. And a node may have converted its arrays.
        known_trees = contents.numbers if contents else ()
        self.in_general = (
            bool(self.info.in_place)
            or k < self.n
            or not all(
                is_one_array(x) or i in known_trees
                for i, x in zip(self.written, values)
            )
        )

    def values(self, done: list[Any]) -> list[Any]:
        """The new values, from the results of the program."""
        return self._treedef_of_values.unflatten(self._arrange([*done, *self._statics]))

    def outcome(self, done: list[Any]) -> Outcome:
        updates, out = self._treedef.unflatten(done)
        return Outcome(out, dict(zip(self.written, updates)), self.info)
