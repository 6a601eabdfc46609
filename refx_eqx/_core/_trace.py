"""Which JAX trace is running, and may this ref be read or written here?

This is the only file that touches the internals of JAX.

JAX runs a Python function under a *trace*: the bottom one evaluates, a `jit`, `scan` or
`cond` stages a program, a `vmap` batches, a `grad` linearizes. Each trace knows the one
it was opened in, so the traces that are running form a chain, innermost first:

    DynamicJaxprTrace (scan)  ->  LinearizeTrace (grad)  ->  EvalTrace

Every ref belongs to the trace it was created in. The rules are:

1. A ref may be written only in its own trace, and only with a value that is alive there.
2. A ref may be read in its own trace; and from an inner one if every trace on the way is
   *transparent*: a `vmap`, or one that a lifted transform of ours opened and that does
   not cache its body.
3. Inside the body of a lifted transform, a ref that the transform carries has an inner
   name. Its outer name may not be touched there: the two would disagree.

Why rule 2 is so strict: JAX caches the traced body of a staged transform by the identity
of the function. A body that read a mutable ref would be silently stale when it runs again
after a write. Plain `jax.grad` is refused because no gradient would flow to the ref.
"""

import contextvars
import functools
import os
import pathlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ParamSpec, TypeVar

import jax
from jax._src import api, config, core
from jax._src.array import ArrayImpl
from jax._src.interpreters.ad import JVPTracer
from jax._src.interpreters.batching import BatchTrace, BatchTracer
from jax._src.lax.lax import _convert_element_type
from jax._src.traceback_util import (
    api_boundary as api_boundary,
    register_exclusion,
)
from jax._src.tree_util import default_registry, none_leaf_registry


__tracebackhide__ = True


P = ParamSpec("P")
T = TypeVar("T")


# JAX leaves the frames of these files out of a traceback: it compares by prefix, so the
# folder of the package is enough.
register_exclusion(f"{pathlib.Path(__file__).parents[1]}{os.sep}")

# A ref holds its trace weakly: a strong reference would keep a finished trace alive, and
# `JAX_CHECK_TRACER_LEAKS` would rightly call that a leak.
TraceRef = Callable[[], Any]


def current_trace() -> Any:
    return core.trace_ctx.trace


def current_trace_ref() -> TraceRef:
    # No callback, so CPython hands back one weakref object per trace, however many refs.
    trace = core.trace_ctx.trace
    # JAX 0.12 has none while it asks a primitive for the types of its results.
    return _nowhere if trace is None else weakref.ref(trace)


def _nowhere() -> None:
    return None


def is_evaluating() -> bool:
    """Whether no transform is running: the values here are arrays, not tracers."""
    return core.trace_ctx.trace is core.eval_trace


def _chain(trace: Any) -> Iterator[Any]:
    while trace is not None:
        yield trace
        trace = getattr(trace, "parent_trace", None)


class Body:
    """One body of a lifted transform, on one thread.

    - `depth`: the number of bodies that it runs in, itself included;
    - `asked`: what it asked of the identity of the refs that it carries, by their ids. See
        `_identity.py`.
    """

    __slots__ = (
        "asked",
        "carried",
        "depth",
        "name",
        "opened",
        "running",
        "transparent",
    )

    def __init__(
        self,
        name: str,
        carried: dict,
        transparent: bool,
        opened: list,
        asked: dict[int, set[Any]],
    ):
        self.name = name
        self.carried = carried
        self.transparent = transparent
        self.opened = opened
        self.asked = asked
        self.depth = len(thread.state.bodies) + 1
        self.running = True


class ThreadState:
    """What this library keeps of one thread.

    - `bodies`: the bodies of lifted transforms that run, outermost first;
    - `calls`: the opened calls whose transformed function is being dispatched.
    """

    __slots__ = ("bodies", "calls")

    def __init__(self):
        self.bodies: list[Body] = []
        self.calls: list[Any] = []


class _Thread(threading.local):
    # An object in one attribute, because it is the attributes of a `threading.local` that
    # take time.
    def __init__(self):
        self.state = ThreadState()


thread = _Thread()

# What may be written: `(predicate on a ref, where this is and what to do)`. A context
# variable, because an `asyncio` task has its own. (A thread begins with none.)
guards: contextvars.ContextVar[tuple[Any, ...]]
guards = contextvars.ContextVar("refx_eqx guards", default=())


class pushed:
    """Puts something on a list of the running thread, for the length of a `with` block.

    A class and not a generator: a signal may come just before the block is entered or after
    it is left, and a generator that is abandoned then takes off, when it is collected at
    last, whatever is on the list by then. What such a signal leaves on it, the function that
    it was in takes off: see `tidying`.
    """

    __slots__ = ("_depth", "_list", "item")

    def __init__(self, on: list[Any], item: Any):
        self._list = on
        self.item = item

    def __enter__(self) -> Any:
        self._depth = len(self._list)
        self._list.append(self.item)
        return self.item

    def __exit__(self, *_: Any) -> None:
        del self._list[self._depth :]


def tidying(fn: Callable[P, T]) -> Callable[P, T]:
    """`fn`, which leaves no body and no call on the lists of its thread, whatever comes."""

    @functools.wraps(fn)
    def tidied(*args: P.args, **kwargs: P.kwargs) -> T:
        state = thread.state
        bodies, calls = len(state.bodies), len(state.calls)
        try:
            return fn(*args, **kwargs)
        finally:
            # Without a call: CPython lets no signal in before these two.
            del state.bodies[bodies:]
            del state.calls[calls:]

    return tidied


class running_body(pushed):
    """Marks that the body of the lifted transform `name` runs, until the context ends.

    **Arguments:**

    - `name`: of the transform, for messages.
    - `carried`: the outer refs for which the body has inner ones.
    - `outer_trace`: the trace in which the transform was called.
    - `transparent`: whether refs that are not carried may be read from the body.
    - `asked`: where to note what it asks of the identity of the refs.
    """

    __slots__ = ("_hook",)

    def __init__(
        self,
        name: str,
        carried: Iterable[Any],
        outer_trace: Any,
        transparent: bool,
        asked: dict[int, set[Any]],
    ):
        opened = []
        for trace in _chain(current_trace()):
            if trace is outer_trace:
                break
            opened.append(trace)
        # Compare refs by identity: a subclass is free to define its own equality.
        by_id = {id(ref): ref for ref in carried}
        body = Body(name, by_id, transparent, opened, asked)
        super().__init__(thread.state.bodies, body)
        self._hook = debug_hook()

    def __exit__(self, *_: Any) -> None:
        super().__exit__()
        # Who keeps an inner ref keeps its body: not what that was about.
        body = self.item
        body.running = False
        body.opened.clear()
        body.carried.clear()
        restore_debug_hook(self._hook)


# What a trace is called in a message. A trace of a kind that is not listed here (JAX adds
# one now and then) is named by its class.
_KINDS = {
    "DynamicJaxprTrace": "a function that JAX stages out (jit, scan, cond, while_loop, "
    "checkpoint, ...)",
    "JVPTrace": "a function under forward-mode differentiation (jvp, linearize, jacfwd)",
    "LinearizeTrace": "a function that JAX differentiates (grad, vjp, linearize)",
    "JaxprTrace": "a function that JAX differentiates (grad, vjp, linearize)",
    "RematTrace": "a function under `jax.checkpoint`",
    "BatchTrace": "a function under vmap",
    "ShardMapTrace": "a function under shard_map",
}


def _kind(trace: Any) -> str:
    name = type(trace).__name__
    return _KINDS.get(name, f"a JAX trace of type {name}")


def _body_of(trace: Any) -> Body | None:
    for body in reversed(thread.state.bodies):
        if any(trace is opened for opened in body.opened):
            return body
    return None


def _where(trace: Any) -> str:
    body = _body_of(trace)
    return _kind(trace) if body is None else f"the body of `{body.name}`"


_ENDED = (
    "it was created inside a transform that has since ended, so its value is gone. "
    "Return the ref from the transformed function instead of keeping it elsewhere; and "
    "use the lifted transform (`rx.filter_vmap`, `rx.filter_jit`, ...): those of JAX and "
    "Equinox do not carry refs out."
)
# JAX does not mark a staged trace as ended, so this is also what a leaked ref hears; and
# the trace of a `custom_vjp` that is being staged out does not say what it was opened in.
_UNRELATED = (
    "it belongs to a trace that is not active here. If that trace has ended, return "
    "the ref from the transformed function instead of keeping it elsewhere; if it is still "
    "running, pass the ref as an argument to the function that uses it."
)


def why_not_readable(ref: Any, owner: TraceRef) -> str | None:
    """The reason why `ref`, of the trace `owner`, may not be read here; or `None`."""
    reason = _why_out_of_reach(ref, owner)
    if reason is not None:
        return reason
    for trace in _chain(core.trace_ctx.trace):
        if trace is owner():
            return None
        body = _body_of(trace)
        if body is None:
            if not isinstance(trace, BatchTrace):
                return (
                    f"it is used inside {_kind(trace)}, which does not carry refs. Use the "
                    "lifted transform of `refx_eqx` (`rx.filter_jit`, `rx.filter_grad`, "
                    "`rx.scan`, ...) and pass the ref, or the module that holds it, as an "
                    "argument. A third-party function takes `rx.snapshot(model)`, to read, "
                    "or `rx.Dag(model)`, to carry."
                )
        elif not body.transparent:
            return (
                f"it is used inside the body of `{body.name}`, but was not passed in: "
                "what a function reaches through a global name, a class, a static field, an "
                "attribute of a function or a plain Python object (`self`) is not carried. "
                "Pass the ref, or the module that holds it, as an argument. A plain object "
                "is no pytree: make it an `rx.Module`, or pass what it holds."
            )
    return _UNRELATED


def why_not_writable(ref: Any, owner: TraceRef) -> str | None:
    """The reason why `ref`, of the trace `owner`, may not be written here; or `None`."""
    reason = _why_out_of_reach(ref, owner)
    if reason is not None:
        return reason
    current = core.trace_ctx.trace
    if owner() is current:
        return None
    return (
        f"it is written inside {_where(current)}, and was created outside. Pass the ref, or "
        "the module that holds it, as an argument to a lifted transform of `refx_eqx` "
        "(`rx.filter_jit`, `rx.filter_grad`, `rx.filter_vmap`, ...), which writes it back."
    )


def _why_out_of_reach(ref: Any, owner: TraceRef) -> str | None:
    """The reason why `ref` may be neither read nor written here, by any rule."""
    for body in reversed(thread.state.bodies):
        if id(ref) in body.carried:
            return (
                f"`{body.name}` carries this ref: inside its function there is an inner "
                "ref for it, and this is the outer one, whose value does not follow. Use "
                f"the ref that `{body.name}` hands to the function, not the outer name."
            )
    owner_trace = owner()
    if owner_trace is core.trace_ctx.trace:
        return None
    if owner_trace is None or not owner_trace.is_valid():
        return _ENDED
    # The bottom trace always runs, also under one that does not say in which it was opened
    # (that of an eager `shard_map`).
    running = [*_chain(core.trace_ctx.trace), core.eval_trace]
    if all(trace is not owner_trace for trace in running):
        return _UNRELATED
    return None


def undisturbed_state() -> ThreadState | None:
    """The state of this thread if nothing is going on in it: no transform, no body of a
    lifted one, no `mutable`. Else `None`."""
    state = thread.state
    if _context.trace is _eval_trace and not state.bodies and not _get_guards():
        return state
    return None


# Names of this module are found sooner than those in `core`.
_context, _eval_trace, _get_guards = core.trace_ctx, core.eval_trace, guards.get


def is_at_home(owner: TraceRef) -> bool:
    """The common case, decided quickly: `owner` runs, and no lifted body does."""
    return owner() is core.trace_ctx.trace and not thread.state.bodies


def outlives(owner: TraceRef, trace: TraceRef) -> bool:
    """Whether `owner` ends no sooner than `trace` does."""
    mine = owner()
    return mine is not None and any(mine is x for x in _chain(trace()))


def is_inner(owner: TraceRef) -> bool:
    """Whether `owner` is a trace that a lifted transform of ours opened, and runs."""
    return _body_of(owner()) is not None


def why_not_alive(value: Any) -> str | None:
    """The reason why the array `value` may not be kept here; or `None`.

    A tracer is alive in the trace that made it and in those opened inside it.
    """
    if not isinstance(value, core.Tracer):
        return None
    trace = value._trace
    if trace is core.trace_ctx.trace:
        return None
    if any(trace is running for running in _chain(core.trace_ctx.trace)):
        return None
    return (
        f"the value is a tracer of {_kind(trace)} that is not active here. Return the "
        "value from that function instead."
    )


def staged_equations() -> Iterator[Any]:
    """The equations that the running staged trace has recorded so far.

    None under `jax.disable_jit`, where nothing is staged.
    """
    frame = getattr(core.trace_ctx.trace, "frame", None)
    for equation in () if frame is None else frame.tracing_eqns:
        # A weak reference, whose referent is `None` if nothing holds the results; an
        # equation with effects as it is (JAX 0.10.1 on), or in a function (JAX 0.10.0).
        if callable(equation):
            equation = equation()
        if equation is not None:
            yield equation


def eval_jaxpr(closed: Any, arrays: list[Any]) -> list[Any]:
    """Runs a program on arrays.

    As `jax.extend.core.jaxpr_as_fun`, but that one does so with `jax_debug_nans` off.
    """
    return core.eval_jaxpr(closed.jaxpr, closed.consts, *arrays)


# What checks the results of compiled programs under `jax_debug_nans` and `jax_debug_infs`
# is a hook, which JAX sets by thread. Where JAX switches the flag off for a moment (in
# `jnp.var`, in the batching of a jitted function, under `checkpoint`), it leaves the hook
# off for good: seen in JAX 0.10 and 0.12. So a call of ours puts it back.
debug_hook = api._post_hook_state.get_local


def restore_debug_hook(hook: Any) -> None:
    if debug_hook() is not hook:
        api._post_hook_state.set_local(hook)


def is_checking_results() -> bool:
    """Whether JAX looks for NaNs or infinities in what a program returns."""
    return config.debug_nans.value or config.debug_infs.value


def is_jit_disabled() -> bool:
    return config.disable_jit.value


def is_concrete(x: Any) -> bool:
    """Whether the value of `x` is known: also that of a tracer of `jvp` may be."""
    return core.is_concrete(x)


def is_tracer(x: Any) -> bool:
    return isinstance(x, core.Tracer)


def is_deleted(x: Any) -> bool:
    """Whether `x` is an array whose buffer is gone: it was donated, or deleted."""
    return isinstance(x, _Array) and not isinstance(x, core.Tracer) and x.is_deleted()


def as_weak(x: Any) -> Any:
    """The same array, weakly typed. JAX has no public way to make one of a given value."""
    return _convert_element_type(x, x.dtype, weak_type=True)


def has_tangent(x: Any) -> bool:
    """Whether `x` depends on an input of the `jvp` that is running innermost."""
    return isinstance(x, JVPTracer) and x._trace is core.trace_ctx.trace


def is_batched(x: Any) -> bool:
    """Whether `x` differs along the axis of the vmap that is running innermost."""
    return (
        isinstance(x, BatchTracer)
        and x._trace is core.trace_ctx.trace
        and x.batch_dim is not None
    )


def batch_axis(x: Any) -> int | None:
    """The axis along which the vmap that is running innermost maps `x`."""
    return x.batch_dim if is_batched(x) else None


def mapped_over(x: Any) -> tuple[bool, ...]:
    """For each of the innermost vmaps that are running, from the inside out: whether `x`
    differs along its axis."""
    over = []
    trace = core.trace_ctx.trace
    while isinstance(trace, BatchTrace):
        mine = isinstance(x, BatchTracer) and x._trace is trace
        over.append(mine and x.batch_dim is not None)
        x = x.val if mine else x
        trace = trace.parent_trace
    return tuple(over)


def varies_over(aval: Any) -> frozenset[Any]:
    """The axes of the mesh of a running `shard_map` along which an array of this type may
    differ."""
    mat = getattr(aval, "mat", None)
    return frozenset() if mat is None else mat.varying


def split_of(aval: Any) -> tuple[Any, ...]:
    """How the type of an array says that it is split: for each of its axes, by which axes of
    a mesh of explicit axes. `()` if it is not."""
    sharding = getattr(aval, "sharding", None)
    spec = getattr(sharding, "spec", None) or ()
    return tuple(spec) if any(axes is not None for axes in spec) else ()


def typed_sharding(x: Any) -> Any:
    """How `x` is split, if its type says so; else `None`, and the compiler decides."""
    return jax.typeof(x).sharding if split_of(jax.typeof(x)) else None


def refuse_as_array(cls: type, refuse: Callable[[Any], Any]) -> None:
    """Makes JAX call `refuse(x)` when it meets an `x` of type `cls` as an array.

    Without it JAX says that the type is "not a valid JAX type", and no more. The table is
    the one in which JAX looks up the abstract value of each type it knows.
    """
    core.pytype_aval_mappings[cls] = refuse


# As `jax.tree.flatten`: with `None` as a leaf; and with everything as a leaf but the tuples,
# lists and dicts of Python.
flatten_with_none: Any = none_leaf_registry.flatten
flatten_containers: Any = type(default_registry)(
    enable_none=True,
    enable_tuple=True,
    enable_namedtuple=False,
    enable_list=True,
    enable_dict=True,
).flatten

# The class of a JAX array that is not a tracer. `type(x) is ConcreteArray` takes a tenth of
# the time of `isinstance(x, jax.Array)`, which goes through a metaclass.
ConcreteArray = ArrayImpl
Tracer = core.Tracer
_Array = jax.Array
