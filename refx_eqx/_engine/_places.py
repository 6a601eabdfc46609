"""Where in a call something is; for messages."""

from collections.abc import Sequence
from typing import Any

import jax.tree_util as jtu

from .._core._closure import Carried
from .._core._deref import path_text
from .._core._structure import DYNAMIC, Structure


__tracebackhide__ = True


def bare_place(structure: Structure, position: int) -> str:
    """Where in a call the array at a position of the bare ones is, such as "argument 1 at
    `['w']`"."""
    bare = [i for i, code in enumerate(structure.codes) if code == DYNAMIC]
    return _place(structure, bare[position])


def ref_place(structure: Structure, number: int, names: Sequence[str] = ()) -> str:
    """Where in a call the ref with this number is first. The first arguments have these
    names, and those after them are operands."""
    return _place(structure, structure.codes.index(number), names)


def _place(structure: Structure, leaf: int, names: Sequence[str] = ()) -> str:
    i = 0
    while leaf >= structure.sizes[i]:
        leaf -= structure.sizes[i]
        i += 1
    if i == 0:
        return "what the function holds"
    path = _path(structure.parts[i], leaf)
    if i == len(structure.parts) - 1:
        # The keywords are a dict: the first key of the path is the name of one.
        name = path[0].key if path else "?"
        which, path = f"the keyword argument `{name}`", path[1:]
    elif i <= len(names):
        return names[i - 1]
    else:
        which = f"operand {i - 1 - len(names)}" if names else f"argument {i - 1}"
    return f"{which} at `{path_text(path)}`" if path else which


def _path(part: Carried, leaf: int) -> tuple[Any, ...]:
    """The key path of a leaf of a part; of the function that it is in, if it is in one."""
    treedef = part.treedef
    counts = [_n_leaves(node) for node in part.nodes or (None,) * treedef.num_leaves]
    numbered = jtu.tree_unflatten(treedef, range(treedef.num_leaves))
    for (path, _), n in zip(jtu.tree_flatten_with_path(numbered)[0], counts):
        if leaf < n:
            return path
        leaf -= n
    return ()


def _n_leaves(node: Any) -> int:
    if node is None:
        return 1
    if not isinstance(node, tuple):
        return 0
    carried = node[-1]
    nodes = carried.nodes or (None,) * carried.treedef.num_leaves
    return sum(map(_n_leaves, nodes))
