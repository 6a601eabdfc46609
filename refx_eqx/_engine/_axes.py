"""Which axis of each array of a call is mapped over: for `filter_vmap` and for `scan`."""

import dataclasses
import inspect
import keyword
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu

from .._core._call import Opened
from .._core._closure import Carried
from .._core._errors import describe, StructureError
from .._core._ref import Ref
from .._core._structure import DYNAMIC
from .._filters._filters import as_filter, Filter, leaves_with_paths, Path


__tracebackhide__ = True


_UNSET: Any = object()

RNG = "rng"
"""The collection of what randomness is drawn from. See `_lanes.py`."""


@dataclasses.dataclass(frozen=True, init=False)
class axes:
    """Axes by collection, or by any other filter, for the `in_axes` of
    [`refx_eqx.filter_vmap`][], [`refx_eqx.scan`][] and [`refx_eqx.map`][].

    !!! Example

        ```python
        import jax.numpy as jnp
        import refx_eqx as rx

        model = {"w": rx.Ref(jnp.array(2.0), "params"), "n": rx.Ref(jnp.zeros(3), "counts")}

        def step(model, x):
            model["n"].value += 1
            return model["w"].value * x

        by_collection = rx.axes(params=None, counts=0)
        out = rx.filter_vmap(step, in_axes=(by_collection, 0))(model, jnp.arange(3.0))
        assert out[2] == 4.0 and model["n"].value[2] == 1.0
        ```

    A broadcast ref of collection `"rng"` is split by lane; `rx.axes(rng=None)` asks for the
    same randomness in each.

    **Arguments:**

    - `by_collection`: a mapping from collection to axis (an `int`, or `None` to
        broadcast). A key may be any filter, such as `rx.path("**.shared.**")`; paths are
        those of the tree that these axes are given for. The first that matches decides.
    - `default`: the axis of all other leaves: an `int`, `None`, or a function of an array.
        If omitted, a leaf that is not named is an error.
    - `**collections`: the axis of each collection.

    **Raises:**

    When used:

    - `StructureError`: if a ref or an array is met for which no axis is given.
    """

    by_collection: Mapping[Hashable, int | None]
    default: Any

    def __init__(
        self,
        by_collection: Mapping[Hashable, int | None] | None = None,
        *,
        default: Any = _UNSET,
        **collections: int | None,
    ):
        merged = {**(by_collection or {}), **collections}
        object.__setattr__(self, "by_collection", merged)
        object.__setattr__(self, "default", default)

    def of(self, path: Path, leaf: Any) -> Any:
        """The axis of one leaf of a tree."""
        for given, axis in self.by_collection.items():
            # A predicate on a leaf is for refs here: arrays have the default.
            if isinstance(given, Filter) or isinstance(leaf, Ref):
                if as_filter(given).matches(path, leaf):
                    return SAME if given == RNG and axis is None else axis
        if self.default is not _UNSET:
            return self.default
        if isinstance(leaf, Ref):
            what = describe(leaf._name, leaf._collection)
        elif eqx.is_array(leaf):
            what = f"the array {eqx.tree_pformat(leaf)}"
        else:
            return None
        raise StructureError(
            f"{self!r} does not say what the axis of {what} is. Name its collection, or "
            "give a default: `rx.axes(..., default=None)`."
        )

    def __hash__(self) -> int:
        return hash((frozenset(self.by_collection.items()), self.default))

    def __repr__(self) -> str:
        given = [f"{k}={v!r}" for k, v in self.by_collection.items()]
        if self.default is not _UNSET:
            given.append(f"default={self.default!r}")
        return f"rx.axes({', '.join(given)})"


def axes_text(ref: Ref, axis: int | None) -> str:
    """How to give the collection of `ref` this axis; for messages."""
    name = ref._collection
    if isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name):
        return f"rx.axes({name}={axis}, default=None)"
    return f"rx.axes({{{name!r}: {axis}}}, default=None)"


class _Same:
    """The axis of a ref of collection "rng" that is broadcast as it is: not split."""

    def __call__(self, array: Any) -> None:
        return None

    def __repr__(self) -> str:
        return "None (the same randomness in all lanes)"


SAME = _Same()


class Axes(NamedTuple):
    """The axes of an opened call. Hashable.

    - `flat`: the axis of each flat array, or `None`;
    - `split`: the numbers of the refs that are split by lane.
    """

    flat: tuple[int | None, ...]
    split: tuple[int, ...]


def _is_none(x: Any) -> bool:
    return x is None


def leaf_axes(spec: Any, tree: Any, what: str) -> list[Any]:
    """The axis of each leaf of `tree`, as `in_axes` gives it: an int, `None`, or a function
    that is still to be called on the arrays of a ref."""

    # Not a tree: `None` is an axis here, and no leaf of the tree that has it.
    found: list[Any] = []

    def resolve(axis: Any, subtree: Any) -> None:
        leaves = jtu.tree_leaves(subtree)
        if axis is None or isinstance(axis, int):
            found.extend(axis for _ in leaves)
        elif isinstance(axis, axes):
            pairs, _ = leaves_with_paths(subtree)
            found.extend(axis.of(*pair) for pair in pairs)
        elif callable(axis):
            found.extend(axis if isinstance(x, Ref) else axis(x) for x in leaves)
        else:
            raise ValueError(
                f"`{what}` must consist of None, ints, functions of a leaf and "
                f"`rx.axes`, and it has {axis!r}."
            )

    try:
        jtu.tree_map(resolve, spec, tree, is_leaf=_is_none)
    except ValueError as e:
        if "must consist of" in str(e):
            raise
        raise StructureError(
            f"`{what}` must be a prefix of the tree that it is for. JAX says: {e}"
        ) from None
    return found


def array_axis(axis: Any, array: Any) -> int | None:
    """The axis of one array of the value of a ref."""
    return axis if axis is None or isinstance(axis, int) else axis(array)


def named_in_axes(fn: Any, in_axes: Any, args: tuple) -> Any:
    """A dict of `in_axes` by argument name, as a tuple. As in Equinox."""
    if not isinstance(in_axes, dict):
        return in_axes
    rest = dict(in_axes)
    names = list(inspect.signature(fn).parameters)[: len(args)]
    by_position = tuple(rest.pop(name, eqx.if_array(0)) for name in names)
    if rest:
        raise ValueError(
            "These `in_axes` do not belong to any argument: "
            f"{', '.join(map(repr, rest))}."
        )
    return by_position


def call_axes(opened: Opened, args: tuple, in_axes: Any, name: str) -> Axes:
    """The axis of each flat array of an opened call.

    What the callable holds and what functions close over is broadcast.

    **Raises:**

    - `StructureError`: if one ref is reached with two different axes.
    """
    structure = opened.structure
    rest = iter(leaf_axes(in_axes, args, "in_axes"))
    bare: list[int | None] = []
    of_ref: dict[int, tuple[Any, str]] = {}
    position = 0
    for i, (part, size) in enumerate(zip(structure.parts, structure.sizes)):
        codes = structure.codes[position : position + size]
        leaves = opened.leaves[position : position + size]
        position += size
        where = "the function, or what it closes over"
        given: list[Any] = [_axis_of_callable(in_axes)] * size
        if 0 < i <= len(args):
            where = f"argument {i - 1}"
            given = _given(part, [next(rest) for _ in range(part.treedef.num_leaves)])
        for code, leaf, axis in zip(codes, leaves, given):
            if code == DYNAMIC:
                bare.append(None if axis is SAME else axis)
            elif code >= 0:
                earlier, earlier_where = of_ref.setdefault(code, (axis, where))
                if earlier != axis:
                    raise StructureError(
                        f"`{name}` met {describe(leaf._name, leaf._collection)} with two "
                        f"axes: {earlier!r} in {earlier_where}, {axis!r} in {where}. One "
                        "ref is one parameter: give it one axis, for example by its "
                        f"collection, as in `{axes_text(leaf, 0)}`."
                    )
    flat, split = list(bare), []
    for number, (start, stop) in enumerate(opened.spans):
        axis, _ = of_ref[number]
        of_arrays = [array_axis(axis, opened.arrays[i]) for i in range(start, stop)]
        flat.extend(of_arrays)
        is_rng = opened.refs[number].collection == RNG
        if is_rng and axis is not SAME and all(x is None for x in of_arrays):
            split.append(number)
    _check_sizes(opened, flat, name)
    return Axes(tuple(flat), tuple(split))


def _axis_of_callable(in_axes: Any) -> Any:
    """Broadcast; and `rx.axes(rng=None)` as the whole of `in_axes` speaks of it too."""
    is_same = isinstance(in_axes, axes) and in_axes.by_collection.get(RNG, 0) is None
    return SAME if is_same else None


def _given(part: Carried, own: list[Any]) -> list[Any]:
    """The axes of the leaves of an argument. Those inside of a function that closes over
    refs have none of their own: they are broadcast."""
    if not part.nodes:
        return own
    given = []
    for node, axis in zip(part.nodes, own):
        given.extend([axis] if node is None else [None] * _n_leaves(node))
    return given


def _n_leaves(node: Any) -> int:
    """How many leaves there are inside of a function that closes over refs."""
    if not isinstance(node, tuple):
        return 0
    carried = node[-1]
    nodes = carried.nodes or [None] * carried.treedef.num_leaves
    return sum(1 if inner is None else _n_leaves(inner) for inner in nodes)


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
                "Broadcast it: `in_axes=None`, or by collection `in_axes=rx.axes(...)`."
            )
        first = first or (shape[axis], which)
        if first[0] != shape[axis]:
            raise StructureError(
                f"`{name}` maps axes of different sizes: {first[0]} of {first[1]}, and "
                f"{shape[axis]} of {which}, whose shape is {shape}. Broadcast one of them: "
                "`in_axes=None`, or by collection `in_axes=rx.axes(...)`."
            )


def ref_axis(opened: Opened, flat_axes: tuple, number: int) -> int | None:
    """The one axis of a ref: that of its arrays, which agree where there are several."""
    start, stop = opened.spans[number]
    found = {flat_axes[i] for i in range(start, stop)}
    return found.pop() if len(found) == 1 else None
