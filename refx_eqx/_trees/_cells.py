"""The contents of functions in a tree: their closure cells, defaults and partials.

JAX treats a function as an opaque leaf, and in Python it can hold anything, pytree or not.
"""

import dis
import functools
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax.tree_util as jtu

from ._equality import Shared


def is_shared(leaf: Any) -> bool:
    return isinstance(leaf, Shared)


def shared_in(x: Any) -> Any:
    """A shared leaf in a set, or among the keys of a dict, or `None`. These are not part of
    the tree that contains the set or dict."""
    # By type first: this is called for each dict in a tree. It computes no hashes.
    if isinstance(x, set | frozenset | dict) and any(
        issubclass(kind, Shared) for kind in set(map(type, x))
    ):
        return next(item for item in x if isinstance(item, Shared))
    return None


def is_lookup(x: Any) -> bool:
    """Whether `x` is for looking up shared leaves. JAX cannot flatten such a dict, as it
    sorts the keys; so it is a leaf, like a set."""
    return shared_in(x) is not None


def may_carry(leaf: Any) -> bool:
    kind = type(leaf)
    if kind not in _CALLABLES:
        return False
    return kind is not types.FunctionType or bool(
        leaf.__closure__ or leaf.__defaults__ or leaf.__kwdefaults__
    )


_CALLABLES = frozenset((types.FunctionType, types.MethodType, functools.partial))


def is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def carried_cells(
    fn: types.FunctionType, is_wanted: Callable[[Any], bool] = is_shared
) -> list[types.CellType]:
    """The cells of a function whose contents are carried with it."""
    return [
        cell
        for cell in fn.__closure__ or ()
        if is_filled(cell) and reaches(cell.cell_contents, is_wanted)
    ]


def inside(obj: Any) -> Iterator[Any]:
    """The trees in a leaf that `may_carry`."""
    if type(obj) is types.FunctionType:
        for cell in obj.__closure__ or ():
            if is_filled(cell):
                yield cell.cell_contents
        yield from filter(None, (obj.__defaults__, obj.__kwdefaults__))
    elif type(obj) is types.MethodType:
        yield obj.__func__
        yield obj.__self__
    else:
        yield (obj.func, obj.args, obj.keywords)


def is_opaque(x: Any) -> bool:
    # A consumed state cannot be flattened, and holds no refs.
    return isinstance(x, eqx.nn.State) or is_lookup(x)


def reaches(tree: Any, is_wanted: Callable[[Any], bool] = is_shared) -> bool:
    """Whether there is such a leaf in a tree, or in a function in the tree."""
    return any(map(is_wanted, reachable(tree)))


def reachable(tree: Any, is_leaf: Callable[[Any], bool] = is_opaque) -> Iterator[Any]:
    """The leaves of a tree, and of the contents of functions in it."""
    seen: set[int] = set()
    todo = [tree]
    while todo:
        for leaf in _leaves(todo.pop(), is_leaf):
            yield leaf
            if may_carry(leaf) and id(leaf) not in seen:
                seen.add(id(leaf))
                todo.extend(inside(leaf))


def held_by(leaf: Any) -> Any:
    """A shared leaf that this leaf is, or holds: in a set, as a key, in a function. Or
    `None`."""
    if isinstance(leaf, Shared):
        return leaf
    if not may_carry(leaf):
        return shared_in(leaf)
    found = (x if is_shared(x) else shared_in(x) for x in reachable(leaf))
    return next((x for x in found if x is not None), None)


def _leaves(tree: Any, is_leaf: Callable[[Any], bool]) -> list[Any]:
    """The leaves of the contents of a function; empty if JAX cannot flatten them.

    The content of a cell need not be a pytree: a dict with keys of two types is not one,
    nor is a list that contains itself. JAX never flattens it, so such a function must work
    here as well.
    """
    if holds_itself(tree):
        return []
    try:
        return jtu.tree_leaves(tree, is_leaf=is_leaf)
    except (ValueError, TypeError):
        return []


def holds_itself(tree: Any) -> bool:
    """Whether a list or a dict contains itself, through lists, dicts, tuples and modules
    only.

    Call this before JAX: its `RecursionError` (jaxlib 0.10 to 0.12) corrupts the recursion
    count of the interpreter, and everything after it fails until exit.
    """
    if not _is_container(tree):
        return False
    # A container is finished when it is met on the stack for the second time.
    todo, entered, left = [tree], set(), set()
    while todo:
        obj = todo[-1]
        if id(obj) in entered:
            todo.pop()
            entered.discard(id(obj))
            left.add(id(obj))
            continue
        entered.add(id(obj))
        for x in _items(obj):
            if _is_container(x) and id(x) not in left:
                if id(x) in entered:
                    return True
                todo.append(x)
    return False


def _is_container(x: Any) -> bool:
    kind = type(x)
    # The second test is for speed: `issubclass` alone goes through Python's `abc`.
    return kind in _MAY_HOLD_ITSELF or (
        hasattr(kind, "__dataclass_fields__") and issubclass(kind, eqx.Module)
    )


def _items(x: Any) -> Any:
    if type(x) is dict:
        return x.values()
    return x if type(x) in _MAY_HOLD_ITSELF else vars(x).values()


_MAY_HOLD_ITSELF = frozenset((list, dict, tuple))


def reachable_functions(fn: types.FunctionType) -> list[types.FunctionType]:
    """`fn` and the functions in its cells, recursively."""
    functions, seen = [fn], {id(fn)}
    for function in functions:
        for cell in function.__closure__ or ():
            content = cell.cell_contents if is_filled(cell) else None
            if isinstance(content, types.FunctionType) and id(content) not in seen:
                seen.add(id(content))
                functions.append(content)
    return functions


def rebound_cells(functions: list[types.FunctionType]) -> set[int]:
    """The cells that these functions rebind themselves (`nonlocal count; count += 1`).

    These are not inputs of a function but a side effect, which JAX runs once per trace.
    """
    return {
        id(cell)
        for function in functions
        if function.__closure__
        for name, cell in zip(function.__code__.co_freevars, function.__closure__)
        if name in _rebound_names(function.__code__)
    }


_rebound: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _rebound_names(code: types.CodeType) -> frozenset[str]:
    names = _rebound.get(code)
    if names is None:
        found = {
            instruction.argval
            for instruction in dis.get_instructions(code)
            if instruction.opname in ("STORE_DEREF", "DELETE_DEREF")
        }
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                found |= _rebound_names(constant)
        names = _rebound[code] = frozenset(found & set(code.co_freevars))
    return names
