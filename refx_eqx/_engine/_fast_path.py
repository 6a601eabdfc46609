"""Plans: what a repeated call already knows, so that it costs as little as `jax.jit`.

There is one mechanism, in three parts:

- `_call_key` reads the arguments: what must be the same for a plan to fit (the identity of
    immutable objects, the type and value of static leaves, the structure of trees), and
    what the plan takes from each call (arrays, and refs passed directly);
- a plan knows, for such arguments, which refs a call carries, the order of arrays for
    `jax.jit`, and the compiled program (which may depend on the identity of the refs: see
    `_core/_identity.py`). A call is then: look up, read the values of the refs, call
    `jax.jit` on a flat list, write back;
- `_watch` notices changes below objects that are keyed by identity. Then the plan is made
    again. For a ref with a value of another structure see `Contents`.

A plan keeps nothing alive. Its refs belong to modules and functions that its key holds by
identity; it is dropped when one of these is, and a function keeps a bounded number of
plans.
"""

import weakref
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu

from .._calls._call import Call, close_result, with_refs
from .._calls._commit import commit, Disturbed, rescue, updates_of
from .._calls._structure import Outcome
from .._core import _trace
from .._core._nodes import is_traced, split_value
from .._core._on_mesh import on_mesh
from .._core._ref import commits, one_step, Ref, set_value
from ._call_key import address, GivenArray, mark, Read, read
from ._contents import Contents, is_one_array, picker
from ._flat import flat_of, forget_values
from ._program import Program, Variant
from ._run_time_errors import explain
from ._watch import Watch


__tracebackhide__ = True


NO_PLAN: Any = object()

_MAX_PLANS = 256
_MAX_NOTES = 1000
# A plan that is remade this often is useless: something changes at each call.
_MAX_REMADE = 100


class Plans:
    """The plans of one lifted function."""

    def __init__(self, fn: Any, program: Program):
        self._fn = fn
        self._program = program
        self._plans: dict[tuple, Plan] = {}
        # Keys that were met once (most are never met again), and keys that cannot have a
        # plan. By their hashes, which keep nothing alive.
        self._noted: dict[int, bool] = {}
        # Modules that were met once, by address.
        self._known: dict[int, weakref.ref] = {}

    def call(self, args: tuple, kwargs: dict) -> Any:
        """Makes the call if there is a plan for it; otherwise returns `NO_PLAN`."""
        state = _trace.undisturbed_state()
        if state is None:
            return NO_PLAN
        found = read(args, kwargs, self._known)
        if found is None:
            return NO_PLAN
        key = tuple(found[0])
        try:
            plan = self._plans.get(key)
        except TypeError:
            # Part of a new module is not hashable: use its identity from now on.
            for module in found[4]:
                self._know(module)
            return NO_PLAN
        if plan is not None and (plan.watch is None or plan.watch.holds()):
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
        number, plans = address(module), weakref.ref(self)

        def forget(_: Any) -> None:
            alive = plans()
            if alive is not None:
                alive._known.pop(number, None)

        self._known[number] = weakref.ref(module, forget)

    def _keep(self, key: tuple, plan: "Plan", by_identity: list[Any]) -> None:
        plans = weakref.ref(self)

        def forget(_: Any) -> None:
            # An address may be reused as soon as its object is gone.
            alive = plans()
            if alive is not None:
                alive._plans.pop(key, None)

        plan.guards = [weakref.ref(x, forget) for x in by_identity]
        if len(self._plans) >= _MAX_PLANS and key not in self._plans:
            self._plans.pop(next(iter(self._plans)), None)
        self._plans[key] = plan


class Plan:
    """A prepared call. See the top of this file."""

    __slots__ = (
        "contents",
        "derefed",
        "donates",
        "guards",
        "known",
        "nodes",
        "order",
        "outside",
        "own",
        "program",
        "remade",
        "restructured",
        "run",
        "settled",
        "variant",
        "watch",
    )

    # For each array outside refs: its position among those of the call, or the array itself
    # if a module holds it. `None` if they are just those of the call.
    outside: list[Any] | None
    # The refs below objects held by identity; the others are passed with each call. And the
    # order of the refs among both; `None` if it is just that.
    own: list[Ref]
    order: list[int] | None
    # `None` if each ref holds one JAX array.
    contents: Contents | None
    # `commits.count` when `contents` were last known to be current. It changes with any
    # write.
    settled: int
    # Weak references to the objects that the key holds by identity.
    guards: list[weakref.ref]
    # What the program did last: `_Known`. A single object, as several threads may be here
    # at once.
    known: "_Known | None"
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
        self.contents = None
        if not all(map(is_one_array, derefed.values)):
            self.contents = Contents(derefed.values, variant.values, variant.n_outside)
        # The node of each ref.
        self.nodes = list(derefed.structure.refs().values())
        self.program, self.variant = program, variant
        # Without donation a call has nothing to decide.
        self.run, self.donates = variant.plain, variant.donates
        self.outside = outside
        self.settled = -1
        self.guards = []
        self.known = None
        self.restructured = restructured
        self.watch: Watch | None = None
        # The plan must not keep current values or passed refs alive.
        forget_values(derefed)
        derefed.refs = self.own if not given else []
        self.derefed = derefed

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

    def call(
        self, arrays: list[Any], given: list[Ref], state: _trace.ThreadState
    ) -> Any:
        """Makes the call with these arrays and refs, on the thread of `state`; returns
        `NO_PLAN` if the plan does not fit the refs."""
        refs = self.own + given if given and self.own else given or self.own
        if self.order is not None:
            refs = list(map(refs.__getitem__, self.order))
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
            is_settled = self.settled == started
            if self.contents is None:
                flat = arrays + values
            else:
                flat = self.contents.flat(arrays, values, is_settled)
                if flat is None:
                    return NO_PLAN
            returned: list[Any] = []
            try:
                try:
                    calls.append(running)
                    if self.donates:
                        result = self.variant.dispatch_donating(
                            self.derefed, flat, values, returned
                        )
                    else:
                        result = self.run(flat)
                finally:
                    del calls[depth:]
                ((number, done),) = result.items()
                known = self.known
                if known is None or known.number != number:
                    known = _Known(number, self, done)
                    if not known.info.asked.holds_for(refs):
                        # Traced by another thread, for its own refs.
                        return NO_PLAN
                    if is_settled and not self.knows(values):
                        return NO_PLAN
                    self.known = known
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
                    updates = updates_of(known.outcome(done), refs)
                    commit(refs, values, started, updates)
                    return answer
                updates = done if known.are_arrays else known.values(done)
                # Not `lock.acquire()`, which a signal may separate from its `try`.
                with commits.lock:
                    if commits.count != started and not (
                        all(ref._value is value for ref, value in zip(refs, values))
                        # Values assumed unchanged may just have been written.
                        and (not is_settled or self.knows(values))
                    ):
                        continue
                    try:
                        for i, value in zip(known.written, updates):
                            refs[i]._value = value
                    except BaseException:
                        # A signal, between two of them: first the others.
                        written = map(refs.__getitem__, known.written)
                        one_step(map(set_value, written, updates))
                        raise
                    finally:
                        commits.count += 1
                    if known.are_kept:
                        self.settled = commits.count
                return answer
            except Disturbed:
                continue
            except BaseException as e:
                if rescue(refs, values, returned):
                    raise
                if isinstance(e, TypeError):
                    if self.contents or not all(map(is_traced, arrays)):
                        # A tracer in a dict, an array of strings: the error says where.
                        return NO_PLAN
                if isinstance(e, ValueError | RuntimeError):  # as JAX raises
                    try:
                        explain(e, refs, values)
                    except Disturbed:
                        continue
                raise


class _Known:
    """How to use the results of a program.

    - `number`, `info`, `written`: those of the trace, as in the `Variant`;
    - `build`, `waits`: those of `info`;
    - `n`: the number of arrays in new values, which come first; `are_arrays`: whether these
        are the new values;
    - `are_kept`: whether the new values have the structure of the old ones, see `Contents`;
    - `is_one`: whether the result is the single array after them;
    - `in_general`: whether there are writes that a plan cannot make itself.
    """

    __slots__ = (
        "_arrange",
        "_statics",
        "_treedef",
        "_treedef_of_values",
        "are_arrays",
        "are_kept",
        "build",
        "in_general",
        "info",
        "is_one",
        "n",
        "number",
        "waits",
        "written",
    )

    def __init__(self, number: int, plan: Plan, done: list[Any]):
        self.number = number
        self.info, self.written, self._treedef = plan.variant.traces[number]
        self.build, self.waits = self.info.build, self.info.waits
        self.n: int = self._treedef.children()[0].num_leaves
        self.is_one = self.info.is_one
        updates, _ = self._treedef.unflatten(done)
        values = list(map(self.info.value, self.written, updates))
        self.are_arrays = all(map(is_one_array, values))
        contents = plan.contents
        self.are_kept = bool(contents and contents.are_kept(self.written, values))
        # Non-array parts of the new values are the same each time.
        leaves, self._treedef_of_values = jtu.tree_flatten(values)
        self._statics: list[Any] = []
        order, k = [], 0
        for leaf in leaves:
            if k < self.n and leaf is done[k]:
                order.append(k)
                k += 1
            else:
                order.append(len(done) + len(self._statics))
                self._statics.append(leaf)
        self._arrange = picker(order)
        # A tree may replace a tree; if it replaces a single array, all plans must check
        # again. And a node may have converted its arrays.
        known_trees = contents.numbers if contents else ()
        self.in_general = (
            bool(self.info.in_place)
            or k < self.n
            or not all(
                is_one_array(x) or i in known_trees
                for i, x in zip(self.written, values)
            )
        )

    def values(self, done: list[Any]) -> list[Any]:
        """The new values, from the results of the program."""
        return self._treedef_of_values.unflatten(self._arrange([*done, *self._statics]))

    def outcome(self, done: list[Any]) -> Outcome:
        updates, out = self._treedef.unflatten(done)
        return Outcome(out, dict(zip(self.written, updates)), self.info)


def make_plan(
    fn: Any, program: Program, args: tuple, kwargs: dict, found: Read
) -> Plan | None:
    """A plan for this call; `None` if something in it can change unnoticed."""
    restructured = commits.restructured
    _, arrays, refs, held, _ = found
    marked = mark(args, kwargs, found)
    if marked is None:
        return None
    derefed = Call(fn, *marked, lambda x: type(x) is GivenArray or is_traced(x))
    if any(ref._channel is not None for ref in derefed.refs):
        return None
    if not all(map(_is_complete, held)):
        return None
    variant, flat = program.variant(derefed)
    outside: list[Any] | None = flat[: variant.n_outside]
    if outside == list(range(len(arrays))):
        outside = None
    plan = Plan(derefed, program, variant, refs, outside, restructured)
    watch = Watch()
    if not all(map(watch.tree, (fn, *held))):
        return None
    plan.watch = watch if watch.is_needed() else None
    return plan


def _is_complete(held: Any) -> bool:
    """Whether a module has all of its fields; if not, its `__init__` is running."""
    fields = held.__dataclass_fields__ if isinstance(held, eqx.Module) else ()
    return all(name in vars(held) for name in fields)
