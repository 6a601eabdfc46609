"""Programs: compiled once for each structure, and called with flat arrays.

`filter_jit` is a program whose body runs the function. The control flow transforms are
programs too, so that a second call with the same structure does not trace again.
"""

import functools
import logging
import types
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.extend.core
import jax.numpy as jnp

from .. import _trace
from .._errors import ConcurrencyError, describe
from .._functionalize import (
    dispatching,
    DYNAMIC,
    Lifted,
    n_arrays,
    Opened,
    Outcome,
    running_call,
    Structure,
)


_trace.register_exclusion(__file__)

Donate = Literal["all", "all-except-first", "warn", "warn-except-first", "none", "refs"]


class Split(NamedTuple):
    """Which of the flat arrays are donated."""

    donated: tuple[int, ...]
    kept: tuple[int, ...]


class _Resplit(Exception):
    """Other arrays can be donated than was thought: the program writes other refs."""

    def __init__(self, split: Split):
        self.split = split


class Program:
    """The compiled programs of one function: one for each structure and set of shapes.

    **Arguments:**

    - `name`: of the function, for the profiler and the compiler.
    - `body`: what is compiled: from an opened call and arrays in place of its own, to an
        outcome. It is kept, so it must hold nothing of a single call.
    - `donate`, `jitkwargs`: as in `filter_jit`.
    """

    def __init__(
        self,
        name: str,
        body: Callable[[Opened, list[Any]], Outcome],
        donate: Donate = "none",
        **jitkwargs: Any,
    ):
        self.donate: Donate = donate
        self._splits: dict[Structure, Split] = {}

        def traced(structure: Structure, arrays: list[Any]) -> Outcome:
            __tracebackhide__ = True
            outcome = body(running_call(), arrays)
            outcome.info.waits = _has_runtime_check(_trace.staged_equations())
            return outcome

        def donating(
            structure: Structure, split: Split, donated: list[Any], kept: list[Any]
        ) -> Outcome:
            __tracebackhide__ = True
            arrays: list[Any] = [None] * (len(donated) + len(kept))
            for i, x in zip(split.donated, donated):
                arrays[i] = x
            for i, x in zip(split.kept, kept):
                arrays[i] = x
            opened = running_call()
            if opened.traced is None:
                outcome = traced(structure, arrays)
            else:
                # Traced a moment ago, to find the split: not a second time.
                jaxpr, treedef = opened.traced
                out = jax.extend.core.jaxpr_as_fun(jaxpr)(*arrays)
                outcome = jax.tree.unflatten(treedef, out)
            right = self._split_for(opened, outcome, arrays)
            if right != split:
                raise _Resplit(right)
            return outcome

        traced.__name__ = traced.__qualname__ = name
        donating.__name__ = donating.__qualname__ = name
        self._traced = traced
        self.plain = jax.jit(traced, static_argnums=0, **jitkwargs)
        self.donating = jax.jit(
            donating, static_argnums=(0, 1), donate_argnums=2, **jitkwargs
        )

    def __call__(self, opened: Opened) -> Outcome:
        __tracebackhide__ = True
        try:
            with dispatching(opened):
                outcome = self._dispatch(opened)
            if outcome.info.waits and _trace.is_evaluating():
                # A failed check must leave every ref at its old value.
                jax.block_until_ready((outcome.out, outcome.updates))
            return outcome
        except (jax.errors.JaxRuntimeError, ValueError, RuntimeError) as e:
            _explain(e, opened)
            raise

    def _dispatch(self, opened: Opened) -> Outcome:
        __tracebackhide__ = True
        if self.donate == "none" or not _trace.is_evaluating():
            return self.plain(opened.structure, opened.arrays)
        split = self.split(opened)
        while True:
            donated, kept = apart(opened.arrays, split)
            try:
                if self.donate in ("warn", "warn-except-first", "refs"):
                    return self.donating(opened.structure, split, donated, kept)
                with warnings.catch_warnings():
                    warnings.filterwarnings(
                        "ignore", message="Some donated buffers were not usable*"
                    )
                    return self.donating(opened.structure, split, donated, kept)
            except _Resplit as e:
                split = self._splits[opened.structure] = e.split

    def lower(self, opened: Opened) -> tuple[Any, Split]:
        """The lowered program for an opened call, and what of its arrays it donates."""
        __tracebackhide__ = True
        with dispatching(opened):
            if self.donate == "none":
                split = Split((), tuple(range(len(opened.arrays))))
                return self.plain.lower(opened.structure, opened.arrays), split
            split = self.split(opened)
            parts = apart(opened.arrays, split)
            return self.donating.lower(opened.structure, split, *parts), split

    def split(self, opened: Opened) -> Split:
        """What to donate, as far as is known before the program is traced for its shapes.

        What is written is known once the function was traced for some. If it depends on
        the shapes (in Python code it may), `donating` notices.
        """
        split = self._splits.get(opened.structure)
        if split is None:
            traced = functools.partial(self._traced, opened.structure)
            jaxpr, outcome = jax.make_jaxpr(traced, return_shape=True)(opened.arrays)
            opened.traced = jaxpr, jax.tree.structure(outcome)
            split = self._split_for(opened, outcome, opened.arrays)
            self._splits[opened.structure] = split
        return split

    def _split_for(self, opened: Opened, outcome: Any, arrays: list[Any]) -> Split:
        every = range(len(arrays))
        if outcome.info.waits:
            return Split((), tuple(every))
        donated = set(_bare_to_donate(opened.structure, self.donate))
        in_first = set()
        if self.donate.endswith("-except-first"):
            in_first = _refs_of_part(opened.structure, 1)
        updates = iter(outcome.updates)
        for number, inside in outcome.info.written:
            start, stop = opened.spans[number]
            # One array in, one array out: for anything else the buffers cannot be matched.
            new = [next(updates) for _ in range(n_arrays(inside))]
            if number not in in_first and inside is None and stop - start == 1:
                old = arrays[start]
                if eqx.is_array(old) and _same_buffer_type(old, new[0]):
                    donated.add(start)
        return Split(
            tuple(i for i in every if i in donated),
            tuple(i for i in every if i not in donated),
        )


def _same_buffer_type(old: Any, new: Any) -> bool:
    return old.shape == new.shape and old.dtype == new.dtype


def _bare_to_donate(structure: Structure, donate: Donate) -> list[int]:
    """The positions of the arrays beside refs that this mode donates."""
    if donate in ("none", "refs"):
        return []
    positions, start = [], 0
    for i, codes in enumerate(_codes_by_part(structure)):
        n = codes.count(DYNAMIC)
        if not (i == 1 and donate.endswith("-except-first")):
            positions.extend(range(start, start + n))
        start += n
    return positions


def _refs_of_part(structure: Structure, part: int) -> set[int]:
    return {code for code in _codes_by_part(structure)[part] if code >= 0}


def _codes_by_part(structure: Structure) -> list[tuple[int, ...]]:
    start, parts = 0, []
    for n in structure.sizes:
        parts.append(structure.codes[start : start + n])
        start += n
    return parts


def apart(arrays: list[Any], split: Split) -> tuple[list[Any], list[Any]]:
    donated = [arrays[i] for i in split.donated]
    kept = [arrays[i] for i in split.kept]
    if donated and len(set(map(id, arrays))) != len(arrays):
        # One buffer in two refs (an average that starts at the parameters, zeros made
        # once) can be donated for neither: give away a copy.
        seen = set(map(id, kept))
        for k, x in enumerate(donated):
            if id(x) in seen:
                donated[k] = jnp.array(x, copy=True)
            seen.add(id(x))
    return donated, kept


def _has_runtime_check(equations: Iterable[Any]) -> bool:
    """Whether a program calls back into Python, which may raise: `eqx.error_if` does."""
    for eqn in equations:
        if eqn.primitive.name in ("pure_callback", "io_callback"):
            return True
        for param in eqn.params.values():
            for sub in param if isinstance(param, (tuple, list)) else (param,):
                sub = getattr(sub, "jaxpr", sub)
                if hasattr(sub, "eqns") and _has_runtime_check(sub.eqns):
                    return True
    return False


_CHECK_FAILED = "_EquinoxRuntimeError: "


def _explain(error: Exception, opened: Opened) -> None:
    """Raises a better error in place of JAX's, where there is one to be had."""
    __tracebackhide__ = True
    text = str(error)
    if _CHECK_FAILED in text:
        # As `eqx.filter_jit` does. JAX hands over the message of a callback as text, with
        # Equinox's advice (to use `filter_jit`) behind it.
        message = text.split(_CHECK_FAILED, 1)[1].split("\n\n\n-----", 1)[0]
        raise eqx.EquinoxRuntimeError(message) from None
    if type(error) is ValueError:
        return
    for ref in opened.refs:
        value = ref._value
        if isinstance(value, jax.Array) and not _trace.is_tracer(value):
            if value.is_deleted():
                raise ConcurrencyError(
                    f"The buffer of {describe(ref._name, ref._collection)} is gone: it was "
                    "donated by a call that has not come back on another thread, or that "
                    "failed. Guard calls that donate with a lock; if it was one thread, "
                    "the value was also held elsewhere and donated there: copy it."
                ) from error


class _QuietChecks(logging.Filter):
    """JAX logs the traceback of every callback that raises. A failed `eqx.error_if` comes
    to the user as an exception, and once is enough."""

    def filter(self, record: logging.LogRecord) -> bool:
        kind = record.exc_info[0] if record.exc_info else None
        return kind is None or kind.__name__ != "_EquinoxRuntimeError"


logging.getLogger("jax._src.callback").addFilter(_QuietChecks())


# A program lives as long as the function that it was made for. Nothing in it holds that
# function: a structure holds functions weakly.
_programs: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _anchor(fn: Any) -> Any:
    """The object whose life a program shares: the Python function that is run."""
    while True:
        if isinstance(fn, types.FunctionType):
            return fn
        if isinstance(fn, Lifted):
            fn = fn.__wrapped__
        elif isinstance(fn, functools.partial | eqx.Partial):
            fn = fn.func
        elif hasattr(fn, "__func__"):
            fn = fn.__func__
        else:
            return type(fn)


def program_of(fn: Any, key: Hashable, make: Callable[[], Program]) -> Program:
    """The program of `fn` under `key` (the transform and its options); made if need be."""
    programs = _programs.setdefault(_anchor(fn), {})
    try:
        program = programs.get(key)
    except TypeError:  # an option that is not hashable: not kept
        return make()
    if program is None:
        program = programs[key] = make()
    return program
