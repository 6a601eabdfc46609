"""The base of `filter_custom_jvp` and `filter_custom_vjp`: a function with rules.

JAX calls a rule instead of the function at any time: while it differentiates, or, if the
function was staged out, long after the call. So the rules do not share the call itself,
which holds the refs and arrays of the caller, but a `CallWithRules`: the structure of the
call, on which the function and each rule run with their own arrays.
"""

import weakref
from collections.abc import Callable, Collection
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import equinox as eqx
import jax
import jax.tree_util as jtu

from .._calls._body import run_body
from .._calls._call import Call
from .._calls._places import place
from .._calls._structure import Leaves, Outcome, OutcomeInfo
from .._core import _trace
from .._core._errors import describe, MismatchError, name_of, StructureError
from .._core._nodes import Index, Value
from .._core._ref import Ref


P = ParamSpec("P")
T = TypeVar("T")


SymbolicZero = jax.custom_derivatives.SymbolicZero


class Rules(NamedTuple):
    """The function and its rules. This is the callable of the call, so values closed over
    by any of them are carried."""

    fn: Any
    first: Any
    second: Any = None


def _function(rules: Rules, *args: Any, **kwargs: Any) -> Any:
    return rules.fn(*args, **kwargs)


class CallWithRules:
    """The structure on which the function and its rules run. Holds no arrays, and refs only
    weakly.

    - `info`: what the function (or the rule that replaced it) did;
    - `remedy`: how to get a derivative with respect to something, for messages.
    """

    def __init__(self, name: str, fn: Any, derefed: Call, remedy: str):
        self.name = name
        self.remedy = remedy
        self.fn_name = name_of(fn)
        self.structure = derefed.structure
        self.nodes = derefed.structure.refs()
        self.info: OutcomeInfo | None = None
        self._trace = weakref.ref(derefed.trace)
        self._refs = [weakref.ref(ref) for ref in derefed.refs]

    @_trace.tidying
    def run(self, arrays: list[Leaves], rule: Callable) -> Outcome:
        refs = [weak() for weak in self._refs]
        carried = [ref for ref in refs if ref is not None]
        # A rule that runs after the body of its call may run for other refs: those of
        # whichever call is differentiated.
        known = [None if ref is None or _has_ended(ref) else ref for ref in refs]
        with _trace.running_body(self.name, carried, self._trace(), False, {}) as body:
            return run_body(self.structure, body, known, arrays, rule)

    def run_function(self, arrays: list[Leaves]) -> Outcome:
        return self.run_forward(arrays, _function, "the function")

    def run_forward(self, arrays: list[Leaves], rule: Callable, which: str) -> Outcome:
        """As `run`, for a rule that must behave like the function: return a result of the
        same structure, and write the same refs."""
        outcome = self.run(arrays, rule)
        earlier, self.info = self.info, outcome.info
        if earlier is None and outcome.updates and rule is not _function:
            # JAX has only called the rule, so run the function to see which refs it writes.
            earlier = jax.eval_shape(lambda: self.run(arrays, _function)).info
        if earlier is None:
            return outcome
        if earlier.result.key != self.info.result.key:
            raise MismatchError(
                f"`{self.name}`: {which} of `{self.fn_name}` must return a result of the "
                "same structure as the function, with the same static values and the same "
                "refs."
            )
        before, now = earlier.written_keys(), self.info.written_keys()
        if before != now:
            differing = before.keys() ^ now.keys()
            named = ", ".join(self.describe(i) for i in sorted(differing))
            raise MismatchError(
                f"`{self.name}`: {which} of `{self.fn_name}` must write the refs that the "
                f"function writes, and no others. It differs in {named or 'a value'}."
            )
        return outcome

    def describe(self, number: int) -> str:
        node = self.nodes[number]
        return describe(node)

    def refuse_perturbed(
        self, perturbed: list[Leaves], first: int, written: Collection[int]
    ) -> None:
        """Refuses a derivative with respect to the trees of a call from number `first` on,
        for which the rule has none. `perturbed` is not `None` for each differentiated
        array. A written ref is state, and has no derivative."""
        for i, leaves in enumerate(perturbed[first:], first):
            for k, leaf in enumerate(leaves):
                if not jtu.tree_leaves(leaf):
                    continue
                if type(leaf) is Value and leaf.index in written:
                    continue
                raise StructureError(
                    f"`{self.name}`: the rule of `{self.fn_name}` gives no derivative with "
                    f"respect to {self.place(i, k, leaf)}, which is differentiated here. "
                    f"{self.remedy} Or exclude it: `rx.filter_grad(..., wrt=...)`, or "
                    "`jax.lax.stop_gradient`."
                )

    def place(self, i: int, k: int, leaf: Any) -> str:
        """A description of leaf number `k` of tree number `i`, for messages."""
        if type(leaf) is Value:
            return self.describe(leaf.index)
        return f"the array in {place(self.structure.parts, i, k)}"


def _has_ended(ref: Ref) -> bool:
    return ref._body is not None and not ref._body.running


class Custom(Generic[P, T]):
    """The common base class: a function with rules, and a pytree of these."""

    def __init__(self, fn: Callable[P, T]):
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

    def _rules(self) -> Rules:
        return Rules(self.__wrapped__, self._first, self._second)


def symbolic_zero(x: Any) -> Any:
    return SymbolicZero(jax.typeof(x).to_tangent_aval())


def derivative(x: Any, inexact: bool) -> Any:
    """A tangent or cotangent as the user sees it: `None` for a symbolic zero."""
    return None if isinstance(x, SymbolicZero) or not inexact else x


def pair_of(frame: CallWithRules, result: Any, which: str, second: str) -> tuple:
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(
            f"`{frame.name}`: {which} of `{frame.fn_name}` must return a pair "
            f"`(out, {second})`."
        )
    return result


def placed(of_result: Leaves, of_out: Leaves) -> Leaves:
    """Moves a list aligned with the leaves of an outcome to the places of the derefed
    result, with `None` for a ref of the caller, which is an input of the function."""
    return [
        result.with_value(made.value if type(made) is Value else None)
        if type(result) is Value
        else (result if type(result) is Index else made)
        for result, made in zip(of_result, of_out)
    ]


def made(out: Leaves, of_result: Leaves) -> Leaves:
    """The inverse of `placed`."""
    return [
        made.with_value(result.value)
        if type(made) is Value
        else (made if type(made) is Index else result)
        for made, result in zip(out, of_result)
    ]
