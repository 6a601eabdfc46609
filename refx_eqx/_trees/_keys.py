"""What stands for something static in the key of a cache."""

import types
import weakref
from collections.abc import Iterator
from typing import Any

import jax.tree_util as jtu

from ._cells import is_filled, is_lookup, reachable_functions, rebound_cells
from ._equality import Identity, Shared


__tracebackhide__ = True


def static_key(leaf: Any) -> Any:
    """What stands for a static leaf in the key of a cache.

    Two leaves have equal keys only if a program traced with the one is right for the
    other: `1`, `1.0` and `True` are equal in Python, and so are `0.0` and `-0.0`. What a
    function closes over is a part of its key: a cell that is bound to something else makes
    another function of it.
    """
    if isinstance(leaf, types.FunctionType):
        return Identity(leaf), _closure_key(leaf) if leaf.__closure__ else None
    if isinstance(leaf, float | complex):
        return type(leaf), repr(leaf)
    if isinstance(leaf, set | frozenset) and is_lookup(leaf):
        return type(leaf), _Items(map(_object_key, leaf))
    return type(leaf), Identity(leaf) if _is_own(leaf) else leaf


def static_keys(tree: Any) -> tuple:
    """What static trees are equal by."""
    leaves, treedef = jtu.tree_flatten(tree)
    return treedef, *map(static_key, leaves)


def identities_in(key: Any) -> Iterator[Identity]:
    """The objects that a key has by identity."""
    if isinstance(key, Identity):
        yield key
    elif isinstance(key, tuple | frozenset):
        for part in key:
            yield from identities_in(part)


def weakly(leaf: Any) -> "Identity | Members | None":
    """What a cache has of a static leaf, to keep no function and no ref alive; `None` if it
    has the leaf itself."""
    if type(leaf) is frozenset and is_lookup(leaf):
        return Members(leaf)
    if _is_own(leaf) or (isinstance(leaf, set | frozenset) and is_lookup(leaf)):
        identity = Identity(leaf)
        return identity if identity.mortal() else None
    return None


def _is_own(leaf: Any) -> bool:
    """Whether it is equal to nothing but itself, or a ref, which is held by identity."""
    if isinstance(leaf, Shared):
        return True
    return type(leaf).__eq__ is object.__eq__ and not isinstance(leaf, weakref.ref)


def recalled(held: Any) -> Any:
    """The leaf that `weakly` is for, or that is held as it is; `None` if it is gone."""
    return held.recall() if isinstance(held, Identity | Members) else held


class Members:
    """A frozenset of refs, held weakly by its members: the set itself may be made for one
    call, and gone after it."""

    __slots__ = ("_kept", "_weak")

    def __init__(self, items: frozenset):
        both = [(x, weakly(x)) for x in items]
        self._kept = [x for x, weak in both if weak is None]
        self._weak = [weak for _, weak in both if weak is not None]

    def recall(self) -> frozenset | None:
        """The set again; `None` if a member is gone."""
        alive: list[Any] = [weak.recall() for weak in self._weak]
        if any(x is None for x in alive):
            return None
        return frozenset([*self._kept, *alive])


def _closure_key(fn: types.FunctionType) -> tuple:
    functions = reachable_functions(fn)
    rebound = rebound_cells(functions)
    return tuple(
        content_key(cell)
        for function in functions
        for cell in function.__closure__ or ()
        if id(cell) not in rebound
    )


EMPTY = object()


def content_key(cell: types.CellType) -> Any:
    """What stands for the content of a cell. A container or an array is itself: like JAX,
    we do not notice a list that is appended to. But refs are taken into a set and out of
    it (layers that are frozen, and thawed one by one), so that is noticed."""
    content: Any = cell.cell_contents if is_filled(cell) else EMPTY
    if type(content) in (set, frozenset) and is_lookup(content):
        return _Items(map(_object_key, content))
    if type(content) is dict and is_lookup(content):
        items = content.items()
        return _Items((_object_key(k), _object_key(v)) for k, v in items)
    return _object_key(content)


class _Items(frozenset):
    """Stands for the items of a set or dict of refs."""

    __slots__ = ()


def _object_key(obj: Any) -> Any:
    if obj is None or isinstance(obj, bool | int | float | complex | str | bytes):
        return static_key(obj)
    return Identity(obj)


# The position of a cell in a closure; what stands for its content; and that content itself, if
# it is told by its identity. (If not: the refs in a set change, and the set does not.)
Watched = tuple[int, Any, Any]


def same_content(cell: types.CellType, key: Any) -> bool:
    """Whether a cell still has the content that `key` stands for."""
    return content_key(cell) == key


def watched_cells(fn: types.FunctionType) -> list[Watched]:
    """The cells of a function whose content matters."""
    rebound = rebound_cells(reachable_functions(fn))
    watched = []
    for i, cell in enumerate(fn.__closure__ or ()):
        if id(cell) not in rebound:
            key = content_key(cell)
            told = not isinstance(key, _Items) and is_filled(cell)
            watched.append((i, key, cell.cell_contents if told else EMPTY))
    return watched


def gone() -> None:
    return None
