"""Undoes changes to refs if the construction of a module fails.

A field that is given a ref sets its name, collection and declared type. The previous state
is kept here while the module is being made, and restored if an exception ends it.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

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
        # The fields of a bare `equinox.Module` that are already converted.
        self.converted: list[_State] = []


_here = _Here()


def keep_state(ref: Ref) -> None:
    """Call this before a field changes any attribute of a ref it holds."""
    if _here.logs:
        state = ref._collection, ref._name, ref._declared, ref._value
        _here.logs[-1].states.append((ref, state))


@contextlib.contextmanager
def making_a_module() -> Iterator[None]:
    """The context in which a module is made. If that fails, its refs are restored."""
    with _logging([]) as log:
        yield
        if len(_here.logs) > 1:
            # The enclosing module may still fail. (A ref of an inner trace, such as
            # `filter_vmap` over layers, ends with that trace, and must not be kept.)
            outer = _here.logs[-2]
            mine = (x for x in log if _trace.outlives(x[0]._trace, outer.trace))
            outer.states.extend(mine)


@contextlib.contextmanager
def one_of_several(is_first: bool, is_last: bool) -> Iterator[None]:
    """The context in which a field of a bare `equinox.Module` is converted: no hook
    surrounds all of them. If it fails, the fields before it are undone too."""
    if is_first:
        _here.converted = []
    log = _here.converted
    try:
        with _logging(log):
            yield
    except BaseException:
        is_last = True
        raise
    finally:
        if is_last:
            _here.converted = []


@contextlib.contextmanager
def _logging(log: list[_State]) -> Iterator[list[_State]]:
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
