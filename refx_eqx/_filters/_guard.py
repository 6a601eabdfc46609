"""Where refs may not be written: inside `mutable`, and in a filter."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from .._core import _jax, _trace
from .._core._errors import describe, ImmutableError
from .._core._ref import commits, Ref
from .._trees._changes import containers, copied, is_same_value


__tracebackhide__ = True


@contextlib.contextmanager
def guarded(allows: Callable[[Ref], bool], where: str) -> Iterator[None]:
    """While it lasts, only refs that `allows` selects may be written.

    **Arguments:**

    - `where`: for messages: where this is, and what to do.
    """
    guard = _Guard(allows, where)
    changed = []
    try:
        _trace.guards.set((*_trace.guards.get(), guard))
        yield
    finally:
        # Not the guards of before: a generator may end in between.
        _trace.guards.set(tuple(g for g in _trace.guards.get() if g is not guard))
        changed = guard.restored()
    for ref in changed:
        raise ImmutableError(
            f"Cannot write {describe(ref)}: a list, a dict or a NumPy array in its value was "
            f"changed in place, and is as it was again: this code ran {where}"
        )


def only_answering() -> contextlib.AbstractContextManager[None]:
    """While it lasts, no ref may be written."""
    return guarded(
        lambda _: False,
        "in a filter, which only answers which refs are meant. Write the ref before, or "
        "after.",
    )


class _Guard:
    """What may be written while it lasts; and what was read that may not, and could be
    changed in place, which is not seen before the end. `depth` is the number of bodies that
    it was opened in."""

    __slots__ = ("_home", "_read", "allows", "depth", "where")

    def __init__(self, allows: Callable[[Ref], bool], where: str):
        self.allows = allows
        self.where = where
        self.depth = len(_trace.thread.state.bodies)
        self._home = _jax.current_trace_ref()
        # By the id of the ref: it, its value, and a copy of that.
        self._read: dict[int, tuple[Ref, Any, Any]] = {}

    def read(self, ref: Ref, value: Any) -> None:
        # What a body does to an inner ref is checked when it is written back.
        if id(ref) in self._read or ref._trace() is not self._home():
            return
        if containers(value) and not self.allows(ref):
            self._read[id(ref)] = ref, value, copied(value)

    def restored(self) -> list[Ref]:
        """Gives the refs that were changed in place the values of before."""
        changed = []
        for ref, value, before in self._read.values():
            if ref._value is value and not is_same_value(value, before):
                changed.append(ref)
                with commits.lock:
                    commits.store(((ref, before),))
        return changed
