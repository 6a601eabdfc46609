"""`scan`, and the loop that `map` and `fori_loop` are made of too."""

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp

from .._core._call import call, Opened
from .._core._errors import describe, name_of, StructureError
from .._core._structure import Outcome
from .._engine._call_axes import Axes, call_axes, is_mapped, placed_update, update_axes
from .._engine._control_flow import (
    as_callable,
    bare_parts,
    CarryBefore,
    check_carry,
    kind_of,
    numbers_to_arrays,
    stage_loop,
    Staged,
    whole_number,
)
from .._engine._in_python import PythonLoop, runs_in_python
from .._engine._program import Program, program_of
from .._engine._rng_split import split_keys


__tracebackhide__ = True


_Carry = TypeVar("_Carry")


def _step(f: Any, carry: Any, x: Any) -> tuple[Any, Any]:
    """One step of `scan`, with the arguments of `scan`."""
    given = CarryBefore(carry)
    out = f(carry, x)
    if not isinstance(out, tuple) or len(out) != 2:
        raise TypeError(
            f"`scan`: `{name_of(f)}` must return a pair `(carry, y)`, and it returned "
            f"{eqx.tree_pformat(out)}."
        )
    new, y = numbers_to_arrays(out)
    check_carry(given, new, "scan")
    return new, y


def run_scan(
    opened: Opened,
    arrays: list[Any],
    axes: Axes,
    bare: range,
    length: int,
    name: str,
    *,
    reverse: bool = False,
    unroll: int | bool = 1,
    counter: int | None = None,
    run: Callable[[list[Any], Any], Outcome] | None = None,
) -> Outcome:
    """`jax.lax.scan` of an opened call.

    **Arguments:**

    - `arrays`: the flat arrays of the call. They are sliced along `axes.flat`.
    - `bare`: which of them are the carry. A step returns them first.
    - `counter`: which of them counts the steps, if any.
    - `run`: one step, from arrays and its number (`None` if nothing is split by step).
    """
    mapped = [i for i, axis in enumerate(axes.flat) if axis is not None]
    refs = range(len(opened.refs))
    sliced = {number for number in refs if is_mapped(opened, axes, number)}
    xs = [jnp.moveaxis(arrays[i], axes.flat[i] or 0, 0) for i in mapped]
    if axes.split:
        xs.append(jnp.arange(length))

    def with_slices(arrays: list[Any], x: list[Any]) -> list[Any]:
        arrays = list(arrays)
        for i, part in zip(mapped, x):
            arrays[i] = part
        # The number of the step comes last.
        return arrays + list(x[len(mapped) :])

    def begun(now: list[Any], first: list[Any]) -> list[Any]:
        now = list(now)
        for number in axes.kept:  # the same randomness: each step begins where all do
            its_own = slice(*opened.spans[number])
            now[its_own] = first[its_own]
        return now

    def body(arrays: list[Any]) -> Outcome:
        n = len(axes.flat)
        mine, number = arrays[:n], arrays[n] if axes.split else None
        if run is not None:
            return run(mine, number)
        mine = split_keys(opened, axes.split, mine, number)
        return opened.run(name, mine, transparent=False, withheld=axes.withheld)

    def placed(stacked: dict[int, Any]) -> dict[int, Any]:
        return {
            number: placed_update(opened, axes, number, new, name)
            for number, new in stacked.items()
        }

    if runs_in_python() and length:
        in_python = PythonLoop(opened, arrays, bare, name, sliced)
        for i in reversed(range(length)) if reverse else range(length):
            mine = with_slices(begun(in_python.arrays, arrays), [x[i] for x in xs])
            in_python.step(body, mine)
            if counter is not None:
                in_python.arrays[counter] = in_python.arrays[counter] + 1
        done = in_python.outcome(reverse)
        stacked = {i: x for i, x in done.updates.items() if i in sliced}
        for number, new in stacked.items():
            _check_all_sliced(opened, axes, number, new, name)
        return Outcome(done.out, {**done.updates, **placed(stacked)}, done.info)

    def stage(arrays: list[Any]) -> Staged:
        return Staged(body, with_slices(arrays, [_first(x) for x in xs]))

    loop = stage_loop(opened, arrays, bare, sliced, stage, name)
    for number, new in loop.staged.avals.updates.items():
        if number in sliced:
            _check_all_sliced(opened, axes, number, new, name)

    def step(carry: tuple, x: list[Any]) -> tuple[tuple, tuple[list, dict]]:
        count, carried = carry
        arrays = begun(loop.with_carry(carried), loop.arrays)
        if counter is not None:
            arrays[counter] = count
            count = count + 1
        outcome = loop.staged(with_slices(arrays, x))
        return (count, loop.carry_of(outcome)), loop.rest_of(outcome)

    count = None if counter is None else loop.arrays[counter]
    # JAX runs no loop without a step in Python: it would not know what one returns.
    staging = contextlib.nullcontext() if length else jax.disable_jit(False)
    with staging:
        (_, final), (ys, stacked) = jax.lax.scan(
            step, (count, loop.initial()), xs, length, reverse=reverse, unroll=unroll
        )
    return loop.outcome(final, (ys, placed(stacked)))


def _check_all_sliced(
    opened: Opened, axes: Axes, number: int, new: Any, name: str
) -> None:
    """Refuses a write to a ref of whose value a part is sliced, and a part is not: it can
    be neither stacked nor carried."""
    own = update_axes(opened, axes, number, new, name)
    if None in own:
        ref = opened.refs[number]
        raise StructureError(
            f"{describe(ref._name, ref._collection)} holds arrays that `{name}` slices, "
            f"and others that it does not (axes {own}), and a step writes it. Put those "
            "that are not sliced into a ref of their own."
        )


def _first(x: Any) -> jax.ShapeDtypeStruct:
    """What a slice of `x` along the leading axis is."""
    if len(x):
        # By JAX itself, which knows of more than shape and dtype: over which axes of a
        # `shard_map` it varies.
        return jax.eval_shape(lambda x: x[0], x)
    kind = kind_of(jax.typeof(x))
    return jax.ShapeDtypeStruct(kind.shape[1:], kind.dtype, weak_type=kind.weak)


def n_steps(arrays: list[Any], axes: Axes, length: int | None, name: str) -> int:
    if length is not None:
        length = whole_number(length, name, "`length`", 0)
    for x, axis in zip(arrays, axes.flat):
        if axis is not None:
            size = jnp.shape(x)[axis]
            if length is not None and length != size:
                raise ValueError(
                    f"`{name}` got length={length}, which disagrees with the size {size} "
                    "of the axis of `xs` that it slices. Leave out `length`."
                )
            return size
    if length is None:
        raise ValueError(
            f"`{name}`: `xs` has nothing to slice, so the number of steps is not known. "
            "Give `length`."
        )
    return length


def scan(
    f: Callable[[_Carry, Any], tuple[_Carry, Any]],
    init: _Carry,
    xs: Any = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    *,
    in_axes: Any = eqx.if_array(0),
) -> tuple[_Carry, Any]:
    """As `jax.lax.scan`, by reference.

    A ref in `xs` is sliced, as an array is: a step sees its own slice, and what it writes
    is stacked back. Every other ref (in the carry, in the module whose method `f` is, in
    what `f` closes over) is carried from step to step, and comes out as the last step left
    it. A ref that is only read costs nothing.

    !!! Example

        ```python
        import jax.numpy as jnp
        import refx_eqx as rx

        total = rx.Ref(jnp.array(0.0))

        def step(carry, x):
            total, product = carry
            total.value += x
            return (total, product * x), total.value

        (_, product), ys = rx.scan(step, (total, 1.0), jnp.array([1.0, 2.0, 3.0]))
        assert product == 6.0 and total.value == 6.0
        assert ys.tolist() == [1.0, 3.0, 6.0]
        ```

    A stack of layers, as [`refx_eqx.filter_vmap`][] makes it, is run in one line. What all
    layers share is not stacked, so it is not sliced: `in_axes` says so.

    !!! Example

        ```python
        import jax
        import jax.numpy as jnp
        import jax.random as jr
        import refx_eqx as rx

        class Layer(rx.Module):
            own: rx.Param[jax.Array]
            shared: rx.Param[jax.Array]

            def __call__(self, x):
                return x + jnp.tanh(self.own[...] @ x) * self.shared[...]

        shared = rx.Ref(jnp.ones(3), "params")
        make = lambda key, shared: Layer(jr.normal(key, (3, 3)), shared)
        layers = rx.filter_vmap(make, in_axes=(0, None))(jr.split(jr.key(0), 4), shared)

        def forward(layers, x):
            return rx.scan(
                lambda x, layer: (layer(x), None),
                x,
                layers,
                in_axes=rx.axes({rx.path("shared"): None}, default=0),
            )[0]

        grads = rx.filter_grad(lambda layers, x: jnp.sum(forward(layers, x)))(
            layers, jnp.ones(3)
        )
        assert grads.own.value.shape == (4, 3, 3)
        assert grads.shared.value.shape == (3,)  # the sum over the layers
        ```

    A ref of collection `"rng"` that is not sliced is split by step: a step sees the key
    with its own number folded in. One that `in_axes` names with `None`, as in
    `rx.axes(rng=None, ...)`, is not: every step begins with what it held before the loop.

    A ref in `xs` that the step reaches as well (the method of a module that scans its own
    layers) is the slice in `xs`. The whole of it may not be touched in a step.

    **Arguments:**

    - `f`: the step, from `(carry, x)` to `(carry, y)`. The new carry has the structure, the
        shapes and the dtypes of the old one, the same static leaves, and the same refs at
        the same places. Python numbers in the carry are traced, as in JAX; those in a
        module are static, as in Equinox.
    - `init`: the first carry.
    - `xs`: what is sliced.
    - `length`: the number of steps; needed only if nothing is sliced.
    - `reverse`, `unroll`: as in `jax.lax.scan`.
    - `in_axes`: a prefix of `xs`, as for [`refx_eqx.filter_vmap`][]: along which axis each
        array is sliced, `None` for not at all. By default all are, along the leading one.

    **Returns:**

    The last carry, and the stacked `y`. New refs in `y` come out stacked; refs of the
    caller that are in the carry or in `y` are the caller's own.

    **Raises:**

    - `StructureError`: if a step changes the structure of the carry, or the shape or dtype
        of a ref that is carried; if one ref is both sliced and carried; if sizes differ.
    - `TraceLevelError`: if a step touches the whole of a ref of which it has a slice.
    """
    f, init = as_callable(f), numbers_to_arrays(init)

    def transform(opened: Opened) -> Outcome:
        # The axes that the user gives are those of `xs`; a carry has none.
        axes = call_axes(
            opened,
            (init, xs),
            (None, in_axes),
            "scan",
            whole=in_axes,
            names=("the carry", "`xs`"),
        )
        n = n_steps(opened.arrays, axes, length, "scan")

        def run(opened: Opened, arrays: list[Any]) -> Outcome:
            bare = bare_parts(opened)[2]
            return run_scan(
                opened, arrays, axes, bare, n, "scan", reverse=reverse, unroll=unroll
            )

        key = ("scan", axes, n, bool(reverse), type(unroll), unroll)
        return program_of(f, key, lambda: Program("scan", run))(opened)

    return call(_step, (f, init, xs), {}, transform)
