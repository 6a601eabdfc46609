"""`filter_custom_jvp`: a function whose tangents are given by a rule."""

import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._calls._call import Call, call
from .._calls._structure import array_of, arrays_of, Leaves, Outcome, tree_of
from .._core._deref import deref
from .._core._errors import name_of
from .._core._nodes import is_inexact
from .._engine._autodiff import arrays_of_result
from .._engine._backward import with_outer_channels, without_channels
from .._engine._custom_rules import (
    CallWithRules,
    Custom,
    derivative,
    made,
    pair_of,
    Rules,
    symbolic_zero,
)
from .._engine._tangents import read_tangents


P = ParamSpec("P")
T = TypeVar("T")


_PASS_BY_POSITION = (
    "Pass it by position: the rule has a tangent for each positional argument."
)


class filter_custom_jvp(Custom[P, T]):
    """As `equinox.filter_custom_jvp`, by reference.

    A write to a ref, by the function or by the rule that replaces it, reaches the caller's
    ref once. Writes are not differentiated: return any value that should be.

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

    - `primals` are the positional arguments. The rule may read and write their refs; it
        must write exactly the refs that the function writes.
    - `tangents` has the structure of `rx.deref(primals)`, with `None` for leaves whose
        tangent is zero or does not exist.
    - `tangent_out` must have the structure of `rx.deref(out)`, with `None` for zero.

    **Arguments:**

    - `fn`: the function. Its keyword arguments, and anything it or the rule closes over,
        are not differentiated.

    **Raises:**

    When called:

    - `RuntimeError`: if it has no rule.
    - `StructureError`: if the rule does not return the same structure or write the same
        refs as the function, or if something the rule has no tangent for is differentiated.
    """

    def def_jvp(self, fn_jvp: Callable) -> Callable:
        """Sets the rule and returns it."""
        self._first = fn_jvp
        return fn_jvp

    def defjvp(self, fn_jvp: Callable) -> None:
        """As Equinox's deprecated method: sets a rule that is given zeros instead of
        `None`."""
        warnings.warn(
            "`filter_custom_jvp.defjvp` is deprecated, as in Equinox. Use `def_jvp`, "
            "whose rule is given `None` for a zero tangent.",
            DeprecationWarning,
            stacklevel=2,
        )

        def rule(primals: tuple, tangents: tuple, **kwargs: Any) -> Any:
            def materialized(x: Any, t: Any) -> Any:
                is_zero = t is None and eqx.is_inexact_array(x)
                return jnp.zeros_like(x) if is_zero else t

            opened = deref(primals)
            return fn_jvp(
                primals, jax.tree.map(materialized, opened, tangents), **kwargs
            )

        self.def_jvp(rule)

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if self._first is None:
            raise RuntimeError(
                f"`def_jvp` has not been called for `{name_of(self.__wrapped__)}`."
            )
        n = len(args)

        def transform(derefed: Call) -> Outcome:
            plain, channels = without_channels(derefed)
            frame = CallWithRules(
                "filter_custom_jvp", self.__wrapped__, plain, _PASS_BY_POSITION
            )
            out, updates = _custom_jvp(frame, n)(plain.arrays)
            assert frame.info is not None
            # Writes are state, which is not differentiated.
            outcome = Outcome(out, jax.lax.stop_gradient(updates), frame.info)
            return with_outer_channels(outcome, channels)

        return call(self._rules(), args, kwargs, transform)


def _custom_jvp(frame: CallWithRules, n: int) -> Callable:
    """A `jax.custom_jvp` of the arrays of a call with `n` positional arguments."""
    parts = frame.structure.parts[:n]

    @jax.custom_jvp
    def flat(arrays: list[Leaves]) -> tuple[Leaves, dict[int, Any]]:
        return arrays_of(frame.run_function(arrays))

    def rule(primals: tuple, tangents: tuple) -> tuple:
        # An eager `jax.jvp` passes Python numbers unconverted.
        (arrays,), (given,) = jtu.tree_map(array_of, primals), tangents
        given = jtu.tree_map(lambda x, t: derivative(t, is_inexact(x)), arrays, given)
        found: dict[str, Any] = {}

        def run(rules: Rules, *args: Any, **kwargs: Any) -> Any:
            of_args = tuple(map(tree_of, parts, given))
            pair = rules.first(args, of_args, **kwargs)
            out, found["tangents"] = pair_of(frame, pair, "the rule", "tangent_out")
            return out

        # The rule runs instead of the function, so it must write the same refs.
        outcome = frame.run_forward(arrays, run, "the rule")
        frame.refuse_perturbed(given, n, outcome.updates)
        part, result = arrays_of_result(frame.structure, outcome, arrays)
        what = "The tangents of the rule"
        (t_result,) = read_tangents([part], [result], [found["tangents"]], what)
        out, updates = arrays_of(outcome)
        leaves, treedef = jtu.tree_flatten(out)
        t_out = [
            symbolic_zero(x) if t is None else t
            for x, t in zip(leaves, treedef.flatten_up_to(made(out, t_result)))
        ]
        zeros = jtu.tree_map(symbolic_zero, updates)
        return (out, updates), (treedef.unflatten(t_out), zeros)

    # With it, a tangent of zero is recognizable, and the rule gets `None`, as in Equinox.
    flat.defjvp(rule, symbolic_zeros=True)
    return flat
