"""Everything used from the internals of JAX that has no public name.

No other file uses them. The trace rule built on them is in `_trace.py`.
"""

import os
import pathlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend.core
from jax._src import api, config, core, dtypes
from jax._src.array import ArrayImpl
from jax._src.interpreters.ad import JVPTracer
from jax._src.interpreters.batching import BatchTrace as BatchTrace, BatchTracer
from jax._src.lax.lax import _convert_element_type
from jax._src.traceback_util import api_boundary as api_boundary, register_exclusion
from jax._src.tree_util import none_leaf_registry


# JAX omits the frames of these files from tracebacks. It matches by prefix, so the package
# folder is enough.
register_exclusion(f"{pathlib.Path(__file__).parents[1]}{os.sep}")

# `trace_ctx.trace` is the innermost running trace; `eval_trace` is the bottom one.
trace_ctx, eval_trace = core.trace_ctx, core.eval_trace


# A ref holds its trace weakly: a strong reference would keep a finished trace alive, and
# `JAX_CHECK_TRACER_LEAKS` would rightly call that a leak.
TraceRef = Callable[[], Any]


def current_trace() -> Any:
    return trace_ctx.trace


def current_trace_ref() -> TraceRef:
    # Without a callback, CPython returns the same weakref object for every ref of a trace.
    trace = trace_ctx.trace
    # In JAX 0.12 there is none while a primitive computes the types of its results.
    return _nowhere if trace is None else weakref.ref(trace)


def _nowhere() -> None:
    return None


def is_evaluating() -> bool:
    """Whether no transform is running: the values here are arrays, not tracers."""
    return trace_ctx.trace is eval_trace


def chain(trace: Any) -> Iterator[Any]:
    while trace is not None:
        yield trace
        trace = getattr(trace, "parent_trace", None)


# The name of each kind of trace in messages. A kind that is not listed (JAX adds one now
# and then) is named by its class.
_NAMES_OF_TRACES = {
    "DynamicJaxprTrace": "a function that JAX stages out (jit, scan, cond, while_loop, "
    "checkpoint, ...)",
    "JVPTrace": "a function under forward-mode differentiation (jvp, linearize, jacfwd)",
    "LinearizeTrace": "a function that JAX differentiates (grad, vjp, linearize)",
    "JaxprTrace": "a function that JAX differentiates (grad, vjp, linearize)",
    "RematTrace": "a function under `jax.checkpoint`",
    "BatchTrace": "a function under vmap",
    "ShardMapTrace": "a function under shard_map",
}


def kind_of_trace(trace: Any) -> str:
    name = type(trace).__name__
    return _NAMES_OF_TRACES.get(name, f"a JAX trace of type {name}")


def staged_equations() -> Iterator[Any]:
    """The equations that the running staged trace has recorded so far.

    None under `jax.disable_jit`, where nothing is staged.
    """
    frame = getattr(trace_ctx.trace, "frame", None)
    for equation in () if frame is None else frame.tracing_eqns:
        # A weak reference, whose referent is `None` if nothing holds the results; an
        # equation with effects is stored directly (JAX 0.10.1 and later), or in a function
        # (JAX 0.10.0).
        if callable(equation):
            equation = equation()
        if equation is not None:
            yield equation


def eval_jaxpr(closed: Any, arrays: list[Any]) -> list[Any]:
    """Runs a program on arrays.

    As `jax.extend.core.jaxpr_as_fun`, but that one turns `jax_debug_nans` off.
    """
    return core.eval_jaxpr(closed.jaxpr, closed.consts, *arrays)


def one_by_one(jitted: Any) -> Callable[[Any], Any]:
    """Traces, and caches, like the `jax.jit` function `jitted`, but runs the operations one
    by one, as JAX does for `jax.checkpoint` outside `jit`.

    A program compiled as a whole may differ in the last bits, for example by fusing a
    product and a sum, and takes a hundred times as long to compile.
    """

    def run(arrays: Any) -> Any:
        if is_jit_disabled():
            return jitted(arrays)
        traced = jitted.trace(arrays)
        closed = traced.jaxpr
        # Closed-over values of a running trace come first.
        given = [*traced._consts, *jax.tree.leaves(arrays)]
        given = map(_as_array, given, closed.in_avals)
        # A result may be a constant of the program, which is not a JAX array.
        out = map(_as_array, eval_jaxpr(closed, list(given)), closed.out_avals)
        return jax.tree.unflatten(jax.tree.structure(traced.out_info), out)

    return run


def _as_array(x: Any, aval: Any) -> Any:
    if isinstance(x, jax.Array) or aval.dtype == jax.dtypes.float0:
        return x
    return _convert_element_type(x, aval.dtype, aval.weak_type)


# Under `jax_debug_nans` and `jax_debug_infs`, a per-thread hook checks the results of
# compiled programs. Where JAX turns the flag off temporarily (in `jnp.var`, in the batching
# of a jitted function, under `checkpoint`), it leaves the hook off for good (JAX 0.10 and
# 0.12). So our calls restore it.
debug_hook = api._post_hook_state.get_local


def restore_debug_hook(hook: Any) -> None:
    if debug_hook() is not hook:
        api._post_hook_state.set_local(hook)


def is_checking_results() -> bool:
    """Whether JAX checks the results of programs for NaNs or infinities."""
    return config.debug_nans.value or config.debug_infs.value


def is_jit_disabled() -> bool:
    return config.disable_jit.value


def is_concrete(x: Any) -> bool:
    """Whether the value of `x` is known, which it may be even for a tracer of `jvp`."""
    return core.is_concrete(x)


def is_tracer(x: Any) -> bool:
    return isinstance(x, core.Tracer)


def is_deleted(x: Any) -> bool:
    """Whether `x` is an array whose buffer is gone: it was donated, or deleted."""
    return isinstance(x, _Array) and not isinstance(x, core.Tracer) and x.is_deleted()


def as_weak(x: Any) -> Any:
    """The same array, weakly typed. JAX has no public way to make one from a given
    value."""
    return _convert_element_type(x, x.dtype, weak_type=True)


def has_tangent(x: Any) -> bool:
    """Whether `x` depends on an input of the innermost running `jvp`."""
    return isinstance(x, JVPTracer) and x._trace is trace_ctx.trace


def is_batched(x: Any) -> bool:
    """Whether `x` differs along the axis of the innermost running vmap."""
    return (
        isinstance(x, BatchTracer)
        and x._trace is trace_ctx.trace
        and x.batch_dim is not None
    )


def batch_axis(x: Any) -> int | None:
    """The axis along which the innermost running vmap maps `x`."""
    return x.batch_dim if is_batched(x) else None


def mapped_over(x: Any) -> tuple[bool, ...]:
    """For each innermost running vmap, from the inside out: whether `x` differs along its
    axis."""
    over = []
    trace = trace_ctx.trace
    while isinstance(trace, BatchTrace):
        mine = isinstance(x, BatchTracer) and x._trace is trace
        over.append(mine and x.batch_dim is not None)
        x = x.val if mine else x
        trace = trace.parent_trace
    return tuple(over)


def varies_over(aval: Any) -> frozenset[Any]:
    """The mesh axes of a running `shard_map` along which an array of this type may
    differ."""
    mat = getattr(aval, "mat", None)
    return frozenset() if mat is None else mat.varying


def split_of(aval: Any) -> tuple[Any, ...]:
    """How an array is split according to its type: for each of its axes, the explicit mesh
    axes that split it. `()` if it is not split."""
    sharding = getattr(aval, "sharding", None)
    spec = getattr(sharding, "spec", None) or ()
    return tuple(spec) if any(axes is not None for axes in spec) else ()


def typed_sharding(x: Any) -> Any:
    """The sharding of `x`, if its type has one; else `None`, and the compiler decides."""
    return jax.typeof(x).sharding if split_of(jax.typeof(x)) else None


def refuse_as_array(cls: type, refuse: Callable[[Any], Any]) -> None:
    """Makes JAX call `refuse(x)` when an `x` of type `cls` is used as an array.

    Otherwise JAX only says that the type is "not a valid JAX type". In these tables JAX
    looks up, for each type it knows, the abstract value and, for the operands of an eager
    operation, the conversion to an array.
    """
    core.pytype_aval_mappings[cls] = refuse
    dtypes.canonicalize_value_handlers[cls] = refuse


# As `jax.tree.flatten`, with `None` as a leaf.
flatten_with_none: Any = none_leaf_registry.flatten

# Public in JAX 0.12 too, though type checkers do not see it exported.
ClosedJaxpr = jax.extend.core.ClosedJaxpr  # pyright: ignore[reportPrivateImportUsage]

# The class of a JAX array that is not a tracer. `type(x) is ConcreteArray` takes a tenth of
# the time of `isinstance(x, jax.Array)`, which goes through a metaclass.
ConcreteArray = ArrayImpl
Tracer = core.Tracer
_Array = jax.Array
