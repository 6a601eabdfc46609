"""`filter_custom_jvp` and `filter_custom_vjp`: derivatives given by rules.

JAX calls a rule in place of the function, when it likes: while it differentiates, or later,
when the function was staged out and the call is long over. So what the rules share is not
the opened call, which holds the refs and arrays of the caller, but a `_Frame`: the structure
of the call, on which the function and each rule are run with arrays of their own.
"""

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .. import _trace
from .._deref import path_text
from .._errors import describe, StructureError
from .._functionalize import call, Opened, run_body
from .._lifted import name_of
from .._ref import Ref
from .._structure import join_value, Outcome, OutcomeInfo, split_value
from ._backward import (
    BackwardWrite,
    Channelled,
    decode,
    encode,
    updates_by_number,
    with_outer_channels,
    with_updates,
    without_channels,
)
from ._differentiable import first_of, is_inexact
from ._layout import Layout, layout_of_args, layout_of_first, result_of, Sparse


_trace.register_exclusion(__file__)

SymbolicZero = jax.custom_derivatives.SymbolicZero


class _Rules(NamedTuple):
    """The function and its rules: the callable of the call, so that what any of them closes
    over is carried. A call of it calls the one that is wanted."""

    fn: Any
    first: Any
    second: Any = None

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return _wanted.stack[-1](self, *args, **kwargs)


class _Wanted(threading.local):
    def __init__(self):
        self.stack: list[Callable] = []


_wanted = _Wanted()


@contextlib.contextmanager
def _calling(rule: Callable) -> Iterator[None]:
    _wanted.stack.append(rule)
    try:
        yield
    finally:
        _wanted.stack.pop()


class _Frame:
    """What the function and its rules are run on. Holds no array and, strongly, no ref.

    - `info`: what the function did (or the rule that ran in its place).
    """

    def __init__(self, name: str, fn: Any, opened: Opened):
        self.name = name
        self.fn_name = name_of(fn)
        self.structure = opened.structure
        self.spans = opened.spans
        self.info: OutcomeInfo | None = None
        self._trace = weakref.ref(opened.trace)
        self._refs = [weakref.ref(ref) for ref in opened.refs]
        # The structure holds functions weakly, and a rule may run after the call.
        self._alive = [static.obj for static in opened.structure.statics]

    def run(self, arrays: list[Any], rule: Callable) -> Outcome:
        __tracebackhide__ = True
        refs = [ref for ref in (weak() for weak in self._refs) if ref is not None]
        with (
            _trace.running_body(self.name, refs, self._trace(), False),
            _calling(rule),
        ):
            return run_body(self.structure, self.name, arrays)

    def run_forward(self, arrays: list[Any], rule: Callable, which: str) -> Outcome:
        """As `run`, for what is to do the same as the function: return a result of the same
        structure, and write the same refs."""
        __tracebackhide__ = True
        outcome = self.run(arrays, rule)
        info, earlier = outcome.info, self.info
        self.info = info
        if earlier is None:
            return outcome
        if earlier.result != info.result or earlier.carried != info.carried:
            raise StructureError(
                f"`{self.name}`: {which} of `{self.fn_name}` must return a result of the "
                "same structure as the function does: of the same static values, and the "
                "same refs."
            )
        if earlier.written != info.written:
            differing = {i for i, _ in earlier.written} ^ {i for i, _ in info.written}
            named = ", ".join(self.describe(i) for i in sorted(differing))
            raise StructureError(
                f"`{self.name}`: {which} of `{self.fn_name}` must write the refs that the "
                f"function writes, and no others. It differs in {named or 'a value'}."
            )
        return outcome

    def describe(self, number: int) -> str:
        note, slot = self.structure.notes[number], self.structure.slots[number]
        return describe(note.name, slot.collection)

    def ref_at(self, position: int) -> int | None:
        """The number of the ref that an array is of; `None` for one beside refs."""
        for number, (start, stop) in enumerate(self.spans):
            if start <= position < stop:
                return number
        return None

    def refuse_perturbed(self, positions: list[int], written: set[int]) -> None:
        """Refuses a derivative by what is not differentiated. A ref that is written is
        state, and has none."""
        __tracebackhide__ = True
        for i in positions:
            number = self.ref_at(i)
            if number in written:
                continue
            what = "an array" if number is None else self.describe(number)
            raise StructureError(
                f"`{self.name}`: the rule of `{self.fn_name}` gives no derivative by {what}, "
                "which is differentiated here. Pass it where the rule has a derivative for "
                "it, or exclude it: `rx.filter_grad(..., wrt=...)`, or "
                "`jax.lax.stop_gradient`."
            )


class _Custom:
    """What the two have in common: a function with rules, which is a pytree of these."""

    def __init__(self, fn: Any):
        self.__wrapped__ = fn
        self._first: Any = None
        self._second: Any = None

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)

        def unflatten(_: None, children: tuple) -> Any:
            self = cls(children[0])
            _, self._first, self._second = children
            return self

        jtu.register_pytree_node(
            cls, lambda x: ((x.__wrapped__, x._first, x._second), None), unflatten
        )

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self
        method: Any = self
        return eqx.Partial(method, instance)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({name_of(self.__wrapped__)})"

    def _rules(self) -> _Rules:
        return _Rules(self.__wrapped__, self._first, self._second)


def _array_of(x: Any) -> Any:
    """Numbers of Python in a ref are arrays to JAX."""
    return x if eqx.is_array(x) else jnp.asarray(x)


def _symbolic_zero(x: Any) -> Any:
    return SymbolicZero(jax.typeof(x).to_tangent_aval())


def _derivative(x: Any, inexact: bool) -> Any:
    """A tangent or cotangent as the user sees it: `None` for a symbolic zero."""
    return None if isinstance(x, SymbolicZero) or not inexact else x


class filter_custom_jvp(_Custom):
    """As `equinox.filter_custom_jvp`, by reference.

    What is written to a ref, by the function or by the rule that runs in its place, is
    written to the caller's ref, once. It is not differentiated: return what is.

    !!! Example

        ```python
        import jax.numpy as jnp
        import refx_eqx as rx

        @rx.filter_custom_jvp
        def f(w, x, *, uses):
            uses.value += 1
            return w.value * x

        @f.def_jvp
        def f_jvp(primals, tangents, *, uses):
            w, x = primals
            t_w, t_x = tangents
            assert t_x is None  # not differentiated below
            return f(w, x, uses=uses), 10 * t_w.value * x

        w, uses = rx.Ref(jnp.array(2.0), "params"), rx.Ref(jnp.array(0))
        grads = rx.filter_grad(f)(w, jnp.array(3.0), uses=uses)
        assert grads.value == 30.0 and uses.value == 1
        ```

    `def_jvp(rule)` sets the rule: `rule(primals, tangents, **kwargs)` returns `(out,
    tangent_out)`.

    - `primals` are the positional arguments. They hold refs, which the rule may read and
        write; it must write the refs that the function writes, and no others.
    - `tangents` has the structure of `rx.deref(primals)`, with `None` for what has no
        tangent, or one of zero.
    - `tangent_out` is to have the structure of `rx.deref(out)`, with `None` for zero.

    **Arguments:**

    - `fn`: the function. Its keyword arguments, and what it and the rule close over, are
        not differentiated.

    **Raises:**

    When called:

    - `RuntimeError`: if it has no rule.
    - `StructureError`: if the rule does not return or write what the function does, or if
        something is differentiated that the rule has no tangent for.
    """

    def def_jvp(self, fn_jvp: Callable) -> Callable:
        """Sets the rule, and returns it."""
        self._first = fn_jvp
        return fn_jvp

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if self._first is None:
            raise RuntimeError(
                f"`def_jvp` was not yet called for `{name_of(self.__wrapped__)}`."
            )
        n = len(args)

        def transform(opened: Opened) -> Outcome:
            __tracebackhide__ = True
            plain, channels = without_channels(opened)
            frame = _Frame("filter_custom_jvp", self.__wrapped__, plain)
            out, updates = _custom_jvp(frame, layout_of_args(plain, n))(plain.arrays)
            assert frame.info is not None
            outcome = Outcome(out, jax.lax.stop_gradient(updates), frame.info)
            return with_outer_channels(outcome, channels)

        return call(self._rules(), args, kwargs, transform)


def _custom_jvp(frame: _Frame, layout: Layout) -> Callable:
    positions = set(layout.positions())

    @jax.custom_jvp
    def flat(arrays: list[Any]) -> tuple[list[Any], list[Any]]:
        __tracebackhide__ = True
        outcome = frame.run_forward(
            arrays, lambda rules, *a, **k: rules.fn(*a, **k), "the function"
        )
        return _arrays_of(outcome)

    def rule(primals: tuple, tangents: tuple) -> tuple:
        __tracebackhide__ = True
        (arrays,), (given,) = primals, tangents
        given = {
            i: _derivative(t, is_inexact(x))
            for i, (t, x) in enumerate(zip(given, arrays))
        }
        found: dict[str, Any] = {}

        def run(rules: _Rules, *args: Any, **kwargs: Any) -> Any:
            __tracebackhide__ = True
            pair = rules.first(args, layout.fill(given), **kwargs)
            out, found["tangents"] = _pair(frame, pair, "the rule", "tangent_out")
            return out

        outcome = frame.run_forward(arrays, run, "the rule")
        frame.refuse_perturbed(
            [i for i, t in given.items() if t is not None and i not in positions],
            {i for i, _ in outcome.info.written},
        )
        result = result_of(frame, outcome, arrays)
        t_out = Sparse(
            result.layout.read(found["tangents"], "The tangents of the rule")
        )
        out, updates = _arrays_of(outcome)
        t_made = [
            _symbolic_zero(x) if t_out[i] is None else t_out[i]
            for i, x in zip(result.made, out)
        ]
        return (out, updates), (t_made, [_symbolic_zero(x) for x in updates])

    flat.defjvp(rule, symbolic_zeros=True)
    return flat


def _arrays_of(outcome: Outcome) -> tuple[list[Any], list[Any]]:
    out, updates = outcome.out, outcome.updates
    return [_array_of(x) for x in out], [_array_of(x) for x in updates]


def _pair(frame: _Frame, result: Any, which: str, second: str) -> tuple:
    __tracebackhide__ = True
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(
            f"`{frame.name}`: {which} of `{frame.fn_name}` must return a pair "
            f"`(out, {second})`."
        )
    return result


class _Residuals:
    """What the forward rule hands to the backward rule: arrays, and all the rest."""

    __slots__ = ("arrays", "rest")

    def __init__(self, arrays: Any, rest: Any):
        self.arrays = arrays
        self.rest = rest


jtu.register_pytree_node(
    _Residuals,
    lambda x: ((x.arrays,), x.rest),
    lambda rest, children: _Residuals(children[0], rest),
)


@dataclasses.dataclass(eq=False)
class _Forward:
    """What the backward rule has to know of the forward rule, beside arrays.

    - `perturbed`: which of the flat arrays are differentiated; `flags`: the same as a tree;
    - `statics`: what of the residuals is not an array;
    - `layout`: of the result; `made`: where the arrays that the rule returned are in it, and
        whether each has a derivative;
    - `written`: the numbers of the refs that it wrote.
    """

    perturbed: list[bool]
    flags: Any
    statics: Any
    layout: Layout
    made: list[tuple[int, bool]]
    written: set[int]


class filter_custom_vjp(_Custom):
    """As `equinox.filter_custom_vjp`, by reference. The backward rule too may write a ref.

    !!! Example

        ```python
        import jax.numpy as jnp
        import refx_eqx as rx

        @rx.filter_custom_vjp
        def watch(x, largest):
            return x

        @watch.def_fwd
        def watch_fwd(perturbed, x, largest):
            return x, None

        @watch.def_bwd
        def watch_bwd(residuals, grad, perturbed, x, largest):
            largest.value = jnp.maximum(largest.value, jnp.max(jnp.abs(grad)))
            return grad

        def loss(w, largest, x):
            return jnp.sum(watch(w.value * x, largest) ** 2)

        w, largest = rx.Ref(jnp.array(2.0), "params"), rx.Ref(jnp.array(0.0), "fp8")
        grads = rx.filter_grad(loss)(w, largest, jnp.array([1.0, 3.0]))
        assert grads.value == 40.0
        assert largest.value == 12.0  # the gradient of `w.value * x` is [4, 12]
        ```

    `def_fwd(rule)` and `def_bwd(rule)` set the rules, with the arguments that they have in
    Equinox:

    - `fwd(perturbed, vjp_arg, *args, **kwargs)` returns `(out, residuals)`. `perturbed` has
        the structure of `rx.deref(vjp_arg)`, with a bool for each leaf. `fwd` must write the
        refs that the function writes, and no others. The residuals are any pytree without
        refs: take their values.
    - `bwd(residuals, grad_out, perturbed, vjp_arg, *args, **kwargs)` returns the gradient:
        of the structure of `rx.deref(vjp_arg)`, with `None` for zero. `grad_out` has the
        structure of `rx.deref(out)`, with `None` for zero.

    What the function and the forward rule write is not differentiated: return what is.

    **What the backward rule may do with refs.** It may write any ref that it is given or
    closes over, if the derivative is taken by [`refx_eqx.filter_grad`][] or
    [`refx_eqx.filter_value_and_grad`][], and that function carries the ref. The value is
    there when these return; under `filter_jit`, `scan`, `cond`, `filter_vmap` and
    `filter_checkpoint` too. The backward pass goes through the calls in reverse order. At
    its beginning, the refs of a collection of which some ref is written have the values that
    they have at the end of the function; each backward rule sees what those before it have
    written. All other refs have, in a backward rule, the values that they had when the
    function was called. A write keeps shape and dtype. Under `filter_vmap`, a ref that is
    broadcast is written with one value for all lanes, such as one of `jax.lax.pmax`.

    What it costs: the function that is differentiated is traced once more, when a backward
    rule is found to write; and each ref of that collection takes twice its memory until the
    backward pass is over.

    **Arguments:**

    - `fn`: the function. Only the first argument has a gradient.

    **Raises:**

    When called:

    - `RuntimeError`: if a rule is missing.

    When differentiated:

    - `StructureError`: if the forward rule does not return or write what the function does;
        if something other than the first argument is differentiated, and is no state that a
        rule writes; if a ref is written in a backward pass that cannot bring the value out.
    """

    def def_fwd(self, fn_fwd: Callable) -> Callable:
        """Sets the forward rule, and returns it."""
        self._first = fn_fwd
        return fn_fwd

    def def_bwd(self, fn_bwd: Callable) -> Callable:
        """Sets the backward rule, and returns it."""
        self._second = fn_bwd
        return fn_bwd

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if self._first is None or self._second is None:
            raise RuntimeError(
                "`def_fwd` or `def_bwd` was not yet called for "
                f"`{name_of(self.__wrapped__)}`."
            )
        first_of(args, "filter_custom_vjp")

        def transform(opened: Opened) -> Outcome:
            __tracebackhide__ = True
            plain, channels = without_channels(opened)
            frame = _Frame("filter_custom_vjp", self.__wrapped__, plain)
            flat = _custom_vjp(frame, layout_of_first(plain))
            carriers = {i: x for i, x in enumerate(plain.arrays) if is_inexact(x)}
            if channels:
                carriers = _spread(plain.arrays, carriers)
            out, updates, threaded = flat(plain.arrays, carriers, channels)
            assert frame.info is not None
            # What is written is not differentiated; the channels are.
            outcome = Outcome(out, jax.lax.stop_gradient(updates), frame.info)
            if not channels:
                return outcome
            new = updates_by_number(outcome)
            for i, channel in threaded.items():
                new[i] = Channelled(new.get(i, plain.values[i]), channel)
            return with_updates(outcome, new)

        return call(self._rules(), args, kwargs, transform)


def _custom_vjp(frame: _Frame, layout: Layout) -> Callable:
    positions = set(layout.positions())

    # The function reads `arrays`; their cotangents go to the `carriers`, which are the
    # inexact ones of them again. See `_spread`.
    @jax.custom_vjp
    def flat(
        arrays: list[Any], carriers: dict[int, Any], channels: dict[int, Any]
    ) -> tuple[list, list, dict]:
        __tracebackhide__ = True
        del carriers
        outcome = frame.run_forward(
            arrays, lambda rules, *a, **k: rules.fn(*a, **k), "the function"
        )
        return (*_arrays_of(outcome), channels)

    def forward(
        arrays: list[Any], carriers: dict[int, Any], channels: dict[int, Any]
    ) -> tuple:
        __tracebackhide__ = True
        perturbed = [
            i in carriers and carriers[i].perturbed for i in range(len(arrays))
        ]
        arrays = [x.value for x in arrays]
        channels = jtu.tree_map(lambda x: x.value, channels)
        flags = layout.fill(perturbed, other=False)
        found: dict[str, Any] = {}

        def run(rules: _Rules, *args: Any, **kwargs: Any) -> Any:
            __tracebackhide__ = True
            pair = rules.first(flags, *args, **kwargs)
            out, found["residuals"] = _pair(
                frame, pair, "the forward rule", "residuals"
            )
            return out

        outcome = frame.run_forward(arrays, run, "the forward rule")
        _refuse_refs(frame, found["residuals"])
        kept, statics = eqx.partition(found["residuals"], eqx.is_array)
        result = result_of(frame, outcome, arrays)
        out, updates = _arrays_of(outcome)
        rest = _Forward(
            perturbed,
            flags,
            statics,
            result.layout,
            [(i, is_inexact(x)) for i, x in zip(result.made, out)],
            {i for i, _ in outcome.info.written},
        )
        return (out, updates, channels), _Residuals((kept, arrays), rest)

    def backward(residuals: _Residuals, cotangents: tuple) -> tuple:
        __tracebackhide__ = True
        forward: _Forward = residuals.rest
        kept, arrays = residuals.arrays
        of_out, _, ends = cotangents
        # A channel that does not lead to the end of the function brings nothing.
        live = {i: end for i, end in ends.items() if not _has_zeros(end)}
        grad_out = Sparse(
            (i, _derivative(ct, inexact))
            for (i, inexact), ct in zip(forward.made, of_out)
        )
        none = [None] * len(arrays)
        inexact = [i for i, x in enumerate(arrays) if is_inexact(x)]
        wanted = any(forward.perturbed[i] for i in positions)
        if not wanted or all(ct is None for ct in grad_out.values()):
            # JAX would not have called the rule: only a channel brought us here.
            return none, dict.fromkeys(inexact), {i: live.get(i) for i in ends}
        present = _values(frame, arrays)
        for i, end in live.items():
            present[i] = decode(end, present[i])
        found: dict[str, Any] = {}

        def run(rules: _Rules, *args: Any, **kwargs: Any) -> None:
            __tracebackhide__ = True
            found["grad"] = rules.second(
                eqx.combine(kept, forward.statics),
                forward.layout.fill(grad_out),
                forward.flags,
                *args,
                **kwargs,
            )

        outcome = frame.run(_with_values(frame, arrays, present), run)
        new = updates_by_number(outcome)
        frame.refuse_perturbed(
            [i for i, p in enumerate(forward.perturbed) if p and i not in positions],
            forward.written | new.keys(),
        )
        for i, value in new.items():
            live[i] = _written(frame, i, value, present[i], live.get(i))
        grads = layout.read(found["grad"], "The gradient that a backward rule returns")
        of_carriers = {
            i: grads.get(i) if forward.perturbed[i] else None for i in inexact
        }
        return none, of_carriers, {i: live.get(i) for i in ends}

    flat.defvjp(forward, backward, symbolic_zeros=True)
    return flat


def _spread(arrays: list[Any], carriers: dict[int, Any]) -> dict[int, Any]:
    """The same carriers, mapped under a `vmap` if any of the arrays is.

    Under `vmap`, the cotangent of something that is not mapped is a sum over the lanes, and
    that of a channel must be none. JAX refuses a rule that has both (since 0.12), for it
    cannot tell them apart. So the sums are taken before: by what makes the carriers mapped.
    Where there is no `vmap`, the compiler removes it.
    """
    differs = jnp.zeros((), bool)
    for x in arrays:
        if jnp.size(x) > 0:
            is_key = jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)
            first = jnp.ravel(jax.random.key_data(x) if is_key else x)[0]
            differs = differs | (first != first)
    return {i: jnp.where(differs, x, x) for i, x in carriers.items()}


def _has_zeros(tree: Any) -> bool:
    return any(isinstance(x, SymbolicZero) for x in jtu.tree_leaves(tree))


def _mapped(channel: Any) -> list[tuple[bool, ...]]:
    return [_trace.mapped_over(x) for x in jtu.tree_leaves(channel)]


def _values(frame: _Frame, arrays: list[Any]) -> list[Any]:
    """The values of the refs of a call."""
    return [
        join_value(slot.inside, iter(arrays[start:stop]))
        for slot, (start, stop) in zip(frame.structure.slots, frame.spans)
    ]


def _with_values(frame: _Frame, arrays: list[Any], values: list[Any]) -> list[Any]:
    """The flat arrays of a call, with these values of its refs."""
    new = list(arrays[: frame.structure.n_bare])
    for value in values:
        new.extend(split_value(value)[1])
    return new


def _refuse_refs(frame: _Frame, residuals: Any) -> None:
    __tracebackhide__ = True
    for path, leaf in jtu.tree_flatten_with_path(residuals)[0]:
        if isinstance(leaf, Ref):
            raise StructureError(
                f"`{frame.name}`: the residuals of `{frame.fn_name}` hold "
                f"{describe(leaf._name, leaf._collection)} at {path_text(path)}. Residuals "
                "are values: return its `.value`, or use the ref that the backward rule is "
                "given."
            )


def _written(frame: _Frame, i: int, value: Any, old: Any, end: Any) -> Any:
    """What a backward rule wrote, for its channel. `end` came along the channel."""
    __tracebackhide__ = True
    which = f"The backward rule of `{frame.fn_name}` writes {frame.describe(i)}"
    if end is None:
        raise BackwardWrite(
            frame.structure.slots[i].collection,
            f"{which}, and what differentiates it here cannot bring the value out. Take "
            "the derivative by `rx.filter_grad` or `rx.filter_value_and_grad`, of a function "
            "that is given this ref, or closes over it.",
        )
    (inside, arrays), (old_inside, old_arrays) = split_value(value), split_value(old)
    if inside != old_inside or _types(arrays) != _types(old_arrays):
        raise StructureError(
            f"{which} with {eqx.tree_pformat(value)}, where it holds "
            f"{eqx.tree_pformat(old)}. A write in a backward rule keeps the structure, the "
            "shape and the dtype: convert the value, or make the ref as it is to be."
        )
    channel = encode(value)
    # What comes along a channel is mapped where the channel is.
    for new_over, old_over in zip(_mapped(channel), _mapped(end)):
        if any(a and not b for a, b in zip(new_over, old_over)):
            raise StructureError(
                f"{which}, which is broadcast by `filter_vmap`, with a value that differs "
                "from lane to lane. Either map it, with `in_axes=`; or write one value for "
                "all lanes, such as `jax.lax.pmax(value, axis_name)`."
            )
    return channel


def _types(arrays: list[Any]) -> list[tuple]:
    return [(jnp.shape(x), jnp.result_type(x)) for x in arrays]
