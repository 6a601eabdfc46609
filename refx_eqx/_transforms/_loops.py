"""`while_loop` and `fori_loop`."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import ArrayLike

from .._calls._call import Call, call
from .._calls._structure import Leaves, Outcome
from .._core import _jax
from .._core._errors import CarryError, describe, name_of
from .._engine._call_axes import no_axes
from .._engine._carry import (
    as_callable,
    next_carry,
    numbers_to_arrays,
    unroll_steps,
    whole_number,
)
from .._engine._control_flow import (
    Loop,
    PythonLoop,
    runs_in_python,
    stage_loop,
    TracedBody,
)
from .._engine._program import Program, program_of
from ._scan import run_scan


T = TypeVar("T")


# A `while_loop` has two functions. So both are arguments of a call whose callable is `None`, and
# the two functions below select the one to run.


def _while_test(_: None, cond_fun: Any, body_fun: Any, val: Any) -> Any:
    test = cond_fun(val)
    if not eqx.is_array_like(test) or jnp.shape(test) != () or not _is_bool(test):
        raise TypeError(
            f"`while_loop`: `{name_of(cond_fun)}` must return a boolean scalar, but it "
            f"returned {eqx.tree_pformat(test)}. Compare, such as `x > 0`."
        )
    return jnp.asarray(test, bool)


def _is_bool(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.bool_)


def _while_step(_: None, cond_fun: Any, body_fun: Any, val: Any) -> Any:
    return next_carry(body_fun, val, "while_loop")


# The trees of the call `while_loop(cond_fun, body_fun, init_val)`, and of `fori_loop`.
_INIT_VAL = 2
_LOWER, _UPPER, _FORI_INIT_VAL = 0, 1, 3


def _run_while(derefed: Call, arrays: list[Leaves]) -> Outcome:
    def run(apply: Callable, arrays: list[Leaves]) -> Outcome:
        return derefed.run("while_loop", arrays, False, apply)

    if runs_in_python(*jtu.tree_leaves(arrays)):
        return _while_in_python(Loop(derefed, arrays, _INIT_VAL, "while_loop"), run)

    def stage(apply: Callable, arrays: list[Leaves]) -> TracedBody:
        return TracedBody(functools.partial(run, apply), arrays)

    step = functools.partial(stage, _while_step)
    loop, staged, after = stage_loop(derefed, arrays, _INIT_VAL, (), step, "while_loop")
    # After staging the step, which may have promoted the dtypes of the carry.
    test = stage(_while_test, loop.arrays)
    _refuse_writes_of_test(derefed, test.avals)
    final = jax.lax.while_loop(
        lambda carried: test(loop.with_carried(carried)).out[0],
        lambda carried: after(staged(loop.with_carried(carried))),
        loop.carried(loop.arrays),
    )
    return loop.outcome(final, ([], {}), staged.avals)


def _refuse_writes_of_test(derefed: Call, outcome: Outcome) -> None:
    for i in outcome.updates:
        raise CarryError(
            f"`while_loop`: `cond_fun` writes {describe(derefed.refs[i])}. It "
            "may only read, because it runs once more than `body_fun` does. Write the ref "
            "in `body_fun`."
        )


def _while_in_python(loop: Loop, run: Callable) -> Outcome:
    in_python = PythonLoop(loop)
    while True:
        test = run(_while_test, loop.arrays)
        _refuse_writes_of_test(loop.derefed, test)
        if not test.out[0]:
            break
        in_python.step(functools.partial(run, _while_step), loop.arrays)
    if in_python.has_run:
        return in_python.outcome()
    # Without steps, the result still needs the structure that a body returns.
    return run(_while_unchanged, loop.arrays)


def _while_unchanged(_: None, cond_fun: Any, body_fun: Any, val: Any) -> Any:
    return val


def while_loop(
    cond_fun: Callable[[T], ArrayLike], body_fun: Callable[[T], T], init_val: T
) -> T:
    """As `jax.lax.while_loop`, by reference.

    Every ref (in the carry, in the module that a function is a method of, or closed over)
    is carried from step to step. `cond_fun` may read what `body_fun` writes.

    !!! Example

        ```python
        import jax.numpy as jnp
        import refx_eqx as rx

        steps = rx.Ref(jnp.array(0))

        def body(val):
            steps, x = val
            steps.value += 1
            return steps, x * 2

        _, x = rx.while_loop(lambda val: val[0].value < 5, body, (steps, 1.0))
        assert x == 32.0 and steps.value == 5
        ```

    **Arguments:**

    - `cond_fun`: maps the carry to whether to take another step. It may only read refs.
    - `body_fun`: the step, from the carry to the next carry, which must have the same
        structure, shapes and dtypes, the same static leaves and the same refs at the same
        places.
    - `init_val`: the first carry.

    **Returns:**

    The last carry.

    **Raises:**

    - `StructureError`: if a step changes the structure of the carry, or the shape or dtype
        of a ref; if `cond_fun` writes a ref.
    """
    fns = as_callable(cond_fun), as_callable(body_fun)
    init_val = numbers_to_arrays(init_val)

    program = program_of(fns, "while_loop", lambda: Program("while_loop", _run_while))
    return call(None, (*fns, init_val), {}, program)


def _fori_step(i: Any, upper: Any, body_fun: Any, val: Any) -> Any:
    """One step of `fori_loop`, with the arguments of `fori_loop`: `i` instead of
    `lower`."""
    return next_carry(functools.partial(body_fun, i), val, "fori_loop")


def _run_fori(derefed: Call, arrays: list[Leaves]) -> Outcome:
    """A `fori_loop` with an unknown number of steps."""

    def stage(arrays: list[Leaves]) -> TracedBody:
        return TracedBody(
            lambda arrays: derefed.run("fori_loop", arrays, transparent=False), arrays
        )

    loop, staged, after = stage_loop(
        derefed, arrays, _FORI_INIT_VAL, (), stage, "fori_loop"
    )
    (lower,), (upper,) = arrays[_LOWER], arrays[_UPPER]

    def step(carry: tuple) -> tuple:
        i, carried = carry
        arrays = loop.with_carried(carried)
        arrays[_LOWER] = [i]
        return i + 1, after(staged(arrays))

    first = lower, loop.carried(loop.arrays)
    _, final = jax.lax.while_loop(lambda carry: carry[0] < upper, step, first)
    return loop.outcome(final, ([], {}), staged.avals)


def fori_loop(
    lower: ArrayLike,
    upper: ArrayLike,
    body_fun: Callable[[Any, T], T],
    init_val: T,
    *,
    unroll: int | bool | None = None,
) -> T:
    """As `jax.lax.fori_loop`, by reference.

    Every ref (in the carry, in the module that `body_fun` is a method of, or closed over)
    is carried from step to step.

    !!! Example

        ```python
        import jax.numpy as jnp
        import refx_eqx as rx

        total = rx.Ref(jnp.array(0))

        def body(i, total):
            total.value += i
            return total

        assert rx.fori_loop(0, 5, body, total) is total
        assert total.value == 10
        ```

    **Arguments:**

    - `lower`, `upper`: the range of `i`, excluding `upper`. If neither is traced, the loop
        can be differentiated in reverse mode, as in JAX.
    - `body_fun`: the step, from `(i, carry)` to the next carry, which must have the same
        structure, shapes and dtypes, the same static leaves and the same refs at the same
        places.
    - `init_val`: the first carry.
    - `unroll`: as in `jax.lax.fori_loop`.

    **Returns:**

    The last carry.

    **Raises:**

    - `StructureError`: if a step changes the structure of the carry, or the shape or dtype
        of a ref.
    - `TypeError`: if `lower` or `upper` is not an integer.
    - `ValueError`: if `unroll` is given and `lower` or `upper` is traced.
    """
    body_fun, init_val = as_callable(body_fun), numbers_to_arrays(init_val)
    is_known = not (_jax.is_tracer(lower) or _jax.is_tracer(upper))
    if is_known:
        first = whole_number(lower, "fori_loop", "`lower`")
        length = max(whole_number(upper, "fori_loop", "`upper`") - first, 0)
    else:
        length = None
        _check_bounds(lower, upper)
    if unroll is not None and length is None:
        raise ValueError(
            "`fori_loop`: `unroll` needs a known number of steps, but `lower` or `upper` "
            "is traced. Leave out `unroll`."
        )
    # As in JAX, a scan if the number of steps is known, which supports reverse mode; otherwise a
    # `while_loop`, which does not.
    steps = 1 if unroll is None else unroll_steps(unroll, "fori_loop")
    lower, upper = _same_dtype(lower, upper)

    def run(derefed: Call, arrays: list[Leaves]) -> Outcome:
        if length is None:
            return _run_fori(derefed, arrays)
        return run_scan(
            derefed,
            arrays,
            no_axes(arrays),
            _FORI_INIT_VAL,
            length,
            "fori_loop",
            unroll=steps,
            counter=_LOWER,
        )

    key = ("fori_loop", length, type(steps), steps)
    program = program_of((body_fun,), key, lambda: Program("fori_loop", run))
    return call(_fori_step, (lower, upper, body_fun, init_val), {}, program)


def _check_bounds(lower: Any, upper: Any) -> None:
    for name, x in (("lower", lower), ("upper", upper)):
        is_integer = jnp.issubdtype(jnp.result_type(x), jnp.integer)
        if jnp.shape(x) != () or not is_integer:
            raise TypeError(
                f"`fori_loop`: `{name}` must be a scalar integer, but is "
                f"{eqx.tree_pformat(x)}. Convert it: `x.astype(int)`."
            )


def _same_dtype(lower: Any, upper: Any) -> tuple[jax.Array, jax.Array]:
    # `lower` counts up to `upper` in the carry, whose dtype cannot change.
    lower, upper = jnp.asarray(lower), jnp.asarray(upper)
    if lower.dtype == upper.dtype and lower.weak_type == upper.weak_type:
        return lower, upper
    dtype = jnp.result_type(lower, upper)
    return lower.astype(dtype), upper.astype(dtype)
