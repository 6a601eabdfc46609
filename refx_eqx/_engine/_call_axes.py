"""The mapped axis of each array of a call, and of what is written.

A ref has one axis, or one for each array of its value, given by the argument that holds the
ref. A function that also reaches the ref (a method that scans its own layers) gives none:
inside it the ref is *withheld*, because it would be the whole ref.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu

from .._calls._call import Call
from .._calls._structure import Leaves, map_values, values_of
from .._core._access import Withheld
from .._core._errors import CarryError, describe, MismatchError
from .._core._ref import Ref
from .._trees._paths import path_text
from ._agreed import agreed
from ._axes import array_axis, axes, leaf_axes
from ._by_filter import RNG, SAME
from ._by_place import each_array, of_new_value, Place, read_places


@dataclasses.dataclass(eq=False)
class Axes:
    """The axes of a call.

    - `trees`: trees like its arrays, with the axis of each, or `None`;
    - `split`: the numbers of the refs that are split along the mapped axis;
    - `kept`: the numbers of those whose randomness is the same at each place of it;
    - `of_refs`: the axis of each ref, for arrays it does not have yet;
    - `withheld`: the leaves of the call that must not be touched, each with the reason, by
        the numbers of the tree and of the leaf in it.
    """

    trees: list[Leaves]
    split: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    of_refs: dict[int, int | None] = dataclasses.field(default_factory=dict)
    withheld: dict[tuple[int, int], Withheld] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> tuple:
        """A hashable key of these axes."""
        # With the tree: two calls of different sharing may have the same numbers.
        flat, treedef = jtu.tree_flatten(self.trees, is_leaf=lambda x: x is None)
        flat = (*flat, treedef)
        withheld = tuple(self.withheld.items())
        return flat, self.split, self.kept, tuple(self.of_refs.items()), withheld

    def in_front(self) -> "Axes":
        """The same, with each mapped axis moved to the front."""
        trees = jtu.tree_map(lambda _: 0, self.trees)
        of_refs = {i: None if x is None else 0 for i, x in self.of_refs.items()}
        return dataclasses.replace(self, trees=trees, of_refs=of_refs)

    def is_mapped(self, number: int) -> bool:
        """Whether a ref, or part of its value, is mapped."""
        own = values_of(self.trees).get(number)
        return self.of_refs.get(number) is not None or bool(jtu.tree_leaves(own))

    def slices(self, arrays: list[Leaves]) -> list[Leaves]:
        """The mapped arrays of a call, with the mapped axis in front; `None` for the
        others."""

        def in_front(x: Any, axis: int | None) -> Any:
            return None if axis is None else jnp.moveaxis(x, axis, 0)

        return jtu.tree_map(in_front, arrays, self.trees)


def no_axes(arrays: list[Leaves]) -> Axes:
    return Axes(jtu.tree_map(lambda _: None, arrays))


def call_axes(
    derefed: Call,
    args: tuple,
    in_axes: Any,
    name: str,
    *,
    whole: Any = None,
    names: tuple[str, ...] = (),
) -> Axes:
    """The axis of each array of a call.

    Values held by the callable or closed over by functions are broadcast, unless an
    argument maps them: then they are withheld there.

    **Arguments:**

    - `args`: the last arguments of the call. The arguments before them are its functions.
    - `in_axes`: a prefix of `args`.
    - `whole`: the user's `in_axes`, which may cover the functions too.
    - `names`: the names of `args`, for messages.

    **Raises:**

    - `StructureError`: if arguments give one ref two different axes.
    """
    outside, said, reached = read_places(
        derefed,
        leaf_axes(in_axes, args, "in_axes"),
        len(args),
        lambda leaf: _of_function(whole, leaf),
        array_axis,
        # A function from leaf to axis returns `None` for a function, which is not an array.
        lambda axis: None if callable(axis) else axis,
        names,
    )
    found: dict[int, Any] = {}
    axes = Axes([])
    split, kept = [], []
    for i, value in values_of(derefed.arrays).items():
        ref = derefed.refs[i]
        axis = _agreed_axis(derefed, ref, value, said.get(i, []), name)
        if i not in said:
            of_functions = [place.what for place in reached[i]]
            axis = SAME if SAME in of_functions else None
        found[i] = jtu.tree_map(lambda x, axis=axis: array_axis(axis, x), value)
        axes.of_refs[i] = one = _axis_of_ref(axis, value)
        is_mapped = one is not None or bool(jtu.tree_leaves(found[i]))
        if axis is SAME:
            kept.append(i)
        elif not is_mapped and ref.collection == RNG:
            split.append(i)
        if is_mapped and i in reached:
            reason = _why_withheld(derefed, said[i][0], args, one, name)
            axes.withheld |= {(p.tree, p.leaf): reason for p in reached[i]}
    axes.trees = [map_values(lambda i, _: found[i], leaves) for leaves in outside]
    axes.split, axes.kept = tuple(split), tuple(kept)
    _check_sizes(derefed, axes, name)
    return axes


def _of_function(whole: Any, leaf: Any) -> Any:
    """The axis of a leaf of the function: broadcast. If `in_axes` is a single
    `rx.axes(rng=None)`, it covers the function too."""
    is_same = isinstance(leaf, Ref) and isinstance(whole, axes)
    axis = whole.named((), leaf) if is_same else None
    return SAME if axis is SAME else None


def _agreed_axis(
    derefed: Call, ref: Ref, value: Any, places: list[Place], name: str
) -> Any:
    """The axis that all arguments with this ref give it."""
    arrays = jtu.tree_leaves(value)

    def code(axis: Any) -> str | None:
        found = {repr(array_axis(axis, x)) for x in arrays or [jnp.zeros(())]}
        return found.pop() if len(found) == 1 else None

    is_same = lambda a, b: _is_same_axis(a, b, arrays)
    return agreed(derefed, ref, places, axes, name, is_same, code)


def _is_same_axis(a: Any, b: Any, arrays: list[Any]) -> bool:
    if a == b:
        return True
    if a is SAME or b is SAME or not arrays:
        return False
    return all(_counted(a, x) == _counted(b, x) for x in arrays)


def _counted(axis: Any, array: Any) -> int | None:
    """An axis of an array, counted from the front: -1 and 1 are the same axis of a
    matrix."""
    axis, ndim = array_axis(axis, array), jnp.ndim(array)
    return axis + ndim if axis is not None and -ndim <= axis < 0 else axis


def _axis_of_ref(axis: Any, value: Any) -> int | None:
    """The axis for future arrays of a ref that now has none, or others."""
    arrays = jtu.tree_leaves(value)
    found = {array_axis(axis, x) for x in arrays or [jnp.zeros(())]}
    return found.pop() if len(found) == 1 else None


def _why_withheld(
    derefed: Call, place: Place, args: tuple, axis: int | None, name: str
) -> Withheld:
    part = derefed.parts[place.tree]
    where = place.where
    path, is_in_function = part.place_of(place.leaf)
    if path and not is_in_function:
        where = f"{where} at {path_text(path)}"
    along = "" if axis is None else f" along axis {axis}"
    return Withheld(
        f"`{name}` maps it{along}, and passes the function a slice of it, in {where}. This "
        "is the whole ref, which the function also reaches. Use the slice that is passed "
        f"to the function; if it needs the whole, read that before `{name}` is called."
    )


def _check_sizes(derefed: Call, axes: Axes, name: str) -> None:
    """Checks that every mapped array has its axis, and that all of these have the same
    size."""

    def which(ref: Ref | None) -> str:
        return "an array" if ref is None else describe(ref)

    first: tuple[int, Ref | None] | None = None
    for array, axis, ref in each_array(derefed, axes.trees):
        if axis is None:
            continue
        shape = jnp.shape(array)
        if not -len(shape) <= axis < len(shape):
            raise MismatchError(
                f"`{name}` cannot map {which(ref)} along axis {axis}: its shape is {shape}. "
                "Broadcast it: `in_axes=None`, or by collection `in_axes=rx.axes(...)`. "
                "Or give a ref the axis: `rx.add_axis(module, size, filter)`."
            )
        first = first or (shape[axis], ref)
        if first[0] != shape[axis]:
            raise MismatchError(
                f"`{name}` maps axes of different sizes: {first[0]} of {which(first[1])}, "
                f"and {shape[axis]} of {which(ref)}, whose shape is {shape}. Broadcast one of "
                "them: `in_axes=None`, or by collection `in_axes=rx.axes(...)`. Or "
                "give a ref the axis: `rx.add_axis(module, size, filter)`."
            )


def update_axes(derefed: Call, axes: Axes, number: int, new: Any, name: str) -> Any:
    """The axis of each array of the new value of a ref, as a tree like it: those of the old
    value.

    **Raises:**

    - `StructureError`: if the old value has several axes, and the new value another
        structure.
    """

    def refuse(several: list[Any]) -> None:
        raise CarryError(
            f"{describe(derefed.refs[number])} holds arrays that `{name}` maps along the "
            f"axes {several}, but was written with a value of another structure, for which "
            "no axes are given. Keep the structure, or use one axis for all of its arrays."
        )

    old, own = values_of(derefed.arrays)[number], values_of(axes.trees)[number]
    return of_new_value(old, own, new, axes.of_refs[number], refuse)


def placed_update(derefed: Call, axes: Axes, number: int, new: Any, name: str) -> Any:
    """The new value of a mapped ref, stacked in front, with each axis moved to its place.

    **Raises:**

    - `StructureError`: if the value cannot have such an axis.
    """

    def placed(x: Any, axis: int | None) -> Any:
        check_axis(derefed.refs[number], axis, jnp.ndim(x), name)
        return jnp.moveaxis(x, 0, axis or 0)

    own = update_axes(derefed, axes, number, new, name)
    return jtu.tree_map(placed, new, own)


def check_axis(ref: Ref, axis: int | None, ndim: int, name: str) -> None:
    """Refuses a slice whose rank does not allow stacking it along `axis`.

    `ndim` is the rank of the stack.
    """
    if axis is not None and not -ndim <= axis < ndim:
        raise CarryError(
            f"{describe(ref)} is mapped by `{name}` along axis {axis}, but was written "
            f"with a value of rank {ndim - 1}: stacked, it has no axis {axis}. Keep the "
            "rank of the slice, or map the ref along axis 0 or -1."
        )
