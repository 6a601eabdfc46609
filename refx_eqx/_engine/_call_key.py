"""What of its arguments a call is told by, and what a plan reads again at each call.

Every argument is read from the top, and each thing in it is one of four:

- an array, of JAX or NumPy: the plan takes it. Its type and shape are for `jax.jit`;
- a ref: by its identity. The plan takes it;
- something immutable that the function was given before, a module or a function: by its
  identity, which stands for all that is below it;
- a node of a pytree, a `functools.partial`, a bound method, a module that is new: by its
  type, its static part and the number of its children, which are read in turn;
- any other leaf: by its type and value, as in the structure of a program.

There is no third kind of thing, so what `jax.jit` can be called with has a key; a leaf that
has no hash has none, and no program either.
"""

import functools
import gc
import math
import types
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np

from .._core import _jax
from .._core._jax import flatten_containers
from .._core._ref import Ref
from .._trees._cells import holds_itself
from .._trees._keys import static_key


__tracebackhide__ = True


# What is read of a call. Its `key` must be the same for a plan to fit; a plan takes the
# `arrays` and the `refs`, in this order; `held` are the modules and functions that the key
# has by identity; `new` are the modules that it has by what is in them. (A tuple, because
# an object takes time to make.)
Read = tuple[list[Any], list[Any], list[Ref], list[Any], list[Any]]


class _WithMethod(eqx.Module):
    def method(self) -> None: ...


# What Equinox makes of a method of a module: a new object each time it is asked for.
_BoundMethod = type(_WithMethod().method)

_flatten_one_level: Any = jtu.default_registry.flatten_one_level  # type: ignore

# What the instances of a type are. Filled as types are met.
_ARRAY, _REF, _MODULE, _FUNCTION, _LITERAL, _OTHER, _REFUSED = range(7)
_kinds: dict[type, int] = {
    _jax.ConcreteArray: _ARRAY,
    np.ndarray: _ARRAY,
    Ref: _REF,
    types.FunctionType: _FUNCTION,
    _BoundMethod: _OTHER,
    **dict.fromkeys((bool, int, str, bytes, type(None)), _LITERAL),
}


def _kind_of(x: Any, kind: type) -> int:
    if issubclass(kind, Ref):
        found = _REF
    elif issubclass(kind, eqx.Module):
        found = _MODULE
    elif _jax.is_tracer(x) or isinstance(x, jax.ShapeDtypeStruct):
        found = _REFUSED
    elif isinstance(x, jax.Array | np.ndarray | np.generic):
        found = _ARRAY
    else:
        found = _OTHER
    _kinds[kind] = found
    return found


# As `id`; but that is told to audit hooks at each call (Python 3.12), of which filelock has one
# (4.0), and JAX imports it: 0.3 us each time.
address: Callable[[Any], int] = object.__hash__

# A container of this many is looked at as a whole.
_MANY = 8
_CONTAINERS = frozenset((tuple, list, dict))
_DEPTH = 6
_ONLY_REFS, _ONLY_ARRAYS = {_REF}, {_ARRAY}
_ALL_ARRAYS = "arrays"
# A key of this length may be of a list that holds itself, and one of that surely is.
_LARGE, _LARGER = 10_000, 10_000_000


def read(args: tuple, kwargs: dict, known: dict[int, Any]) -> Read | None:
    """Reads the arguments of a call; `None` if they have no key.

    `known` has the addresses of the modules that are told by identity.

    One function and one loop: calls of Python functions are what takes time here.
    """
    key: list[Any] = []
    arrays: list[Any] = []
    refs: list[Ref] = []
    held: list[Any] = []
    new: list[Any] = []
    if kwargs:
        key.append(tuple(kwargs))
        todo = [*args, *kwargs.values()]
        todo.reverse()
    else:
        todo = list(args[::-1])
    limit = _LARGE
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
        if what == _FUNCTION:
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
        if kind in _CONTAINERS and len(x) >= _MANY and _has_end(x):
            # As a whole, by JAX: `static` is its structure.
            try:
                children, static = flatten_containers(x)
            except Exception:  # keys that cannot be sorted
                return None
        elif kind is tuple or kind is list:
            children, static = x, None
        elif kind is functools.partial:
            children, static = (x.func, x.args, x.keywords), None
        elif kind is types.MethodType or kind is _BoundMethod:
            children, static = (x.__func__, x.__self__), None
        else:
            try:
                parts = _flatten_one_level(x)
            except Exception:  # of the user's, or keys that cannot be sorted
                return None
            if parts is None:
                if what == _REFUSED:
                    return None
                key.append(_leaf(x, kind))
                continue
            children, static = parts
        if len(key) > limit:
            if limit == _LARGER or any(map(holds_itself, (*args, *kwargs.values()))):
                return None
            limit = _LARGER
        n = len(children)
        key.append(kind)
        key.append(static)
        key.append(n)
        if n >= _MANY:
            kinds = set(map(_kinds.get, set(map(type, children))))
            if kinds == _ONLY_REFS:
                key.extend([ref._number for ref in children])
                refs.extend(children)
                continue
            if kinds == _ONLY_ARRAYS:
                key.append(_ALL_ARRAYS)
                arrays.extend(children)
                continue
        todo.extend(children[::-1])
    return key, arrays, refs, held, new


def _leaf(x: Any, kind: type) -> Any:
    if kind is float:
        # `0.0 == -0.0`, and a NaN is not equal to itself.
        return (kind, x) if x and not math.isnan(x) else (kind, repr(x))
    return static_key(x)


def _has_end(x: Any) -> bool:
    """Whether what is in a container surely has an end: JAX must not be given what has none.
    Level by level, all at once, which takes little time."""
    level = [x]
    for _ in range(_DEPTH):
        level = gc.get_referents(*level)
        kinds = set(map(type, level))
        if kinds.isdisjoint(_CONTAINERS):
            return True
        if not kinds <= _CONTAINERS:
            level = [x for x in level if type(x) in _CONTAINERS]
    return False


class GivenArray(int):
    """Stands for an array of the call, by its position, while a plan is made."""

    __slots__ = ()


def mark(args: tuple, kwargs: dict, read: Read) -> tuple[tuple, dict]:
    """The arguments, with each array that a plan takes replaced by its position."""
    marker = _Marker(read)
    # In the order in which `read` met them.
    marked = tuple(map(marker.tree, args))
    return marked, {name: marker.tree(x) for name, x in kwargs.items()}


class _Marker:
    # A class: two functions that call each other would be a cycle.

    def __init__(self, read: Read):
        self._held = set(map(id, read[3]))
        self._count = 0

    def tree(self, tree: Any) -> Any:
        return jtu.tree_map(self._leaf, tree, is_leaf=self._is_held)

    def _is_held(self, x: Any) -> bool:
        return id(x) in self._held

    def _leaf(self, x: Any) -> Any:
        kind = type(x)
        if self._is_held(x):
            return x
        if _kinds.get(kind) == _ARRAY:
            self._count += 1
            return GivenArray(self._count - 1)
        if kind is functools.partial:
            func, its_args, keywords = self.tree((x.func, x.args, x.keywords))
            return functools.partial(func, *its_args, **keywords)
        if kind is types.MethodType:
            return types.MethodType(*self.tree((x.__func__, x.__self__)))
        return x
