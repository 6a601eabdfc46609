"""What a call carries: trees whose leaves may be functions that close over refs.

JAX treats a function as an opaque leaf. For us a function that closes over refs is a node:
its children are the contents of those of its closure cells in which a ref can be reached,
followed through nested functions, bound methods and `functools.partial`. Rebuilding the
node makes a new function, of the same code, with new cells. Cells without refs stay the
very same objects, so `nonlocal` works on them.
"""

import functools
import types
import weakref
from collections.abc import Iterator
from typing import Any

import jax.tree_util as jtu

from ._ref import is_opened, Ref


class Carried:
    """The structure of a tree, with the functions in it that carry refs opened.

    Hashable and comparable. Holds no ref, no array and no function that carries refs.
    """

    __slots__ = ("_hash", "nodes", "treedef")

    def __init__(self, treedef: Any, nodes: tuple):
        self.treedef = treedef
        self.nodes = (
            nodes  # one for each leaf of `treedef`; `None` for an ordinary leaf
        )
        self._hash = hash((treedef, nodes))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: Any) -> bool:
        if self is other:
            return True
        return (
            isinstance(other, Carried)
            and self._hash == other._hash
            and self.treedef == other.treedef
            and self.nodes == other.nodes
        )


class _Same:
    """Holds an object; equal when it is the same object."""

    __slots__ = ("obj",)

    def __init__(self, obj: Any):
        self.obj = obj

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Same) and self.obj is other.obj

    def __hash__(self) -> int:
        return id(self.obj)


class _Function(tuple):
    """A function: `(number, code, globals, cells, extras, carried)`.

    `cells` has the cell that is kept, or `None` for one whose content is carried.
    """

    __slots__ = ()


class _Method(tuple):
    """A bound method of an object that is a pytree: `(carried,)` of `(function, object)`."""

    __slots__ = ()


class _Partial(tuple):
    """A `functools.partial`: `(carried,)` of `(function, args, keywords)`."""

    __slots__ = ()


class _Again(int):
    """A later place of the function with this number. A recursive function has one."""

    __slots__ = ()


def flatten(tree: Any) -> tuple[list[Any], Carried]:
    """The leaves of a tree, those inside of functions that carry refs included."""
    leaves, treedef = jtu.tree_flatten(tree)
    if not any(map(may_carry, leaves)):
        # `None` for every leaf, without making a tuple of them.
        return leaves, Carried(treedef, ())
    out: list[Any] = []
    return out, _flatten(leaves, treedef, out, {})


def may_carry(leaf: Any) -> bool:
    kind = type(leaf)
    if kind not in _CALLABLES:
        return False
    return kind is not types.FunctionType or leaf.__closure__ is not None


_CALLABLES = frozenset((types.FunctionType, types.MethodType, functools.partial))


def _flatten(leaves: list, treedef: Any, out: list, numbers: dict[int, int]) -> Carried:
    nodes = []
    for leaf in leaves:
        node = None
        if may_carry(leaf) and _carries(leaf):
            node = _open(leaf, out, numbers)
        else:
            out.append(leaf)
        nodes.append(node)
    if all(node is None for node in nodes):
        nodes = []
    return Carried(treedef, tuple(nodes))


def _sub(tree: Any, out: list, numbers: dict[int, int]) -> Carried:
    leaves, treedef = jtu.tree_flatten(tree)
    return _flatten(leaves, treedef, out, numbers)


def _open(leaf: Any, out: list, numbers: dict[int, int]) -> Any:
    if type(leaf) is types.MethodType:
        return _Method((_sub((leaf.__func__, leaf.__self__), out, numbers),))
    if type(leaf) is functools.partial:
        return _Partial((_sub((leaf.func, leaf.args, leaf.keywords), out, numbers),))
    number = numbers.get(id(leaf))
    if number is not None:
        return _Again(number)
    number = numbers[id(leaf)] = len(numbers)
    kept, contents = [], []
    for cell in leaf.__closure__:
        if _is_filled(cell) and _reaches_ref(cell.cell_contents):
            kept.append(None)
            contents.append(cell.cell_contents)
        else:
            kept.append(_Same(cell))
    extras = _Same(leaf.__defaults__), _Same(leaf.__kwdefaults__), leaf.__qualname__
    carried = _sub(contents, out, numbers)
    globals_ = _Same(leaf.__globals__)
    return _Function((number, leaf.__code__, globals_, tuple(kept), extras, carried))


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def inside(obj: Any) -> Iterator[Any]:
    """The trees that a callable leaf holds."""
    if type(obj) is types.FunctionType:
        for cell in obj.__closure__ or ():
            if _is_filled(cell):
                yield cell.cell_contents
    elif type(obj) is types.MethodType:
        yield obj.__func__
        yield obj.__self__
    elif type(obj) is functools.partial:
        yield (obj.func, obj.args, obj.keywords)


def _reaches_ref(tree: Any) -> bool:
    seen: set[int] = set()
    todo = [tree]
    while todo:
        for leaf in jtu.tree_leaves(todo.pop(), is_leaf=is_opened):
            if isinstance(leaf, Ref):
                return True
            if may_carry(leaf) and id(leaf) not in seen:
                seen.add(id(leaf))
                todo.extend(inside(leaf))
    return False


def _carries(leaf: Any) -> bool:
    return _reaches_ref(leaf)


def unflatten(structure: Carried, leaves: list[Any]) -> Any:
    """The tree again. Each function that carries refs is a new one, with new cells."""
    if not structure.nodes:
        return jtu.tree_unflatten(structure.treedef, leaves)
    return _unflatten(structure, iter(leaves), {})


def _unflatten(structure: Carried, leaves: Iterator[Any], made: dict[int, Any]) -> Any:
    nodes = structure.nodes or (None,) * structure.treedef.num_leaves
    return jtu.tree_unflatten(
        structure.treedef,
        [
            next(leaves) if node is None else _close(node, leaves, made)
            for node in nodes
        ],
    )


def _close(node: Any, leaves: Iterator[Any], made: dict[int, Any]) -> Any:
    if isinstance(node, _Again):
        return made[int(node)]
    if isinstance(node, _Method):
        return types.MethodType(*_unflatten(node[0], leaves, made))
    if isinstance(node, _Partial):
        func, args, keywords = _unflatten(node[0], leaves, made)
        return functools.partial(func, *args, **keywords)
    number, code, globals_, kept, extras, carried = node
    defaults, kwdefaults, qualname = extras
    cells = tuple(types.CellType() if cell is None else cell.obj for cell in kept)
    fn = types.FunctionType(
        code, globals_.obj, code.co_name, defaults.obj, closure=cells
    )
    fn.__kwdefaults__ = kwdefaults.obj
    fn.__qualname__ = qualname
    # Before the cells are filled: a recursive function is in one of them.
    made[number] = fn
    contents = iter(_unflatten(carried, leaves, made))
    for cell, keep in zip(cells, kept):
        if keep is None:
            cell.cell_contents = next(contents)
    return fn


def static_key(leaf: Any) -> Any:
    """What stands for a static leaf in the key of a cache.

    Two leaves have equal keys only if a program traced with the one is right for the
    other: `1`, `1.0` and `True` are equal in Python, and so are `0.0` and `-0.0`. A
    function is held weakly, so that a cache does not keep it alive.
    """
    if isinstance(leaf, types.FunctionType):
        return weakref.ref(leaf)
    if isinstance(leaf, float | complex):
        return type(leaf), repr(leaf)
    return type(leaf), leaf
