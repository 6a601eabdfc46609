"""`map`."""

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._calls._call import Call, call
from .._calls._structure import Leaves, Outcome
from .._engine._call_axes import Axes, call_axes, placed_update
from .._engine._carry import as_callable, numbers_to_arrays, whole_number
from .._engine._control_flow import with_values
from .._engine._program import Program, program_of
from ._scan import n_steps, run_scan
from ._vmap import vmapped


Y = TypeVar("Y")


def _map_step(f: Any, xs: Any) -> Any:
    """One step of `map`, with the arguments of `map`."""
    return numbers_to_arrays(f(xs))


def _map_in_batches(
    derefed: Call, arrays: list[Leaves], axes: Axes, length: int, batch_size: int
) -> Outcome:
    """A scan over vectorized batches, and the remainder."""
    leading = axes.in_front()
    n_batches, n_rest = divmod(length, batch_size)
    n_full = length - n_rest
    elements = axes.slices(arrays)

    def with_elements(arrays: list[Leaves], part: Callable[[Any], Any]) -> list[Leaves]:
        return eqx.combine(jtu.tree_map(part, elements), arrays)

    def one_batch(arrays: list[Leaves], number: Any) -> Outcome:
        places = (
            None if number is None else number * batch_size + jnp.arange(batch_size)
        )
        return vmapped(
            derefed, arrays, leading, "map", places=places, transparent=False
        )

    def in_batches(x: Any) -> Any:
        return x[:n_full].reshape(n_batches, batch_size, *x.shape[1:])

    def as_elements(x: Any) -> Any:
        return x.reshape(n_full, *x.shape[2:])

    results = []
    if n_batches:
        batches = with_elements(arrays, in_batches)
        outcome = run_scan(
            derefed, batches, leading, None, n_batches, "map", run=one_batch
        )
        updates, carried = dict(outcome.updates), {}
        for i, new in updates.items():
            if axes.is_mapped(i):
                updates[i] = jtu.tree_map(as_elements, new)
            elif i not in axes.kept:
                carried[i] = new
        arrays = with_values(arrays, carried)
        out = jtu.tree_map(as_elements, outcome.out)
        results.append(Outcome(out, updates, outcome.info))
    if n_rest:
        places = jnp.arange(n_full, length)
        rest = with_elements(arrays, lambda x: x[n_full:])
        results.append(
            vmapped(derefed, rest, leading, "map", places=places, transparent=False)
        )

    # Batches and remainder run one function on elements of one shape, so both do the same.
    def joined(*parts: Any) -> Any:
        return jnp.concatenate(parts)

    out = jtu.tree_map(joined, *[outcome.out for outcome in results])
    updates = {}
    for i, last in results[-1].updates.items():
        if axes.is_mapped(i):
            last = jtu.tree_map(joined, *[x.updates[i] for x in results])
            last = placed_update(derefed, axes, i, last, "map")
        updates[i] = last
    return Outcome(out, updates, results[0].info)


def map(
    f: Callable[[Any], Y],
    xs: PyTree,
    *,
    batch_size: int | None = None,
    in_axes: PyTree = eqx.if_array(0),
) -> Y:
    """As `jax.lax.map`, by reference: [`refx_eqx.scan`][] without a carry.

    !!! Example

        ```python
        import jax.numpy as jnp
        import refx_eqx as rx

        counts = rx.Ref(jnp.zeros(3), "counts")

        def f(x):
            counts, x = x
            counts.value += x
            return 2 * x

        out = rx.map(f, (counts, jnp.arange(3.0)))
        assert out.tolist() == [0.0, 2.0, 4.0]
        assert counts.value.tolist() == [0.0, 1.0, 2.0]
        ```

    **Arguments:**

    - `f`: a function of one element. Refs that are not sliced are carried from element to
        element.
    - `xs`: the tree to slice.
    - `batch_size`: the number of elements to vectorize at a time, as with
        [`refx_eqx.filter_vmap`][]: within a batch, a ref that is not sliced can only be
        written with one value. `f` runs once per batch: a counter in such a ref counts
        batches, and a sliced one counts elements.
    - `in_axes`: as for [`refx_eqx.scan`][].

    **Returns:**

    The stacked results, as those of [`refx_eqx.scan`][].

    **Raises:**

    As [`refx_eqx.scan`][]; and as [`refx_eqx.filter_vmap`][] with `batch_size`.
    """
    f = as_callable(f)
    if batch_size is not None:
        batch_size = whole_number(batch_size, "map", "`batch_size`", 1)

    def transform(derefed: Call) -> Outcome:
        axes = call_axes(
            derefed, (xs,), (in_axes,), "map", whole=in_axes, names=("`xs`",)
        )
        n = n_steps(derefed.arrays, axes, None, "map")

        def run(derefed: Call, arrays: list[Leaves]) -> Outcome:
            if batch_size is None or n == 0:
                return run_scan(derefed, arrays, axes, None, n, "map")
            return _map_in_batches(derefed, arrays, axes, n, batch_size)

        key = ("map", axes.key, n, batch_size)
        # JAX vectorizes the remainder outside its scan.
        make = lambda: Program("map", run, as_a_whole=batch_size is None)
        return program_of((f,), key, make)(derefed)

    return call(_map_step, (f, xs), {}, transform)
