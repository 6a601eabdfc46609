"""`filter_jit`: one compiled program for each structure, called with flat arrays."""

import functools
import inspect
import logging
import types
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, overload, ParamSpec, TypeVar

import equinox as eqx
import jax
import jax.extend.core
import jax.numpy as jnp

from .. import _trace
from .._errors import ConcurrencyError, describe, StructureError
from .._functionalize import (
    call,
    dispatching,
    DYNAMIC,
    Lifted,
    n_arrays,
    name_of,
    open_call,
    Opened,
    Outcome,
    running_call,
    Structure,
)


_trace.register_exclusion(__file__)

_P = ParamSpec("_P")
_T = TypeVar("_T")

Donate = Literal["all", "all-except-first", "warn", "warn-except-first", "none", "refs"]


class _Split(NamedTuple):
    """Which of the flat arrays are donated."""

    donated: tuple[int, ...]
    kept: tuple[int, ...]


class _Resplit(Exception):
    """Other arrays can be donated than was thought: the program writes other refs."""

    def __init__(self, split: _Split):
        self.split = split


class _Program:
    """The compiled programs of one function: one for each structure and set of shapes."""

    def __init__(self, name: str, donate: Donate, jitkwargs: dict[str, Any]):
        self.donate = donate
        self._splits: dict[Structure, _Split] = {}

        def traced(structure: Structure, arrays: list[Any]) -> Outcome:
            __tracebackhide__ = True
            outcome = running_call().run("filter_jit", arrays, transparent=False)
            outcome.info.waits = _has_runtime_check(_trace.staged_equations())
            return outcome

        def donating(
            structure: Structure, split: _Split, donated: list[Any], kept: list[Any]
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
            donated, kept = _apart(opened.arrays, split)
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

    def split(self, opened: Opened) -> _Split:
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

    def _split_for(self, opened: Opened, outcome: Any, arrays: list[Any]) -> _Split:
        every = range(len(arrays))
        if outcome.info.waits:
            return _Split((), tuple(every))
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
        return _Split(
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


def _apart(arrays: list[Any], split: _Split) -> tuple[list[Any], list[Any]]:
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


def _program(fn: Any, donate: Donate, jitkwargs: dict[str, Any]) -> _Program:
    key = donate, tuple(sorted(jitkwargs.items()))
    try:
        programs = _programs.setdefault(_anchor(fn), {})
        program = programs.get(key)
    except TypeError:  # an option that is not hashable
        return _Program(name_of(fn), donate, jitkwargs)
    if program is None:
        program = programs[key] = _Program(name_of(fn), donate, jitkwargs)
    return program


class _Jit(Lifted):
    transform_name = "filter_jit"

    def __init__(self, fn: Any, *, donate: Donate, jitkwargs: dict[str, Any]):
        super().__init__(fn, donate=donate, jitkwargs=jitkwargs)
        self._program = _program(fn, donate, jitkwargs)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        return call(self.__wrapped__, *self._bind(args, kwargs), self._program)

    def _bind(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if kwargs and not args and self.options["donate"].endswith("-except-first"):
            # "First" is the first parameter, also when it is passed by name.
            bound = inspect.signature(self.__wrapped__).bind(*args, **kwargs)
            return bound.args, bound.kwargs
        return args, kwargs

    def lower(self, /, *args: Any, **kwargs: Any) -> "Lowered":
        """Traces and lowers the function for these arguments. Nothing is written."""
        __tracebackhide__ = True
        opened = open_call(self.__wrapped__, *self._bind(args, kwargs))
        program = self._program
        with dispatching(opened):
            if program.donate == "none":
                split = _Split((), tuple(range(len(opened.arrays))))
                lowered = program.plain.lower(opened.structure, opened.arrays)
            else:
                split = program.split(opened)
                parts = _apart(opened.arrays, split)
                lowered = program.donating.lower(opened.structure, split, *parts)
        return Lowered(self, lowered, opened.structure, split)


class Lowered:
    """A lowered `filter_jit` function: what `.lower(...)` returns.

    It has the attributes of `jax.stages.Lowered`; `compile` is aware of refs.
    """

    def __init__(self, jit: _Jit, lowered: Any, structure: Structure, split: _Split):
        self.lowered = lowered
        self._rest = jit, structure, split

    def compile(
        self, compiler_options: dict[str, str | bool] | None = None
    ) -> "Compiled":
        compiled = self.lowered.compile(compiler_options=compiler_options)
        return Compiled(compiled, *self._rest)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lowered, name)


class Compiled:
    """A compiled `filter_jit` function: takes arguments of the structure and shapes that it
    was compiled for, and writes refs back as the function itself does.

    It has the attributes of `jax.stages.Compiled`.
    """

    def __init__(self, compiled: Any, jit: _Jit, structure: Structure, split: _Split):
        self.compiled = compiled
        self._jit = jit
        self._structure = structure
        self._split = split

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        jit = self._jit

        def run(opened: Opened) -> Outcome:
            __tracebackhide__ = True
            if opened.structure != self._structure:
                raise StructureError(
                    f"`{name_of(jit.__wrapped__)}` was compiled for arguments of another "
                    "structure (another sharing of refs, other static values, ...). Call "
                    "the `filter_jit` function itself, which compiles when it must."
                )
            if jit.options["donate"] == "none":
                outcome = self.compiled(opened.arrays)
            else:
                outcome = self.compiled(*_apart(opened.arrays, self._split))
            jax.block_until_ready(outcome.updates if outcome.info.waits else ())
            return outcome

        return call(jit.__wrapped__, *jit._bind(args, kwargs), run)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.compiled, name)


@overload
def filter_jit(
    *, donate: Donate = "none", **jitkwargs: Any
) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]: ...


@overload
def filter_jit(
    fun: Callable[_P, _T], *, donate: Donate = "none", **jitkwargs: Any
) -> Callable[_P, _T]: ...


def filter_jit(fun: Any = None, *, donate: Donate = "none", **jitkwargs: Any) -> Any:
    """As `equinox.filter_jit`, by reference: what the function writes to a ref is written
    to the caller's ref.

    The arrays in refs and all bare JAX and NumPy arrays are traced. All else is static.
    The refs in the arguments, in the function itself (a module, a bound method, a partial)
    and in what it closes over are carried. Only those that were written come back.

    !!! Example

        ```python
        import jax.numpy as jnp
        import refx_eqx as rx

        count = rx.Ref(jnp.array(0), "counts")

        @rx.filter_jit
        def step(count, x):
            count.value += 1
            return x * count.value

        assert step(count, jnp.array(3.0)) == 3.0
        assert step(count, jnp.array(3.0)) == 6.0
        assert count.value == 2
        ```

    A second call with arguments of the same structure, sharing, shapes and dtypes does not
    trace again, whichever objects they are. Another sharing does. The call returns before
    the computation is done; it waits only if the program has a run-time check
    (`equinox.error_if`). If the function raises, or a check fails, no ref has changed.

    **Arguments:**

    - `fun`: the function to compile.
    - `donate`: whose buffers may be reused for the results. `"refs"`: those of the refs
        that the function overwrites. The others are Equinox's: `"all"`,
        `"all-except-first"`, `"warn"`, `"warn-except-first"`, `"none"` (the default); they
        donate the bare arrays too, in all arguments or all but the first. A ref that is
        not overwritten is never donated, nor is anything in a program with a run-time
        check: it would be lost if the check failed.
    - `**jitkwargs`: passed on to `jax.jit`, such as `compiler_options`.

    **Returns:**

    A function with the signature of `fun`, and the method `.lower(*args, **kwargs)`, whose
    result has `.compile()`.

    **Raises:**

    When called:

    - `TraceLevelError`: if the function touches a ref that it reaches through a global name.
    - `StructureError`: if it changes a list, a dict or a closure variable that it was given.
    - `ConcurrencyError`: if another thread wrote a ref whose buffer was donated.
    """
    if fun is None:
        return functools.partial(filter_jit, donate=donate, **jitkwargs)
    modes = Donate.__args__  # type: ignore[attr-defined]
    if donate not in modes:
        raise ValueError(
            f"`filter_jit(..., donate={donate!r})` must be one of "
            f"{', '.join(map(repr, modes))}."
        )
    unsupported = sorted(_UNSUPPORTED & jitkwargs.keys())
    if unsupported:
        raise ValueError(
            f"`filter_jit` does not take {', '.join(map(repr, unsupported))}: what is "
            "traced and what is static is decided by the filter. Use `donate=` to donate."
        )
    return _Jit(fun, donate=donate, jitkwargs=jitkwargs)


_UNSUPPORTED: frozenset[str] = frozenset(
    (
        "static_argnums",
        "static_argnames",
        "donate_argnums",
        "donate_argnames",
        "in_shardings",
        "out_shardings",
    )
)
