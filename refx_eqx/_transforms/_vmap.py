"""`filter_vmap`."""

from collections.abc import Callable, Hashable
from typing import Any, overload, ParamSpec, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from .._calls._call import Call, call
from .._calls._places import leaf_place
from .._calls._structure import Leaves, Outcome
from .._core import _jax
from .._core._access import refuse_cycle
from .._core._errors import CarryError, describe, MismatchError
from .._core._nodes import is_node
from .._core._ref import Ref
from .._engine._axes import array_axis, axes, leaf_axes, named_in_axes
from .._engine._by_place import given_of_result
from .._engine._call_axes import Axes, call_axes, check_axis, update_axes
from .._engine._rng_split import is_key, split_keys
from .._engine._wrapper import Lifted


P = ParamSpec("P")
T = TypeVar("T")


class _Vmap(Lifted):
    transform_name = "filter_vmap"

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        if kwargs:
            raise TypeError(
                "`filter_vmap` functions take positional arguments only, as in Equinox. "
                f"Pass {', '.join(map(repr, kwargs))} by position."
            )
        fn, options = self.__wrapped__, self.options
        in_axes = named_in_axes(fn, options["in_axes"], args)

        def transform(derefed: Call) -> Outcome:
            axes = call_axes(derefed, args, in_axes, self.transform_name, whole=in_axes)
            return vmapped(
                derefed,
                derefed.arrays,
                axes,
                self.transform_name,
                out_axes=options["out_axes"],
                axis_name=options["axis_name"],
                axis_size=options["axis_size"],
                **options["vmapkwargs"],
            )

        return call(fn, args, {}, transform)


def vmapped(
    derefed: Call,
    arrays: list[Leaves],
    axes: Axes,
    name: str,
    *,
    places: Any = None,
    out_axes: Any = eqx.if_array(0),
    axis_size: int | None = None,
    transparent: bool = True,
    **vmapkwargs: Any,
) -> Outcome:
    """The body of a call, vectorized along the mapped axis.

    **Arguments:**

    - `arrays`: the arrays of the call, mapped along `axes`.
    - `name`, `transparent`: as for `Call.run`.
    - `places`: the positions along the mapped axis. From 0 by default.
    """
    if places is None and axes.split:
        places = _place_numbers(arrays, axes, _size(arrays, axes, axis_size, name))
    # As in Equinox, the function just runs if nothing is mapped, and nothing is to be.
    is_vmap = bool(jtu.tree_leaves((axes.trees, places))) or axis_size is not None
    # The axes of the outcome; filled while the body runs.
    traced: dict[str, Any] = {}

    def apply(fn: Any, *args: Any, **kwargs: Any) -> Any:
        return _with_axes(fn(*args, **kwargs), out_axes)

    def body(arrays: list[Leaves], place: Any) -> tuple[Outcome, Outcome]:
        mine = split_keys(axes.split, arrays, place)
        outcome = derefed.run(name, mine, transparent, apply, axes.withheld)
        differs = _jax.is_batched if is_vmap else lambda x: False
        given = Outcome(
            _result_axes(derefed, outcome, out_axes, name),
            _update_axes(derefed, outcome, axes, differs, name),
            outcome.info,
        )
        treedef = jtu.tree_structure(outcome)
        traced["axes"] = treedef.flatten_up_to(given)
        is_mapped = treedef.unflatten([axis is not None for axis in traced["axes"]])
        mapped, unmapped = eqx.partition(outcome, is_mapped)
        for x in jtu.tree_leaves(unmapped):
            if differs(x):
                raise ValueError(
                    f"`{name}(..., out_axes=...)`: the result has a batched array where "
                    "`out_axes` is None. Give it an axis."
                )
        return mapped, unmapped

    if not is_vmap:
        mapped, unmapped = body(arrays, places)
        if jtu.tree_leaves(mapped):
            raise ValueError(_nothing_mapped(name))
        return unmapped

    # JAX needs `out_axes` before tracing, but the writes are known only afterwards. So the body
    # returns mapped and unmapped arrays separately, mapped on axis 0, and the axes are moved
    # into place at the end.
    lifted = jax.vmap(
        body,
        in_axes=(axes.trees, 0),
        out_axes=(0, None),
        axis_size=axis_size,
        **vmapkwargs,
    )
    mapped, unmapped = lifted(arrays, places)
    flat, treedef = jtu.tree_flatten(eqx.combine(mapped, unmapped))
    return treedef.unflatten(map(_place, flat, traced["axes"]))


def _place(x: Any, axis: Any) -> Any:
    if axis is FIRST:
        return _first_element(x)
    if axis is LARGEST:
        return jnp.max(x, axis=0)
    return jnp.moveaxis(x, 0, axis) if axis else x


def _first_element(x: jax.Array) -> jax.Array:
    split = _jax.split_of(jax.typeof(x))
    if split and split[0] is not None:
        # A split axis cannot be sliced where types say how it is split.
        spec = jax.P(None, *split[1:])
        x = jax.sharding.reshard(x, NamedSharding(jax.typeof(x).sharding.mesh, spec))
    return x[0]


def _place_numbers(arrays: list[Leaves], axes: Axes, size: int) -> jax.Array:
    """The positions along the mapped axis, split like that axis, because under a mesh of
    explicit axes everything mapped must be split the same way."""
    places = jnp.arange(size)
    flat, treedef = jtu.tree_flatten(arrays)
    for x, axis in zip(flat, treedef.flatten_up_to(axes.trees)):
        split = _jax.split_of(jax.typeof(x))
        if axis is not None and split and split[axis] is not None:
            # A concrete array knows its devices; a type knows only the mesh.
            known = jax.typeof(x) if _jax.is_tracer(x) else x
            spec = jax.P(split[axis])
            return jax.sharding.reshard(
                places, NamedSharding(known.sharding.mesh, spec)
            )
    return places


def _size(arrays: list[Leaves], axes: Axes, axis_size: int | None, name: str) -> int:
    """The size of the mapped axis."""
    for x in jtu.tree_leaves(axes.slices(arrays)):
        return len(x)
    if axis_size is None:
        raise ValueError(_nothing_mapped(name))
    return axis_size


def _nothing_mapped(name: str) -> str:
    return (
        f"`{name}`: nothing is mapped, so the size of the mapped axis is unknown. Pass an "
        "array that `in_axes` maps, or give `axis_size`."
    )


def _with_axes(result: Any, out_axes: Any) -> Any:
    """The result, with numbers that are given an axis converted to arrays. As in
    Equinox."""
    refuse_cycle(result)
    leaves, treedef = jtu.tree_flatten(result)
    if not any(map(_is_number, leaves)):
        return result
    axes = leaf_axes(out_axes, result, "out_axes")
    return treedef.unflatten(
        [
            jnp.asarray(x) if _is_number(x) and isinstance(axis, int) else x
            for x, axis in zip(leaves, axes)
        ]
    )


def _is_number(leaf: Any) -> bool:
    """Whether this is array-like, but not a JAX array."""
    return isinstance(leaf, _NUMBERS)


_NUMBERS = bool, int, float, complex, np.ndarray, np.generic


def _result_axes(derefed: Call, outcome: Outcome, out_axes: Any, name: str) -> Leaves:
    """The axis of each array of the result, inside and outside refs."""

    def of_value(axis: Any, value: Any) -> Any:
        return jtu.tree_map(lambda x: array_axis(axis, x), value)

    of_leaves = lambda result: leaf_axes(out_axes, result, "out_axes")
    found = given_of_result(derefed, outcome, of_leaves, of_value, name, "out_axes")
    (part,) = outcome.info.result.parts
    for k, (leaf, own) in enumerate(zip(outcome.out, found)):
        arrays, treedef = jtu.tree_flatten(leaf)
        for x, axis in zip(arrays, treedef.flatten_up_to(own)):
            if axis is not None and not -jnp.ndim(x) - 1 <= axis <= jnp.ndim(x):
                what = describe(leaf) if is_node(leaf) else "an array"
                where = leaf_place(part, k)
                raise MismatchError(_no_out_axis(what, where, axis, jnp.shape(x), name))
    return found


def _no_out_axis(
    what: str, where: str, axis: int, shape: tuple[int, ...], name: str
) -> str:
    return (
        f"`{name}(..., out_axes=...)` gives {what}, in the result at {where}, the axis {axis}, "
        f"but its shape in the function is {shape}, so the stack has no such axis. Give it "
        f"one from {-len(shape) - 1} to {len(shape)}; if other arrays need another, "
        "`rx.axes(...)` gives each collection its own."
    )


# The axis of a key that was broadcast, split along the mapped axis, and written: the first
# key goes out.
FIRST = object()

# That of a count of keys, written where only some places draw: in a branch, or a loop of different
# lengths. The largest goes out, so that no place draws a key again.
LARGEST = object()


def _update_axes(
    derefed: Call,
    outcome: Outcome,
    axes: Axes,
    differs: Callable[[Any], bool],
    name: str,
) -> dict[int, Any]:
    """A mapped value goes out on the axis it came in on; a broadcast one must still be one
    value.

    **Arguments:**

    - `differs`: whether an array differs along the mapped axis.
    """

    def of_array(i: int, x: Any, axis: int | None) -> Any:
        check_axis(derefed.refs[i], axis, jnp.ndim(x) + 1, name)
        if axis is not None or not differs(x):
            return axis
        if i in axes.split and is_key(x):
            return FIRST
        if i in axes.split and jnp.issubdtype(x.dtype, jnp.integer):
            return LARGEST
        raise CarryError(_written_along(derefed.refs[i], name))

    found = {}
    for i, new in outcome.updates.items():
        own = update_axes(derefed, axes, i, new, name)
        found[i] = jtu.tree_map(lambda x, axis, i=i: of_array(i, x, axis), new, own)
    return found


def _written_along(ref: Ref, name: str) -> str:
    return (
        f"{describe(ref)} is broadcast by `{name}`, but was written with a value that "
        "differs along the mapped axis. Either map it: give it the axis, "
        f"`rx.add_axis(module, size, {ref._collection!r})`, and pass that in an argument "
        f"whose `in_axes` is `{axes.text_for(ref, '0')}`; or write one value for all, such as "
        "`jax.lax.pmean(value, axis_name)`."
    )


@overload
def filter_vmap(
    fun: Callable[P, T],
    *,
    in_axes: PyTree = eqx.if_array(0),
    out_axes: PyTree = eqx.if_array(0),
    axis_name: Hashable = None,
    axis_size: int | None = None,
    **vmapkwargs: Any,
) -> Callable[P, T]: ...


@overload
def filter_vmap(
    *,
    in_axes: PyTree = eqx.if_array(0),
    out_axes: PyTree = eqx.if_array(0),
    axis_name: Hashable = None,
    axis_size: int | None = None,
    **vmapkwargs: Any,
) -> Callable[[Callable[P, T]], Callable[P, T]]: ...


def filter_vmap(
    fun: Callable[..., Any] | None = None,
    *,
    in_axes: PyTree = eqx.if_array(0),
    out_axes: PyTree = eqx.if_array(0),
    axis_name: Hashable = None,
    axis_size: int | None = None,
    **vmapkwargs: Any,
) -> Callable[..., Any]:
    """As `equinox.filter_vmap`, by reference.

    A mapped ref is written slice by slice, and comes out on the axis it came in on. A
    broadcast ref may only be written with a value that is the same along the mapped axis.
    Refs held or closed over by the function itself are broadcast. Refs made inside come out
    with a new axis; refs of the caller are returned as the same objects.

    If the function also reaches a mapped ref otherwise (a method mapped over the heads of
    its own module), it must use the slice. It cannot touch the whole ref.

    A broadcast ref of collection `"rng"` is split along the mapped axis: each element sees
    the key with its own number folded in. See [`refx_eqx.Rngs`][].

    !!! Example

        ```python
        import jax
        import jax.numpy as jnp
        import refx_eqx as rx

        mean = rx.Ref(jnp.array(0.0), "batch_stats")

        def normalize(mean, x):
            mean.value = jax.lax.pmean(x, "batch")  # one value for all
            return x - mean.value

        xs = jnp.array([1.0, 2.0, 3.0])
        vmapped = rx.filter_vmap(normalize, in_axes=(None, 0), axis_name="batch")
        assert vmapped(mean, xs)[0] == -1.0 and mean.value == 2.0
        ```

    Ensembles work as in Equinox:

    !!! Example

        ```python
        import jax
        import jax.numpy as jnp
        import jax.random as jr
        import refx_eqx as rx

        class Linear(rx.Module):
            weight: rx.Param[jax.Array]

            def __init__(self, key):
                self.weight = jr.normal(key, (2, 3))

            def __call__(self, x):
                return self.weight[...] @ x

        ensemble = rx.filter_vmap(Linear)(jr.split(jr.key(0), 8))
        assert ensemble.weight.shape == (8, 2, 3)
        out = rx.filter_vmap(lambda m, x: m(x), in_axes=(0, None))(ensemble, jnp.ones(3))
        assert out.shape == (8, 2)
        ```

    **Arguments:**

    - `fun`: the function to vectorize. Takes positional arguments only.
    - `in_axes`: a prefix of the tuple of arguments, or a dict by argument name. Each leaf
        is an `int`, `None` for broadcast, a function of a leaf, or [`refx_eqx.axes`][]. A
        function of a leaf is called with each ref and each array. What it answers for a ref
        holds, also if it is `None`, if the function looks at the ref: if it tells it from
        any other object, as `rx.is_ref(leaf)` and `leaf.collection` do. A function that
        knows only arrays, as `eqx.if_array(0)`, is called with the arrays in the ref. The
        axis of a function applies to the values it closes over. By default all arrays are
        mapped on axis 0, inside and outside refs, except those that functions close over.
    - `out_axes`: likewise, a prefix of the result.
    - `axis_name`: a name for the mapped axis, for collectives such as `jax.lax.pmean`.
    - `axis_size`: the size of the mapped axis. Needed only if nothing is mapped, but a
        result has an axis.
    - `**vmapkwargs`: passed on to `jax.vmap`, such as `spmd_axis_name`.

    **Returns:**

    The vectorized function.

    **Raises:**

    When called:

    - `StructureError`: if a broadcast ref is written with a value that differs along the
        mapped axis, if one ref has two axes, if sizes differ, or if a result does not have
        the axis that `out_axes` gives it.
    - `TraceLevelError`: if the function touches the whole of a ref that it has a slice of.
    """
    return _Vmap.of(
        fun,
        in_axes=in_axes,
        out_axes=out_axes,
        axis_name=axis_name,
        axis_size=axis_size,
        vmapkwargs=vmapkwargs,
    )
