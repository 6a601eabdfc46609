"""Plans: what a repeated call already knows, so that it costs as little as `jax.jit`.

There is one mechanism, in four parts:

- `_call_key` reads the arguments: what must be the same for a plan to fit (the identity of
    immutable objects, the type and value of static leaves, the structure of trees), and
    what the plan takes from each call (arrays, and refs passed directly). Most calls repeat
    the last one with other arrays: this is checked first, without a key;
- a plan (`_plan`) knows, for such arguments, which refs a call carries, the order of arrays
    for `jax.jit`, and the compiled program (which may depend on the identity of the refs:
    see `_core/_identity.py`). A call is then: look up, read the values of the refs, call
    `jax.jit` on a flat list, write back. The values are kept until something else writes a
    ref, so a loop reads them only once;
- `_returned` knows which refs are written, and how the result is built;
- `_watch` notices changes below objects that are keyed by identity. Then the plan is made
    again. For a ref with a value of another structure see `Contents`.

A plan keeps nothing alive. Its refs belong to modules and functions that its key holds by
identity; it is dropped when one of these is, and a function keeps a bounded number of
plans.
"""

import weakref
from typing import Any

from .._calls._commit import Disturbed, next_try
from .._core import _trace
from .._core._ref import is_ref
from ._call_key import address, form_of, Read, read
from ._plan import make_plan, NO_PLAN, Plan
from ._program import Program


_Weak = weakref.ref

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
        self._last: Plan | None = None
        # Keys that were met once (most are never met again), and keys that cannot have a
        # plan. By their hashes, which keep nothing alive.
        self._noted: dict[int, bool] = {}
        # Modules that were met once, by address.
        self._known: dict[int, weakref.ref] = {}

    def call(self, args: tuple, kwargs: dict) -> Any:
        """Makes the call if there is a plan for it; otherwise returns `NO_PLAN`."""
        tries = 1
        while True:
            state = _trace.undisturbed_state()
            if state is None:
                return NO_PLAN
            plan = self._last
            try:
                # Most often it is the last call again, with other arrays: see `form_of`.
                # Inline, because calling a function would take as long as the loop.
                if (
                    plan is not None
                    and plan.form is not None
                    and not kwargs
                    and len(plan.form) == len(args)
                ):
                    arrays = []
                    for x, then in zip(args, plan.form):
                        if then is type(x):
                            arrays.append(x)
                        elif then is not x and (
                            # A dead reference returns `None`, which `x` may be as well.
                            type(then) is not _Weak or x is None or then() is not x
                        ):
                            break
                    else:
                        if plan.holds is None or plan.holds():
                            refs = [args[i] for i in plan.places] if plan.places else ()
                            out = plan.call(arrays, refs, state)
                            if out is not NO_PLAN:
                                return out
                return self._look_up(args, kwargs, state)
            except Disturbed as e:
                tries = next_try(self._fn, e, tries)

    def _look_up(self, args: tuple, kwargs: dict, state: _trace.ThreadState) -> Any:
        found = read(args, kwargs, self._known)
        if found is None:
            return NO_PLAN
        key, arrays, refs, _, new = found
        plan = self._last
        try:
            # Usually the last one: identical objects compare without hashing.
            if plan is None or plan.key != key:
                plan = self._plans.get(tuple(key))
        except Exception:
            # Part of a new module is not hashable, or its equality raised: use its identity
            # from now on.
            for module in new:
                self._know(module)
            return NO_PLAN
        if plan is not None and (plan.holds is None or plan.holds()):
            self._last = plan
            out = plan.call(arrays, refs, state)
            if out is not NO_PLAN:
                return out
        return self._learn(args, kwargs, found, plan, state)

    def _learn(
        self,
        args: tuple,
        kwargs: dict,
        found: Read,
        before: Plan | None,
        state: _trace.ThreadState,
    ) -> Any:
        _, arrays, refs, held, new = found
        key = tuple(found[0])
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
            self._forget(key)
            self._noted[note] = False
            return NO_PLAN
        plan.remade = remade
        # A plan for a module by its contents takes refs and arrays from inside it.
        if not kwargs and not new:
            plan.form = form_of(args, self._known)
            plan.places = [i for i, x in enumerate(args) if is_ref(x)]
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

    def _keep(self, key: tuple, plan: Plan, by_identity: list[Any]) -> None:
        plans = weakref.ref(self)

        def forget(_: Any) -> None:
            # An address may be reused as soon as its object is gone.
            alive = plans()
            if alive is not None:
                alive._forget(key)

        plan.guards = [weakref.ref(x, forget) for x in by_identity]
        if len(self._plans) >= _MAX_PLANS and key not in self._plans:
            self._plans.pop(next(iter(self._plans)), None)
        self._plans[key] = self._last = plan

    def _forget(self, key: tuple) -> None:
        self._last = None
        self._plans.pop(key, None)
