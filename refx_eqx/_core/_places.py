"""Where in a call something is; for messages."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax.tree_util as jtu

from .._trees._carried import Carried, counts
from .._trees._paths import path_text
from ._errors import describe
from ._nodes import Value


__tracebackhide__ = True


def place(parts: Sequence[Carried], i: int, k: int, names: Sequence[str] = ()) -> str:
    """Where in a call leaf number `k` of tree number `i` is, such as "argument 1 at
    `['w']`".

    The last two trees are the keywords and the callable; of a result there is one tree. The first arguments have these
    names, and those after them are operands.
    """
    path = path_in(parts[i], k)
    if len(parts) == 1:
        return f"the result at {place_text(path)}" if path else "the result"
    if i == len(parts) - 1:
        return "what the function holds"
    if i == len(parts) - 2:
        # The keywords are a dict: the first key of the path is the name of one.
        which = f"the keyword argument `{path[0].key if path else '?'}`"
        path = path[1:]
    elif i < len(names):
        return names[i]
    else:
        which = f"operand {i - len(names)}" if names else f"argument {i}"
    where = f"{which} at `{path_text(path)}`" if path else which
    return (
        f"what the function in {where} holds" if _is_in_function(parts[i], k) else where
    )


def flat_place(derefed: Any, n: int) -> str:
    """Where in a call number `n` of its flat arrays is."""
    places = [
        (i, k, leaf)
        for i, leaves in enumerate(derefed.arrays)
        for k, leaf in enumerate(leaves)
    ]
    # Those in refs come last.
    for i, k, leaf in sorted(places, key=lambda x: type(x[2]) is Value):
        n -= len(jtu.tree_leaves(leaf))
        if n < 0:
            where = place(derefed.parts, i, k)
            if type(leaf) is not Value:
                return where
            ref = derefed.refs[leaf.index]
            return f"{describe(ref._name, ref._collection)}, in {where}"
    raise AssertionError("every array of a call has a place in it")


def _is_in_function(part: Carried, k: int) -> bool:
    if not part.nodes:
        return False
    return (
        next(node for node, (_, i) in zip(part.nodes, _paths(part)) if k < i)
        is not None
    )


def ref_place(derefed: Any, number: int, names: Sequence[str] = ()) -> str:
    """Where in a call the ref with this number is first."""
    for i, leaves in enumerate(derefed.arrays):
        for k, leaf in enumerate(leaves):
            if type(leaf) is Value and leaf.index == number:
                return place(derefed.parts, i, k, names)
    raise AssertionError("every ref of a call has a place in it")


def path_in(part: Carried, k: int) -> tuple:
    """The key path of a leaf of a tree; that of the function which it is in, if it is in
    one."""
    return next(path for path, i in _paths(part) if k < i)


def _paths(part: Carried) -> Iterator[tuple[tuple, int]]:
    """The path of each leaf of the tree itself, with the number of the leaf after it."""
    numbered = jtu.tree_unflatten(part.treedef, range(part.treedef.num_leaves))
    after = 0
    for (path, _), n in zip(jtu.tree_flatten_with_path(numbered)[0], counts(part)):
        after += n
        yield path, after


def place_text(path: tuple) -> str:
    """A key path for a message: `[0].weight`."""
    return f"`{path_text(path)}`" if path else "its root"
