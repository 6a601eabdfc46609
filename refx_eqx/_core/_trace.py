"""Which JAX trace is running, and may this ref be read or written here?

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
import threading
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

from ._jax import (
    BatchTrace,
    chain,
    current_trace,
    debug_hook,
    eval_trace,
    kind_of_trace,
    restore_debug_hook,
    trace_ctx,
    Tracer,
    TraceRef,
)


__tracebackhide__ = True


P = ParamSpec("P")
T = TypeVar("T")


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
        for trace in chain(current_trace()):
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


def _body_of(trace: Any) -> Body | None:
    for body in reversed(thread.state.bodies):
        if any(trace is opened for opened in body.opened):
            return body
    return None


def _where_it_runs(trace: Any) -> str:
    body = _body_of(trace)
    return kind_of_trace(trace) if body is None else f"the body of `{body.name}`"


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
    "running, pass the ref as an argument to the function that uses it; and give a callback "
    "the value: `jax.debug.callback(fn, ref.value)`."
)


def why_not_readable(ref: Any, owner: TraceRef) -> str | None:
    """The reason why `ref`, of the trace `owner`, may not be read here; or `None`."""
    reason = _why_out_of_reach(ref, owner)
    if reason is not None:
        return reason
    for trace in chain(trace_ctx.trace):
        if trace is owner():
            return None
        body = _body_of(trace)
        if body is None:
            if not isinstance(trace, BatchTrace):
                return (
                    f"it is used inside {kind_of_trace(trace)}, which does not carry refs. Use the "
                    "lifted transform of `refx_eqx` (`rx.filter_jit`, `rx.filter_grad`, "
                    "`rx.scan`, ...) and pass the ref, or the module that holds it, as an "
                    "argument. For a third-party function, make `rx.snapshot(model)` outside it, "
                    "to read, or pass `rx.Dag(model)`, to carry."
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
    current = trace_ctx.trace
    if owner() is current:
        return None
    return (
        f"it is written inside {_where_it_runs(current)}, and was created outside. Pass the ref, or "
        "the module that holds it, as an argument to a lifted transform of `refx_eqx` "
        "(`rx.filter_jit`, `rx.filter_grad`, `rx.filter_vmap`, ...), which writes it back."
    )


def _why_out_of_reach(ref: Any, owner: TraceRef) -> str | None:
    """The reason why `ref` may be neither read nor written here, by any rule."""
    body = ref._body
    if body is not None and not body.running:
        return (
            f"`{body.name}` handed it to its function, which has returned, so its value is gone. "
            "Return the ref from that function instead of keeping it elsewhere; and give "
            "a callback the value: `jax.debug.callback(fn, ref.value)`."
        )
    for body in reversed(thread.state.bodies):
        if id(ref) in body.carried:
            return (
                f"`{body.name}` carries this ref: inside its function there is an inner "
                "ref for it, and this is the outer one, whose value does not follow. Use "
                f"the ref that `{body.name}` hands to the function, not the outer name."
            )
    owner_trace = owner()
    if owner_trace is trace_ctx.trace:
        return None
    if owner_trace is None or not owner_trace.is_valid():
        return _ENDED
    # The bottom trace always runs, also under one that does not say in which it was opened
    # (that of an eager `shard_map`).
    running = [*chain(trace_ctx.trace), eval_trace]
    if all(trace is not owner_trace for trace in running):
        return _UNRELATED
    return None


def undisturbed_state() -> ThreadState | None:
    """The state of this thread if nothing is going on in it: no transform, no body of a
    lifted one, no `mutable`. Else `None`."""
    state = thread.state
    if trace_ctx.trace is eval_trace and not state.bodies and not guards.get():
        return state
    return None


def is_at_home(owner: TraceRef) -> bool:
    """The common case, decided quickly: `owner` runs, and no lifted body does."""
    return owner() is trace_ctx.trace and not thread.state.bodies


def outlives(owner: TraceRef, trace: TraceRef) -> bool:
    """Whether `owner` ends no sooner than `trace` does."""
    mine = owner()
    return mine is not None and any(mine is x for x in chain(trace()))


def is_inner(owner: TraceRef) -> bool:
    """Whether `owner` is a trace that a lifted transform of ours opened, and runs."""
    return _body_of(owner()) is not None


def why_not_alive(value: Any) -> str | None:
    """The reason why the array `value` may not be kept here; or `None`.

    A tracer is alive in the trace that made it and in those opened inside it.
    """
    if not isinstance(value, Tracer):
        return None
    trace = value._trace
    if trace is trace_ctx.trace:
        return None
    if any(trace is running for running in chain(trace_ctx.trace)):
        return None
    return (
        f"the value is a tracer of {kind_of_trace(trace)} that is not active here. Return the "
        "value from that function instead."
    )
