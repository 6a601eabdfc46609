"""Places in a call, for messages."""

from collections.abc import Sequence
from typing import Any

from .._core._nodes import Value
from .._trees._closure import Part
from .._trees._paths import path_text


def place(parts: Sequence[Part], i: int, k: int, names: Sequence[str] = ()) -> str:
    """The place of leaf number `k` of tree number `i` in a call, such as "argument 1 at
    `w`".

    The last two trees are the keywords and the callable; a result is a single tree. The
    first arguments have these names; the others are operands.
    """
    path, is_in_function = parts[i].place_of(k)
    if len(parts) == 1:
        return f"the result at {place_text(path)}" if path else "the result"
    if i == len(parts) - 1:
        return "what the function holds"
    if i == len(parts) - 2:
        # The keywords are a dict: the first key of the path is the keyword.
        which = f"the keyword argument `{path[0].key if path else '?'}`"
        path = path[1:]
    elif i < len(names):
        return names[i]
    else:
        which = f"operand {i - len(names)}" if names else f"argument {i}"
    where = f"{which} at {path_text(path)}" if path else which
    return f"what the function in {where} holds" if is_in_function else where


def ref_place(derefed: Any, number: int, names: Sequence[str] = ()) -> str:
    """The first place in a call of the ref with this number."""
    for i, leaves in enumerate(derefed.arrays):
        for k, leaf in enumerate(leaves):
            if type(leaf) is Value and leaf.index == number:
                return place(derefed.parts, i, k, names)
    raise AssertionError("every ref of a call has a place in it")


def leaf_place(part: Part, k: int) -> str:
    """The place of a leaf in its tree: `0.weight`."""
    return place_text(part.place_of(k)[0])


def place_text(path: tuple) -> str:
    """A key path for a message."""
    return path_text(path) if path else "its root"
