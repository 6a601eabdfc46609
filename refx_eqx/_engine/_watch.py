"""Watches mutable objects below an immutable tree for changes.

A module is immutable, but not everything it holds is. A plan that keys a module or a
function by identity watches what is below it:

- a list, a dict, a set, a node of any other type not known to be immutable: flattened by
    one level again, comparing its children by identity;
- closure variables and default arguments: by identity, or by type and value if they are
    numbers or strings;
- a static leaf with its own hash (a dataclass with `unsafe_hash`): by its hash, like
    programs. (JAX compares static fields of a module as parts of a treedef: neither it nor
    Equinox notices one that changes in place.)

A NumPy array that changes in place is read again by each call. A change that bypasses the
guard of its type, by `object.__setattr__` on a module, is not noticed.
"""

import contextlib
import dataclasses
import enum
import functools
import itertools
import types
import weakref
from collections.abc import Callable
from operator import is_
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np

from .._core._access import refuse_cycle
from .._core._ref import Ref
from .._trees._cells import flatten_one_level, inside, is_lookup, may_carry, reaches
from .._trees._keys import same_content, watched_cells
from ._wrapper import Lifted


class Watch:
    """What was found below some trees, in its state at that time."""

    __slots__ = (
        "_dicts",
        "_functions",
        "_lists",
        "_nodes",
        "_seen",
        "_sets",
        "_statics",
    )

    def __init__(self):
        # Each with its contents. Functions are held weakly: a function may be in its own
        # cell.
        self._lists: list[tuple[list, tuple]] = []
        self._dicts: list[tuple[dict, tuple, tuple]] = []
        self._sets: list[tuple[set, frozenset]] = []
        self._nodes: list[tuple[Any, tuple, Any]] = []
        self._statics: list[tuple[Any, int]] = []
        self._functions: list[_Function] = []
        self._seen: set[int] = set()

    def tree(self, tree: Any) -> bool:
        """Watches what is below `tree`; returns `False` if a node makes new children each
        time, so that this is impossible."""
        found = True

        def visit(x: Any) -> bool:
            nonlocal found
            kind = type(x)
            if kind is list:
                self._lists.append((x, tuple(x)))
            elif kind is dict:
                self._dicts.append((x, tuple(x), tuple(x.values())))
                return is_lookup(x)
            elif is_lookup(x):
                return True
            elif isinstance(x, Lifted):
                found = self.tree(list(x.options.values())) and found
            elif not _is_immutable(kind):
                parts = flatten_one_level(x)
                if parts is not None:
                    children, static = parts
                    if _makes_the_same(x, children, static):
                        self._nodes.append((x, tuple(children), static))
                    else:
                        found = False
            return False

        try:
            refuse_cycle(tree)
            leaves = jtu.tree_leaves(tree, is_leaf=visit)
        except Exception:  # closed-over values need not be pytrees
            return False
        for leaf in leaves:
            if id(leaf) in self._seen:
                continue
            if may_carry(leaf):
                self._seen.add(id(leaf))
                if type(leaf) is types.FunctionType:
                    function = _Function(leaf)
                    if function.is_needed():
                        self._functions.append(function)
                for held in inside(leaf):
                    # Objects without refs go by identity, in the structure of a call too.
                    if not self.tree(held) and reaches(held):
                        found = False
            else:
                self._leaf(leaf)
        return found

    def _leaf(self, leaf: Any) -> None:
        if isinstance(leaf, set):
            self._seen.add(id(leaf))
            self._sets.append((leaf, frozenset(leaf)))
        elif isinstance(leaf, dict) and type(leaf) is not dict:
            self._seen.add(id(leaf))
            self._dicts.append((leaf, tuple(leaf), tuple(leaf.values())))
        # An unhashable object is in the cell of a closure, where it goes by identity.
        has_own_hash = type(leaf).__hash__ not in (object.__hash__, None)
        if has_own_hash and not isinstance(leaf, _OF_ONE_HASH):
            self._seen.add(id(leaf))
            with contextlib.suppress(TypeError):
                self._statics.append((leaf, hash(leaf)))

    def check(self) -> Callable[[], bool] | None:
        """A function that returns whether nothing has changed; `None` if nothing can."""
        both = (
            (_same_lists, self._lists),
            (_same_dicts, self._dicts),
            (_same_sets, self._sets),
            (_same_nodes, self._nodes),
            (_same_statics, self._statics),
            (_same_functions, self._functions),
        )
        checks = [functools.partial(check, items) for check, items in both if items]
        if len(checks) > 1:
            return functools.partial(_all_same, checks)
        return checks[0] if checks else None


def _all_same(checks: list[Callable[[], bool]]) -> bool:
    return all(check() for check in checks)


def _same_lists(lists: list[tuple[list, tuple]]) -> bool:
    for items, then in lists:
        if len(items) != len(then) or not all(map(is_, items, then)):
            return False
    return True


def _same_dicts(dicts: list[tuple[dict, tuple, tuple]]) -> bool:
    for items, keys, then in dicts:
        if tuple(items) != keys or not all(map(is_, items.values(), then)):
            return False
    return True


def _same_sets(sets: list[tuple[set, frozenset]]) -> bool:
    return all(items == then for items, then in sets)


def _same_nodes(nodes: list[tuple[Any, tuple, Any]]) -> bool:
    return all(_makes_the_same(*node) for node in nodes)


def _same_statics(statics: list[tuple[Any, int]]) -> bool:
    return all(hash(leaf) == then for leaf, then in statics)


def _same_functions(functions: "list[_Function]") -> bool:
    for function in functions:
        fn = function.recall()
        if fn is None:
            return False
        # A function without defaults was called with all arguments, so new defaults do not
        # matter to a plan.
        if function.defaults and fn.__defaults__ is not function.defaults:
            return False
        if function.kwdefaults and fn.__kwdefaults__ is not function.kwdefaults:
            return False
        for name, x in function.attributes:
            if vars(fn).get(name) is not x:
                return False
        cells = fn.__closure__ or ()
        try:
            for i, recall in function.recalls:
                content = cells[i].cell_contents
                if (_NONE if content is None else content) is not recall():
                    break
            else:
                continue
        except ValueError:  # a cell is empty
            pass
        if not all(same_content(cells[i], key) for i, key in function.watched):
            return False
    return True


class _Function:
    """The closed-over values and defaults of a function, as they were."""

    __slots__ = ("attributes", "defaults", "kwdefaults", "recall", "recalls", "watched")

    def __init__(self, fn: types.FunctionType):
        self.recall = weakref.ref(fn)
        # The key of a function that carries no refs does not include them. (Accessing them
        # triggers audit hooks, as `id` does, which takes longer than everything else.)
        carries = reaches(fn)
        self.defaults = fn.__defaults__ if carries else None
        self.kwdefaults = fn.__kwdefaults__ if carries else None
        self.attributes = tuple(vars(fn).items()) if carries else ()
        cells = watched_cells(fn)
        self.watched = [(i, key) for i, key, _ in cells]
        # Checked first, as most contents are unchanged objects: their identity. Each entry
        # returns the object, or `None` if it is gone.
        self.recalls = [(i, _recalling(content)) for i, _, content in cells]

    def is_needed(self) -> bool:
        return bool(self.watched or self.defaults or self.kwdefaults or self.attributes)


def _recalling(x: Any) -> Callable[[], Any]:
    """A callable that returns `x` without running Python code. Holds `x` weakly, if
    possible."""
    try:
        return weakref.ref(x)
    except TypeError:
        return itertools.repeat(_NONE if x is None else x).__next__


# The content `None`, as a weak reference to what is gone returns `None`.
_NONE = object()


def _makes_the_same(node: Any, children: Any, static: Any) -> bool:
    now, static_now = flatten_one_level(node)
    return (
        len(now) == len(children)
        and all(map(is_, now, children))
        and static_now == static
    )


def _is_immutable(kind: type) -> bool:
    if issubclass(kind, _IMMUTABLE):
        return True
    params = getattr(kind, "__dataclass_params__", None)
    return dataclasses.is_dataclass(kind) and bool(params and params.frozen)


_IMMUTABLE = (eqx.Module, Ref, tuple, type(None), jtu.Partial, Lifted)
_IMMUTABLE += (jax.Array, np.ndarray, types.FunctionType)

# Types that hash by value, and are immutable.
_OF_ONE_HASH = (bool, int, float, complex, str, bytes, type, type(None), frozenset)
_OF_ONE_HASH += (enum.Enum, np.dtype, np.generic, np.ndarray, jax.Array, Ref)
