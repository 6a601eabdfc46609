"""What `filter_custom_jvp` and `filter_custom_vjp` have in common: a function with rules.

JAX calls a rule in place of the function, when it likes: while it differentiates, or later,
when the function was staged out and the call is long over. So what the rules share is not
the opened call, which holds the refs and arrays of the caller, but a `Frame`: the structure
of the call, on which the function and each rule are run with arrays of their own.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.tree_util as jtu

from .._core import _trace
from .._core._call import Opened, run_body
from .._core._errors import describe, name_of, StructureError
from .._core._ref import Ref
from .._core._structure import inside_of, join_value, Outcome, OutcomeInfo, split_value
from ._places import bare_place


__tracebackhide__ = True


SymbolicZero = jax.custom_derivatives.SymbolicZero


class Rules(NamedTuple):
    """The function and its rules: the callable of the call, so that what any of them closes
    over is carried."""

    fn: Any
    first: Any
    second: Any = None


class Frame:
    """What the function and its rules are run on. Holds no array and, strongly, no ref.

    - `info`, `written`: what the function did (or the rule that ran in its place).
    - `remedy`: how to have a derivative by something, for messages.
    """

    def __init__(self, name: str, fn: Any, opened: Opened, remedy: str):
        self.name = name
        self.remedy = remedy
        self.fn_name = name_of(fn)
        self.structure = opened.structure
        self.spans = opened.spans
        self.info: OutcomeInfo | None = None
        self.written: dict[int, tuple | None] = {}
        self._trace = weakref.ref(opened.trace)
        self._refs = [weakref.ref(ref) for ref in opened.refs]
        # The structure holds functions weakly, and a rule may run after the call.
        self._alive = [static.obj for static in opened.structure.statics]

    def run(self, arrays: list[Any], rule: Callable) -> Outcome:
        refs = [weak() for weak in self._refs]
        carried = [ref for ref in refs if ref is not None]
        # A rule that runs after the body of its call may be run for other refs: those of
        # whichever call is differentiated.
        known = [None if ref is None or _has_ended(ref) else ref for ref in refs]
        with _trace.running_body(self.name, carried, self._trace(), False, {}) as body:
            return run_body(self.structure, body, known, arrays, rule)

    def run_function(self, arrays: list[Any]) -> Outcome:
        return self.run_forward(
            arrays, lambda rules, *a, **k: rules.fn(*a, **k), "the function"
        )

    def run_forward(self, arrays: list[Any], rule: Callable, which: str) -> Outcome:
        """As `run`, for what is to do the same as the function: return a result of the same
        structure, and write the same refs."""
        outcome = self.run(arrays, rule)
        info, earlier, before = outcome.info, self.info, self.written
        written = {i: inside_of(x) for i, x in outcome.updates.items()}
        self.info, self.written = info, written
        if earlier is None:
            return outcome
        if earlier.result != info.result or earlier.carried != info.carried:
            raise StructureError(
                f"`{self.name}`: {which} of `{self.fn_name}` must return a result of the "
                "same structure as the function does: of the same static values, and the "
                "same refs."
            )
        if before != written:
            differing = before.keys() ^ written.keys()
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

    def place(self, position: int) -> str:
        """What an array is, for messages."""
        number = self.ref_at(position)
        if number is None:
            return f"the array in {bare_place(self.structure, position)}"
        return self.describe(number)

    def refuse_perturbed(self, positions: list[int], written: set[int]) -> None:
        """Refuses a derivative by what is not differentiated. A ref that is written is
        state, and has none."""
        for i in positions:
            number = self.ref_at(i)
            if number in written:
                continue
            raise StructureError(
                f"`{self.name}`: the rule of `{self.fn_name}` gives no derivative by "
                f"{self.place(i)}, which is differentiated here. {self.remedy} Or exclude it: "
                "`rx.filter_grad(..., wrt=...)`, or `jax.lax.stop_gradient`."
            )

    def values(self, arrays: list[Any]) -> list[Any]:
        """The values of the refs of a call."""
        return [
            join_value(slot.inside, iter(arrays[start:stop]))
            for slot, (start, stop) in zip(self.structure.slots, self.spans)
        ]

    def with_values(self, arrays: list[Any], values: list[Any]) -> list[Any]:
        """The flat arrays of a call, with these values of its refs."""
        new = list(arrays[: self.structure.n_bare])
        for value in values:
            new.extend(split_value(value)[1])
        return new


def _has_ended(ref: Ref) -> bool:
    return ref._body is not None and not ref._body.running


class Custom:
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

    def _rules(self) -> Rules:
        return Rules(self.__wrapped__, self._first, self._second)


def symbolic_zero(x: Any) -> Any:
    return SymbolicZero(jax.typeof(x).to_tangent_aval())


def derivative(x: Any, inexact: bool) -> Any:
    """A tangent or cotangent as the user sees it: `None` for a symbolic zero."""
    return None if isinstance(x, SymbolicZero) or not inexact else x


def pair_of(frame: Frame, result: Any, which: str, second: str) -> tuple:
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(
            f"`{frame.name}`: {which} of `{frame.fn_name}` must return a pair "
            f"`(out, {second})`."
        )
    return result
