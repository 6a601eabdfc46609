"""`scan`, and the loop that `map` and `fori_loop` use too."""

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._calls._call import Call, call
from .._calls._structure import Leaves, Outcome, values_of
from .._core import _jax
from .._core._errors import CarryError, describe, MismatchError, name_of
from .._engine._agreed import CARRY
from .._engine._by_place import each_array
from .._engine._call_axes import Axes, call_axes, placed_update, update_axes
from .._engine._carry import (
    as_callable,
    CarryBefore,
    check_carry,
    numbers_to_arrays,
    reverse_flag,
    unroll_steps,
    whole_number,
)
from .._engine._control_flow import (
    Loop,
    PythonLoop,
    runs_in_python,
    stage_loop,
    TracedBody,
    with_values,
)
from .._engine._kinds import kind_of
from .._engine._program import Program, program_of
from .._engine._rng_split import split_keys


Carry = TypeVar("Carry")
Y = TypeVar("Y")


def _step(f: Any, carry: Any, x: Any) -> tuple[Any, Any]:
    """One step of `scan`, with the arguments of `scan`."""
    given = CarryBefore(carry)
    out = f(carry, x)
    if not isinstance(out, tuple | list) or len(out) != 2:
        raise TypeError(
            f"`scan`: `{name_of(f)}` must return a pair `(carry, y)`, but it returned "
            f"{eqx.tree_pformat(out)}."
        )
    new, y = numbers_to_arrays(tuple(out))
    check_carry(given, new, "scan")
    return new, y


class _Steps:
    """The steps of one scan: the inputs of each step, and the slices it writes.

    - `xs`: the arrays to slice, with the step axis in front; and the step numbers, if
        anything is split by step;
    - `sliced`: the numbers of the sliced refs;
    - `count`: the initial value of the step counter, or `None`.
    """

    def __init__(
        self,
        derefed: Call,
        arrays: list[Leaves],
        axes: Axes,
        length: int,
        name: str,
        counter: int | None,
        run: Callable[[list[Leaves], Any], Outcome] | None,
    ):
        self.xs = axes.slices(arrays), jnp.arange(length) if axes.split else None
        self.sliced = {i for i in range(len(derefed.refs)) if axes.is_mapped(i)}
        (self.count,) = [None] if counter is None else arrays[counter]
        self._derefed = derefed
        self._axes = axes
        self._name = name
        self._counter = counter
        self._run = run

    def run(self, arrays: list[Leaves], step: Any) -> Outcome:
        if self._run is not None:
            return self._run(arrays, step)
        axes = self._axes
        if axes.split:
            arrays = split_keys(axes.split, arrays, step)
        return self._derefed.run(
            self._name, arrays, transparent=False, withheld=axes.withheld
        )

    def arrays(
        self, now: list[Leaves], first: list[Leaves], slices: list[Leaves], count: Any
    ) -> list[Leaves]:
        """The arrays of one step. `first` are those of the call before all steps."""
        # The same randomness: every step begins with the same keys.
        fixed = {i: x for i, x in values_of(first).items() if i in self._axes.kept}
        arrays = eqx.combine(slices, with_values(now, fixed))
        if self._counter is not None:
            arrays[self._counter] = [count]
        return arrays

    def placed(self, stacked: dict[int, Any]) -> dict[int, Any]:
        """The writes to slices, with the step axis moved to its place."""
        return {
            i: placed_update(self._derefed, self._axes, i, new, self._name)
            for i, new in stacked.items()
        }


def run_scan(
    derefed: Call,
    arrays: list[Leaves],
    axes: Axes,
    carry: int | None,
    length: int,
    name: str,
    *,
    reverse: bool = False,
    unroll: int | bool = 1,
    counter: int | None = None,
    run: Callable[[list[Leaves], Any], Outcome] | None = None,
) -> Outcome:
    """`jax.lax.scan` of a call.

    **Arguments:**

    - `arrays`: the arrays of the call, sliced along `axes`.
    - `carry`: which tree of the call is the carry. A step returns it first.
    - `counter`: which tree counts the steps, if any.
    - `run`: one step, given its arrays and its number (`None` if nothing is split by step).
    """
    _check_whole_axis(derefed, axes, name)
    steps = _Steps(derefed, arrays, axes, length, name, counter, run)
    if runs_in_python() and length:
        loop = Loop(derefed, arrays, carry, name)
        return _scan_in_python(steps, loop, length, reverse)

    # From the types of the slices: with no steps there are no slices.
    def stage(arrays: list[Leaves]) -> TracedBody:
        slices, step = jtu.tree_map(_slice_type, steps.xs)
        mine = steps.arrays(arrays, arrays, slices, steps.count)
        return TracedBody(steps.run, mine, step)

    loop, staged, after = stage_loop(derefed, arrays, carry, steps.sliced, stage, name)
    for i, new in staged.avals.updates.items():
        if i in steps.sliced:
            _check_all_sliced(derefed, axes, i, new, name)

    def step(carry: tuple, x: tuple) -> tuple[tuple, Any]:
        # `count` is carried, as in JAX, so `fori_loop` allocates no array of all its steps.
        (count, carried), (slices, number) = carry, x
        mine = steps.arrays(loop.with_carried(carried), loop.arrays, slices, count)
        outcome = staged(mine, number)
        count = None if count is None else count + 1
        return (count, after(outcome)), loop.rest(outcome)

    first = steps.count, loop.carried(loop.arrays)
    # JAX has no scan without steps under `jax.disable_jit` (0.10 to 0.12).
    with contextlib.nullcontext() if length else jax.disable_jit(False):
        (_, final), (ys, stacked) = jax.lax.scan(
            step, first, steps.xs, length, reverse=reverse, unroll=unroll
        )
    return loop.outcome(final, (ys, steps.placed(stacked)), staged.avals)


def _scan_in_python(steps: _Steps, loop: Loop, length: int, reverse: bool) -> Outcome:
    in_python, first, count = PythonLoop(loop, steps.sliced), loop.arrays, steps.count
    for i in reversed(range(length)) if reverse else range(length):
        slices, step = jtu.tree_map(lambda x, i=i: x[i], steps.xs)
        mine = steps.arrays(loop.arrays, first, slices, count)
        in_python.step(lambda arrays, step=step: steps.run(arrays, step), mine)
        count = None if count is None else count + 1
    done = in_python.outcome(reverse)
    stacked = {i: x for i, x in done.updates.items() if i in steps.sliced}
    return Outcome(done.out, {**done.updates, **steps.placed(stacked)}, done.info)


def _check_all_sliced(
    derefed: Call, axes: Axes, number: int, new: Any, name: str
) -> None:
    """Refuses a write to a ref whose value is only partly sliced: it can be neither stacked
    nor carried."""
    own = update_axes(derefed, axes, number, new, name)
    flat = jtu.tree_structure(new).flatten_up_to(own)
    if None in flat:
        raise CarryError(
            f"{describe(derefed.refs[number])} holds arrays that `{name}` slices, and "
            f"others that it does not (axes {flat}), and a step writes it. Put the arrays "
            "that are not sliced into a separate ref."
        )


def _check_whole_axis(derefed: Call, axes: Axes, name: str) -> None:
    """Refuses an array whose type says that the axis to slice is split between devices."""
    for x, axis, ref in each_array(derefed, axes.trees):
        split = _jax.split_of(jax.typeof(x))
        if axis is None or not split or split[axis] is None:
            continue
        which = f"an array {jax.typeof(x).str_short()}"
        whole = [None if i == axis % len(split) else s for i, s in enumerate(split)]
        raise MismatchError(
            f"`{name}` slices {which if ref is None else describe(ref)} along axis {axis}, "
            f"which is split over the mesh by {split[axis]!r}, and each step needs a slice on "
            "all devices. Split another axis: "
            f"`jax.sharding.reshard(x, P({', '.join(map(repr, whole))}))`."
        )


def _slice_type(x: Any) -> jax.ShapeDtypeStruct:
    """The type of a slice of `x` along the leading axis."""
    if len(x):
        # By JAX itself, whose types include more than shape and dtype: the `shard_map` axes
        # along which `x` varies.
        return jax.eval_shape(lambda x: x[0], x)
    kind = kind_of(jax.typeof(x))
    return jax.ShapeDtypeStruct(kind.shape[1:], kind.dtype, weak_type=kind.weak)


def n_steps(arrays: list[Leaves], axes: Axes, length: int | None, name: str) -> int:
    if length is not None:
        length = whole_number(length, name, "`length`", 0)
    for x in jtu.tree_leaves(axes.slices(arrays)):
        if length is not None and length != len(x):
            raise ValueError(
                f"`{name}` got length={length}, which disagrees with the size {len(x)} of "
                "the axis of `xs` that it slices. Leave out `length`."
            )
        return len(x)
    if length is None:
        or_length = ", or give `length`" if name == "scan" else ""
        raise ValueError(
            f"`{name}`: `xs` has nothing to slice, so the number of steps is unknown. Pass "
            f"an array, such as `jnp.arange(n)`{or_length}."
        )
    return length


def scan(
    f: Callable[[Carry, Any], tuple[Carry, Y]],
    init: Carry,
    xs: PyTree = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    *,
    in_axes: PyTree = eqx.if_array(0),
) -> tuple[Carry, Y]:
    """As `jax.lax.scan`, by reference.

    A ref in `xs` is sliced like an array: a step sees its own slice, and its writes are
    stacked back. Every other ref (in the carry, in the module that `f` is a method of, or
    closed over by `f`) is carried from step to step, and ends with the value of the last
    step. A ref that is only read costs nothing.

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

    One line runs a stack of layers made by [`refx_eqx.filter_vmap`][]. Refs shared by all
    layers are not stacked, so `in_axes` says that they are not sliced.

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

    A ref of collection `"rng"` that is not sliced is split by step: each step sees the key
    with its own number folded in. If `in_axes` gives it `None`, as in `rx.axes(rng=None,
    ...)`, it is not split: every step begins with the key from before the loop.

    If the step also reaches a ref of `xs` otherwise (a method that scans the layers of its
    own module), it must use the slice. A step cannot touch the whole ref.

    **Arguments:**

    - `f`: the step, from `(carry, x)` to `(carry, y)`. The new carry must have the
        structure, shapes and dtypes of the old one, the same static leaves, and the same
        refs at the same places. Python numbers in the carry are traced, as in JAX; those in
        a module are static, as in Equinox.
    - `init`: the first carry.
    - `xs`: the tree to slice.
    - `length`: the number of steps. Needed only if nothing is sliced.
    - `reverse`, `unroll`: as in `jax.lax.scan`.
    - `in_axes`: a prefix of `xs`, as for [`refx_eqx.filter_vmap`][]: the axis along which
        to slice each array, or `None` not to slice it. By default all are sliced along the
        leading axis.

    **Returns:**

    The last carry, and the stacked `y`. New refs in `y` come out stacked; refs of the
    caller in the carry or `y` are returned as the same objects.

    **Raises:**

    - `StructureError`: if a step changes the structure of the carry, or the shape or dtype
        of a ref that is carried; if one ref is both sliced and carried; if sizes differ.
    - `TraceLevelError`: if a step touches the whole of a ref that it has a slice of.
    """
    f, init = as_callable(f), numbers_to_arrays(init)
    reverse = reverse_flag(reverse, "scan")
    unroll = unroll_steps(unroll, "scan")

    def transform(derefed: Call) -> Outcome:
        # Inside the call, because the key of the program includes the axes, which depend on the
        # refs of the call. The user gives the axes of `xs`; the carry has none.
        axes = call_axes(
            derefed,
            (init, xs),
            (None, in_axes),
            "scan",
            whole=in_axes,
            names=(CARRY, "`xs`"),
        )
        n = n_steps(derefed.arrays, axes, length, "scan")

        def run(derefed: Call, arrays: list[Leaves]) -> Outcome:
            return run_scan(
                derefed, arrays, axes, _INIT, n, "scan", reverse=reverse, unroll=unroll
            )

        key = ("scan", axes.key, n, reverse, type(unroll), unroll)
        return program_of((f,), key, lambda: Program("scan", run))(derefed)

    return call(_step, (f, init, xs), {}, transform)


# The tree of the call that is the carry.
_INIT = 1
