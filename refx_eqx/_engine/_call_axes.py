"""Which axis of each array of a call is mapped over, and where what is written goes.

A ref has one axis, or one for each array of its value. What says it is the argument that
holds the ref. A function that reaches the ref as well (the method that scans its own
layers) says nothing: inside it the ref is *withheld*, because it would be the whole one.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import jax.tree_util as jtu

from .._core._call import Opened
from .._core._deref import path_text
from .._core._errors import describe, StructureError
from .._core._ref import Ref, Withheld
from .._core._structure import DYNAMIC, inside_of
from ._axes import array_axis, axes, axes_text, Given, leaf_axes, RNG, SAME, spread


__tracebackhide__ = True


class Axes(NamedTuple):
    """The axes of an opened call. Hashable.

    - `flat`: the axis of each flat array, or `None`;
    - `split`: the numbers of the refs that are split along the mapped axis;
    - `kept`: of those whose randomness is the same at each place of it;
    - `of_refs`: the axis of each ref, for arrays that it does not have yet;
    - `withheld`: the leaves of the call that may not be touched, each with the reason.
    """

    flat: tuple[int | None, ...]
    split: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    of_refs: tuple[int | None, ...] = ()
    withheld: tuple[tuple[int, Withheld], ...] = ()

    def in_front(self) -> "Axes":
        """The same, with each mapped axis moved to the front."""
        front = lambda axes: tuple(None if axis is None else 0 for axis in axes)
        return self._replace(flat=front(self.flat), of_refs=front(self.of_refs))


class _Place(NamedTuple):
    """One place of a ref in a call: which leaf, in which part, and the axis given there."""

    leaf: int
    part: int
    axis: Any
    where: str


def call_axes(
    opened: Opened,
    args: tuple,
    in_axes: Any,
    name: str,
    *,
    whole: Any = None,
    names: tuple[str, ...] = (),
) -> Axes:
    """The axis of each flat array of an opened call.

    What the callable holds and what functions close over is broadcast, unless an argument
    maps it: then it is withheld there.

    **Arguments:**

    - `args`: the last arguments of the call. Those before are the functions that it is made
        of.
    - `in_axes`: a prefix of `args`.
    - `whole`: the `in_axes` of the user, which may speak of the functions too.
    - `names`: of `args`, for messages.

    **Raises:**

    - `StructureError`: if arguments give one ref two different axes.
    """
    bare, said, reached = _read_places(opened, args, in_axes, whole, names)
    flat, of_refs = list(bare), []
    split, kept, withheld = [], [], []
    for number, (start, stop) in enumerate(opened.spans):
        arrays = opened.arrays[start:stop]
        axis = _agreed(opened, number, said.get(number, []), name)
        if number not in said:
            of_functions = [place.axis for place in reached[number]]
            axis = SAME if SAME in of_functions else None
        of_arrays = [array_axis(axis, x) for x in arrays]
        flat.extend(of_arrays)
        of_refs.append(_axis_of_ref(axis, of_arrays))
        is_mapped = of_refs[-1] is not None or any(x is not None for x in of_arrays)
        if axis is SAME:
            kept.append(number)
        elif not is_mapped and opened.refs[number].collection == RNG:
            split.append(number)
        if is_mapped and number in reached:
            reason = _why_withheld(opened, said[number][0], args, of_refs[-1], name)
            withheld += [(place.leaf, reason) for place in reached[number]]
    _check_sizes(opened, flat, name)
    return Axes(tuple(flat), tuple(split), tuple(kept), tuple(of_refs), tuple(withheld))


_FUNCTION = "the function, or what it closes over"


def _read_places(
    opened: Opened, args: tuple, in_axes: Any, whole: Any, names: tuple[str, ...]
) -> tuple[list[int | None], dict[int, list[_Place]], dict[int, list[_Place]]]:
    """The axes of the bare arrays; the places of each ref whose axis is said there; and
    those at which a function reaches it, which say nothing."""
    structure = opened.structure
    n_functions = len(structure.parts) - 1 - len(args)
    rest = iter(leaf_axes(in_axes, args, "in_axes"))
    bare: list[int | None] = []
    said: dict[int, list[_Place]] = {}
    reached: dict[int, list[_Place]] = {}
    start = 0
    for i, (part, size) in enumerate(zip(structure.parts, structure.sizes)):
        leaves = opened.leaves[start : start + size]
        if n_functions <= i < n_functions + len(args):
            k = i - n_functions
            where = names[k] if names else f"argument {k}"
            own = [next(rest) for _ in range(part.treedef.num_leaves)]
            given = [_of_argument(x) for x in spread(part, own, leaves)]
        else:
            k, where = -1, _FUNCTION
            given = [_of_function(whole, leaf) for leaf in leaves]
        for j, (leaf, (axis, is_inside)) in enumerate(zip(leaves, given), start):
            code = structure.codes[j]
            if code == DYNAMIC:
                bare.append(array_axis(axis, leaf))
            elif code >= 0:
                says_nothing = is_inside and (axis is None or axis is SAME)
                places = reached if says_nothing else said
                places.setdefault(code, []).append(_Place(j, k, axis, where))
        start += size
    return bare, said, reached


def _of_argument(given: Given) -> Given:
    # A function from leaf to axis says of a function, which is no array, `None`.
    if given.is_inside and callable(given.axis) and given.axis is not SAME:
        return given._replace(axis=None)
    return given


def _of_function(whole: Any, leaf: Any) -> Given:
    """Of a leaf of the function: broadcast. `rx.axes(rng=None)` as the whole of `in_axes`
    speaks of it too."""
    is_same = isinstance(leaf, Ref) and isinstance(whole, axes)
    axis = whole.named((), leaf) if is_same else None
    return Given(SAME if axis is SAME else None, True)


def _agreed(opened: Opened, number: int, places: list[_Place], name: str) -> Any:
    """The axis that all arguments with this ref give it."""
    if not places:
        return None
    first, *others = places
    arrays = opened.arrays[slice(*opened.spans[number])]
    for other in others:
        if not _is_same_axis(first.axis, other.axis, arrays):
            ref = opened.refs[number]
            raise StructureError(
                f"`{name}` met {describe(ref._name, ref._collection)} with two axes: "
                f"{first.axis!r} in {first.where}, {other.axis!r} in {other.where}. One "
                "ref is one parameter: give it one axis, for example by its collection, "
                f"as in `{axes_text(ref, 0)}`."
            )
    return first.axis


def _is_same_axis(a: Any, b: Any, arrays: list[Any]) -> bool:
    if a == b:
        return True
    if a is SAME or b is SAME or not arrays:
        return False
    return all(_counted(a, x) == _counted(b, x) for x in arrays)


def _counted(axis: Any, array: Any) -> int | None:
    """An axis of an array, counted from the front: -1 and 1 are one axis of a matrix."""
    axis, ndim = array_axis(axis, array), jnp.ndim(array)
    return axis + ndim if axis is not None and -ndim <= axis < 0 else axis


def _axis_of_ref(axis: Any, of_arrays: list[int | None]) -> int | None:
    """The axis of arrays that a ref may be given, where it has none, or others."""
    if of_arrays:
        return of_arrays[0] if len(set(of_arrays)) == 1 else None
    return array_axis(axis, jnp.zeros(()))


def _why_withheld(
    opened: Opened, place: _Place, args: tuple, axis: int | None, name: str
) -> Withheld:
    leaf = opened.leaves[place.leaf]
    where = place.where
    for path, other in jtu.tree_flatten_with_path(args[place.part])[0]:
        if other is leaf:
            where = f"{where} at `{path_text(path)}`" if path else where
            break
    along = "" if axis is None else f" along axis {axis}"
    return Withheld(
        f"`{name}` maps it{along}, and hands the function a slice of it, in {where}. This "
        "is the whole of it, which the function reaches as well. Use the slice that the "
        f"function is given; if it needs the whole, read that before `{name}` is called."
    )


def _check_sizes(opened: Opened, flat: list[int | None], name: str) -> None:
    """Every mapped array has its axis, and all of these have one size."""
    what = ["an array"] * opened.structure.n_bare
    for ref, (start, stop) in zip(opened.refs, opened.spans):
        what += [describe(ref._name, ref._collection)] * (stop - start)
    first: tuple[int, str] | None = None
    for array, axis, which in zip(opened.arrays, flat, what):
        if axis is None:
            continue
        shape = jnp.shape(array)
        if not -len(shape) <= axis < len(shape):
            raise StructureError(
                f"`{name}` cannot map {which} along axis {axis}: its shape is {shape}. "
                "Broadcast it: `in_axes=None`, or by collection `in_axes=rx.axes(...)`. Or "
                "give a ref the axis: `rx.add_axis(module, size, filter)`."
            )
        first = first or (shape[axis], which)
        if first[0] != shape[axis]:
            raise StructureError(
                f"`{name}` maps axes of different sizes: {first[0]} of {first[1]}, and "
                f"{shape[axis]} of {which}, whose shape is {shape}. Broadcast one of them: "
                "`in_axes=None`, or by collection `in_axes=rx.axes(...)`. Or give a ref the "
                "axis: `rx.add_axis(module, size, filter)`."
            )


def is_mapped(opened: Opened, axes: Axes, number: int) -> bool:
    """Whether a ref, or a part of its value, is mapped."""
    own = axes.flat[slice(*opened.spans[number])]
    one = axes.of_refs[number] if axes.of_refs else None
    return one is not None or any(axis is not None for axis in own)


def update_axes(
    opened: Opened, axes: Axes, number: int, new: Any, name: str
) -> list[int | None]:
    """The axis of each array of the new value of a ref: that of the old one.

    **Raises:**

    - `StructureError`: if the old value has several axes, and the new one another
        structure.
    """
    old = list(axes.flat[slice(*opened.spans[number])])
    arrays = jtu.tree_leaves(new)
    if has_places_of(inside_of(new), opened.structure.slots[number].inside):
        return old
    if len(set(old)) > 1:
        ref = opened.refs[number]
        raise StructureError(
            f"{describe(ref._name, ref._collection)} holds arrays that `{name}` maps along "
            f"the axes {old}, and was written with a value of another structure, for which "
            "no axes are given. Keep the structure, or use one axis for all of its arrays."
        )
    return [axes.of_refs[number] if axes.of_refs else None] * len(arrays)


def has_places_of(new: tuple | None, old: tuple | None) -> bool:
    """Whether two values have their arrays at the same places."""
    if new is None or old is None:
        return new is old
    is_array = lambda inside: [static is None for static in inside[1]]
    return new[0] == old[0] and is_array(new) == is_array(old)


def placed_update(opened: Opened, axes: Axes, number: int, new: Any, name: str) -> Any:
    """The new value of a ref that is mapped, stacked in front, with each axis in its place.

    **Raises:**

    - `StructureError`: if the value has no such axis.
    """
    own = update_axes(opened, axes, number, new, name)
    arrays, treedef = jtu.tree_flatten(new)
    return jtu.tree_unflatten(treedef, _placed(opened, number, arrays, own, name))


def _placed(
    opened: Opened, number: int, arrays: list, own: list[int | None], name: str
) -> Iterator[Any]:
    for x, axis in zip(arrays, own):
        check_axis(opened.refs[number], axis, jnp.ndim(x), name)
        yield jnp.moveaxis(x, 0, axis or 0)


def check_axis(ref: Ref, axis: int | None, ndim: int, name: str) -> None:
    """Refuses a slice of such a rank that it cannot be stacked along `axis`.

    `ndim` is the rank of the stack.
    """
    if axis is not None and not -ndim <= axis < ndim:
        raise StructureError(
            f"{describe(ref._name, ref._collection)} is mapped by `{name}` along axis "
            f"{axis}, and was written with a value of rank {ndim - 1}: stacked, it has no "
            f"axis {axis}. Keep the rank of the slice, or map the ref along axis 0 or -1."
        )
