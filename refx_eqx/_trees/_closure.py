"""Functions in a derefed tree: those that hold refs are nodes of it.

To JAX a function is a leaf. So before a tree is derefed, and wherever its refs are looked
for, each function, bound method and partial in it that reaches a ref becomes a `Closure`: a
pytree node with the trees that the function carries as children, by the names that they have
in it. `closed` makes functions of them again.

    {"f": lambda x: w[...] * x}   -- opened -->  {"f": Closure(w=w)}  -- deref -->  {"f": Closure(w=Value(...))}

What is carried with a function `_functions.py` says.
"""

from collections.abc import Iterable
from typing import Any

import equinox as eqx
import jax.tree_util as jtu

from ._cells import is_lookup, may_carry, reaches
from ._functions import head_of, names_in, rebuilt


__tracebackhide__ = True


class Closure:
    """A function that holds refs, as a pytree node: its children are what it carries.

    - `head`: the function without that. Structure.
    """

    __slots__ = ("contents", "head")

    def __init__(self, head: Any, contents: list[Any]):
        self.head = head
        self.contents = contents

    def __repr__(self) -> str:
        pairs = zip(_names_in(self.head), self.contents)
        return f"Closure({', '.join(f'{name}={x!r}' for name, x in pairs)})"

    def __eq__(self, other: object) -> bool:
        return type(other) is Closure and bool(eqx.tree_equal(self, other))

    __hash__ = None  # type: ignore[assignment]


def _with_keys(closure: Closure) -> tuple[Iterable, Any]:
    keys = map(jtu.GetAttrKey, _names_in(closure.head))
    return tuple(zip(keys, closure.contents)), closure.head


jtu.register_pytree_with_keys(
    Closure,
    _with_keys,
    lambda head, contents: Closure(head, list(contents)),
    lambda closure: (tuple(closure.contents), closure.head),
)


def opened(tree: Any) -> Any:
    """The tree with a `Closure` for each function in it that reaches a ref."""
    return _opened(tree, {})


def _opened(tree: Any, numbers: dict[int, int]) -> Any:
    # A dict of refs is no tree to JAX, which sorts the keys.
    leaves, treedef = jtu.tree_flatten(tree, is_leaf=is_lookup)
    if not any(map(may_carry, leaves)):
        return tree
    return jtu.tree_unflatten(treedef, [_opened_leaf(x, numbers) for x in leaves])


def _opened_leaf(leaf: Any, numbers: dict[int, int]) -> Any:
    if not (may_carry(leaf) and reaches(leaf)):
        return leaf
    head, contents = head_of(leaf, numbers)
    return Closure(head, [_opened(x, numbers) for x in contents])


def closed(tree: Any) -> Any:
    """The opposite of `opened`, whatever is in the place of the refs.

    **Raises:**

    - `FirstPlaceGone`: if the first place of a function is not in the tree.
    """
    return _closed(tree, {})


def _closed(tree: Any, made: dict[int, Any]) -> Any:
    leaves, treedef = jtu.tree_flatten(tree, is_leaf=is_closure)
    if not any(map(is_closure, leaves)):
        return tree
    return jtu.tree_unflatten(treedef, [_closed_leaf(x, made) for x in leaves])


def _closed_leaf(leaf: Any, made: dict[int, Any]) -> Any:
    if not is_closure(leaf):
        return leaf
    return rebuilt(leaf.head, lambda: _closed(leaf.contents, made), made)


class _Names(tuple):
    """Instead of the head of a function: the names of what it carries, and no more."""

    __slots__ = ()


def by_name(tree: Any) -> Any:
    """`opened`, to be aligned with another tree: two functions are of one structure when
    they carry trees of the same names. `closed` does not take it."""
    return jtu.tree_map(_by_name, opened(tree), is_leaf=is_closure)


def _by_name(x: Any) -> Any:
    if not is_closure(x):
        return x
    return Closure(_Names(_names_in(x.head)), [by_name(y) for y in x.contents])


def _names_in(head: Any) -> Iterable[str]:
    return head if type(head) is _Names else names_in(head)


def is_closure(x: Any) -> bool:
    return type(x) is Closure
