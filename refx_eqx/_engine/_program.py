"""Programs: compiled once per structure, and called with flat arrays.

`filter_jit` is a program whose body runs the function. The control flow transforms are
programs too, so a second call with the same structure does not retrace.
"""

import functools
import itertools
import types
import warnings
import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jax.tree_util import tree_leaves as leaves

from .._calls._call import Call, dispatching, running_call
from .._calls._structure import Leaves, ONE_ARRAY, Outcome, OutcomeInfo, Structure
from .._core import _jax
from .._core._identity import Asked
from .._core._on_mesh import Shardings
from .._trees._functions import origin_of
from ._by_call import ByCall
from ._donation import (
    ALONE,
    apart,
    call_into,
    Donate,
    same_buffer_type,
    Split,
    what_to_donate,
)
from ._flat import flat_of, unflatten
from ._run_time_errors import explain, has_runtime_check, JIT_ID
from ._shardings import keep_in_place


class _Resplit(Exception):
    """The program writes other refs than expected, so other arrays can be donated."""

    def __init__(self, split: Split):
        self.split = split


class Program:
    """The compiled programs of one function: one per structure, and per set of shapes and
    dtypes within it.

    **Arguments:**

    - `name`: the name of the function, for the profiler and the compiler.
    - `body`: the function to compile: maps a call, and arrays to use instead of its own, to
        an outcome. It is kept, so it must not hold on to a single call.
    - `donate`, `jitkwargs`: as in `filter_jit`.
    - `as_a_whole`: whether to compile it as a whole. Transforms that JAX runs operation by
        operation outside `jit` are not, so that they give the same bits.
    """

    def __init__(
        self,
        name: str,
        body: Callable[[Call, list[Leaves]], Outcome],
        donate: Donate = "none",
        as_a_whole: bool = True,
        **jitkwargs: Any,
    ):
        self.as_a_whole = as_a_whole
        self.name = name
        self.body = body
        self.donate: Donate = donate
        self.jitkwargs = jitkwargs
        # By the shardings of the refs, which writes preserve.
        self._variants: dict[Shardings, ByCall[Variant]] = {}

    def variant(self, derefed: Call) -> tuple["Variant", list[Any]]:
        """The program for the structure of a call (and for its refs, if their identity
        matters), and the flat arrays to run it on."""
        flat = flat_of(derefed)
        variants = self._variants.setdefault(flat.shardings, ByCall())
        return variants.get(derefed, self._new_variant), flat.arrays

    def _new_variant(self, derefed: Call) -> "Variant":
        return Variant(self, derefed.structure, flat_of(derefed).treedef)

    def traced(self, variant: "Variant", derefed: Call) -> Asked:
        """Notes for which refs a variant that was traced for a call is right."""
        return self._variants[flat_of(derefed).shardings].note(derefed, variant)

    def __call__(self, derefed: Call) -> Outcome:
        try:
            with dispatching(derefed):
                while True:
                    variant, flat = self.variant(derefed)
                    result = variant.dispatch(
                        derefed, flat, derefed.values, derefed.returned
                    )
                    outcome = variant.outcome(result)
                    # Another thread may have traced it meanwhile, for its own refs.
                    if outcome.info.asked.holds_for(derefed.refs):
                        break
            if outcome.info.waits and _jax.is_evaluating():
                # A failed check must leave every ref unchanged.
                jax.block_until_ready(result)
        except (ValueError, RuntimeError) as e:
            explain(e, derefed.refs, derefed.values)
            raise
        return outcome


# What the `jax.jit` functions return: see `Variant`.
Result = dict[int, list[Any]]


class Trace(NamedTuple):
    """What one trace of a program did: its info, the numbers of the refs it wrote, and the
    structure of their new values and the result, `(updates, out)`."""

    info: OutcomeInfo
    written: tuple[int, ...]
    treedef: Any


class Variant:
    """A program for one structure: `jax.jit` functions on flat lists of arrays.

    Such a function returns `{number: arrays}`; `traces` has everything else under this
    number. JAX builds this without calling Python: it is fastest, and no signal can come
    between the end of a donating call, when its buffers are gone, and the moment its result
    is stored.
    """

    def __init__(self, program: Program, structure: Structure, treedef: Any):
        self._donate = program.donate
        self.donates = program.donate != "none"
        outside, values = treedef.children()
        self.n_outside: int = outside.num_leaves
        # For each ref: the structure of its value, and the positions of its arrays.
        self.values = values.children()
        ends = itertools.accumulate(
            (x.num_leaves for x in self.values), initial=self.n_outside
        )
        self._spans = [range(*both) for both in itertools.pairwise(ends)]
        self._in_donated = what_to_donate(structure, program.donate)
        self.traces: dict[int, Trace] = {}
        self._numbers = itertools.count()
        # What to donate, as far as is known; see `_donation`. And exceptions by the types
        # of the arrays, so that alternating calls of two types do not retrace.
        self._usual: _Donation | None = None
        self._others: dict[tuple, _Donation] = {}
        self._quiet: list[warnings.catch_warnings] = []
        self._jitkwargs = program.jitkwargs
        body = program.body
        # Not a cycle, which would keep closed-over values such as tracers alive until
        # garbage collection. The caller has both.
        mine, owner = weakref.ref(self), weakref.ref(program)

        def traced(flat: list[Any]) -> Result:
            # The stack of a failed `eqx.error_if` is cut here: see `_run_time_errors.py`.
            __equinox_jit_id__ = JIT_ID  # noqa: F841
            # Not from a closure of this function, which `jax.jit` keeps: JAX traces it
            # again for other shapes, long after the call it was made for.
            derefed = running_call()
            arrays = unflatten(derefed.structure, treedef, flat)
            outcome = body(derefed, arrays)
            shardings = flat_of(derefed).shardings
            if shardings:
                keep_in_place(outcome, arrays, shardings)
            outcome.info.waits = has_runtime_check(_jax.staged_equations())
            variant, its_program = mine(), owner()
            assert variant is not None and its_program is not None
            outcome.info.asked = its_program.traced(variant, derefed)
            both = list(outcome.updates.values()), outcome.out
            arrays_out, treedef_out = jax.tree.flatten(both)
            trace = Trace(outcome.info, tuple(outcome.updates), treedef_out)
            return {variant._number_of(trace): arrays_out}

        traced.__name__ = traced.__qualname__ = program.name
        self._traced = traced
        jitted = jax.jit(traced, **program.jitkwargs)
        self.plain: Any = jitted if program.as_a_whole else _jax.one_by_one(jitted)

    def _number_of(self, trace: "Trace") -> int:
        """The same for equal traces: JAX's caches keep one result per number."""
        for number, known in list(self.traces.items()):
            if known == trace:
                return number
        number = next(self._numbers)
        self.traces[number] = trace
        return number

    def outcome(self, result: "Result") -> Outcome:
        """Converts the result of a `jax.jit` function to an outcome."""
        ((number, arrays),) = result.items()
        info, written, treedef = self.traces[number]
        updates, out = treedef.unflatten(arrays)
        return Outcome(out, dict(zip(written, updates)), info)

    def dispatch(
        self, derefed: Call, arrays: list[Any], values: list[Any], returned: list[Any]
    ) -> "Result":
        """Calls the program. Call this while `derefed` is the running call.

        `arrays` and `values` are used instead of those of `derefed`. If buffers were
        donated, the result is also stored in `returned`: see `call_into`.
        """
        if self.donates and _jax.is_evaluating():
            # Only `arrays` holds them from here on: `apart` counts other holders.
            derefed.arrays = []
            return self.dispatch_donating(derefed, arrays, values, returned)
        return self.plain(arrays)

    def dispatch_donating(
        self, derefed: Call, arrays: list[Any], values: list[Any], returned: list[Any]
    ) -> "Result":
        if _jax.is_checking_results():
            # JAX finds a NaN after the buffers are gone, and would run on them again.
            return self.plain(arrays)
        donation = self._usual
        if donation is None or self._others:
            donation = self._donation(derefed, arrays)
        while True:
            try:
                # Not in a variable, which would be counted at the second try.
                return call_into(
                    returned,
                    self.outcome,
                    donation.run,
                    *apart(arrays, values, donation.split),
                )
            except _Resplit as e:
                donation = self._others[_types(arrays)] = _Donation(self, e.split)
            finally:
                if self._quiet:
                    self._speak()

    def be_quiet(self) -> None:
        """Silences warnings of unused donations until `_speak`, if the mode wants none. JAX
        warns when it compiles, so this is called when it traces, not at each call."""
        if self._donate in ("all", "all-except-first"):
            context = warnings.catch_warnings()
            context.__enter__()
            self._quiet.append(context)
            message = "Some donated buffers were not usable*"
            warnings.filterwarnings("ignore", message=message)

    def _speak(self) -> None:
        while self._quiet:
            self._quiet.pop().__exit__(None, None, None)

    def lower(self, derefed: Call, arrays: list[Any]) -> tuple[Any, Split]:
        """The lowered program, and which of its arrays it donates."""
        with dispatching(derefed):
            if not self.donates:
                return self.plain.lower(arrays), Split((), tuple(range(len(arrays))))
            derefed.arrays = []
            donation = self._donation(derefed, arrays)
            while True:
                split = donation.split
                try:
                    lowered = donation.run.lower(*apart(arrays, derefed.values, split))
                    return lowered, split
                except _Resplit as e:
                    donation = self._others[_types(arrays)] = _Donation(self, e.split)
                finally:
                    self._speak()

    def _donation(self, derefed: Call, arrays: list[Any]) -> "_Donation":
        """What to donate, as far as is known before the program is traced for these shapes.

        The written refs are known once the function has been traced for some shapes. If
        they depend on the shapes (through Python code), the function of a `_Donation`
        notices.
        """
        if self._usual is None:
            jaxpr, result = jax.make_jaxpr(self._traced, return_shape=True)(arrays)
            derefed.traced = jaxpr, jax.tree.structure(result)
            self._usual = _Donation(self, self.split_for(result, arrays))
        if self._others:
            return self._others.get(_types(arrays), self._usual)
        return self._usual

    def split_for(self, result: "Result", arrays: list[Any]) -> Split:
        every = range(len(arrays))
        outcome = self.outcome(result)
        if outcome.info.waits:
            return Split((), tuple(every))
        outside, kept_refs = self._in_donated
        donated = set(outside)
        for number, new in outcome.updates.items():
            # A value of another structure has no matching buffer.
            same = jax.tree.structure(new) == self.values[number]
            if number in kept_refs or not same:
                continue
            for i, after in zip(self._spans[number], leaves(new)):
                if eqx.is_array(arrays[i]) and same_buffer_type(arrays[i], after):
                    donated.add(i)
        ordered = tuple(i for i in every if i in donated)
        trees = {
            number: tuple(k for k, i in enumerate(ordered) if i in span)
            for number, span in enumerate(self._spans)
            if self.values[number] != ONE_ARRAY
        }
        in_trees = {k for positions in trees.values() for k in positions}
        n_outside = sum(i < self.n_outside for i in ordered)
        return Split(
            ordered,
            tuple(i for i in every if i not in donated),
            n_outside,
            [ALONE - (k in in_trees) for k in range(n_outside, len(ordered))],
            tuple((number, ks) for number, ks in trees.items() if ks),
        )


class _Donation:
    """Which of its arrays a program donates, and the `jax.jit` function that does so."""

    __slots__ = ("run", "split")

    def __init__(self, variant: Variant, split: Split):
        mine = weakref.ref(variant)

        def donating(donated: tuple[Any, ...], kept: tuple[Any, ...]) -> Result:
            variant = mine()
            assert variant is not None
            variant.be_quiet()
            flat = split.joined(donated, kept)
            derefed = running_call()
            if derefed.traced is None:
                result = variant._traced(flat)
            else:
                # Traced a moment ago to find the split; do not trace again.
                jaxpr, out_treedef = derefed.traced
                out = _jax.eval_jaxpr(jaxpr, flat)
                result = jax.tree.unflatten(out_treedef, out)
            right = variant.split_for(result, flat)
            if right.donated != split.donated:
                raise _Resplit(right)
            return result

        donating.__name__ = donating.__qualname__ = variant._traced.__name__
        self.split = split
        self.run = jax.jit(donating, donate_argnums=0, **variant._jitkwargs)


def _types(arrays: list[Any]) -> tuple:
    return tuple(map(jax.typeof, arrays))


# A program lives as long as the functions it was made for, which it does not hold: a
# structure holds functions weakly. A nested mapping: for the first function its programs,
# then the same for the next function.
_programs: Any = weakref.WeakKeyDictionary()


def function_in(fn: Any) -> Any:
    """The object whose lifetime a program shares: the Python function that is run."""
    seen: set[int] = set()
    while id(fn) not in seen:  # a wrapper may wrap itself
        seen.add(id(fn))
        if isinstance(fn, types.FunctionType):
            return origin_of(fn)
        if isinstance(fn, functools.partial | eqx.Partial):
            fn = fn.func
        elif hasattr(fn, "__func__"):
            fn = fn.__func__
        elif hasattr(fn, "__wrapped__"):
            fn = fn.__wrapped__
        else:
            break
    return type(fn)


def program_of(
    fns: tuple[Any, ...], key: Hashable, make: Callable[[], Program]
) -> Program:
    """The program of these functions under `key` (the transform and its options), made if
    necessary."""
    programs, level = {}, _programs
    for fn in fns:
        programs, level = level.setdefault(
            function_in(fn), ({}, weakref.WeakKeyDictionary())
        )
    try:
        program = programs.get(key)
    except TypeError:  # an unhashable option: not kept
        return make()
    if program is None:
        program = programs[key] = make()
    return program
