"""The arguments of a call as the transform of another library sees them: derefed trees of
arrays, with `None` for what is none, so that a spec for an argument fits it as a prefix."""

from collections.abc import Iterator
from typing import Any

import jax.tree_util as jtu

from .._core._call import Opened
from .._core._nodes import Index, Value
from .._core._structure import DYNAMIC, Structure
from ._axes import n_leaves


__tracebackhide__ = True


class ArgumentTrees:
    """Where the flat arrays of a call are in its parts: the callable, the arguments, the
    keywords. Each array is in the part that brings it first.

    - `positions`: those of the arrays of each part, in order.
    """

    def __init__(self, opened: Opened):
        self._structure: Structure = opened.structure
        self._by_leaf: list[list[list[int]]] = []
        self._codes: list[list[int | None]] = []
        self._is_first: dict[tuple[int, int], int] = {}
        codes, seen = iter(opened.structure.codes), set()
        bare = iter(range(opened.structure.n_bare))

        def positions(code: int) -> list[int]:
            if code == DYNAMIC:
                return [next(bare)]
            if code < 0 or code in seen:
                return []
            seen.add(code)
            return list(range(*opened.spans[code]))

        for i, part in enumerate(opened.structure.parts):
            by_leaf, of_part = [], []
            for node in part.nodes or (None,) * part.treedef.num_leaves:
                if node is None:
                    code = next(codes)
                    if code >= 0 and code not in seen:
                        self._is_first[i, len(by_leaf)] = code
                    by_leaf.append(positions(code))
                    of_part.append(code)
                else:  # of a function that closes over refs: one leaf, with several arrays
                    inside = [positions(next(codes)) for _ in range(n_leaves(node))]
                    by_leaf.append([i for some in inside for i in some])
                    of_part.append(None)
            self._by_leaf.append(by_leaf)
            self._codes.append(of_part)
        self.positions = [[i for some in part for i in some] for part in self._by_leaf]

    def fill(self, part: int, arrays: list[Any]) -> Any:
        """The tree of one part."""
        leaves = []
        for i, (code, mine) in enumerate(zip(self._codes[part], self._by_leaf[part])):
            found = [arrays[k] for k in mine]
            if code is None:
                leaves.append(found)
            elif code >= 0:
                leaves.append(self._node(code, (part, i) in self._is_first, found))
            else:
                leaves.append(found[0] if found else None)
        return jtu.tree_unflatten(self._structure.parts[part].treedef, leaves)

    def _node(self, code: int, is_first: bool, arrays: list[Any]) -> Value | Index:
        slot, note = self._structure.slots[code], self._structure.notes[code]
        about = code, slot.collection, slot.ref_type, note
        if not is_first:
            return Index(*about)
        if slot.inside is None:
            return Value(arrays[0], *about)
        treedef, statics = slot.inside
        rest = iter(arrays)
        leaves = [next(rest) if static is None else None for static in statics]
        return Value(jtu.tree_unflatten(treedef, leaves), *about)

    def read(self, part: int, tree: Any) -> Iterator[tuple[int, Any]]:
        """The opposite of `fill`: each array of the tree, with its position."""
        subtrees = self._structure.parts[part].treedef.flatten_up_to(tree)
        for mine, subtree in zip(self._by_leaf[part], subtrees):
            yield from zip(mine, jtu.tree_leaves(subtree), strict=True)
