"""Taking a function apart into a head and the trees it carries, and rebuilding it.

For us a function that closes over refs is a node: its children are the contents of those
closure cells from which a ref can be reached (through nested functions, bound methods and
`functools.partial`), and its default arguments if they contain one. Rebuilding the node
makes a new function with the same code and new cells. Cells without refs stay the very same
objects, so `nonlocal` works on them.
"""

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

from ._cells import (
    carried_cells,
    functions_among,
    is_filled,
    is_shared,
    reachable,
    reaches,
    rebound_cells,
)
from ._equality import Identity, Ignored
from ._keys import content_key, contents_key, gone


class _OwnCell:
    """A cell that the rebuilt function keeps; equal if it is the same cell with the same
    content, and the functions in it close over the same."""

    __slots__ = ("cell", "key")

    def __init__(self, cell: types.CellType, rebound: set[int]):
        self.cell = cell
        self.key = None
        if id(cell) not in rebound:
            held = [cell.cell_contents] if is_filled(cell) else []
            self.key = content_key(cell), contents_key(held, rebound)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _OwnCell) and (
            self.cell is other.cell and self.key == other.key
        )

    def __hash__(self) -> int:
        return hash((id(self.cell), self.key))


class _OwnDefaults(Identity):
    """The default arguments that the rebuilt function keeps; equal if they are the same
    objects, with the same refs in the sets among them, and the same closures."""

    __slots__ = ("key",)

    def __init__(self, defaults: Any, rebound: set[int]):
        super().__init__(defaults, weak=False)
        self.key = contents_key(defaults, rebound)

    def __eq__(self, other: Any) -> bool:
        return super().__eq__(other) and self.key == getattr(other, "key", None)

    __hash__ = Identity.__hash__


class FirstPlaceGone(LookupError):
    """A function was at two places of a tree, and only the later place is left."""


class _FunctionHead(tuple):
    """A function: `(number, code, globals, cells, extras, origin)`.

    `cells` has each kept cell, or `None` for one whose content is carried. `extras` are its
    names, defaults and attributes; the defaults are `None` if they are carried, after the
    contents of the cells. `origin` is the function itself, held weakly.
    """

    __slots__ = ()


class _MethodHead(tuple):
    """A bound method of a pytree. It carries `[function, object]`."""

    __slots__ = ()


class _PartialHead(tuple):
    """A `functools.partial`. It carries `[function, args, keywords]`."""

    __slots__ = ()


class LaterPlace(int):
    """A later place of the function with this number. Recursive functions have one."""

    __slots__ = ()


def head_of(
    leaf: Any, numbers: dict[int, int], is_wanted: Callable[[Any], bool] = is_shared
) -> tuple[Any, list[Any]]:
    """Takes a function apart into its head and the trees it carries. A function that was
    met before carries none.

    **Arguments:**

    - `numbers`: the numbers of the functions met so far, by id. This one is added.
    """
    if type(leaf) is types.MethodType:
        return _MethodHead(), [leaf.__func__, leaf.__self__]
    if type(leaf) is functools.partial:
        return _PartialHead(), [leaf.func, leaf.args, leaf.keywords]
    number = numbers.get(id(leaf))
    if number is not None:
        # The same function again, or a reference to itself in its own cell: without this
        # the tree of a recursive function would be infinite.
        return LaterPlace(number), []
    # Before visiting its contents: a recursive function is in one of its own cells.
    number = numbers[id(leaf)] = len(numbers)
    rebound = rebound_cells(functions_among(reachable(leaf)))
    carried = carried_cells(leaf, is_wanted)
    # By identity: cells compare equal if their contents do.
    ids = set(map(id, carried))
    kept = tuple(
        None if id(cell) in ids else _OwnCell(cell, rebound)
        for cell in leaf.__closure__ or ()
    )
    contents: list[Any] = [cell.cell_contents for cell in carried]
    extras: list[Any] = [Ignored((name, getattr(leaf, name)) for name in _LOOKS)]
    for defaults in (leaf.__defaults__, leaf.__kwdefaults__):
        is_carried = bool(defaults) and reaches(defaults, is_wanted)
        extras.append(None if is_carried else _OwnDefaults(defaults, rebound))
        if is_carried:
            contents.append(defaults)
    # `functools.wraps` puts the wrapped function here: it is also in a cell, where its
    # contents are carried.
    extras += ((k, _itself(v)) for k, v in vars(leaf).items() if k != "__wrapped__")
    # Each call makes a new function with the same code. A program is kept by the user's own
    # function, and dies with it.
    origin = Ignored((weakref.ref(origin_of(leaf)),))
    looks = (
        number,
        leaf.__code__,
        _itself(leaf.__globals__),
        kept,
        tuple(extras),
        origin,
    )
    return _FunctionHead(looks), contents


def _itself(obj: Any) -> Identity:
    """Equal by identity, and recoverable."""
    return Identity(obj, weak=False)


def kind_of(head: Any) -> type:
    """The type of the function that was taken apart."""
    kinds = {_MethodHead: types.MethodType, _PartialHead: functools.partial}
    return kinds.get(type(head), types.FunctionType)


def names_in(head: Any) -> list[str]:
    """The names of the trees that a function carries."""
    if type(head) is _MethodHead:
        return ["__func__", "__self__"]
    if type(head) is _PartialHead:
        return ["func", "args", "keywords"]
    if type(head) is LaterPlace:
        return []
    _, code, _, kept, (_, defaults, kwdefaults, *_), _ = head
    names = [name for name, keep in zip(code.co_freevars, kept) if keep is None]
    names += ["__defaults__"] if defaults is None else []
    return names + (["__kwdefaults__"] if kwdefaults is None else [])


_LOOKS = "__annotations__", "__doc__", "__module__", "__name__", "__qualname__"


def rebuilt(head: Any, contents: Callable[[], Any], made: dict[int, Any]) -> Any:
    """The inverse of `head_of`.

    **Arguments:**

    - `contents`: returns the trees that the function carries. Called once the function
        exists: a recursive function is in one of them.
    - `made`: the functions made so far, by number. This one is added.
    """
    if isinstance(head, LaterPlace):
        if int(head) not in made:
            raise FirstPlaceGone
        return made[int(head)]
    if isinstance(head, _MethodHead):
        return types.MethodType(*contents())
    if isinstance(head, _PartialHead):
        func, args, keywords = contents()
        return functools.partial(func, *args, **keywords)
    number, code, globals_, kept, extras, (origin,) = head
    looks, defaults, kwdefaults, *own = extras
    # Empty cells, filled below: a recursive function is needed to make their contents.
    cells = tuple(types.CellType() if keep is None else keep.cell for keep in kept)
    fn = types.FunctionType(code, globals_.recall(), closure=cells)
    for name, value in looks:
        setattr(fn, name, value)
    for name, held in own:
        setattr(fn, name, held.recall())
    _origins[fn] = origin
    made[number] = fn
    rest = iter(contents())
    for cell, keep in zip(cells, kept):
        if keep is None:
            cell.cell_contents = next(rest)
    fn.__defaults__ = next(rest) if defaults is None else defaults.recall()
    fn.__kwdefaults__ = next(rest) if kwdefaults is None else kwdefaults.recall()
    return fn


# For each rebuilt function, the function it stands for.
_origins: weakref.WeakKeyDictionary[types.FunctionType, weakref.ref] = (
    weakref.WeakKeyDictionary()
)


def origin_of(fn: types.FunctionType) -> types.FunctionType:
    """The function that `fn` was rebuilt from, through any number of transforms; or `fn`.

    A body is rebuilt at each call. Programs compiled for it are kept by its origin.
    """
    origin = _origins.get(fn, gone)()
    return fn if origin is None else origin
