"""The key of a call, read from its arguments, and what a plan reads again at each call.

Every argument is read from the top, and each thing in it is one of four:

- a JAX or NumPy array: the plan takes it. `jax.jit` handles its type and shape;
- a ref: by its identity. The plan takes it;
- something immutable that the function was given before, a module or a function: by its
    identity, which covers everything below it;
- a pytree node, a `functools.partial`, a bound method, a new module: by its type, its
    static part and the number of its children, which are read in turn;
- any other leaf: by its type and value, as in the structure of a program.

There is no other kind, so everything `jax.jit` can be called with has a key; an unhashable
leaf has none, and no program either.
"""

import enum
import functools
import itertools
import math
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np

from .._core import _jax
from .._core._ref import Ref
from .._trees._cells import flatten_one_level, holds_itself, is_lookup
from .._trees._keys import static_key


# The result of reading a call. Its `key` must be the same for a plan to fit; a plan takes
# the `arrays` and the `refs`, in this order; `held` are the modules and functions that the
# key holds by identity; `new` are the modules that it holds by their contents. (A tuple,
# because an object takes time to make.) The key is a list if nothing in it can change in
# place; otherwise a tuple, whose hash must be checked even for identical objects.
Read = tuple[Sequence[Any], list[Any], list[Ref], list[Any], list[Any]]


class _WithMethod(eqx.Module):
    def method(self) -> None: ...


# What Equinox makes of a method of a module: a new object at each access.
_BoundMethod = type(_WithMethod().method)


# The kind of the instances of a type. Filled as types are met.
_ARRAY, _REF, _MODULE, _ITSELF, _LITERAL, _OTHER, _REFUSED = range(7)
_kinds: dict[type, int] = {}
_MAX_KINDS = 1000
_LITERALS = (bool, int, str, bytes, type(None))
# Types that are not pytrees, and never will be. Without their own equality, instances equal
# only themselves.
_NO_TREES = (type, enum.Enum, types.FunctionType, type(jax.jit(lambda: None)))


def _kind_of(x: Any, kind: type) -> int:
    if issubclass(kind, Ref):
        found = _REF
    elif issubclass(kind, eqx.Module):
        found = _OTHER if kind is _BoundMethod else _MODULE
    elif _jax.is_tracer(x) or isinstance(x, jax.ShapeDtypeStruct):
        found = _REFUSED
    elif isinstance(x, jax.Array | np.ndarray | np.generic):
        found = _ARRAY
    elif kind in _LITERALS:
        found = _LITERAL
    elif issubclass(kind, _NO_TREES) and kind.__eq__ is object.__eq__:
        found = _ITSELF if kind.__weakrefoffset__ else _OTHER
    else:
        found = _OTHER
    if len(_kinds) >= _MAX_KINDS:  # for classes that are made repeatedly
        _kinds.clear()
    _kinds[kind] = found
    return found


# As `id`, which reports each call to audit hooks (Python 3.12). filelock (4.0), which JAX
# imports, has one: 0.3 us each time.
address: Callable[[Any], int] = object.__hash__

# This many children of a node, all of one type, are read at once, in C.
_MANY = 8
_ARRAYS, _DICTS = {_jax.ConcreteArray}, {dict}
_ARRAYS_ALONE, _SEQUENCES = "arrays", ({list}, {tuple})
_flattened = itertools.chain.from_iterable
# A key of the first length may come from a list that contains itself; one of the second
# surely does.
_LARGE, _LARGER = 10_000, 10_000_000


def read(args: tuple, kwargs: dict, known: dict[int, Any]) -> Read | None:
    """Reads the arguments of a call; `None` if they have no key.

    `known` has the addresses of the modules that are identified by address.

    One function and one loop: Python function calls dominate the time here.
    """
    key: list[Any] = []
    arrays: list[Any] = []
    refs: list[Ref] = []
    held: list[Any] = []
    new: list[Any] = []
    if kwargs:
        key.append(tuple(kwargs))
        todo = [*args, *kwargs.values()]
    else:
        todo = [*args]
    todo.reverse()
    limit = _LARGE
    is_fixed = True
    children: Sequence[Any]
    while todo:
        x = todo.pop()
        kind = type(x)
        what = _kinds.get(kind)
        if what is None:
            what = _kind_of(x, kind)
        if what == _ARRAY:
            key.append(None)
            arrays.append(x)
            continue
        if what == _REF:
            key.append(x._number)
            refs.append(x)
            continue
        if what == _ITSELF:
            key.append(address(x))
            held.append(x)
            continue
        if what == _LITERAL:
            key.append((kind, x))
            continue
        if what == _MODULE:
            where = address(x)
            if where in known:
                key.append(where)
                held.append(x)
                continue
            new.append(x)
        if kind is tuple or kind is list:
            children, static = x, None
        elif kind is dict:
            children, static = list(x.values()), tuple(x)
        elif kind is functools.partial:
            children, static = (x.func, x.args, x.keywords), None
        elif kind is types.MethodType or kind is _BoundMethod:
            children, static = (x.__func__, x.__self__), None
        else:
            try:
                parts = flatten_one_level(x)
            except Exception:  # from user code
                return None
            if parts is None:
                if what == _REFUSED:
                    return None
                is_fixed = False
                key.append(_leaf(x, kind))
                continue
            children, static = parts
            is_fixed = is_fixed and (static is None or isinstance(static, type))
        n = len(children)
        key += kind, static, n
        while n >= _MANY:
            if type(children[0]) is Ref:
                # Nothing else has such a number, so it shows that all of them are refs.
                # Checking their types as well would take twice as long.
                try:
                    key += [ref._number for ref in children]
                except AttributeError:
                    break
                refs += children
                children = []
            elif (kinds := set(map(type, children))) == _ARRAYS:
                key.append(_ARRAYS_ALONE)
                arrays += children
                children = []
            elif kinds == _DICTS:
                key += dict, tuple(map(len, children)), tuple(_flattened(children))
                children = list(_flattened(map(dict.values, children)))
            elif kinds in _SEQUENCES:
                key += *kinds, tuple(map(len, children))
                children = list(_flattened(children))
            else:
                break
            n = len(children)
            if n > limit:
                break
        if len(key) + n > limit:
            if limit == _LARGER or any(map(holds_itself, (*args, *kwargs.values()))):
                return None
            limit = _LARGER
        todo += children[::-1]
    return key if is_fixed else tuple(key), arrays, refs, held, new


def _leaf(x: Any, kind: type) -> Any:
    if kind is float:
        # `0.0 == -0.0`, and a NaN does not equal itself.
        return (kind, x) if x and not math.isnan(x) else (kind, repr(x))
    return static_key(x)


# Types that are not trees, and whose instances cannot change.
_UNCHANGING = (float, complex, np.dtype, type)


def form_of(args: tuple, known: dict[int, Any]) -> tuple | None:
    """Identifies a repeated call with the same objects, except for arrays: for an array its
    type, and for anything else the object itself, by weak reference if possible. `None` if
    there is a tree among them, which may have changed."""
    form = []
    for x in args:
        what = _kind_of(x, type(x))
        if what == _ARRAY:
            form.append(type(x))
        elif (
            what in (_REF, _ITSELF, _LITERAL)
            or (what == _MODULE and address(x) in known)
            or isinstance(x, _UNCHANGING)
        ):
            try:
                form.append(weakref.ref(x))
            except TypeError:
                form.append(x)
        else:
            return None
    return tuple(form)


class GivenArray(int):
    """Stands for an array of the call, by its position, while a plan is made."""

    __slots__ = ()


def mark(args: tuple, kwargs: dict, read: Read) -> tuple[tuple, dict] | None:
    """The arguments, with each array that a plan takes replaced by its position. `None` if
    they contain a dict for looking up refs, which is a leaf to JAX."""
    marker = _Marker(read)
    # In the order of `read`.
    marked = tuple(map(marker.tree, args))
    marked_kwargs = {name: marker.tree(x) for name, x in kwargs.items()}
    return None if marker.has_lookup else (marked, marked_kwargs)


class _Marker:
    # A class: two functions that call each other would be a cycle.

    def __init__(self, read: Read):
        self._held = set(map(id, read[3]))
        self._count = 0
        self.has_lookup = False

    def tree(self, tree: Any) -> Any:
        return jtu.tree_map(self._leaf, tree, is_leaf=self._is_leaf)

    def _is_leaf(self, x: Any) -> bool:
        return type(x) is dict or id(x) in self._held

    def _leaf(self, x: Any) -> Any:
        kind = type(x)
        if id(x) in self._held:
            return x
        if _kind_of(x, kind) == _ARRAY:
            self._count += 1
            return GivenArray(self._count - 1)
        if kind is dict:
            # In its own order, not JAX's.
            self.has_lookup = self.has_lookup or is_lookup(x)
            return {name: self.tree(item) for name, item in x.items()}
        if kind is functools.partial:
            func, its_args, keywords = self.tree((x.func, x.args, x.keywords))
            return functools.partial(func, *its_args, **keywords)
        if kind is types.MethodType:
            return types.MethodType(*self.tree((x.__func__, x.__self__)))
        return x
