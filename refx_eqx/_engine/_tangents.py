"""Trees of tangents and cotangents, as a user gives them.

They have the structure of the derefed tree that they are for, with `None` for zero. At the
place of a ref there may be a `Value`, a ref or its value; of several places of one ref, one
has it.
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.tree_util as jtu

from .._core._closure import Carried
from .._core._errors import describe, MismatchError
from .._core._functions import leaves_up_to
from .._core._nodes import Index, is_node, Value
from .._core._ref import Ref
from .._core._structure import Leaves, map_values, values_of


__tracebackhide__ = True


def read_tangents(
    parts: Sequence[Carried], like: Sequence[Leaves], trees: Sequence[Any], what: str
) -> list[Leaves]:
    """The derefed leaves of trees of tangents: an array, or `None` for zero, instead of each
    array of `like`.

    **Arguments:**

    - `parts`, `like`: the structure of the trees that these are tangents of, and their
        derefed leaves, with `None` for what has no tangent.
    - `trees`: the tangents. `None` instead of a whole tree is `None` everywhere in it.
    - `what`: names them, for messages.

    **Raises:**

    - `StructureError`: if a tree is of another structure.
    """
    likes = values_of(like)
    # Of each ref. `None` is the absence of a node here, so nothing says more than "zero".
    found = {i: jtu.tree_map(lambda _: None, value) for i, value in likes.items()}
    read = []
    for part, mine, tree in zip(parts, like, trees):
        given = _leaves_up_to(part, tree, what)
        read.append([_read_leaf(a, b, likes, found, what) for a, b in zip(mine, given)])
    return [map_values(lambda i, _: found[i], leaves) for leaves in read]


def _leaves_up_to(part: Carried, tree: Any, what: str) -> list[Any]:
    if tree is None:
        return [None] * part.num_leaves
    try:
        return leaves_up_to(part, tree)
    except (ValueError, TypeError) as e:
        raise MismatchError(
            f"{what} must have the structure of `rx.deref` of it, with `None` for what "
            f"has no derivative. JAX says: {e}"
        ) from None


def _read_leaf(
    leaf: Any, given: Any, likes: dict[int, Any], found: dict[int, Any], what: str
) -> Any:
    if is_node(leaf):
        _read_ref(leaf, given, likes[leaf.index], found, what)
        return leaf
    if leaf is not None:
        return _one_array(given, what)
    if jtu.tree_leaves(given):
        raise MismatchError(
            f"{what} must have `None` where there is nothing to differentiate, and has "
            f"{eqx.tree_pformat(given)} for something that is not differentiated."
        )
    return None


def _one_array(x: Any, what: str) -> Any:
    if x is not None and not eqx.is_array_like(x):
        raise MismatchError(
            f"{what} must have an array or `None` at the place of each array, and has {x!r}."
        )
    return x


def _read_ref(
    node: Value | Index, given: Any, like: Any, found: dict[int, Any], what: str
) -> None:
    value = given.value if isinstance(given, (Value, Ref)) else given
    if value is None or isinstance(value, Index):
        return
    which = describe(node.label.name, node.collection)
    treedef = jtu.tree_structure(like)
    if treedef.num_leaves == 0:
        raise MismatchError(
            f"{what} must have `None` where there is nothing to differentiate, and has "
            f"{eqx.tree_pformat(value)} for {which}: something that is not differentiated."
        )
    try:
        values = treedef.flatten_up_to(value)
    except (ValueError, TypeError) as e:
        raise MismatchError(
            f"{what} must have the structure of the value of {which}, with `None` for what "
            f"is not differentiated. JAX says: {e}"
        ) from None
    earlier = treedef.flatten_up_to(found[node.index])
    values = [_one_array(x, what) for x in values]
    for x, y in zip(earlier, values):
        if x is not None and y is not None and x is not y:
            raise MismatchError(
                f"{what} must have one value for {which}, which is one ref at several "
                "places. Give it at one of them, and `None` at the others."
            )
    both = [y if x is None else x for x, y in zip(earlier, values)]
    found[node.index] = jtu.tree_unflatten(treedef, both)
