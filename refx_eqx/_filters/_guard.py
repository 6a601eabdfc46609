"""Contexts that forbid writes to refs: `mutable`, and calls of filters."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from .._core import _jax, _trace
from .._core._blocks import Block
from .._core._errors import describe, ImmutableError
from .._core._ref import commits, Ref
from .._trees._changes import containers, copied, is_same_value


@contextlib.contextmanager
def guarded(allows: Callable[[Ref], bool], where: str) -> Iterator[None]:
    """A context in which only refs selected by `allows` may be written.

    **Arguments:**

    - `where`: what the context is, and what to do, for messages.
    """
    guard = _Guard(allows, where)
    changed = []
    try:
        _trace.guards.begin(guard)
        yield
    finally:
        guard.ended = True
        _trace.guards.running()
        changed = guard.restored()
    for ref in changed:
        raise ImmutableError(
            f"Cannot write {describe(ref)}: a list, a dict or a NumPy array in its value "
            f"was changed in place, and has been restored: this code ran {where}"
        )


def only_answering() -> contextlib.AbstractContextManager[None]:
    """A context in which no ref may be written."""
    return guarded(
        lambda _: False,
        "in a filter, which only selects refs. Write the ref before, or after.",
    )


class _Guard(Block):
    """What may be written in a context, and the values read there that could be changed in
    place but must not be: such changes are found at the end. `depth` is the number of
    bodies around it."""

    __slots__ = ("_home", "_read", "allows", "depth", "where")

    def __init__(self, allows: Callable[[Ref], bool], where: str):
        super().__init__()
        self.allows = allows
        self.where = where
        self.depth = len(_trace.thread.state.bodies)
        self._home = _jax.current_trace_ref()
        # By the id of the ref: the ref, its value, and a copy of the value.
        self._read: dict[int, tuple[Ref, Any, Any]] = {}

    def read(self, ref: Ref, value: Any) -> None:
        # Changes of a body to an inner ref are checked when they are written back.
        if self.ended or id(ref) in self._read or ref._trace() is not self._home():
            return
        if containers(value) and not self.allows(ref):
            self._read[id(ref)] = ref, value, copied(value)

    def restored(self) -> list[Ref]:
        """Restores the values of refs that were changed in place."""
        changed = []
        # Taken: where the block began, the guard is kept until someone looks.
        read, self._read = self._read, {}
        for ref, value, before in read.values():
            if ref._value is value and not is_same_value(value, before):
                changed.append(ref)
                with commits.lock:
                    commits.store(((ref, before),))
        return changed
