"""What a call carries: trees whose leaves may be functions that close over refs.

JAX treats a function as an opaque leaf. For us a function that closes over refs is a node:
its children are the contents of those of its closure cells in which a ref can be reached,
followed through nested functions, bound methods and `functools.partial`, and its default
arguments if there is one in them. Rebuilding the node makes a new function, of the same
code, with new cells. Cells without refs stay the very same objects, so `nonlocal` works on
them.
"""

import dis
import functools
import itertools
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax.tree_util as jtu

from . import _trace
from ._errors import CarryError
from ._identity import Identity, Ignored
from ._nodes import is_node
from ._ref import is_ref, Ref


__tracebackhide__ = True


class Carried:
    """The structure of a tree, with the functions in it that carry refs opened.

    Hashable and comparable. Holds no ref, no array and no function that carries refs.
    """

    __slots__ = ("_hash", "nodes", "num_leaves", "treedef")

    def __init__(self, treedef: Any, nodes: tuple):
        self.treedef = treedef
        # One for each leaf of `treedef`, `None` for an ordinary leaf; or none at all.
        self.nodes = nodes
        inside = [_num_leaves(node) for node in nodes]
        self.num_leaves: int = sum(inside) if nodes else treedef.num_leaves
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


def _num_leaves(node: Any) -> int:
    if node is None:
        return 1
    return node[-1].num_leaves if isinstance(node, tuple) else 0


def counts(structure: Carried) -> list[int]:
    """For each leaf of the tree itself, how many there are in its place: one, or all those
    inside of a function that is opened."""
    nodes = structure.nodes or (None,) * structure.treedef.num_leaves
    return list(map(_num_leaves, nodes))


def outside(structure: Carried, leaves: list[Any], inside: Any = None) -> list[Any]:
    """The leaves of the tree itself: `inside` for a function that is opened."""
    if not structure.nodes:
        return leaves
    rest, found = iter(leaves), []
    for node in structure.nodes:
        mine = list(itertools.islice(rest, _num_leaves(node)))
        found.append(mine[0] if node is None else inside)
    return found


def grouped(structure: Carried, leaves: list[Any]) -> list[Any]:
    """The leaves of the tree itself: the list of those inside for a function that is
    opened."""
    rest = iter(leaves)
    parts = [list(itertools.islice(rest, n)) for n in counts(structure)]
    nodes = structure.nodes or (None,) * len(parts)
    return [x[0] if node is None else x for x, node in zip(parts, nodes)]


def ungrouped(structure: Carried, outer: list[Any]) -> list[Any]:
    """The opposite of `grouped`."""
    nodes = structure.nodes or (None,) * len(outer)
    both = zip(outer, nodes)
    return [x for leaf, node in both for x in ([leaf] if node is None else leaf)]


class _Same:
    """Holds an object; equal when it is the same object."""

    __slots__ = ("obj",)

    def __init__(self, obj: Any):
        self.obj = obj

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Same) and self.obj is other.obj

    def __hash__(self) -> int:
        return id(self.obj)


class _Kept:
    """A cell that is kept unchanged; equal when it is the same cell, of the same content."""

    __slots__ = ("cell", "key")

    def __init__(self, cell: types.CellType, is_rebound: bool):
        self.cell = cell
        self.key = None if is_rebound else _content_key(cell)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Kept) and (
            self.cell is other.cell and self.key == other.key
        )

    def __hash__(self) -> int:
        return hash((id(self.cell), self.key))


class _Function(tuple):
    """A function: `(number, code, globals, cells, extras, origin)`, and `carried` last.

    `cells` has the cell that is kept, or `None` for one whose content is carried. `extras`
    are its looks, defaults and attributes; the defaults are `None` if they are carried,
    behind the contents of the cells. `origin` is the function itself, weakly.
    """

    __slots__ = ()


class _Method(tuple):
    """A bound method of an object that is a pytree: `(carried,)` of `[function, object]`."""

    __slots__ = ()


class _Partial(tuple):
    """A `functools.partial`: `(carried,)` of `[function, args, keywords]`."""

    __slots__ = ()


class _Again(int):
    """A later place of the function with this number. A recursive function has one."""

    __slots__ = ()


class _Opening(NamedTuple):
    """What one `flatten` has found.

    - `out`: the leaves;
    - `numbers`: of the functions that were met, by their ids;
    - `is_wanted`: which leaves make it open the function that they are in.
    """

    out: list[Any]
    numbers: dict[int, int]
    is_wanted: Callable[[Any], bool]


def flatten(
    tree: Any, is_wanted: Callable[[Any], bool] = is_ref
) -> tuple[list[Any], Carried]:
    """The leaves of a tree, those inside of functions that carry refs included.

    **Arguments:**

    - `is_wanted`: which leaves make a node of the function that they are in.

    **Raises:**

    - `StructureError`: if a list or a dict holds itself.
    """
    refuse_cycle(tree)
    leaves, treedef = jtu.tree_flatten(tree)
    if not any(map(may_carry, leaves)):
        # `None` for every leaf, without making a tuple of them.
        return leaves, Carried(treedef, ())
    opening = _Opening([], {}, is_wanted)
    return opening.out, _flatten(leaves, treedef, opening)


def refuse_cycle(tree: Any) -> None:
    if holds_itself(tree):
        raise CarryError(
            f"A {type(tree).__name__} holds itself, or something in it does: that is no "
            "pytree, as it has no end. Take the cycle out of what is passed."
        )


def is_ref_or_tracer(leaf: Any) -> bool:
    """What makes a node of a function that is returned: an array of the trace must come
    out as the other results do, and not stay behind in a cell."""
    return isinstance(leaf, Ref) or _trace.is_tracer(leaf)


def may_carry(leaf: Any) -> bool:
    kind = type(leaf)
    if kind not in _CALLABLES:
        return False
    return kind is not types.FunctionType or bool(
        leaf.__closure__ or leaf.__defaults__ or leaf.__kwdefaults__
    )


_CALLABLES = frozenset((types.FunctionType, types.MethodType, functools.partial))


def _flatten(leaves: list, treedef: Any, opening: _Opening) -> Carried:
    nodes = []
    for leaf in leaves:
        node = None
        # A partial is always opened: what was bound in it are arguments like others.
        if type(leaf) is functools.partial or (
            may_carry(leaf) and reaches(leaf, opening.is_wanted)
        ):
            node = _open(leaf, opening)
        else:
            opening.out.append(leaf)
        nodes.append(node)
    if all(node is None for node in nodes):
        nodes = []
    return Carried(treedef, tuple(nodes))


def _sub(tree: Any, opening: _Opening) -> Carried:
    leaves, treedef = jtu.tree_flatten(tree)
    return _flatten(leaves, treedef, opening)


def _open(leaf: Any, opening: _Opening) -> Any:
    head, contents = head_of(leaf, opening.numbers, opening.is_wanted)
    if isinstance(head, _Again):
        return head
    return type(head)((*head, _sub(contents, opening)))


def head_of(
    leaf: Any, numbers: dict[int, int], is_wanted: Callable[[Any], bool] = is_ref
) -> tuple[Any, list[Any]]:
    """A function, taken apart: what it is without the trees that it carries, and these
    trees. A function that was met before carries none.

    **Arguments:**

    - `numbers`: of the functions that were met, by their ids. This one is added.
    """
    if type(leaf) is types.MethodType:
        return _Method(), [leaf.__func__, leaf.__self__]
    if type(leaf) is functools.partial:
        return _Partial(), [leaf.func, leaf.args, leaf.keywords]
    number = numbers.get(id(leaf))
    if number is not None:
        return _Again(number), []
    number = numbers[id(leaf)] = len(numbers)
    rebound = _rebound_cells(_reachable_functions(leaf))
    carried = carried_cells(leaf, is_wanted)
    # By identity: cells are equal when their contents are.
    ids = set(map(id, carried))
    kept = tuple(
        None if id(cell) in ids else _Kept(cell, id(cell) in rebound)
        for cell in leaf.__closure__ or ()
    )
    contents: list[Any] = [cell.cell_contents for cell in carried]
    extras: list[Any] = [Ignored((name, getattr(leaf, name)) for name in _LOOKS)]
    for defaults in (leaf.__defaults__, leaf.__kwdefaults__):
        is_carried = bool(defaults) and reaches(defaults, is_wanted)
        extras.append(None if is_carried else _Same(defaults))
        if is_carried:
            contents.append(defaults)
    extras += ((k, _Same(v)) for k, v in vars(leaf).items() if k != "__wrapped__")
    origin = Ignored((weakref.ref(origin_of(leaf)),))
    looks = number, leaf.__code__, _Same(leaf.__globals__), kept, tuple(extras), origin
    return _Function(looks), contents


def names_in(head: Any) -> list[str]:
    """What the trees that a function carries are called in it."""
    if type(head) is _Method:
        return ["__func__", "__self__"]
    if type(head) is _Partial:
        return ["func", "args", "keywords"]
    if type(head) is _Again:
        return []
    _, code, _, kept, (_, defaults, kwdefaults, *_), _ = head
    names = [name for name, keep in zip(code.co_freevars, kept) if keep is None]
    names += ["__defaults__"] if defaults is None else []
    return names + (["__kwdefaults__"] if kwdefaults is None else [])


_LOOKS = "__annotations__", "__doc__", "__module__", "__name__", "__qualname__"


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def carried_cells(
    fn: types.FunctionType, is_wanted: Callable[[Any], bool] = is_ref
) -> list[types.CellType]:
    """The cells of a function whose content is carried with it."""
    return [
        cell
        for cell in fn.__closure__ or ()
        if _is_filled(cell) and reaches(cell.cell_contents, is_wanted)
    ]


def inside(obj: Any) -> Iterator[Any]:
    """The trees that a callable leaf holds."""
    if type(obj) is types.FunctionType:
        for cell in obj.__closure__ or ():
            if _is_filled(cell):
                yield cell.cell_contents
        yield from filter(None, (obj.__defaults__, obj.__kwdefaults__))
    elif type(obj) is types.MethodType:
        yield obj.__func__
        yield obj.__self__
    elif type(obj) is functools.partial:
        yield (obj.func, obj.args, obj.keywords)


def reaches(tree: Any, is_wanted: Callable[[Any], bool] = is_ref) -> bool:
    """Whether there is such a leaf in a tree, or in a function in it."""
    return any(map(is_wanted, reachable(tree)))


def reachable(tree: Any) -> Iterator[Any]:
    """The leaves of a tree, and of what the functions in it hold."""
    seen: set[int] = set()
    todo = [tree]
    while todo:
        for leaf in _leaves(todo.pop()):
            yield leaf
            if may_carry(leaf) and id(leaf) not in seen:
                seen.add(id(leaf))
                todo.extend(inside(leaf))


def _leaves(tree: Any) -> list[Any]:
    """The leaves of what a function holds; none if JAX cannot tell them.

    What is in a cell need be no pytree: a dict with keys of two types is not one, nor a
    list that holds itself. JAX never asks, so the function must work here as well.
    """
    if holds_itself(tree):
        return []
    try:
        return jtu.tree_leaves(tree, is_leaf=_is_whole)
    except (ValueError, TypeError):
        return []


def holds_itself(tree: Any) -> bool:
    """Whether a list or a dict is inside of itself, by lists, dicts and tuples alone.

    To be asked before JAX is: its `RecursionError` (jaxlib 0.10 to 0.12) leaves the count
    of the interpreter wrong, so that everything after it fails, up to the exit.
    """
    if type(tree) not in _CONTAINERS:
        return False
    # A container is left when it is met the second time on the stack.
    todo, entered, left = [tree], set(), set()
    while todo:
        obj = todo[-1]
        if id(obj) in entered:
            todo.pop()
            entered.discard(id(obj))
            left.add(id(obj))
            continue
        entered.add(id(obj))
        for x in obj.values() if type(obj) is dict else obj:
            if type(x) in _CONTAINERS and id(x) not in left:
                if id(x) in entered:
                    return True
                todo.append(x)
    return False


_CONTAINERS = (list, dict, tuple)


def _is_whole(x: Any) -> bool:
    # A state that was consumed does not let itself be flattened, and holds no refs.
    return is_node(x) or isinstance(x, eqx.nn.State) or is_table(x)


def is_table(x: Any) -> bool:
    """Whether `x` is a dict with refs as keys. It is no tree to JAX, which sorts the keys;
    so it is a leaf like a set of refs, to look refs up in."""
    return isinstance(x, dict) and _has_ref(x)


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
            next(leaves)
            if node is None
            else rebuilt(node, lambda: _unflatten(node[-1], leaves, made), made)
            for node in nodes
        ],
    )


def rebuilt(head: Any, contents: Callable[[], Any], made: dict[int, Any]) -> Any:
    """The opposite of `head_of`.

    **Arguments:**

    - `contents`: gives the trees that the function carries. Called when it is there: a
        recursive function is in one of them.
    - `made`: the functions that were made, by their numbers. This one is added.
    """
    if isinstance(head, _Again):
        return made[int(head)]
    if isinstance(head, _Method):
        return types.MethodType(*contents())
    if isinstance(head, _Partial):
        func, args, keywords = contents()
        return functools.partial(func, *args, **keywords)
    number, code, globals_, kept, extras, (origin,), *_ = head
    looks, defaults, kwdefaults, *own = extras
    cells = tuple(types.CellType() if keep is None else keep.cell for keep in kept)
    fn = types.FunctionType(code, globals_.obj, closure=cells)
    for name, value in looks:
        setattr(fn, name, value)
    for name, held in own:
        setattr(fn, name, held.obj)
    _origins[fn] = origin
    made[number] = fn
    rest = iter(contents())
    for cell, keep in zip(cells, kept):
        if keep is None:
            cell.cell_contents = next(rest)
    fn.__defaults__ = next(rest) if defaults is None else defaults.obj
    fn.__kwdefaults__ = next(rest) if kwdefaults is None else kwdefaults.obj
    return fn


# For each function that was rebuilt, the one that it stands for.
_origins: weakref.WeakKeyDictionary[types.FunctionType, weakref.ref] = (
    weakref.WeakKeyDictionary()
)


def origin_of(fn: types.FunctionType) -> types.FunctionType:
    """The function that `fn` was rebuilt from, by however many transforms; or `fn`.

    A body is rebuilt at each call. What is compiled for it is kept by its origin.
    """
    origin = _origins.get(fn, _gone)()
    return fn if origin is None else origin


def _gone() -> None:
    return None


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
    if isinstance(leaf, set | frozenset) and _has_ref(leaf):
        return type(leaf), _Items(map(_object_key, leaf))
    return type(leaf), Identity(leaf) if _is_own(leaf) else leaf


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
    if type(leaf) is frozenset and _has_ref(leaf):
        return Members(leaf)
    if _is_own(leaf) or (isinstance(leaf, set | frozenset) and _has_ref(leaf)):
        identity = Identity(leaf)
        return identity if identity.mortal() else None
    return None


def _is_own(leaf: Any) -> bool:
    """Whether it is equal to nothing but itself, or a ref, which is held by identity."""
    if isinstance(leaf, Ref):
        return True
    return type(leaf).__eq__ is object.__eq__ and not isinstance(leaf, weakref.ref)


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
        alive = [weak.recall() for weak in self._weak]
        if any(x is None for x in alive):
            return None
        members: list[Any] = [*self._kept, *alive]
        return frozenset(members)


def _closure_key(fn: types.FunctionType) -> tuple:
    functions = _reachable_functions(fn)
    rebound = _rebound_cells(functions)
    return tuple(
        _content_key(cell)
        for function in functions
        for cell in function.__closure__ or ()
        if id(cell) not in rebound
    )


def _reachable_functions(fn: types.FunctionType) -> list[types.FunctionType]:
    """`fn` and the functions that are in its cells, and in theirs."""
    functions, seen = [fn], {id(fn)}
    for function in functions:
        for cell in function.__closure__ or ():
            content = cell.cell_contents if _is_filled(cell) else None
            if isinstance(content, types.FunctionType) and id(content) not in seen:
                seen.add(id(content))
                functions.append(content)
    return functions


def _rebound_cells(functions: list[types.FunctionType]) -> set[int]:
    """The cells that these functions rebind themselves (`nonlocal count; count += 1`).

    They are no input of a function but a side effect, which JAX runs once a trace.
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


_EMPTY = object()


def _content_key(cell: types.CellType) -> Any:
    """What stands for the content of a cell. A container or an array is itself: like JAX,
    we do not notice a list that is appended to. But refs are taken into a set and out of
    it (layers that are frozen, and thawed one by one), so that is noticed."""
    content = cell.cell_contents if _is_filled(cell) else _EMPTY
    if type(content) in (set, frozenset) and _has_ref(content):
        return _Items(map(_object_key, content))
    if type(content) is dict and _has_ref(content):
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


def _has_ref(items: Iterable[Any]) -> bool:
    """Whether one of these objects is a ref."""
    return any(issubclass(kind, Ref) for kind in set(map(type, items)))


# The position of a cell in a closure; what stands for its content; and that content, if it
# is a number or a text, or a function that returns it, or `None` if it is gone.
Watched = tuple[int, Any, Any, Callable[[], Any] | None]


def same_content(cell: types.CellType, key: Any) -> bool:
    """Whether a cell still has the content that `key` stands for."""
    return _content_key(cell) == key


def watched_cells(fn: types.FunctionType) -> list[Watched]:
    """The cells of a function whose content matters."""
    rebound = _rebound_cells(_reachable_functions(fn))
    watched = []
    for i, cell in enumerate(fn.__closure__ or ()):
        if id(cell) not in rebound:
            key = _content_key(cell)
            content, recall = None, None
            if isinstance(key, Identity):
                recall = key.recall
            elif isinstance(key, _Items):
                recall = _gone  # the same object says nothing
            else:
                content = cell.cell_contents
            watched.append((i, key, content, recall))
    return watched
