"""`associative_scan`."""

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.tree_util as jtu

from .._calls._call import Call, call
from .._calls._places import place_text
from .._calls._structure import Leaves, Outcome
from .._core._errors import CarryError, describe, StructureError
from .._core._nodes import is_traced
from .._core._ref import Ref
from .._engine._carry import (
    as_callable,
    next_carry,
    numbers_to_arrays,
    reverse_flag,
    whole_number,
)
from .._engine._control_flow import TracedBody
from .._engine._program import Program, program_of


T = TypeVar("T")


def _combine(fn: Any, a: Any, b: Any) -> Any:
    """One application of the function of `associative_scan`."""
    return next_carry(lambda a: fn(a, b), a, "associative_scan")


def associative_scan(
    fn: Callable[[T, T], T],
    elems: T,
    reverse: bool = False,
    axis: int = 0,
) -> T:
    """As `jax.lax.associative_scan`. `fn` may read refs.

    The number and order of calls to `fn` are unspecified, so it must not write refs.

    !!! Example

        ```python
        import equinox as eqx
        import jax.numpy as jnp
        import refx_eqx as rx

        class Decay(rx.Module):
            rate: rx.Param[float]

            def __call__(self, a, b):
                (decay_a, a), (decay_b, b) = a, b
                return decay_a * decay_b, self.rate[...] * a * decay_b + b

        decay = Decay(1.0)
        elems = jnp.full(3, 0.5), jnp.ones(3)
        assert rx.associative_scan(decay, elems)[1].tolist() == [1.0, 1.5, 1.75]
        ```

    **Arguments:**

    - `fn`: an associative function of two stacks of elements, as for
        `jax.lax.associative_scan`.
    - `elems`: any pytree without refs, whose arrays are scanned along `axis`.
    - `reverse`, `axis`: as in `jax.lax.associative_scan`.

    **Returns:**

    The running results, with the structure of `elems`.

    **Raises:**

    - `StructureError`: if `fn` writes a ref, if `elems` contains one, or if `fn` changes
        the structure of its arguments.
    - `ValueError`: if `elems` has no arrays to scan along `axis`.
    """
    fn, elems = as_callable(fn), numbers_to_arrays(elems)
    for path, leaf in jtu.tree_flatten_with_path(elems)[0]:
        if isinstance(leaf, Ref):
            raise StructureError(
                f"`associative_scan`: `elems` has {describe(leaf)} at {place_text(path)}. "
                "It combines values, so the results have no ref to go to. Pass the "
                "values: `rx.snapshot(elems)`."
            )

    reverse = reverse_flag(reverse, "associative_scan")
    axis = whole_number(axis, "associative_scan", "`axis`")
    arrays = [x for x in jtu.tree_leaves(elems) if is_traced(x)]
    shapes = [x.shape for x in arrays]
    if not arrays or any(not -len(shape) <= axis < len(shape) for shape in shapes):
        raise ValueError(
            f"`associative_scan`: `elems` must have arrays, all with an axis {axis} to "
            f"scan along, but is {eqx.tree_pformat(elems)}. Pass arrays, or another `axis`."
        )

    def run(derefed: Call, arrays: list[Leaves]) -> Outcome:
        return _run_associative_scan(derefed, arrays, reverse, axis)

    # `fn` combines two stacks of elements, so the call is given `elems` twice.
    key = ("associative_scan", reverse, axis)
    make = lambda: Program("associative_scan", run, as_a_whole=False)
    return call(_combine, (fn, elems, elems), {}, program_of((fn,), key, make))


def _run_associative_scan(
    derefed: Call, arrays: list[Leaves], reverse: bool, axis: int
) -> Outcome:
    fn, elems, _, *others = arrays

    def combine(a: Leaves, b: Leaves) -> Outcome:
        outcome = derefed.run("associative_scan", [fn, a, b, *others], False)
        for i in outcome.updates:
            raise CarryError(
                f"`associative_scan`: the function writes {describe(derefed.refs[i])}. It "
                "may only read, because the number and order of its calls are "
                "unspecified. Use `rx.scan`, or return the value as part of the elements."
            )
        return outcome

    leaves = jtu.tree_leaves(elems)
    if reverse and axis < 0 and leaves:
        # JAX reverses along `axis` before it counts a negative one from the end.
        axis += leaves[0].ndim
    # With one element the function is not called: its outcome has the same structure.
    info = TracedBody(lambda elems: combine(elems, elems), elems).avals.info
    out = jax.lax.associative_scan(
        lambda a, b: combine(a, b).out, elems, reverse=reverse, axis=axis
    )
    return Outcome(out, {}, info)
