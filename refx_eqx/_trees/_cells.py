"""The contents of functions in a tree: their closure cells, defaults and partials.

JAX treats a function as an opaque leaf, and in Python it can hold anything, pytree or not.
"""

import dis
import functools
import itertools
import types
import weakref
from collections import defaultdict, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import equinox as eqx
import jax.tree_util as jtu

from ._equality import ByValue, Shared


def is_shared(leaf: Any) -> bool:
    return isinstance(leaf, Shared)


def looked_up(x: Any) -> Iterator[Any]:
    """The shared leaves in a set or in the keys of a dict, also inside a tuple or a module
    there. These are not part of the tree that contains the set or dict."""
    members = x if isinstance(x, set | frozenset | dict) else ()
    # By type first: this is called for each dict in a tree. It computes no hashes.
    while not NAMES.issuperset(map(type, members)):
        one_of = {type(member): member for member in members}
        may_hold = {kind for kind, one in one_of.items() if _may_hold(one)}
        for member in members if may_hold else ():
            if type(member) in may_hold:
                for leaf in reachable(member):
                    yield from (leaf,) if is_shared(leaf) else looked_up(leaf)
        groups = (member for member in members if type(member) in _GROUPS)
        members = list(itertools.chain.from_iterable(groups))


NAMES = frozenset((str, int, float, complex, bool, bytes, type(None)))
"""The types of most members: they hold nothing."""

# Members that are looked into one by one, as there may be many.
_GROUPS = frozenset((tuple, frozenset))


def _may_hold(member: Any) -> bool:
    """Whether members of this type may hold shared leaves, except the groups."""
    kind = type(member)
    if kind in NAMES or kind in _GROUPS:
        return False
    return is_shared(member) or kind in _CALLABLES or not jtu.all_leaves([member])


def is_lookup(x: Any) -> bool:
    """Whether `x` is for looking up shared leaves. JAX cannot flatten such a dict, as it
    sorts the keys; so it is a leaf, like a set."""
    return next(looked_up(x), None) is not None


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
        return next(looked_up(leaf), None)
    held = (x if is_shared(x) else next(looked_up(x), None) for x in reachable(leaf))
    return next((x for x in held if x is not None), None)


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
    """Whether a pytree node contains itself, through nodes that JAX would flatten.

    Call this before JAX: its `RecursionError` (jaxlib 0.10 to 0.12) corrupts the recursion
    count of the interpreter, and everything after it fails until exit.
    """
    children = _children(tree)
    if children is None:
        return False
    if jtu.all_leaves(children):  # most values; this is quick
        return False
    # The nodes from the top to here, each with its children that are still to be visited.
    # The finished ones stay alive, so that no other object gets the id of one.
    leaf_types: set[type] = set()
    path, entered, finished = [(tree, iter(children))], {id(tree)}, {}
    while path:
        node, rest = path[-1]
        for x in rest:
            if type(x) in leaf_types or id(x) in finished:
                continue
            if id(x) in entered:
                return True
            children = _children(x)
            if children is None:
                leaf_types.add(type(x))
                continue
            if jtu.all_leaves(children):
                finished[id(x)] = x
                continue
            path.append((x, iter(children)))
            entered.add(id(x))
            break
        else:
            path.pop()
            entered.discard(id(node))
            finished[id(node)] = node
        if len(path) > _DEEPEST:  # a node that makes another such node when flattened
            return True
    return False


def _children(x: Any) -> Any:
    """The children of a pytree node; `None` for a leaf."""
    kind = type(x)
    if kind in _SEQUENCES:
        return x
    if kind in DICTS:  # JAX sorts the keys, which may be impossible
        return x.values()
    # The first test is for speed: `issubclass` alone goes through Python's `abc`.
    if hasattr(kind, "__dataclass_fields__") and issubclass(kind, eqx.Module):
        return vars(x).values()
    if isinstance(x, ByValue):  # it checks its own tree
        return ()
    try:
        parts = flatten_one_level(x)
    except Exception:  # from user code
        return ()
    return parts and parts[0]


# `(children, aux)` of one node, or `None` for a leaf.
flatten_one_level: Any = jtu.default_registry.flatten_one_level

_SEQUENCES = frozenset((list, tuple))
DICTS = frozenset((dict, OrderedDict, defaultdict))

# JAX flattens far fewer levels.
_DEEPEST = 20_000


def functions_among(leaves: Iterable[Any]) -> list[types.FunctionType]:
    """The functions among the leaves of a tree, each once."""
    found = {id(x): x for x in leaves if type(x) is types.FunctionType}
    return list(found.values())


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
