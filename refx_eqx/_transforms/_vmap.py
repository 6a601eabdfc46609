"""`filter_vmap`."""

import functools
from collections.abc import Callable, Hashable
from typing import Any, overload, ParamSpec, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._core import _trace
from .._core._call import call, close_result, Opened
from .._core._closure import flatten
from .._core._errors import describe, StructureError
from .._core._nodes import Note
from .._core._structure import DYNAMIC, n_arrays, Outcome, Slot
from .._engine._axes import array_axis, axes_text, leaf_axes, named_in_axes, spread
from .._engine._call_axes import Axes, call_axes, check_axis, update_axes
from .._engine._rng_split import is_key, split_keys
from .._engine._wrapper import Lifted


__tracebackhide__ = True


_P = ParamSpec("_P")
_T = TypeVar("_T")


class _Vmap(Lifted):
    transform_name = "filter_vmap"

    def __init__(self, fn: Any, **options: Any):
        super().__init__(fn, **options)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        if kwargs:
            raise TypeError(
                "`filter_vmap` functions take positional arguments only, as in Equinox. "
                f"Pass {', '.join(map(repr, kwargs))} by position."
            )
        fn, options = self.__wrapped__, self.options
        in_axes = named_in_axes(fn, options["in_axes"], args)

        def transform(opened: Opened) -> Outcome:
            axes = call_axes(opened, args, in_axes, self.transform_name, whole=in_axes)
            return vmapped(
                opened,
                opened.arrays,
                axes,
                self.transform_name,
                out_axes=options["out_axes"],
                axis_name=options["axis_name"],
                axis_size=options["axis_size"],
                **options["vmapkwargs"],
            )

        return call(fn, args, {}, transform)


def vmapped(
    opened: Opened,
    arrays: list[Any],
    axes: Axes,
    name: str,
    *,
    lanes: Any = None,
    out_axes: Any = eqx.if_array(0),
    axis_size: int | None = None,
    transparent: bool = True,
    **vmapkwargs: Any,
) -> Outcome:
    """The body of an opened call, for all lanes at once.

    **Arguments:**

    - `arrays`: the flat arrays of the call; mapped over along `axes.flat`.
    - `name`, `transparent`: as for `Opened.run`.
    - `lanes`: the numbers of the lanes; from 0 by default.
    """
    if lanes is None and axes.split:
        lanes = jnp.arange(_n_lanes(arrays, axes, axis_size, name))
    # The part of the outcome that is not arrays; filled while the body runs.
    traced: dict[str, Any] = {}

    def body(arrays: list[Any], lane: Any) -> tuple[Any, Any]:
        mine = split_keys(opened, axes.split, arrays, lane)
        outcome = opened.run(name, mine, transparent, withheld=axes.withheld)
        trees = outcome.out, outcome.updates
        given = [
            *_result_axes(opened, outcome, out_axes, name),
            *_update_axes(opened, outcome, axes, name),
        ]
        traced.update(info=outcome.info, axes=given)
        is_mapped = jtu.tree_unflatten(
            jtu.tree_structure(trees), [axis is not None for axis in given]
        )
        mapped, unmapped = eqx.partition(trees, is_mapped)
        for x in jtu.tree_leaves(unmapped):
            if _trace.is_batched(x):
                raise ValueError(
                    f"`{name}(..., out_axes=...)`: the result has a batched array where "
                    "`out_axes` is None. Give it an axis."
                )
        return mapped, unmapped

    lifted = jax.vmap(
        body,
        in_axes=(list(axes.flat), 0),
        out_axes=(0, None),
        axis_size=axis_size,
        **vmapkwargs,
    )
    flat, treedef = jtu.tree_flatten(eqx.combine(*lifted(arrays, lanes)))
    placed = map(_place, flat, traced["axes"])
    return Outcome(*jtu.tree_unflatten(treedef, placed), traced["info"])


def _place(x: Any, axis: Any) -> Any:
    if axis is FIRST_LANE:
        return x[0]
    return jnp.moveaxis(x, 0, axis) if axis else x


def _n_lanes(arrays: list[Any], axes: Axes, axis_size: int | None, name: str) -> int:
    for x, axis in zip(arrays, axes.flat):
        if axis is not None:
            return jnp.shape(x)[axis]
    if axis_size is None:
        raise ValueError(
            f"`{name}`: nothing is mapped, so the number of lanes is not known. Give "
            "`axis_size`."
        )
    return axis_size


def _result_axes(
    opened: Opened, outcome: Outcome, out_axes: Any, name: str
) -> list[int | None]:
    """The axis of each array of the result: those outside refs, then those of new refs."""
    info = outcome.info
    structure = info.result
    (part,) = structure.parts
    result = close_result(outcome, opened.refs)
    leaves, _ = flatten(result)
    given = spread(part, leaf_axes(out_axes, result, "out_axes"), leaves)
    arrays = iter(outcome.out)
    axes: list[int | None] = []
    of_refs: dict[int, list[Any]] = {}
    for code, (axis, _) in zip(structure.codes, given):
        if code == DYNAMIC:
            axes.append(array_axis(axis, next(arrays)))
        elif code >= 0:
            of_refs.setdefault(code, []).append(axis)
    for number, slot in enumerate(structure.slots):
        if number not in info.carried:
            mine = [next(arrays) for _ in range(n_arrays(slot.inside))]
            by_place = [[array_axis(axis, x) for x in mine] for axis in of_refs[number]]
            _check_one_axis(structure.notes[number], slot, by_place, name)
            axes += by_place[0]
    return axes


def _check_one_axis(note: Note, slot: Slot, by_place: list[list], name: str) -> None:
    for other in by_place[1:]:
        if other != by_place[0]:
            raise StructureError(
                f"`{name}(..., out_axes=...)` gives {describe(note.name, slot.collection)} "
                f"two axes, {_text(by_place[0])} and {_text(other)}: it is one new ref at "
                "two places of the result. Give both places one axis."
            )


def _text(axes: list) -> str:
    return repr(axes[0] if len(axes) == 1 else axes)


# The axis of a key that was broadcast, split by lane, and written: one lane's goes out.
FIRST_LANE = object()


def _update_axes(opened: Opened, outcome: Outcome, axes: Axes, name: str) -> list[Any]:
    """What came in on an axis goes out on it; what was broadcast must still be one value."""
    found: list[Any] = []
    for number, new in outcome.updates.items():
        own = update_axes(opened, axes, number, new, name)
        for x, axis in zip(jtu.tree_leaves(new), own):
            check_axis(opened.refs[number], axis, jnp.ndim(x) + 1, name)
            if axis is not None or not _trace.is_batched(x):
                found.append(axis)
            elif number in axes.split and is_key(x):
                found.append(FIRST_LANE)
            else:
                ref = opened.refs[number]
                raise StructureError(
                    f"{describe(ref._name, ref._collection)} is broadcast by `{name}`, and "
                    "was written with a value that differs along the mapped axis. Either "
                    "map it: give it the axis, `rx.add_axis(module, size, "
                    f"{ref._collection!r})`, and pass that in an argument whose `in_axes` "
                    f"is `{axes_text(ref, 0)}`; or write one value for all, such as "
                    "`jax.lax.pmean(value, axis_name)`."
                )
    return found


@overload
def filter_vmap(
    *,
    in_axes: Any = ...,
    out_axes: Any = ...,
    axis_name: Hashable = ...,
    axis_size: int | None = ...,
    **vmapkwargs: Any,
) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]: ...


@overload
def filter_vmap(
    fun: Callable[_P, _T],
    *,
    in_axes: Any = ...,
    out_axes: Any = ...,
    axis_name: Hashable = ...,
    axis_size: int | None = ...,
    **vmapkwargs: Any,
) -> Callable[_P, _T]: ...


def filter_vmap(
    fun: Any = None,
    *,
    in_axes: Any = eqx.if_array(0),
    out_axes: Any = eqx.if_array(0),
    axis_name: Hashable = None,
    axis_size: int | None = None,
    **vmapkwargs: Any,
) -> Any:
    """As `equinox.filter_vmap`, by reference.

    A ref that is mapped in on an axis may be written lane by lane, and comes out on that
    axis. A ref that is broadcast may be written with one value for all lanes. The refs of
    the function itself, and of what it closes over, are broadcast. Refs made inside come
    out with a new axis; refs of the caller that are returned are the caller's own.

    What an argument maps, the function may reach as well (the method of a module over its
    own heads); the whole of it may not be touched inside.

    A broadcast ref of collection `"rng"` is split by lane: each lane sees the key with its
    own number folded in. See [`refx_eqx.Rngs`][].

    !!! Example

        ```python
        import jax
        import jax.numpy as jnp
        import refx_eqx as rx

        mean = rx.Ref(jnp.array(0.0), "batch_stats")

        def normalise(mean, x):
            mean.value = jax.lax.pmean(x, "batch")  # one value for all lanes
            return x - mean.value

        xs = jnp.array([1.0, 2.0, 3.0])
        vmapped = rx.filter_vmap(normalise, in_axes=(None, 0), axis_name="batch")
        assert vmapped(mean, xs)[0] == -1.0 and mean.value == 2.0
        ```

    An ensemble is made, and used, as in Equinox:

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

    - `fun`: the function to vectorise. Takes positional arguments only.
    - `in_axes`: a prefix of the tuple of arguments, or a dict by argument name. Each leaf is
        an `int`, `None` for broadcast, a function of a leaf, or [`refx_eqx.axes`][]. A
        function of a leaf is given each ref, and each array; where it says of a ref what
        it says of anything that is no array, it is asked for the arrays in the ref. The
        axis of a function is that of what it closes over. By default all arrays are mapped
        on axis 0, in refs and outside refs, but for those that functions close over.
    - `out_axes`: likewise, a prefix of the result.
    - `axis_name`: a name for the mapped axis, for collectives such as `jax.lax.pmean`.
    - `axis_size`: the size of the mapped axis; needed only if nothing is mapped.
    - `**vmapkwargs`: passed on to `jax.vmap`, such as `spmd_axis_name`.

    **Returns:**

    The vectorised function.

    **Raises:**

    When called:

    - `StructureError`: if a broadcast ref is written with a value that differs between
        lanes, if one ref is met with two axes, or if sizes differ.
    - `TraceLevelError`: if the function touches the whole of a ref of which it has a slice.
    """
    options = dict(
        in_axes=in_axes,
        out_axes=out_axes,
        axis_name=axis_name,
        axis_size=axis_size,
        vmapkwargs=vmapkwargs,
    )
    if fun is None:
        return functools.partial(_Vmap, **options)
    return _Vmap(fun, **options)
