"""Undoes changes to refs if the construction of a module fails.

A field that is given a ref sets its name, collection and declared type. The previous state
is kept here while the module is being made, and restored if an exception ends it.

The metaclass of `rx.Module` surrounds all of that. A bare `equinox.Module` only calls us in
a converter for each field, and in `__check_init__`: see `finish_fields`.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx

from .._core import _jax, _trace
from .._core._ref import commits, Ref, set_content


_State = tuple[Ref, tuple[Any, ...]]


class _Log(NamedTuple):
    """The states of refs, and the trace in which their module is being made."""

    states: list[_State]
    trace: _jax.TraceRef


class _Here(threading.local):
    def __init__(self):
        # One per module that is being made, outermost first.
        self.logs: list[_Log] = []


_here = _Here()


def keep_state(ref: Ref) -> None:
    """Call this before a field changes any attribute of a ref it holds."""
    if _here.logs:
        state = ref._collection, ref._name, ref._declared, ref._value
        _here.logs[-1].states.append((ref, state))


@contextlib.contextmanager
def making_a_module() -> Iterator[None]:
    """The context in which a module is made. If that fails, its refs are restored."""
    with _logging() as log:
        yield
        if len(_here.logs) > 1:
            # The enclosing module may still fail. (A ref of an inner trace, such as
            # `filter_vmap` over layers, ends with that trace, and must not be kept.)
            outer = _here.logs[-2]
            mine = (x for x in log if _trace.outlives(x[0]._trace, outer.trace))
            outer.states.extend(mine)


class ModuleMeta(type(eqx.Module)):
    """The class of `rx.Module`."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        with making_a_module():
            return super().__call__(*args, **kwargs)


def finish_fields(cls: type, finish: Callable[[Any], None]) -> None:
    """Calls `finish` with each new instance of `cls`, a bare `equinox.Module`, when all its
    fields are converted. Only then may the refs that it was given change.

    Equinox calls the converters, and then the `__check_init__` of each class in the MRO. Of
    these, this is the last one that is ours. If one that follows fails, of a base without
    ref fields, nothing tells us.
    """
    check = cls.__dict__.get("__check_init__")
    if hasattr(check, "_finishes_fields"):
        return  # by another field of the class

    def check_init(self: Any) -> None:
        with making_a_module():
            hooks = (vars(base).get("__check_init__") for base in type(self).__mro__)
            *_, last = (hook for hook in hooks if hasattr(hook, "_finishes_fields"))
            if last is check_init:
                finish(self)
            if check is not None:
                check(self)

    if check is not None:
        functools.update_wrapper(check_init, check)
    check_init._finishes_fields = True  # pyright: ignore[reportFunctionMemberAccess]
    cls.__check_init__ = check_init  # pyright: ignore[reportAttributeAccessIssue]


@contextlib.contextmanager
def _logging() -> Iterator[list[_State]]:
    log: list[_State] = []
    mine = _Log(log, _jax.current_trace_ref())
    try:
        _here.logs.append(mine)
        yield log
    except BaseException:
        with commits.lock:
            for ref, (*rest, value) in reversed(log):
                ref._collection, ref._name, ref._declared = rest
                if ref._value is not value:
                    set_content(ref, value)
            commits.written()
            commits.restructured += 1
        raise
    finally:
        # Not the last: a signal may come before it is pushed.
        _here.logs[:] = [log for log in _here.logs if log is not mine]
