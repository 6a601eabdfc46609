"""`filter_custom_vjp`: a function whose cotangents are given by a rule."""

import copy
import dataclasses
import warnings
from collections.abc import Callable, Set
from typing import Any, NamedTuple, ParamSpec, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._calls._call import Call, call
from .._calls._structure import (
    array_of,
    arrays_of,
    join,
    Leaves,
    map_values,
    Outcome,
    tree_of,
    values_of,
)
from .._core._access import refuse_cycle
from .._core._errors import CarryError, describe, MismatchError, name_of
from .._core._nodes import is_inexact
from .._core._ref import Channeled, Ref
from .._engine._autodiff import arrays_of_result, first_of
from .._engine._backward import mapped_with, without_channels, written_by_rule
from .._engine._channel import decode
from .._engine._custom_rules import (
    CallWithRules,
    Custom,
    derivative,
    pair_of,
    placed,
    Rules,
    SymbolicZero,
)
from .._engine._tangents import read_tangents
from .._trees._closure import Part
from .._trees._paths import path_text


P = ParamSpec("P")
T = TypeVar("T")


_PASS_IN_FIRST = "Pass it in the first argument, in a tuple with the current one."


class filter_custom_vjp(Custom[P, T]):
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

    `def_fwd(rule)` and `def_bwd(rule)` set the rules, which have the same arguments as in
    Equinox:

    - `fwd(perturbed, vjp_arg, *args, **kwargs)` returns `(out, residuals)`. `perturbed` has
        the structure of `rx.deref(vjp_arg)`, with a bool for each leaf. `fwd` must write
        exactly the refs that the function writes. The residuals are any pytree without
        refs: take their values.
    - `bwd(residuals, grad_out, perturbed, vjp_arg, *args, **kwargs)` returns the gradient,
        with the structure of `rx.deref(vjp_arg)` and `None` for zero. `grad_out` has the
        structure of `rx.deref(out)`, with `None` for zero.

    Writes by the function and the forward rule are not differentiated: return any value
    that should be.

    **What the backward rule may do with refs.** It may write any ref that it is given or
    closes over, provided that the derivative is taken by [`refx_eqx.filter_grad`][] or
    [`refx_eqx.filter_value_and_grad`][] and that function carries the ref. The new value is
    there when these return, also under `filter_jit`, `scan`, `cond`, `filter_vmap` and
    `filter_checkpoint`. The backward pass visits the calls in reverse order. If a backward
    rule writes any ref of a collection, all refs of that collection start the backward pass
    with the values they have at the end of the function, and each rule sees the writes of
    the rules before it. All other refs have the values they had when the function was
    called. A write must keep shape and dtype. Under `filter_vmap`, a broadcast ref must be
    written with one value for all elements, for example by `jax.lax.pmax`.

    The cost: the differentiated function is traced once more when a backward rule turns out
    to write, and each ref of that collection takes twice its memory until the backward pass
    is over.

    **Arguments:**

    - `fn`: the function. Only the first argument has a gradient.

    **Raises:**

    When called:

    - `RuntimeError`: if a rule is missing.

    When differentiated:

    - `StructureError`: if the forward rule does not return the same structure or write the
        same refs as the function; if something other than the first argument is
        differentiated, and is not state that a rule writes; if a ref is written in a
        backward pass that cannot return its value.
    """

    def def_fwd(self, fn_fwd: Callable) -> Callable:
        """Sets the forward rule and returns it."""
        self._first = fn_fwd
        return fn_fwd

    def def_bwd(self, fn_bwd: Callable) -> Callable:
        """Sets the backward rule and returns it."""
        self._second = fn_bwd
        return fn_bwd

    def defvjp(self, fn_fwd: Callable, fn_bwd: Callable) -> None:
        """As Equinox's deprecated method: sets rules that are not told what is
        differentiated, and are given zeros instead of `None`."""
        warnings.warn(
            "`filter_custom_vjp.defvjp` is deprecated, as in Equinox. Use `def_fwd` and "
            "`def_bwd`, whose rules take one more argument: `perturbed`.",
            DeprecationWarning,
            stacklevel=2,
        )

        def fwd(perturbed: Any, *args: Any, **kwargs: Any) -> tuple:
            out, residuals = fn_fwd(*args, **kwargs)
            return out, (eqx.filter(out, eqx.is_inexact_array), residuals)

        def bwd(
            both: tuple, grad: Any, perturbed: Any, *args: Any, **kwargs: Any
        ) -> Any:
            out, residuals = both
            grad = jtu.tree_map(
                lambda x, ct: jnp.zeros_like(x) if ct is None else ct, out, grad
            )
            return fn_bwd(residuals, grad, *args, **kwargs)

        self.def_fwd(fwd)
        self.def_bwd(bwd)

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if self._first is None or self._second is None:
            raise RuntimeError(
                "`def_fwd` or `def_bwd` has not been called for "
                f"`{name_of(self.__wrapped__)}`."
            )
        first_of(args, "filter_custom_vjp")

        def transform(derefed: Call) -> Outcome:
            plain, channels = without_channels(derefed)
            frame = CallWithRules(
                "filter_custom_vjp", self.__wrapped__, plain, _PASS_IN_FIRST
            )
            # The function reads the arrays, but their cotangents go to these: see `_Parts`.
            carriers = eqx.filter(plain.arrays, is_inexact)
            if channels:
                carriers = mapped_with(plain.arrays, carriers)
            parts = _Parts(frame)
            flat = jax.custom_vjp(parts.function)
            flat.defvjp(parts.forward, parts.backward, symbolic_zeros=True)
            out, updates, threaded = flat(plain.arrays, carriers, channels)
            assert frame.info is not None
            # Writes are not differentiated; the channels are.
            values = {**values_of(plain.arrays), **jax.lax.stop_gradient(updates)}
            both = {i: Channeled(values[i], x) for i, x in threaded.items()}
            statics = {i: frame.nodes[i].value for i in threaded}
            info = copy.copy(frame.info)
            info.written = {**statics, **info.written}
            updates = {i: both.get(i, values[i]) for i in info.written}
            return Outcome(out, updates, info)

        return call(self._rules(), args, kwargs, transform)


@dataclasses.dataclass(eq=False)
class _Forward:
    """What the backward rule needs to know about the forward rule, apart from arrays.

    - `perturbed`: `True` for each differentiated array, else `None`; `flags`: the same for
        the first argument, as the rules see it;
    - `statics`: the residuals that are not arrays;
    - `part`, `nodes`: the structure of the derefed result, and its leaves without arrays;
    - `inexact`: which of the arrays returned by the rule have a derivative;
    - `written`: the numbers of the refs it wrote.
    """

    perturbed: list[Leaves]
    flags: Any
    statics: Any
    part: Part
    nodes: Leaves
    inexact: Leaves
    written: Set[int]


class _Residuals(eqx.Module):
    """What the forward rule passes to the backward rule: arrays, and everything else."""

    arrays: tuple[Any, list[Leaves]]
    rest: _Forward = eqx.field(static=True)


class _Given(NamedTuple):
    """The inputs of the backward rule: the residuals, the arrays of the call, the
    cotangents of the result, and the cotangent of each channel."""

    residuals: Any
    arrays: list[Leaves]
    of_out: Leaves
    ends: dict[int, Any]


class _Parts:
    """The three parts of a `jax.custom_vjp`, as functions of the arrays of a call.

    The function reads `arrays`; their cotangents go to the `carriers`, a second copy of the
    inexact ones. See `mapped_with`. A backward rule writes refs through the `channels`.
    """

    def __init__(self, frame: CallWithRules):
        self.frame = frame

    def function(
        self, arrays: list[Leaves], carriers: list[Leaves], channels: dict[int, Any]
    ) -> tuple[Leaves, dict, dict]:
        del carriers
        return (*arrays_of(self.frame.run_function(arrays)), channels)

    def forward(
        self, arrays: list[Leaves], carriers: list[Leaves], channels: dict[int, Any]
    ) -> tuple:
        frame = self.frame
        # With `symbolic_zeros=True`, JAX passes each array with a flag: is it differentiated?
        perturbed = jtu.tree_map(lambda x: x.perturbed or None, carriers)
        outside = [map_values(lambda _i, _x: None, leaves) for leaves in perturbed]
        frame.refuse_perturbed(outside, 1, ())
        # An eager derivative passes Python and NumPy numbers unconverted.
        arrays = jtu.tree_map(lambda x: array_of(x.value), arrays)
        channels = jtu.tree_map(lambda x: x.value, channels)
        structure = frame.structure
        flags = jtu.tree_map(lambda _: False, join(arrays[0], structure.statics[0]))
        flags = tree_of(structure.parts[0], eqx.combine(perturbed[0], flags))
        found: dict[str, Any] = {}

        def run(rules: Rules, *args: Any, **kwargs: Any) -> Any:
            pair = rules.first(flags, *args, **kwargs)
            out, found["residuals"] = pair_of(
                frame, pair, "the forward rule", "residuals"
            )
            return out

        outcome = frame.run_forward(arrays, run, "the forward rule")
        _refuse_refs(frame, found["residuals"])
        # Residuals must be arrays in JAX; their static leaves wait in the treedef.
        kept, statics = eqx.partition(found["residuals"], eqx.is_array)
        part, result = arrays_of_result(structure, outcome, arrays)
        out, updates = arrays_of(outcome)
        nodes = jtu.tree_map(lambda _: None, result)
        inexact = jtu.tree_map(is_inexact, out)
        rest = _Forward(
            perturbed, flags, statics, part, nodes, inexact, frozenset(updates)
        )
        return (out, updates, channels), _Residuals((kept, arrays), rest)

    def backward(self, residuals: _Residuals, cotangents: tuple) -> tuple:
        forward: _Forward = residuals.rest
        kept, arrays = residuals.arrays
        of_out, _, ends = cotangents
        # A channel that does not reach the end of the function carries nothing.
        live = {i: end for i, end in ends.items() if not _has_zeros(end)}
        of_out = jtu.tree_map(
            lambda ok, ct: derivative(ct, ok), forward.inexact, of_out
        )
        grad = jtu.tree_map(lambda _: None, arrays[0])
        if jtu.tree_leaves(of_out):
            given = _Given(eqx.combine(kept, forward.statics), arrays, of_out, live)
            if jtu.tree_leaves(forward.perturbed[0]):
                grad, live = self.pull_back(forward, given)
            else:
                self.check_unwanted(forward, given)
        grad = _where_wanted(forward.perturbed[0], grad, arrays[0])
        of_others = jtu.tree_map(lambda _: None, arrays[1:])
        none = jtu.tree_map(lambda _: None, arrays)
        # The gradient goes to the carriers, not to the arrays.
        return none, [grad, *of_others], {i: live.get(i) for i in ends}

    def run_rule(
        self, forward: _Forward, given: _Given
    ) -> tuple[Any, dict[int, Any], dict[int, Any]]:
        """Runs the backward rule. Returns the gradient, the writes by number, and the
        previous values of the refs."""
        ends = given.ends
        present = [
            map_values(lambda i, x: decode(ends[i], x) if i in ends else x, leaves)
            for leaves in given.arrays
        ]
        found: dict[str, Any] = {}

        def run(rules: Rules, *args: Any, **kwargs: Any) -> None:
            grad = tree_of(forward.part, placed(forward.nodes, given.of_out))
            found["grad"] = rules.second(
                given.residuals, grad, forward.flags, *args, **kwargs
            )

        updates = self.frame.run(present, run).updates
        written = forward.written | updates.keys()
        self.frame.refuse_perturbed(forward.perturbed, 1, written)
        return found["grad"], updates, values_of(present)

    def check_unwanted(self, forward: _Forward, given: _Given) -> None:
        """Called when no gradient is needed from the rule. It is not run, but anything
        differentiated must be state, and only the rule can tell which refs it writes."""
        numbers = {
            i for i, x in values_of(forward.perturbed).items() if jtu.tree_leaves(x)
        }
        if numbers - forward.written:
            jax.eval_shape(lambda: self.run_rule(forward, given) and None)

    def pull_back(
        self, forward: _Forward, given: _Given
    ) -> tuple[Leaves, dict[int, Any]]:
        """Returns the gradient of the first argument, and the channels by number: what came
        in along them, updated by the writes of the rule."""
        frame, arrays, ends = self.frame, given.arrays, given.ends
        grad, updates, present = self.run_rule(forward, given)
        written = {}
        for i, value in updates.items():
            which = f"The backward rule of `{frame.fn_name}` writes {frame.describe(i)}"
            collection = frame.nodes[i].collection
            written[i] = written_by_rule(
                which, collection, value, present[i], ends.get(i)
            )
        what = "The gradient that a backward rule returns"
        parts = frame.structure.parts[:1]
        (leaves,) = read_tangents(parts, arrays[:1], [grad], what)
        self.check_shapes(leaves, arrays[0])
        return leaves, {**ends, **written}

    def check_shapes(self, grads: Leaves, arrays: Leaves) -> None:
        frame = self.frame
        for k, (grad, leaf) in enumerate(zip(grads, arrays)):
            flat, treedef = jtu.tree_flatten(leaf)
            for x, y in zip(flat, treedef.flatten_up_to(grad)):
                if y is not None and jnp.shape(y) != jnp.shape(x):
                    raise MismatchError(
                        f"The backward rule of `{frame.fn_name}` returns "
                        f"{eqx.tree_pformat(y)} as the gradient by "
                        f"{frame.place(0, k, leaf)}, which is {eqx.tree_pformat(x)}. Return "
                        "a gradient of the same shape, or `None` for zero."
                    )


def _where_wanted(wanted: Leaves, grad: Leaves, like: Leaves) -> Leaves:
    """The gradient where it is wanted, and `None` elsewhere."""
    treedef = jtu.tree_structure(like)
    both = zip(treedef.flatten_up_to(wanted), treedef.flatten_up_to(grad))
    return treedef.unflatten([x if flag else None for flag, x in both])


def _has_zeros(tree: Any) -> bool:
    return any(isinstance(x, SymbolicZero) for x in jtu.tree_leaves(tree))


def _refuse_refs(frame: CallWithRules, residuals: Any) -> None:
    refuse_cycle(residuals)
    for path, leaf in jtu.tree_flatten_with_path(residuals)[0]:
        if isinstance(leaf, Ref):
            raise CarryError(
                f"`{frame.name}`: the residuals of `{frame.fn_name}` hold "
                f"{describe(leaf)} at {path_text(path)}. Residuals "
                "are values: return its `.value`, or use the ref that the backward rule is "
                "given."
            )
