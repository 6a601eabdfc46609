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
    # Not by the `batch_size` of JAX: its `vmap` knows neither which refs are mapped nor that
    # keys differ between elements.
    leading = axes.in_front()
    n_batches, n_rest = divmod(length, batch_size)
    n_full = length - n_rest
    elements = axes.slices(arrays)

    def with_elements(arrays: list[Leaves], part: Callable[[Any], Any]) -> list[Leaves]:
        return eqx.combine(jtu.tree_map(part, elements), arrays)

    def vectorized(arrays: list[Leaves], places: Any) -> Outcome:
        return vmapped(
            derefed, arrays, leading, "map", places=places, transparent=False
        )

    def one_batch(arrays: list[Leaves], number: Any) -> Outcome:
        if number is not None:
            number = number * batch_size + jnp.arange(batch_size)
        return vectorized(arrays, number)

    def in_batches(x: Any) -> Any:
        return x[:n_full].reshape(n_batches, batch_size, *x.shape[1:])

    results = []
    if n_batches:
        batches = with_elements(arrays, in_batches)
        outcome = run_scan(
            derefed, batches, leading, None, n_batches, "map", run=one_batch
        )
        outcome, carried = _by_element(outcome, axes, n_full)
        arrays = with_values(arrays, carried)
        results.append(outcome)
    if n_rest:
        rest = with_elements(arrays, lambda x: x[n_full:])
        results.append(vectorized(rest, jnp.arange(n_full, length)))
    return _joined(derefed, axes, results)


def _by_element(outcome: Outcome, axes: Axes, n: int) -> tuple[Outcome, dict[int, Any]]:
    """The outcome of a scan over batches, by element (`n` in all); and the values to carry
    from it to the remainder."""

    def by_element(stacked: Any) -> Any:
        return jtu.tree_map(lambda x: x.reshape(n, *x.shape[2:]), stacked)

    updates, carried = {}, {}
    for i, new in outcome.updates.items():
        updates[i] = by_element(new) if axes.is_mapped(i) else new
        if not axes.is_mapped(i) and i not in axes.kept:
            carried[i] = new
    return Outcome(by_element(outcome.out), updates, outcome.info), carried


def _joined(derefed: Call, axes: Axes, results: list[Outcome]) -> Outcome:
    """The outcome of the batches and the remainder. They run one function on elements of one
    shape, so both do the same."""

    def joined(*parts: Any) -> Any:
        return jtu.tree_map(lambda *x: jnp.concatenate(x), *parts)

    updates = dict(results[-1].updates)
    for i in filter(axes.is_mapped, updates):
        stacked = joined(*[outcome.updates[i] for outcome in results])
        updates[i] = placed_update(derefed, axes, i, stacked, "map")
    out = joined(*[outcome.out for outcome in results])
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
