"""A plan: a prepared call. See `_fast_path.py`."""

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu

from .._calls._call import Call, close_result, with_refs
from .._calls._commit import commit, Disturbed, rescue, updates_of
from .._core import _trace
from .._core._nodes import is_traced, split_value
from .._core._on_mesh import on_mesh
from .._core._ref import commits, is_ref, one_step, Ref, set_value
from .._trees._cells import holds_itself
from ._call_key import GivenArray, mark, Read
from ._contents import Contents, is_one_array, picker
from ._flat import flat_of, forget_values
from ._program import Program, Result
from ._returned import Returned
from ._run_time_errors import explain
from ._watch import Watch


# Returned instead of a result if the plan does not fit the call.
NO_PLAN: Any = object()

# The state at the end of the last call: `commits.count`, which changes with any write; the
# values of the refs, or `None` if they were dropped; and whether these have the structure
# known to `Contents`. A single object, as several threads may be here at once.
Settled = tuple[int, list[Any] | None, bool]
_UNSETTLED: Settled = (-1, None, False)


class Plan:
    """A prepared call.

    - `key`, `form`: identify the call without a look-up, see `_call_key.py`; `places`: the
        positions of refs in the form;
    - `holds`: returns whether nothing has changed below objects that the key holds by
        identity; `None` if nothing can;
    - `guards`: weak references to these objects;
    - `remade`: how often the plan was made again.
    """

    __slots__ = (
        "__weakref__",
        "contents",
        "derefed",
        "donates",
        "form",
        "guards",
        "held_arrays",
        "holds",
        "key",
        "known",
        "me",
        "nodes",
        "order",
        "order_of_arrays",
        "own",
        "places",
        "program",
        "remade",
        "restructured",
        "run",
        "settled",
        "variant",
    )

    def __init__(self, derefed: Call, program: Program, found: Read, restructured: int):
        key, arrays, given, _, _ = found
        self.key = key if type(key) is list else None
        self.form: tuple | None = None
        self.places: list[int] = []
        self.holds: Callable[[], bool] | None = None
        self.guards: list[weakref.ref] = []
        self.remade = 0
        variant, flat = program.variant(derefed)
        self.program, self.variant = program, variant
        # Without donation a call has nothing to decide.
        self.run, self.donates = variant.plain, variant.donates
        # The arrays outside refs: those of the call, and those that modules hold. And their
        # order; `None` if they are just those of the call.
        outside = flat[: variant.n_outside]
        self.held_arrays = [x for x in outside if type(x) is not GivenArray]
        held = itertools.count(len(arrays))
        places = [x if type(x) is GivenArray else next(held) for x in outside]
        self.order_of_arrays = None
        if places != [*range(len(arrays))]:
            self.order_of_arrays = picker(places)
        # The refs below objects held by identity; the others are passed with each call. And
        # the order of the refs among both; `None` if it is just that.
        ids = {id(ref) for ref in given}
        self.own = [ref for ref in derefed.refs if id(ref) not in ids]
        both = [*self.own, *given]
        place_of = {id(ref): i for i, ref in reversed(list(enumerate(both)))}
        places = [place_of[id(ref)] for ref in derefed.refs]
        self.order = None if places == [*range(len(both))] else picker(places)
        # `None` if each ref holds one JAX array.
        self.contents: Contents | None = None
        if not all(map(is_one_array, derefed.values)):
            self.contents = Contents(derefed.values, variant.values, variant.n_outside)
        self.settled = _UNSETTLED
        self.me = weakref.ref(self)
        # The node of each ref.
        self.nodes = list(derefed.structure.refs().values())
        self.restructured = restructured
        # How to use the results of the last call. A single object, as several threads may be
        # here at once.
        self.known: Returned | None = None
        # The plan must not keep current values or passed refs alive.
        forget_values(derefed)
        derefed.refs = self.own if not given else []
        self.derefed = derefed

    # Flat on purpose: between the C++ code of two calls, a Python function takes about 0.2 us,
    # as long as reading ten refs. Rare cases have functions of their own.
    def call(
        self, arrays: list[Any], given: Sequence[Ref], state: _trace.ThreadState
    ) -> Any:
        """Makes the call with these arrays and refs, on the thread of `state`.

        Returns `NO_PLAN` if the plan does not fit the refs.

        **Raises:**

        - `Disturbed`: if a ref was written meanwhile. Then this call has written nothing.
        """
        refs = [*self.own, *given] if given else self.own
        if self.order is not None:
            refs = list(self.order(refs))
        if self.order_of_arrays is not None:
            arrays = list(self.order_of_arrays(arrays + self.held_arrays))
        started = commits.count
        count, values, is_known = self.settled
        if count != started:
            values, is_known = None, False
        if values is None:
            values = [ref._value for ref in refs]
        if self.restructured != commits.restructured and not self.fits(refs, values):
            return NO_PLAN
        if self.contents is None:
            flat = arrays + values
        else:
            flat = self.contents.flat(arrays, values, is_known)
            if flat is None:
                return NO_PLAN
        returned: list[Any] = []
        calls = state.calls
        depth = len(calls)
        try:
            try:
                calls.append((self.derefed, refs) if given else self.derefed)
                if self.donates:
                    result = self.variant.dispatch_donating(
                        self.derefed, flat, values, returned
                    )
                else:
                    result = self.run(flat)
            finally:
                del calls[depth:]
            known = self.known
            if known is None or known.number not in result:
                known = self.meet(result, refs, values, is_known)
                if known is None:
                    return NO_PLAN
            done = result[known.number]
            if known.waits:
                jax.block_until_ready(done)
            # Before anything is written: rebuilding a user's class may raise.
            if known.is_one:
                answer = done[known.n]
            elif known.build is not None:
                answer = known.build(done[known.n :])
            else:
                answer = close_result(known.outcome(done), refs)
            if known.in_general:
                commit(refs, values, started, updates_of(known.outcome(done), refs))
                return answer
            updates = done if known.are_arrays else known.values(done)
            if not known.written and not commits.lock.locked():
                if count == commits.count:
                    return answer
            after = values.copy()
            # Not `lock.acquire()`, which a signal may separate from its `try`.
            with commits.lock:
                if commits.count != started and not (
                    all(ref._value is value for ref, value in zip(refs, values))
                    # Values assumed unchanged may just have been written.
                    and (not is_known or self.knows(values))
                ):
                    raise Disturbed(refs, values)
                try:
                    for i, value in zip(known.written, updates):
                        refs[i]._value = after[i] = value
                except BaseException:
                    # A signal, between two of them: first the others.
                    written = map(refs.__getitem__, known.written)
                    one_step(map(set_value, written, updates))
                    raise
                finally:
                    commits.count += 1
                if self.donates:
                    after = None  # `apart` counts the holders of each array
                elif commits.reader is not self.me:
                    commits.release()
                    commits.reader = self.me
                self.settled = commits.count, after, known.are_kept
            return answer
        except BaseException as e:
            out = self.failed(e, arrays, refs, values, returned)
            if out is None:
                raise
            return out

    def release(self) -> None:
        """Drops the values that it keeps."""
        self.settled = _UNSETTLED

    def fits(self, refs: list[Ref], values: list[Any]) -> bool:
        """Whether the plan fits these refs and their values. (`Contents.flat` checks values
        that are not single JAX arrays.)"""
        restructured = commits.restructured
        others = set(self.contents.numbers) if self.contents else ()
        for i, (ref, value, node) in enumerate(zip(refs, values, self.nodes)):
            if ref._collection != node.collection:
                return False
            if ref._declared != node.label.declared:
                return False
            if i not in others and not (
                is_one_array(value) and is_one_array(ref._value)
            ):
                return False
        if any(map(holds_itself, values)):
            return False
        arrays = [split_value(value)[0] for value in values]
        if on_mesh(jtu.tree_leaves(arrays)) != flat_of(self.derefed).shardings:
            return False
        # The identity of the refs may have turned out to matter meanwhile.
        if self.program.variant(with_refs(self.derefed, refs))[0] is not self.variant:
            return False
        self.restructured = restructured
        return True

    def knows(self, values: list[Any]) -> bool:
        """Whether values that are not single JAX arrays have the known structure."""
        if self.contents is None:
            return True
        none: list[Any] = [None] * self.variant.n_outside
        return self.contents.flat(none, values, False) is not None

    def meet(
        self, result: Result, refs: list[Ref], values: list[Any], is_known: bool
    ) -> Returned | None:
        """Learns how to use results of this trace; `None` if it does not fit these refs."""
        ((number, done),) = result.items()
        known = Returned(number, self.variant, self.contents, done)
        if not known.info.asked.holds_for(refs):
            # Traced by another thread, for its own refs.
            return None
        if is_known and not self.knows(values):
            return None
        self.known = known
        return known

    def failed(
        self,
        e: BaseException,
        arrays: list[Any],
        refs: list[Ref],
        values: list[Any],
        returned: list[Any],
    ) -> Any:
        """What to return if a call raised this: `NO_PLAN`; or `None` to raise it."""
        if isinstance(e, Disturbed) or rescue(refs, values, returned):
            return None
        if isinstance(e, TypeError):
            if self.contents or not all(map(is_traced, arrays)):
                # A tracer in a dict, an array of strings: the error says where.
                return NO_PLAN
        if isinstance(e, ValueError | RuntimeError):  # as JAX raises
            explain(e, refs, values)
        return None


def make_plan(
    fn: Any, program: Program, args: tuple, kwargs: dict, found: Read
) -> Plan | None:
    """A plan for this call; `None` if something in it can change unnoticed."""
    restructured = commits.restructured
    _, _, refs, held, _ = found
    marked = mark(args, kwargs, found)
    if marked is None or not all(map(is_ref, refs)):
        return None
    derefed = Call(fn, *marked, lambda x: type(x) is GivenArray or is_traced(x))
    if not all(map(_is_complete, held)):
        return None
    plan = Plan(derefed, program, found, restructured)
    watch = Watch()
    if not all(map(watch.tree, (fn, *held))):
        return None
    plan.holds = watch.check()
    return plan


def _is_complete(held: Any) -> bool:
    """Whether a module has all of its fields; if not, its `__init__` is running."""
    fields = held.__dataclass_fields__ if isinstance(held, eqx.Module) else ()
    return all(name in vars(held) for name in fields)
