"""Plans: what a repeated call knows already, so that it costs what `jax.jit` costs.

Equinox modules are immutable. So what a call has to find out about a module (its refs, its
structure) it finds out once, and a plan keeps it for as long as the module lives. A call
with a plan is: look up, read the values of the refs, call `jax.jit` on a flat list, write
back.

What may have changed since is checked, cheaply, and then the plan is made anew:

- a list or a dict in the module, or a closure variable: compared item by item, by identity;
- a static leaf with a hash of its own (a dataclass with `unsafe_hash`): by its hash, as
  programs are found. (Static fields of a module are compared by JAX, as parts of a treedef:
  it does not notice one that changes in place, nor does Equinox.)
- the structure of a ref (its value is no array any more, or its collection was set), and
  whether it matters which ref it is: `commits.irregular` counts what could change that;
- a tree of a type that is not known to be immutable: there is no plan for it.
"""

import enum
import functools
import itertools
import types
import weakref
from collections.abc import Iterator
from operator import is_
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np

from .._core import _closure, _trace
from .._core._call import (
    close_result,
    commit,
    Disturbed,
    open_call,
    Opened,
    updates_of,
)
from .._core._ref import commits, Ref
from .._core._structure import Held, is_traced, Outcome, OutcomeInfo
from ._program import explain, Program, Variant
from ._wrapper import Lifted


__tracebackhide__ = True


NO_PLAN: Any = object()
_ARRAYS = (_trace.ConcreteArray, np.ndarray)


class Plans:
    """The plans of one lifted function."""

    def __init__(self, fn: Any, program: Program):
        self._fn = fn
        self._program = program
        self._plans: dict[tuple, Plan | _Failed | None] = {}

    def call(self, args: tuple, kwargs: dict) -> Any:
        """Makes the call, if there is a plan for it; `NO_PLAN` if there is none."""
        state = _trace.undisturbed_state()
        if state is None:
            return NO_PLAN
        key: list[Any] = []
        arrays: list[Any] = []
        try:
            for arg in args:
                kind = type(arg)
                if kind in _by_identity:
                    key.append(id(arg))
                elif kind is _trace.ConcreteArray:
                    key.append(None)
                    arrays.append(arg)
                elif not _describe(arg, key, arrays):
                    return NO_PLAN
            if kwargs:
                key.append(tuple(kwargs))
                for arg in kwargs.values():
                    if not _describe(arg, key, arrays):
                        return NO_PLAN
        except RecursionError:  # a list that holds itself: the general way says so
            return NO_PLAN
        try:
            plan = self._plans.get(tuple(key))
        except TypeError:
            return NO_PLAN
        if type(plan) is Plan and plan.holds():
            out = plan.call(arrays, state)
            if out is not NO_PLAN:
                return out
        return self._learn(tuple(key), args, kwargs, arrays, state)

    def _learn(
        self, key: tuple, args: tuple, kwargs: dict, arrays: list[Any], state: Any
    ) -> Any:
        if key not in self._plans:
            # The first time, a key is only noted: most modules that are made in passing
            # (by `eqx.tree_at`, by a transform) are never seen again.
            if len(self._plans) >= _MAX_NOTES:
                self._plans = {k: v for k, v in self._plans.items() if v is not None}
            self._plans[key] = None
            return NO_PLAN
        before = self._plans[key]
        if type(before) is _Failed and before.times == _MAX_FAILURES:
            return NO_PLAN
        plan = make_plan(self._fn, self._program, args, kwargs)
        if plan is None:
            failed = before if type(before) is _Failed else _Failed()
            failed.times += 1
            self._keep(key, failed, args, kwargs)
            return NO_PLAN
        self._keep(key, plan, args, kwargs)
        return plan.call(arrays, state)

    def _keep(
        self, key: tuple, plan: "Plan | _Failed", args: tuple, kwargs: dict
    ) -> None:
        plans = weakref.ref(self)

        def forget(_: Any) -> None:
            # An id may be used again as soon as its object is gone.
            alive = plans()
            if alive is not None:
                alive._plans.pop(key, None)

        held = (x for arg in (*args, *kwargs.values()) for x in _held(arg))
        plan.guards = [weakref.ref(x, forget) for x in held]
        self._plans[key] = plan


class _Failed:
    """There could be no plan: a ref has a value that is not one array, say. That may pass
    (a NumPy array is soon written over), so it is tried again, but not at each call."""

    __slots__ = ("guards", "times")

    guards: list[weakref.ref]

    def __init__(self):
        self.times = 0


_MAX_FAILURES = 3
_MAX_NOTES = 1000

# The types whose instances are told apart by identity, and known to be immutable. Filled as
# they are met.
_by_identity: set[type] = {Ref, types.FunctionType}


def _is_by_identity(kind: type) -> bool:
    if kind in _by_identity:
        return True
    if issubclass(kind, (eqx.Module, Ref)):
        _by_identity.add(kind)
        return True
    return False


def _describe(arg: Any, key: list[Any], arrays: list[Any]) -> bool:
    """Adds to `key` what must be the same for a plan to fit, and to `arrays` those that
    may differ, in JAX's order. `False` if there can be no plan."""
    kind = type(arg)
    if kind in _ARRAYS:
        key.append(None)
        arrays.append(arg)
    elif _is_by_identity(kind):
        key.append(id(arg))
    elif arg is None or kind in (bool, int, str):
        key.append((kind, arg))
    elif kind is tuple or kind is list:
        key.append((kind, len(arg)))
        return all(_describe(x, key, arrays) for x in arg)
    elif kind is dict:
        try:
            names = sorted(arg)
        except TypeError:
            return False
        key.append((kind, *names))
        return all(_describe(arg[name], key, arrays) for name in names)
    else:
        leaves, treedef = jtu.tree_flatten(arg)
        if any(type(leaf) not in _ARRAYS for leaf in leaves):
            return False
        key.append(treedef)
        arrays.extend(leaves)
    return True


def _held(arg: Any) -> Iterator[Any]:
    """What of an argument is in a key by its identity."""
    kind = type(arg)
    if kind in _by_identity:
        yield arg
    elif kind is tuple or kind is list:
        for x in arg:
            yield from _held(x)
    elif kind is dict:
        for x in arg.values():
            yield from _held(x)


class Plan:
    """One call, prepared. See the top of this file."""

    __slots__ = (
        "bare",
        "cells",
        "containers",
        "donate",
        "guards",
        "irregular",
        "last",
        "opened",
        "program",
        "refs",
        "run",
        "slots",
        "statics",
        "variant",
    )

    # For each array beside the refs: its position among those of the call, or the array
    # itself where a module holds it. `None` if they are just those of the call.
    bare: list[Any] | None
    # What could have changed.
    containers: list["_List | _Dict | _Set"]
    cells: list[_closure.Watched]
    statics: list[tuple[Any, int]]
    # Weak references to the modules that the key has by identity.
    guards: list[weakref.ref]
    # Of the last outcome: its info, and the refs that it writes, or `None` if some of them
    # get anything else than one array. A tuple, as several threads may be here at once.
    last: tuple[OutcomeInfo | None, list[Ref] | None]

    def __init__(
        self,
        opened: Opened,
        program: Program,
        variant: Variant,
        bare: list[Any] | None,
        irregular: int,
    ):
        self.opened = opened
        self.program, self.variant = program, variant
        self.refs = opened.refs
        self.slots = opened.structure.slots
        # Without donation there is nothing to decide on a call.
        self.run = variant.plain
        self.donate = (
            functools.partial(variant.dispatch, opened) if variant.donates else None
        )
        self.bare = bare
        self.containers, self.cells, self.statics = [], [], []
        self.guards = []
        self.last = None, None
        self.irregular = irregular

    def fits(self, values: list[Any]) -> bool:
        """Whether these values of the refs, and those of now, are such as the plan knows."""
        irregular = commits.irregular
        if any(
            type(value) is not _trace.ConcreteArray
            or type(ref._value) is not _trace.ConcreteArray
            or ref._collection != slot.collection
            or ref._declared != slot.declared
            for value, ref, slot in zip(values, self.refs, self.slots)
        ):
            return False
        # It may matter which refs these are, and that was found out meanwhile.
        if self.program.variant(self.opened) is not self.variant:
            return False
        self.irregular = irregular
        return True

    def holds(self) -> bool:
        """Whether no list, dict, static object or closure variable has changed."""
        if self.containers and not all(x.holds() for x in self.containers):
            return False
        if self.statics and any(hash(obj) != then for obj, then in self.statics):
            return False
        try:
            # Most contents are objects that stay: that is quicker seen than keys compared.
            for cell, _, recall in self.cells:
                content = cell.cell_contents
                if content is None or content is not recall():
                    break
            else:
                return True
        except ValueError:  # an empty cell
            pass
        return all(_closure.same_content(cell, key) for cell, key, _ in self.cells)

    def call(self, arrays: list[Any], state: _trace.ThreadState) -> Any:
        """Makes the call with these arrays beside the refs, on the thread of `state`;
        `NO_PLAN` if the refs are such as the plan does not know."""
        refs = self.refs
        if self.bare is not None:
            arrays = [arrays[x] if type(x) is _Given else x for x in self.bare]
        calls, lock = state.calls, commits.lock
        while True:
            started = commits.count
            values = [ref._value for ref in refs]
            if self.irregular != commits.irregular and not self.fits(values):
                return NO_PLAN
            calls.append(self.opened)
            try:
                try:
                    if self.donate is not None:
                        out, updates, info = self.donate(arrays + values, values)
                    else:
                        flat = arrays + values if arrays else values
                        out, updates, info = self.run(flat)
                    if info.waits:
                        jax.block_until_ready((out, updates))
                finally:
                    calls.pop()
                known, written = self.last
                if known is not info:
                    if not info.asked.holds_for(refs):
                        return NO_PLAN  # traced by another thread, for its own refs
                    written = _written_refs(self.opened, updates)
                    self.last = info, written
                if written is None:
                    # A value that is not one array: the general way.
                    outcome = Outcome(out, updates, info)
                    result = close_result(outcome, refs)
                    commit(refs, values, started, updates_of(outcome, refs))
                    return result
                # Closed before anything is written: a class of the user's may raise.
                if info.build is None:
                    result = close_result(Outcome(out, updates, info), refs)
                else:
                    result = info.build(out)
                lock.acquire()  # half the time of a `with` statement
                try:
                    if commits.count != started and not all(
                        ref._value is value for ref, value in zip(refs, values)
                    ):
                        continue
                    for ref, value in zip(written, updates.values()):
                        ref._value = value
                    commits.count += 1
                finally:
                    lock.release()
            except Disturbed:
                continue
            except (jax.errors.JaxRuntimeError, ValueError, RuntimeError) as e:
                try:
                    explain(e, refs, values)
                except Disturbed:
                    continue
                raise
            return result


class _List:
    """A list, and what was in it when the plan was made."""

    __slots__ = ("items", "then")

    def __init__(self, items: list):
        self.items = items
        self.then = tuple(items)

    def holds(self) -> bool:
        items, then = self.items, self.then
        return len(items) == len(then) and all(map(is_, items, then))


class _Dict:
    """The same of a dict; the order of its keys counts."""

    __slots__ = ("items", "keys", "then")

    def __init__(self, items: dict):
        self.items = items
        self.keys = tuple(items)
        self.then = tuple(items.values())

    def holds(self) -> bool:
        items = self.items
        return tuple(items) == self.keys and all(map(is_, items.values(), self.then))


class _Set:
    """The same of a set."""

    __slots__ = ("items", "then")

    def __init__(self, items: set):
        self.items = items
        self.then = frozenset(items)

    def holds(self) -> bool:
        return self.items == self.then


def _written_refs(opened: Opened, updates: dict[int, Any]) -> list[Ref] | None:
    """The refs that get one array each; `None` if some get anything else."""
    if any(type(x) is Held for x in updates.values()):
        return None
    return [opened.refs[number] for number in updates]


class _Given(int):
    """Stands for an array of the call, by its position, while a plan is made."""

    __slots__ = ()


def _mark(arg: Any, positions: Iterator[int]) -> Any:
    """`arg` with its arrays replaced by their positions; in the order of `_describe`."""
    kind = type(arg)
    if kind in _ARRAYS:
        return _Given(next(positions))
    if _is_by_identity(kind) or arg is None or kind in (bool, int, str):
        return arg
    if kind is tuple or kind is list:
        return kind(_mark(x, positions) for x in arg)
    if kind is dict:
        return {name: _mark(arg[name], positions) for name in sorted(arg)}
    return jtu.tree_map(lambda _: _Given(next(positions)), arg)


def make_plan(fn: Any, program: Program, args: tuple, kwargs: dict) -> Plan | None:
    """A plan for this call; `None` if something in it can change unseen."""
    irregular, positions = commits.irregular, itertools.count()
    marked = tuple(_mark(arg, positions) for arg in args)
    marked_kwargs = {name: _mark(arg, positions) for name, arg in kwargs.items()}
    opened = open_call(
        fn, marked, marked_kwargs, lambda x: type(x) is _Given or is_traced(x)
    )
    if any(type(value) is not _trace.ConcreteArray for value in opened.values):
        return None
    bare = opened.arrays[: opened.structure.n_bare]
    as_given = bare == list(range(next(positions)))
    variant = program.variant(opened)
    plan = Plan(opened, program, variant, None if as_given else bare, irregular)
    walk = _Walk(plan)
    walk.tree(fn)
    for arg in (*args, *kwargs.values()):
        for held in _held(arg):
            walk.tree(held)
    # The plan must not keep the values of this moment alive.
    opened.arrays, opened.values, opened.leaves = [], [], []
    return None if walk.unknown else plan


class _Walk:
    """Finds everything below a tree that may change without the tree changing."""

    def __init__(self, plan: Plan):
        self.unknown = False
        self._plan = plan
        self._seen: set[int] = set()

    def tree(self, tree: Any) -> None:
        try:
            _closure.refuse_cycle(tree)
            leaves = jtu.tree_leaves(tree, is_leaf=self._visit)
        except (ValueError, TypeError):  # what a function closes over need be no pytree
            self.unknown = True
            return
        for leaf in leaves:
            if id(leaf) in self._seen:
                continue
            if type(leaf) is types.FunctionType and leaf.__closure__:
                self._seen.add(id(leaf))
                self._plan.cells += _closure.watched_cells(leaf)
                for content in _closure.inside(leaf):
                    self.tree(content)
            elif _closure.may_carry(leaf):
                self._seen.add(id(leaf))
                for inside in _closure.inside(leaf):
                    self.tree(inside)
            else:
                self._static(leaf)

    def _visit(self, x: Any) -> bool:
        kind = type(x)
        if kind is list:
            self._plan.containers.append(_List(x))
        elif kind is dict:
            self._plan.containers.append(_Dict(x))
            return _closure.is_table(x)
        elif not (_is_immutable(kind) or jtu.all_leaves((x,))):
            self.unknown = True
        return False

    def _static(self, leaf: Any) -> None:
        if isinstance(leaf, set):
            self._seen.add(id(leaf))
            self._plan.containers.append(_Set(leaf))
        # One without a hash is no part of a program, or is there by its identity.
        if type(leaf).__hash__ in (object.__hash__, None):
            return
        if isinstance(leaf, _OF_ONE_HASH):
            return
        self._seen.add(id(leaf))
        self._plan.statics.append((leaf, hash(leaf)))


def _is_immutable(kind: type) -> bool:
    return _is_by_identity(kind) or issubclass(kind, _IMMUTABLE)


_IMMUTABLE = (tuple, type(None), jtu.Partial, Lifted, *_ARRAYS)

# What is hashed by its value, and cannot change it.
_OF_ONE_HASH = (
    *(bool, int, float, complex, str, bytes, type, type(None)),
    *(enum.Enum, np.dtype, np.generic, np.ndarray, jax.Array, Ref),
)
