"""Which JAX trace is running, and may this ref be read or written here?

JAX runs a Python function under a *trace*: the bottom one evaluates, a `jit`, `scan` or
`cond` stages a program, a `vmap` batches, a `grad` linearizes. Each trace knows the one it
was opened in, so the running traces form a chain, innermost first:

    DynamicJaxprTrace (scan)  ->  LinearizeTrace (grad)  ->  EvalTrace

Every ref belongs to the trace it was created in. The rules are:

1. A ref may be written only in its own trace, and only with a value that is alive there.
2. A ref may be read in its own trace; and from an inner one if every trace on the way is
    *transparent*: a `vmap`, or a trace opened by one of our lifted transforms that does not
    cache its body.
3. Inside the body of a lifted transform, a ref that the transform carries has an inner
   name. Its outer name must not be touched there: the two would disagree.

Why rule 2 is so strict: JAX caches the traced body of a staged transform by the identity of
the function. A body that reads a mutable ref would be silently stale when run again after a
write. Plain `jax.grad` is refused because no gradient would flow to the ref.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

from ._blocks import Blocks
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


P = ParamSpec("P")
T = TypeVar("T")


@dataclasses.dataclass(slots=True, eq=False)
class Body:
    """One body of a lifted transform, on one thread.

    - `depth`: the number of bodies it runs in, including itself;
    - `asked`: what it asked about the identity of its refs, by their ids. See
        `_identity.py`.
    """

    name: str
    carried: dict[int, Any]
    transparent: bool
    opened: list[Any]
    asked: dict[int, set[Any]]
    depth: int
    running: bool = True


class ThreadState:
    """The per-thread state of this library.

    - `bodies`: the running bodies of lifted transforms, outermost first;
    - `calls`: the opened calls whose transformed function is being dispatched.
    """

    __slots__ = ("bodies", "calls")

    def __init__(self):
        self.bodies: list[Body] = []
        self.calls: list[Any] = []


class _Thread(threading.local):
    # One object in one attribute, because attribute access on a `threading.local` is slow.
    def __init__(self):
        self.state = ThreadState()


thread = _Thread()

# What may be written, and where this is said: see `_filters/_guard.py`.
guards: Blocks[Any] = Blocks("refx_eqx guards")


class pushed:
    """Pushes an item on a list of the current thread, for the duration of a `with` block.

    A class and not a generator: a signal may come just before the block is entered or after
    it is left, and an abandoned generator would, when it is finally collected, pop whatever
    is on the list by then. An item left by such a signal is removed by the enclosing
    function: see `tidying`.
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
    """Wraps `fn` so that it never leaves a body or call on the lists of its thread."""

    @functools.wraps(fn)
    def tidied(*args: P.args, **kwargs: P.kwargs) -> T:
        state = thread.state
        bodies, calls = len(state.bodies), len(state.calls)
        try:
            return fn(*args, **kwargs)
        finally:
            # Without a call, so CPython handles no signal before these two.
            del state.bodies[bodies:]
            del state.calls[calls:]

    return tidied


class running_body(pushed):
    """Marks that the body of the lifted transform `name` runs, until the context ends.

    **Arguments:**

    - `name`: the name of the transform, for messages.
    - `carried`: the outer refs for which the body has inner ones.
    - `outer_trace`: the trace in which the transform was called.
    - `transparent`: whether refs that are not carried may be read from the body.
    - `asked`: where to note what it asks about the identity of the refs.
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
        # Compares refs by identity: a subclass may define its own equality.
        by_id = {id(ref): ref for ref in carried}
        bodies = thread.state.bodies
        body = Body(name, by_id, transparent, opened, asked, len(bodies) + 1)
        super().__init__(bodies, body)
        self._hook = debug_hook()

    def __exit__(self, *_: Any) -> None:
        super().__exit__()
        # An inner ref that is kept keeps its body alive, but not the refs of the body.
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


_RETURN_IT = (
    "return the ref from the transformed function instead of keeping it elsewhere; and use "
    "the lifted transform (`rx.filter_vmap`, `rx.filter_jit`, ...): the transforms of JAX "
    "and Equinox do not carry refs out."
)
_ENDED = (
    "it was created inside a transform that has since ended, so its value is gone: "
    f"{_RETURN_IT}"
)
# JAX does not mark a staged trace as ended, so a leaked ref gets this message too; and the
# trace of a `custom_vjp` that is being staged out does not know its parent.
_UNRELATED = (
    f"it belongs to a trace that is not active here. If that trace has ended, {_RETURN_IT} If "
    "it is still running, pass the ref as an argument to the function that uses it; and "
    "give a callback the value: `jax.debug.callback(fn, ref.value)`."
)


def why_not_readable(ref: Any, owner: TraceRef) -> str | None:
    """The reason why `ref`, of the trace `owner`, cannot be read here; or `None`."""
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
                    "to read with `[...]`, or pass `rx.Dag(model)`, to carry."
                )
        elif not body.transparent:
            return (
                f"it is used inside the body of `{body.name}`, but was not passed in: refs "
                "reached through a global name, a class, a static field, an attribute of "
                "a function or a plain Python object (`self`) are not carried. Pass the "
                "ref, or the module that holds it, as an argument. A plain object is not "
                "a pytree: make it an `rx.Module`, or pass its contents; nor is a list that "
                "holds itself, or a dict whose keys cannot be sorted."
            )
    return _UNRELATED


def why_not_writable(ref: Any, owner: TraceRef) -> str | None:
    """The reason why `ref`, of the trace `owner`, cannot be written here; or `None`."""
    reason = _why_out_of_reach(ref, owner)
    if reason is not None:
        return reason
    current = trace_ctx.trace
    if owner() is current:
        return None
    return (
        f"it is written inside {_where_it_runs(current)}, but was created outside. Pass "
        "the ref, or the module that holds it, as an argument to a lifted transform of "
        "`refx_eqx` (`rx.filter_jit`, `rx.filter_grad`, `rx.filter_vmap`, ...), which "
        "writes it back."
    )


def _why_out_of_reach(ref: Any, owner: TraceRef) -> str | None:
    """The reason why `ref` may be neither read nor written here, by any rule."""
    body = ref._body
    if body is not None and not body.running:
        return (
            f"`{body.name}` passed it to its function, which has returned, so its value is "
            "gone. Return the ref from that function instead of keeping it elsewhere; and "
            "give a callback the value: `jax.debug.callback(fn, ref.value)`."
        )
    for body in reversed(thread.state.bodies):
        if id(ref) in body.carried:
            return (
                f"`{body.name}` carries this ref: its function has an inner ref for it, "
                "but this is the outer one, whose value is not updated. Use the ref that "
                f"`{body.name}` passes to the function, not the outer name."
            )
    owner_trace = owner()
    if owner_trace is trace_ctx.trace:
        return None
    if owner_trace is None or not owner_trace.is_valid():
        return _ENDED
    # The bottom trace always runs, even under a trace that does not know its parent (that
    # of an eager `shard_map`).
    running = [*chain(trace_ctx.trace), eval_trace]
    if all(trace is not owner_trace for trace in running):
        return _UNRELATED
    return None


def undisturbed_state() -> ThreadState | None:
    """The state of this thread if it is idle: no transform, no lifted body, no `mutable`.
    Else `None`."""
    state = thread.state
    if trace_ctx.trace is not eval_trace or state.bodies:
        return None
    return None if guards.begun() and guards.running() else state


def is_at_home(owner: TraceRef) -> bool:
    """The common case, decided quickly: `owner` is running, and no lifted body is."""
    return owner() is trace_ctx.trace and not thread.state.bodies


def outlives(owner: TraceRef, trace: TraceRef) -> bool:
    """Whether `owner` ends no sooner than `trace` does."""
    mine = owner()
    return mine is not None and any(mine is x for x in chain(trace()))


def is_inner(owner: TraceRef) -> bool:
    """Whether `owner` is a running trace opened by one of our lifted transforms."""
    return _body_of(owner()) is not None


def why_not_alive(value: Any) -> str | None:
    """The reason why the array `value` cannot be kept here; or `None`.

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
