"""Cache keys for static objects."""

import types
import weakref
from collections.abc import Iterator, Set
from typing import Any

import jax.tree_util as jtu

from ._cells import (
    functions_among,
    is_filled,
    is_lookup,
    NAMES,
    reachable,
    reaches,
    rebound_cells,
)
from ._equality import Identity, Shared


def static_key(leaf: Any) -> Any:
    """The cache key of a static leaf.

    Two leaves have equal keys only if a program traced with one is right for the other:
    `1`, `1.0` and `True` are equal in Python, and so are `0.0` and `-0.0`. The closed-over
    values of a function are part of its key: rebinding a cell makes it another function.
    """
    if isinstance(leaf, types.FunctionType):
        carries = leaf.__closure__ or leaf.__defaults__ or leaf.__kwdefaults__
        return Identity(leaf), contents_key(leaf) if carries else None
    if isinstance(leaf, float | complex):
        return type(leaf), repr(leaf)
    if _is_set_of_refs(leaf):
        return type(leaf), _Items(map(_member_key, leaf))
    return type(leaf), Identity(leaf) if _is_own(leaf) else leaf


def static_keys(tree: Any) -> tuple:
    """The keys of the leaves of static trees."""
    leaves, treedef = jtu.tree_flatten(tree)
    return treedef, *map(static_key, leaves)


def identities_in(key: Any) -> Iterator[Identity]:
    """The objects that a key holds by identity."""
    if isinstance(key, Identity):
        yield key
    elif isinstance(key, tuple | frozenset):
        for part in key:
            yield from identities_in(part)


def weakly(leaf: Any) -> "Identity | Members | None":
    """What a cache stores for a static leaf, so as not to keep functions and refs alive;
    `None` if it stores the leaf itself."""
    if type(leaf) is frozenset and _is_set_of_refs(leaf):
        return Members(leaf)
    if _is_own(leaf) or _is_set_of_refs(leaf):
        identity = Identity(leaf)
        return identity if identity.mortal() else None
    return None


def _is_set_of_refs(x: Any) -> bool:
    """Also an empty set: one that refs are added to and removed from may be empty."""
    return isinstance(x, set | frozenset) and (not x or is_lookup(x))


def _is_own(leaf: Any) -> bool:
    """Whether it equals only itself, or is a ref, which is held by identity."""
    if isinstance(leaf, Shared):
        return True
    return type(leaf).__eq__ is object.__eq__ and not isinstance(leaf, weakref.ref)


def recalled(held: Any) -> Any:
    """The leaf that `weakly` was given, or that is stored directly; `None` if it is
    gone."""
    return held.recall() if isinstance(held, Identity | Members) else held


class Members:
    """A frozenset of refs, or a tuple in one, whose members are held weakly: the set itself
    may only exist for one call."""

    __slots__ = ("_held", "_kind")

    def __init__(self, items: frozenset | tuple):
        self._kind = type(items)
        self._held = [x if type(x) in NAMES else _member(x) for x in items]

    def recall(self) -> Any:
        """The set or tuple, or `None` if a member is gone."""
        items = []
        for held in self._held:
            item = recalled(held)
            if item is None and held is not None:
                return None
            items.append(item)
        # Not by calling it: a named tuple takes its items one by one.
        base: Any = tuple if issubclass(self._kind, tuple) else frozenset
        return base.__new__(self._kind, items)


def _member(x: Any) -> "Identity | Members":
    return Members(x) if isinstance(x, tuple | frozenset) else Identity(x)


def contents_key(tree: Any, rebound: Set[int] = frozenset()) -> tuple:
    """The key for what the functions in a tree close over, and for the sets of refs there.

    **Arguments:**

    - `tree`: a function, or anything that holds functions: a partial, a bound method, a
        list, a module.
    - `rebound`: the ids of more cells that are not inputs.
    """
    leaves = list(reachable(tree))
    functions = functions_among(leaves)
    rebound = rebound | rebound_cells(functions)
    cells = [
        content_key(cell)
        for function in functions
        for cell in function.__closure__ or ()
        if id(cell) not in rebound
    ]
    lookups = [key for key in map(_lookup_key, leaves) if key is not None]
    return *cells, *lookups


EMPTY = object()


def content_key(cell: types.CellType) -> Any:
    """The key for the content of a cell. A container or array goes by identity: like JAX,
    we do not notice an append to a list. But refs are added to and removed from sets
    (layers that are frozen, and unfrozen one by one), so that is noticed."""
    content: Any = cell.cell_contents if is_filled(cell) else EMPTY
    key = _lookup_key(content)
    return _object_key(content) if key is None else key


def _lookup_key(x: Any) -> "_Items | None":
    """The key for the items of a set or dict of refs; `None` for anything else."""
    if _is_set_of_refs(x):
        return _Items(map(_member_key, x))
    if isinstance(x, dict) and is_lookup(x):
        return _Items((_member_key(k), _object_key(v)) for k, v in x.items())
    return None


class _Items(frozenset):
    """The key for the items of a set or dict of refs."""

    __slots__ = ()


def _member_key(obj: Any) -> Any:
    """Like `_object_key`, but a tuple or a frozenset goes by its items, as each call may
    make a new one."""
    if isinstance(obj, tuple):
        return type(obj), *map(_member_key, obj)
    if isinstance(obj, frozenset):
        return type(obj), _Items(map(_member_key, obj))
    return _object_key(obj)


def _object_key(obj: Any) -> Any:
    if obj is None or isinstance(obj, bool | int | float | complex | str | bytes):
        return static_key(obj)
    return Identity(obj)


# The position of a cell in a closure; the key of its content; and the content itself, if
# its identity determines the key. (It does not for a set, whose refs change.)
Watched = tuple[int, Any, Any]


# Instead of the key of a cell that the function itself rebinds, as a count of its calls: the
# content is then no input, unless it is a function or holds shared leaves.
_NO_INPUT = object()


def _is_input(cell: types.CellType) -> bool:
    content = cell.cell_contents if is_filled(cell) else None
    return isinstance(content, types.FunctionType) or reaches(content)


def same_content(cell: types.CellType, key: Any) -> bool:
    """Whether the content of a cell still has this key."""
    return not _is_input(cell) if key is _NO_INPUT else content_key(cell) == key


def watched_cells(fn: types.FunctionType) -> list[Watched]:
    """The cells of a function."""
    rebound = rebound_cells(functions_among(reachable(fn)))
    watched = []
    for i, cell in enumerate(fn.__closure__ or ()):
        is_input = id(cell) not in rebound or _is_input(cell)
        key = content_key(cell) if is_input else _NO_INPUT
        told = not isinstance(key, _Items) and is_filled(cell)
        watched.append((i, key, cell.cell_contents if told else EMPTY))
    return watched


def gone() -> None:
    return None
