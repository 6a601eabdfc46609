"""Trees of tangents and cotangents given by users.

They have the structure of the corresponding derefed tree, with `None` for zero. For a ref
there may be a `Value`, a ref or a bare value; if a ref has several places, one of them has
it. Where there is nothing to differentiate there is `None`, or, as in JAX, an array of
`float0`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu

from .._calls._places import leaf_place
from .._calls._structure import Leaves, map_values, values_of
from .._core._access import refuse_cycle
from .._core._errors import describe, MismatchError
from .._core._nodes import Index, is_inexact, is_node, Value
from .._core._ref import Ref
from .._fields._referenced import in_original_classes
from .._trees._closure import Part


def read_tangents(
    parts: Sequence[Part], like: Sequence[Leaves], trees: Sequence[Any], what: str
) -> list[Leaves]:
    """The derefed leaves of trees of tangents: an array, or `None` for zero, for each array
    of `like`.

    **Arguments:**

    - `parts`, `like`: the structure of the primal trees, and their derefed leaves, with
        `None` for leaves without a tangent.
    - `trees`: the tangents. `None` for a whole tree means `None` everywhere in it.
    - `what`: their name, for messages.

    **Raises:**

    - `StructureError`: if a tree has another structure.
    - `TypeError`: if something is not a tangent.
    """
    likes = values_of(like)
    # By ref. `None` is the absence of a node here, and cannot mean more than "zero".
    found = {i: jtu.tree_map(lambda _: None, value) for i, value in likes.items()}
    read = []
    for part, mine, tree in zip(parts, like, trees):
        given = _given_leaves(part, tree, what)
        read.append([])
        for k, (leaf, x) in enumerate(zip(mine, given)):
            if is_node(leaf):
                _read_ref(leaf, x, likes[leaf.index], found, what)
            else:
                place = functools.partial(leaf_place, part, k)
                leaf = _tangent(leaf, x, what, place)
            read[-1].append(leaf)
    return [map_values(lambda i, _: found[i], leaves) for leaves in read]


def _given_leaves(part: Part, tree: Any, what: str) -> list[Any]:
    if tree is None:
        return [None] * part.treedef.num_leaves
    refuse_cycle(tree)
    like = in_original_classes(part.tree(range(part.treedef.num_leaves)))
    part = part._replace(treedef=jtu.tree_structure(like))
    try:
        return part.leaves_up_to(in_original_classes(tree))
    except (ValueError, TypeError) as e:
        raise MismatchError(
            f"{what} must have the derefed structure, with `None` for anything without a "
            f"derivative. JAX says: {e}"
        ) from None


def _tangent(leaf: Any, given: Any, what: str, where: Callable[[], str]) -> Any:
    """`given`, as the tangent of `leaf`: an array, or `None`."""
    if given is None:
        return None
    if leaf is None or not is_inexact(leaf):
        if all(map(_is_float0, jtu.tree_leaves(given))):
            return None
        wanted = "`None` where there is nothing to differentiate"
    elif eqx.is_array_like(given) and is_inexact(given):
        return given
    else:
        wanted = "a floating-point or complex array, or `None`, for each such array"
    error = TypeError if jtu.all_leaves([given]) else MismatchError
    raise error(
        f"{what} must have {wanted}, but has {eqx.tree_pformat(given)} for {where()}."
    )


def _is_float0(x: Any) -> bool:
    return getattr(x, "dtype", None) == jax.dtypes.float0


def _read_ref(
    node: Value | Index, given: Any, like: Any, found: dict[int, Any], what: str
) -> None:
    value = given.value if isinstance(given, (Value, Ref)) else given
    if value is None or isinstance(value, Index):
        return
    which = describe(node)
    # The statics of the value may appear unchanged in the tangent.
    leaves, treedef = jtu.tree_flatten(like, is_leaf=lambda x: x is None)
    try:
        values = treedef.flatten_up_to(value)
    except (ValueError, TypeError) as e:
        raise MismatchError(
            f"{what} must have the structure of the value of {which}, with `None` for "
            f"anything that is not differentiated. JAX says: {e}"
        ) from None
    values = [
        None
        if leaf is None and not any(map(eqx.is_array_like, jtu.tree_leaves(x)))
        else _tangent(leaf, x, what, lambda: which)
        for leaf, x in zip(leaves, values)
    ]
    earlier = treedef.flatten_up_to(found[node.index])
    for x, y in zip(earlier, values):
        if x is not None and y is not None and x is not y:
            raise MismatchError(
                f"{what} must have one value for {which}, which is one ref at several "
                "places. Give it at one of them, and `None` at the others."
            )
    both = [y if x is None else x for x, y in zip(earlier, values)]
    found[node.index] = jtu.tree_unflatten(treedef, both)
