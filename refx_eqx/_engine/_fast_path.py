"""Plans: what a repeated call knows already, so that it costs what `jax.jit` costs.

There is one mechanism, in three parts:

- `_call_key` reads the arguments: what must be the same for a plan to fit (identity of what
  cannot change, type and value of what is static, the structure of what is a tree), and
  what the plan takes from each call (arrays, and the refs that are given themselves);
- a plan knows, for such arguments, which refs a call carries, in which order `jax.jit`
  wants all arrays, and which compiled program it is (also, if the function asks which refs
  it is given: see `_core/_identity.py`). A call is then: look up, read the
  values of the refs, call `jax.jit` on a flat list, write back;
- `_watch` notices what has changed below something that is told by its identity. Then the
  plan is made again. And where a ref has a value of another structure: see `_flat`.

A plan keeps nothing alive. The refs that it has are those of modules and functions that its
key has by identity, it goes when one of these does, and a function keeps a bounded number.
"""

import functools
import weakref
from typing import Any

import jax
import jax.tree_util as jtu

from .._core import _trace
from .._core._call import Call, close_result, with_refs
from .._core._commit import commit, Disturbed, rescue, updates_of
from .._core._on_mesh import on_mesh
from .._core._ref import commits, one_step, Ref, set_value
from .._core._structure import Outcome, OutcomeInfo
from .._core._values import is_traced, split_value
from .._trees._keys import static_keys
from ._call_key import GivenArray, mark, Read, read
from ._flat import flat_of, forget_values
from ._program import Program, Variant
from ._run_time_errors import explain
from ._watch import Watch


__tracebackhide__ = True


NO_PLAN: Any = object()

_MAX_PLANS = 256
_MAX_NOTES = 1000
# A plan that is remade this often is worth nothing: something changes at each call.
_MAX_REMADE = 100


class Plans:
    """The plans of one lifted function."""

    def __init__(self, fn: Any, program: Program):
        self._fn = fn
        self._program = program
        self._plans: dict[tuple, Plan] = {}
        # The keys that were met once: most are never met again. And those for which there
        # can be no plan. By their hashes, which keep nothing alive.
        self._noted: dict[int, bool] = {}
        # The modules that were met once, by their ids.
        self._known: dict[int, weakref.ref] = {}

    def call(self, args: tuple, kwargs: dict) -> Any:
        """Makes the call, if there is a plan for it; `NO_PLAN` if there is none."""
        state = _trace.undisturbed_state()
        if state is None:
            return NO_PLAN
        found = read(args, kwargs, self._known)
        if found is None:
            return NO_PLAN
        key = tuple(found[0])
        try:
            plan = self._plans.get(key)
        except (
            TypeError
        ):  # a part of a new module has no hash: told by identity from now on
            for module in found[4]:
                self._know(module)
            return NO_PLAN
        if plan is not None and plan.watch.holds():
            out = plan.call(found[1], found[2], state)
            if out is not NO_PLAN:
                return out
        return self._learn(key, args, kwargs, found, plan, state)

    def _learn(
        self,
        key: tuple,
        args: tuple,
        kwargs: dict,
        found: Read,
        before: "Plan | None",
        state: Any,
    ) -> Any:
        _, arrays, refs, held, new = found
        for module in new:
            self._know(module)
        note = hash(key)
        if before is None and not self._noted.get(note, False):
            if note not in self._noted:
                if len(self._noted) >= _MAX_NOTES:
                    self._noted.clear()
                self._noted[note] = True
            return NO_PLAN
        plan = None
        remade = 0 if before is None else before.remade + 1
        if remade < _MAX_REMADE:
            plan = make_plan(self._fn, self._program, args, kwargs, found)
        if plan is None:
            self._plans.pop(key, None)
            self._noted[note] = False
            return NO_PLAN
        plan.remade = remade
        mortal = plan.derefed.structure.mortal()
        self._keep(key, plan, [*held, *refs, *mortal])
        return plan.call(arrays, refs, state)

    def _know(self, module: Any) -> None:
        number, plans = id(module), weakref.ref(self)

        def forget(_: Any) -> None:
            alive = plans()
            if alive is not None:
                alive._known.pop(number, None)

        self._known[number] = weakref.ref(module, forget)

    def _keep(self, key: tuple, plan: "Plan", by_identity: list[Any]) -> None:
        plans = weakref.ref(self)

        def forget(_: Any) -> None:
            # An id may be used again as soon as its object is gone.
            alive = plans()
            if alive is not None:
                alive._plans.pop(key, None)

        plan.guards = [weakref.ref(x, forget) for x in by_identity]
        if len(self._plans) >= _MAX_PLANS and key not in self._plans:
            self._plans.pop(next(iter(self._plans)), None)
        self._plans[key] = plan


class Plan:
    """One call, prepared. See the top of this file."""

    __slots__ = (
        "derefed",
        "donate",
        "guards",
        "last",
        "nodes",
        "order",
        "others",
        "outside",
        "own",
        "program",
        "remade",
        "restructured",
        "run",
        "statics",
        "variant",
        "watch",
    )

    # For each array outside refs: its position among those of the call, or the array
    # itself where a module holds it. `None` if they are just those of the call.
    outside: list[Any] | None
    # The refs below what is held by identity; the others are given with each call. And the
    # order of the refs among both, `None` if it is just that.
    own: list[Ref]
    order: list[int] | None
    # The numbers of the refs whose value is not one JAX array.
    others: list[int]
    # Weak references to what the key has by identity.
    guards: list[weakref.ref]
    # About the last outcome: its info, and whether it writes anything else than JAX arrays. A
    # tuple, as several threads may be here at once.
    last: tuple[OutcomeInfo | None, bool]
    remade: int

    def __init__(
        self,
        derefed: Call,
        program: Program,
        variant: Variant,
        given: list[Ref],
        outside: list[Any] | None,
        restructured: int,
    ):
        positions = {id(ref): i for i, ref in reversed(list(enumerate(given)))}
        self.own = [ref for ref in derefed.refs if id(ref) not in positions]
        of_own = {id(ref): i for i, ref in enumerate(self.own)}
        order = [
            of_own[id(ref)] if id(ref) in of_own else len(self.own) + positions[id(ref)]
            for ref in derefed.refs
        ]
        in_order = order == list(range(len(self.own) + len(given)))
        self.order = None if in_order else order
        self.others = [
            i
            for i, value in enumerate(derefed.values)
            if type(value) is not _trace.ConcreteArray
        ]
        # For each ref: its node, and what its value is equal by apart from its arrays.
        self.nodes = list(derefed.structure.refs().values())
        self.statics = [static_keys(node.value) for node in self.nodes]
        self.program, self.variant = program, variant
        # Without donation there is nothing to decide on a call.
        self.run = variant.plain
        self.donate = (
            functools.partial(variant.dispatch, derefed) if variant.donates else None
        )
        self.outside = outside
        self.guards = []
        self.last = None, False
        self.restructured = restructured
        self.watch = Watch()
        # The plan must keep neither the values of this moment nor given refs alive.
        forget_values(derefed)
        derefed.refs = self.own if not given else []
        self.derefed = derefed

    def fits(self, refs: list[Ref], values: list[Any]) -> bool:
        """Whether these refs, and their values, are such as the plan knows. (For those that
        are not one JAX array, `_flat` sees.)"""
        restructured = commits.restructured
        others = set(self.others)
        for i, (ref, value, node) in enumerate(zip(refs, values, self.nodes)):
            if ref._collection != node.collection:
                return False
            if ref._declared != node.label.declared:
                return False
            if i not in others and (
                type(value) is not _trace.ConcreteArray
                or type(ref._value) is not _trace.ConcreteArray
            ):
                return False
        arrays = [split_value(value)[0] for value in values]
        if on_mesh(jtu.tree_leaves(arrays)) != flat_of(self.derefed).shardings:
            return False
        # It may matter which refs these are, and that was found out meanwhile.
        if self.program.variant(with_refs(self.derefed, refs))[0] is not self.variant:
            return False
        self.restructured = restructured
        return True

    def call(
        self, arrays: list[Any], given: list[Ref], state: _trace.ThreadState
    ) -> Any:
        """Makes the call with these arrays and refs, on the thread of `state`; `NO_PLAN` if
        the refs are such as the plan does not know."""
        refs = self.own + given if given else self.own
        if self.order is not None:
            refs = [refs[i] for i in self.order]
        if self.outside is not None:
            arrays = [arrays[x] if type(x) is GivenArray else x for x in self.outside]
        running = (self.derefed, refs) if given else self.derefed
        calls = state.calls
        depth = len(calls)
        while True:
            started = commits.count
            values = [ref._value for ref in refs]
            if self.restructured != commits.restructured and not self.fits(
                refs, values
            ):
                return NO_PLAN
            flat = values
            if self.others:
                flat = self._flat(arrays, values)
                if flat is None:
                    return NO_PLAN
            elif arrays or self.donate is not None:
                flat = arrays + values
            returned: list[Any] = []
            try:
                try:
                    calls.append(running)
                    if self.donate is None:
                        out, updates, info = self.run(flat)
                    else:
                        out, updates, info = self.donate(flat, values, returned)
                    if info.waits:
                        jax.block_until_ready((out, updates))
                finally:
                    del calls[depth:]
                known, in_general = self.last
                if known is not info:
                    if not info.asked.holds_for(refs):
                        return NO_PLAN  # traced by another thread, for its own refs
                    in_general = not all(
                        type(x) is _trace.ConcreteArray and info.written[i] is None
                        for i, x in updates.items()
                    )
                    self.last = info, in_general
                outcome: Any = None
                if info.build is None or in_general:
                    outcome = Outcome(out, updates, info)
                # Before anything is written: to rebuild a class of the user's may raise.
                if info.build is None:
                    result = close_result(outcome, refs)
                else:
                    result = info.build(out)
                if in_general:
                    commit(refs, values, started, updates_of(outcome, refs))
                    return result
                # Not `lock.acquire()`, which a signal may part from its `try`.
                with commits.lock:
                    if commits.count != started and not all(
                        ref._value is value for ref, value in zip(refs, values)
                    ):
                        continue
                    try:
                        for number, value in updates.items():
                            refs[number]._value = value
                    except BaseException:
                        # A signal, between two of them: first the others.
                        get = refs.__getitem__
                        one_step(map(set_value, map(get, updates), updates.values()))
                        raise
                    finally:
                        commits.count += 1
                return result
            except Disturbed:
                continue
            except BaseException as e:
                if rescue(refs, values, returned):
                    raise
                if isinstance(e, TypeError):
                    if self.others or not all(map(is_traced, arrays)):
                        # A tracer in a dict, an array of texts: it is told where.
                        return NO_PLAN
                if isinstance(e, ValueError | RuntimeError):  # as JAX raises
                    try:
                        explain(e, refs, values)
                    except Disturbed:
                        continue
                raise

    def _flat(self, arrays: list[Any], values: list[Any]) -> list[Any] | None:
        """All arrays of a call in which some ref has another value than one JAX array;
        `None` if such a value has another structure than the plan knows."""
        flat, start = list(arrays), 0
        for number in self.others:
            flat += values[start:number]
            start = number + 1
            value, treedef = values[number], self.variant.values[number]
            if treedef == _ONE_ARRAY and type(value) in _one_array:
                flat.append(value)
                continue
            its_arrays, found = jtu.tree_flatten(value)
            if found != treedef or not set(map(type, its_arrays)) <= _ONLY_ARRAYS:
                # Numbers, texts, functions, ...
                of_arrays, statics = split_value(value)
                its_arrays, found = jtu.tree_flatten(of_arrays)
                if found != treedef or static_keys(statics) != self.statics[number]:
                    return None
                if of_arrays is value:
                    _one_array.add(type(value))
            flat += its_arrays
        return flat + values[start:]


_ONE_ARRAY = jtu.tree_structure(0)
_ONLY_ARRAYS = {_trace.ConcreteArray}
# The types of which a value is one array, or a number. Filled as types are met.
_one_array = {_trace.ConcreteArray}


def make_plan(
    fn: Any, program: Program, args: tuple, kwargs: dict, found: Read
) -> Plan | None:
    """A plan for this call; `None` if something in it can change unseen."""
    restructured = commits.restructured
    _, arrays, refs, held, _ = found
    marked, marked_kwargs = mark(args, kwargs, found)
    derefed = Call(
        fn, marked, marked_kwargs, lambda x: type(x) is GivenArray or is_traced(x)
    )
    if any(ref._channel is not None for ref in derefed.refs):
        return None
    if not all(map(_is_complete, held)):
        return None
    variant, flat = program.variant(derefed)
    outside: list[Any] | None = flat[: variant.n_outside]
    if outside == list(range(len(arrays))):
        outside = None
    plan = Plan(derefed, program, variant, refs, outside, restructured)
    if not all(map(plan.watch.tree, (fn, *held))):
        return None
    return plan


def _is_complete(held: Any) -> bool:
    """Whether a module has all of its fields: else its `__init__` is running."""
    fields = getattr(held, "__dataclass_fields__", ())
    return all(name in vars(held) for name in fields)
