"""The derefed form of the trees of a call: the form of gradients, tangents and cotangents.

A call is opened into flat arrays, and so is its result. A `Layout` knows where the arrays
of a tree are among them. Its two methods are inverse to each other:

    flat arrays   -- fill -->   tree of Value, Index and arrays   -- read -->   flat arrays

What has no array, or none that is differentiated, is `None` in the tree.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.tree_util as jtu

from .._core._call import Opened
from .._core._closure import Carried
from .._core._errors import describe, StructureError
from .._core._nodes import Index, Note, Value
from .._core._ref import Ref
from .._core._structure import (
    DYNAMIC,
    inside_of,
    n_arrays,
    Outcome,
    Slot,
    Structure,
)


__tracebackhide__ = True


class _Place(NamedTuple):
    """A ref in a tree: the `number`-th of it, whose arrays are at `start` and after."""

    number: int
    is_first: bool
    slot: Slot
    note: Note
    start: int

    def node(self, value: Any) -> Value | Index:
        slot = self.slot
        if self.is_first:
            return Value(value, self.number, slot.collection, slot.ref_type, self.note)
        return Index(self.number, slot.collection, slot.ref_type, self.note)


class Layout:
    """Where the arrays of a tree are among flat ones.

    - `treedef`: of the tree, with refs as leaves;
    - `places`: for each leaf the position of its array, a `_Place`, or `None`.
    """

    __slots__ = ("places", "treedef")

    def __init__(self, treedef: Any, places: tuple):
        self.treedef = treedef
        self.places = places

    def _key(self) -> tuple:
        return self.treedef, self.places

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Layout) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def positions(self) -> list[int]:
        """The positions of all arrays of the tree, in its order."""
        return [i for places in self.by_leaf() for i in places]

    def by_leaf(self) -> list[Sequence[int]]:
        """The positions of the arrays of each leaf."""
        return [_positions(place) for place in self.places]

    def fill(self, values: Any, other: Any = None) -> Any:
        """The derefed tree, with `values[i]` for the array at position `i`, and `other` for
        what is not an array."""
        leaves = []
        for place in self.places:
            if isinstance(place, _Place):
                value = None
                if place.is_first:
                    found = (values[i] for i in _positions(place))
                    value = _join(place.slot.inside, found, other)
                leaves.append(place.node(value))
            else:
                leaves.append(other if place is None else values[place])
        return jtu.tree_unflatten(self.treedef, leaves)

    def read(self, tree: Any, what: str) -> dict[int, Any]:
        """What `tree` has for each position: an array, or `None`.

        At the place of a ref the tree has a `Value`, a ref or a bare value. Of several
        places of one ref, one has it, and the others have an `Index` or `None`.

        **Raises:**

        - `StructureError`: if the tree is of another structure. `what` names it.
        """
        try:
            given = self.treedef.flatten_up_to(tree)
        except (ValueError, TypeError) as e:
            raise StructureError(
                f"{what} must have the structure of `rx.deref` of it, with `None` for what "
                f"has no derivative. JAX says: {e}"
            ) from None
        found: dict[int, Any] = {}
        for place, leaf in zip(self.places, given):
            if isinstance(place, _Place):
                _read_ref(place, leaf, what, found)
            elif place is not None:
                found[place] = _one_array(leaf, what)
            elif jtu.tree_leaves(leaf):
                raise StructureError(
                    f"{what} must have `None` where there is nothing to differentiate, "
                    f"and has {leaf!r} in place of something that is not an array."
                )
        return found

    def read_tuple(self, trees: Sequence, what: str) -> dict[int, Any]:
        """As `read`, of a tuple; `None` in place of a whole item is `None` everywhere."""
        items = zip(self.treedef.children(), trees)
        given = tuple(
            jtu.tree_unflatten(child, [None] * child.num_leaves)
            if tree is None
            else tree
            for child, tree in items
        )
        return self.read(given, what)

    def first(self, name: str) -> "Layout":
        """Of the first half of a pair: what `has_aux` separates."""
        treedef = first_of_pair(self.treedef, name)
        return Layout(treedef, self.places[: treedef.num_leaves])


def first_of_pair(treedef: Any, name: str) -> Any:
    """Of the treedef of a result with `has_aux`, that of what is differentiated."""
    children, node = treedef.children(), treedef.node_data()
    if node is None or node[0] is not tuple or len(children) != 2:
        raise TypeError(
            f"`{name}(..., has_aux=True)`: the function must return a pair "
            "`(value, aux)`."
        )
    return children[0]


def _positions(place: Any) -> Sequence[int]:
    if isinstance(place, _Place):
        n = n_arrays(place.slot.inside) if place.is_first else 0
        return range(place.start, place.start + n)
    return () if place is None else (place,)


def _join(inside: tuple | None, values: Iterator[Any], other: Any) -> Any:
    """As `join_value`, with `other` for what is static."""
    if inside is None:
        return next(values)
    treedef, statics = inside
    leaves = [next(values) if static is None else other for static in statics]
    return jtu.tree_unflatten(treedef, leaves)


def _one_array(leaf: Any, what: str) -> Any:
    if leaf is not None and not eqx.is_array_like(leaf):
        raise StructureError(
            f"{what} must have an array or `None` at the place of each array, and has "
            f"{leaf!r}."
        )
    return leaf


def _read_ref(place: _Place, leaf: Any, what: str, found: dict[int, Any]) -> None:
    value = leaf.value if isinstance(leaf, (Value, Ref)) else leaf
    which = describe(place.note.name, place.slot.collection)
    inside = place.slot.inside
    positions = range(place.start, place.start + n_arrays(inside))
    if value is None or isinstance(value, Index):
        values = [None] * len(positions)
    elif inside is None:
        values = [value]
    else:
        try:
            values = inside[0].flatten_up_to(value)
        except (ValueError, TypeError) as e:
            raise StructureError(
                f"{what} must have the structure of the value of {which}. JAX says: {e}"
            ) from None
        values = [x for x, static in zip(values, inside[1]) if static is None]
    for i, x in zip(positions, values):
        earlier = found.setdefault(i, _one_array(x, what))
        if x is not None and earlier is not x:
            if earlier is not None:
                raise StructureError(
                    f"{what} must have one value for {which}, which is one ref at several "
                    "places. Give it at one of them, and `None` at the others."
                )
            found[i] = x


def _n_leaves(part: Carried) -> int:
    """How many leaves a part has, those inside of functions included."""
    nodes = part.nodes or (None,) * part.treedef.num_leaves
    return sum(map(_n_leaves_of, nodes))


def _n_leaves_of(node: Any) -> int:
    if node is None:
        return 1
    return _n_leaves(node[-1]) if isinstance(node, tuple) else 0


def _places(
    structure: Structure, first: int, stop: int, slots: Sequence[Slot], starts: list
) -> list[tuple]:
    """The places of each of the parts `first` to `stop` of a structure."""
    leaf = sum(structure.sizes[:first])
    bare = structure.codes[:leaf].count(DYNAMIC)
    # Numbered by their first place in these trees, as `deref` does.
    indices: dict[int, int] = {}
    by_part = []
    for part in structure.parts[first:stop]:
        places: list[Any] = []
        for node in part.nodes or (None,) * part.treedef.num_leaves:
            n = _n_leaves_of(node)
            code = structure.codes[leaf] if node is None else None
            if code is not None and code >= 0:
                is_first = code not in indices
                index = indices.setdefault(code, len(indices))
                note = structure.notes[code]
                places.append(_Place(index, is_first, slots[code], note, starts[code]))
            else:
                # Of a function that closes over refs, nothing is differentiated.
                places.append(bare if code == DYNAMIC else None)
            bare += structure.codes[leaf : leaf + n].count(DYNAMIC)
            leaf += n
        by_part.append(tuple(places))
    return by_part


def layout_of_args(opened: Opened, n: int) -> Layout:
    """The layout of the tuple of the first `n` positional arguments of a call."""
    structure = opened.structure
    starts = [start for start, _ in opened.spans]
    by_part = _places(structure, 1, 1 + n, structure.slots, starts)
    treedefs = [part.treedef for part in structure.parts[1 : 1 + n]]
    places = [place for places in by_part for place in places]
    return Layout(jtu.treedef_tuple(treedefs), tuple(places))


def layout_of_first(opened: Opened) -> Layout:
    """The layout of the first argument of a call."""
    both = layout_of_args(opened, 1)
    return Layout(both.treedef.children()[0], both.places)


class Result(NamedTuple):
    """The result of a body: its layout, and flat arrays that the layout is for.

    The arrays of a ref of the caller that is returned are those that it ends with. `made`
    has the positions of all others: of those in the `out` of the outcome.
    """

    layout: Layout
    arrays: list[Any]
    made: list[int]


def result_of(opened: Any, outcome: Outcome, arrays: list[Any]) -> Result:
    """The result of a body that was run on `arrays`. Of the call, `opened`, only the
    `structure` and the `spans` are used."""
    info = outcome.info
    structure = info.result
    out, updates = iter(outcome.out), outcome.updates
    flat = [next(out) for _ in range(structure.n_bare)]
    made = list(range(len(flat)))
    slots, starts = [], []
    for i, slot in enumerate(structure.slots):
        number = info.carried.get(i)
        if number is None:
            inside = slot.inside
            its_arrays = [next(out) for _ in range(n_arrays(inside))]
        elif number in updates:
            inside = inside_of(updates[number])
            its_arrays = jtu.tree_leaves(updates[number])
        else:
            inside = opened.structure.slots[number].inside
            its_arrays = arrays[slice(*opened.spans[number])]
        slots.append(slot._replace(inside=inside))
        starts.append(len(flat))
        flat.extend(its_arrays)
        if number is None:
            made.extend(range(starts[-1], len(flat)))
    (part,) = structure.parts
    (places,) = _places(structure, 0, 1, slots, starts)
    return Result(Layout(part.treedef, places), flat, made)


def replaced(arrays: list[Any], positions: Sequence[int], new: Sequence[Any]) -> list:
    """`arrays`, with `new` at these positions."""
    arrays = list(arrays)
    for i, x in zip(positions, new):
        arrays[i] = x
    return arrays


class Sparse(dict):
    """Values by position; `None` at all others."""

    def __missing__(self, key: int) -> None:
        return None
