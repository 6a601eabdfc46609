"""`filter_pure_callback`."""

from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._calls._call import Call
from .._calls._structure import Leaves, Structure
from .._core import _jax, _trace
from .._core._access import refuse_cycle
from .._core._errors import CarryError, describe, MismatchError
from .._core._nodes import is_traced
from .._core._ref import Ref
from .._engine._run_time_errors import CallbackFailed, explain


def filter_pure_callback(
    callback: Callable[..., Any],
    *args: Any,
    result_shape_dtypes: PyTree,
    sharding: jax.sharding.Sharding | None = None,
    vmap_method: str | None = None,
    vectorized: bool | None = None,
    **kwargs: Any,
) -> PyTree:
    """As `equinox.filter_pure_callback`, for arguments that hold refs: calls a Python
    function from inside a compiled program.

    The callback gets refs that hold their values at the call. It is pure, so it may read
    them but not write them.

    !!! Example

        ```python
        import jax
        import jax.numpy as jnp
        import numpy as np
        import refx_eqx as rx

        w = rx.Ref(jnp.array(2.0), "params")

        @rx.filter_jit
        def f(w, x):
            return rx.filter_pure_callback(
                lambda w, x: np.asarray(w.value) * np.asarray(x),
                w,
                x,
                result_shape_dtypes=jax.ShapeDtypeStruct((), jnp.float32),
            )

        assert f(w, jnp.array(3.0)) == 6.0
        ```

    **Arguments:**

    - `callback`: the Python function to call, as `callback(*args, **kwargs)`.
    - `*args`, `**kwargs`: its arguments, of any type. It may also close over refs and
        arrays.
    - `result_shape_dtypes`: the result, with `jax.ShapeDtypeStruct`s instead of arrays. An
        array stands for its shape.
    - `sharding`: as in `jax.pure_callback`.
    - `vmap_method`: how the callback is called under a `vmap`, as in `jax.pure_callback`:
        once per item (`"sequential"`), or once for all, with arrays that have an axis in
        front (`"expand_dims"`, `"broadcast_all"`). By default, a `vmap` is an error.
    - `vectorized`: what older versions of JAX had instead of `vmap_method`. An error.

    **Returns:**

    The result of the callback.

    **Raises:**

    - `TypeError`: if `vectorized` is given.

    When the program runs:

    - `StructureError`: if the callback writes a ref, or its result does not match
        `result_shape_dtypes`.
    - Any exception of the callback: unchanged under `rx.filter_jit` and outside staged
        code, and as a JAX run-time error under JAX's own transforms.
    """
    if vectorized is not None:
        method = "expand_dims" if vectorized else "sequential"
        raise TypeError(
            f"`filter_pure_callback(..., vectorized={vectorized!r})`: JAX has removed this "
            f'argument. Pass `vmap_method="{method}"` instead.'
        )
    derefed = Call(callback, args, kwargs)
    # The callback lives as long as the program, and must not keep the tracers of the call.
    structure = derefed.structure
    refuse_cycle(result_shape_dtypes)
    types, statics = eqx.partition(result_shape_dtypes, is_traced)
    # An array stands for its shape: a program keeps no array alive, and no tracer.
    types = jtu.tree_map(_as_shape, types)

    def run(arrays: list[Leaves]) -> Any:
        try:
            out = _run_callback(structure, arrays)
            refuse_cycle(out)
            out_arrays, out_statics = eqx.partition(out, eqx.is_array)
            if not (
                eqx.tree_equal(out_statics, statics)
                and _is_of_types(out_arrays, types, vmap_method in _ITEM_BY_ITEM)
            ):
                raise MismatchError(
                    "The callback of `filter_pure_callback` must return what "
                    f"`result_shape_dtypes` says: {eqx.tree_pformat(eqx.combine(types, statics))}; "
                    f"it returned {eqx.tree_pformat(out)}."
                )
            return out_arrays
        except Exception as e:
            # JAX passes on only the text of an exception; `explain` recovers the exception.
            raise CallbackFailed(e) from e

    try:
        arrays = jax.pure_callback(
            run, types, derefed.arrays, sharding=sharding, vmap_method=vmap_method
        )
        if _jax.is_evaluating():
            jax.block_until_ready(arrays)
    except jax.errors.JaxRuntimeError as e:
        explain(e, derefed.refs, derefed.values)
        raise
    return eqx.combine(arrays, statics)


# Under a `vmap` by another method, the callback is called once, and its results have axes in
# front.
_ITEM_BY_ITEM = None, "sequential", "sequential_unrolled"


def _is_of_types(arrays: Any, types: Any, exactly: bool) -> bool:
    """Whether JAX would take these results. What it says of others is "INTERNAL"."""
    arrays, treedef = jtu.tree_flatten(arrays)
    types, expected = jtu.tree_flatten(types)
    return treedef == expected and all(
        x.shape[0 if exactly else x.ndim - len(type.shape) :] == type.shape
        and jnp.result_type(x) == type.dtype
        for x, type in zip(arrays, types)
    )


def _as_shape(x: Any) -> jax.ShapeDtypeStruct:
    is_shape = isinstance(x, jax.ShapeDtypeStruct)
    return x if is_shape else jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))


@_trace.tidying
def _run_callback(structure: Structure, arrays: list[Leaves]) -> Any:
    """Runs the callback on refs that hold these values."""
    refs: dict[int, Ref] = {}
    trace = _jax.current_trace()
    with _trace.running_body("filter_pure_callback", (), trace, True, {}) as body:
        leaves = structure.leaves(arrays, refs)
        for ref in refs.values():
            # Which refs they stand for is unknown when the program runs.
            ref._body = body
        *args, kwargs, fn = structure.trees(leaves)
        out = fn(*args, **kwargs)
        _refuse_writes(refs.values())
    return out


def _refuse_writes(refs: Iterable[Ref]) -> None:
    for ref in refs:
        if ref._written:
            raise CarryError(
                f"A pure callback cannot write {describe(ref)}: "
                "JAX may call it more than once, or not at all. Return the new value, and "
                "write it outside the callback."
            )
