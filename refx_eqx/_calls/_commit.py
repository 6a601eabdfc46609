"""Writes the updates of a call into the refs of its caller: all at once, or none."""

import threading
from collections.abc import Set
from typing import Any

from .._core import _jax, _trace
from .._core._access import check_writable, donated, is_gone
from .._core._errors import ConcurrencyError, describe, name_of, StructureError
from .._core._ref import commits, Ref
from .._trees._changes import containers
from ._structure import Outcome


def updates_of(outcome: Outcome, refs: list[Ref]) -> list[tuple[Ref, Any]]:
    """The refs of a call that were written, each with its new value.

    **Raises:**

    - `StructureError`: if a list or a dict that was changed in place is also held by
        another ref.
    """
    if outcome.info.in_place:
        _check_unshared(refs, outcome.info.in_place)
    return [(refs[i], outcome.info.value(i, x)) for i, x in outcome.updates.items()]


def _check_unshared(refs: list[Ref], in_place: Set[int]) -> None:
    held = [containers(ref._value) for ref in refs]
    for i in in_place:
        for other, theirs in zip(refs, held):
            shared = [x for key, x in theirs.items() if key in held[i]]
            if shared and other is not refs[i]:
                both = [describe(r) for r in (refs[i], other)]
                raise StructureError(
                    f"Cannot write {both[0]}: the function changed a "
                    f"{type(shared[0]).__name__} in its value in place, and {both[1]} "
                    "holds the same one, so plain Python would change both, but a "
                    "transform only one. Give each ref its own, such as "
                    "`rx.Ref(dict(...))`; or write a new value, `ref.value = "
                    "{**ref.value, ...}`, which changes one."
                )


class Disturbed(Exception):
    """A ref was written while a call was using it, by another thread or by a callback: the
    call must run again."""

    def __init__(self, refs: list[Ref], values: list[Any]):
        super().__init__()
        self.refs = [ref for ref, value in zip(refs, values) if ref._value is not value]


_MAX_TRIES = 1000


def next_try(fn: Any, disturbed: Disturbed, tries: int) -> int:
    """How often a call has been tried, when it is tried again.

    **Raises:**

    - `ConcurrencyError`: if that would not end differently.
    """
    if tries < _MAX_TRIES:
        # If no other thread is left to write a ref, the next try is the last: a callback
        # would do so again at every try.
        return _MAX_TRIES if threading.active_count() == 1 else tries + 1
    what = describe(disturbed.refs[0]) if disturbed.refs else "one of its refs"
    raise ConcurrencyError(
        f"`{name_of(fn)}` gave up: whenever it ran, {what} was written meanwhile, by a "
        "callback in it or by another thread. Let a callback return the value, and write "
        "it in the function: `ref.value = jax.pure_callback(...)`. Serialize the calls of "
        "several threads with a lock."
    ) from None


def explain_donated(error: Exception, refs: list[Ref], values: list[Any]) -> None:
    """Raises a better error than JAX's if a call failed because a buffer is gone.

    **Raises:**

    - `Disturbed`: if another thread donated a value after it was read, and has written a
        new one: the call must run again.
    - `DonatedError`: if there is no new one; `ConcurrencyError` if another thread may have
        donated it.
    """
    # "Array has been deleted", "buffer that was donated", and on a GPU "Donation requested
    # for invalid buffer".
    text = str(error).lower()
    if "deleted" not in text and "donat" not in text:
        return
    for ref, value in zip(refs, values):
        if is_gone(value):
            if ref._value is not value:
                raise Disturbed(refs, values) from None
            if threading.active_count() > 1:
                raise ConcurrencyError(
                    f"The buffer of {describe(ref)} is gone: it was donated by a call that "
                    "is still running on another thread, or that failed. Guard donating "
                    "calls with a lock; with a single thread, the array was also used "
                    "elsewhere, and donated or deleted there: donate a copy."
                ) from error
            raise donated(ref) from error


def commit(
    refs: list[Ref], values: list[Any], started: int, updates: list[tuple[Ref, Any]]
) -> None:
    """Writes the updates of a call into the caller's refs: all of them, or none.

    The result of a call is right if no ref it read was written meanwhile. If one was,
    raises `Disturbed` and writes nothing.

    **Arguments:**

    - `refs`, `values`: the refs of the call, and what was read from them.
    - `started`: `commits.count` before the read.
    - `updates`: the refs to write, with their new values.
    """
    trace, state = _jax.current_trace(), _trace.thread.state
    # The common case, decided once for all refs: a step may write thousands.
    quiet = not state.bodies and not _trace.guards.begun()
    for ref, _ in updates:
        if not (quiet and ref._trace() is trace):
            check_writable(ref)
    with commits.lock:
        # The count first: refs are compared only if something was written.
        if commits.count != started and not all(
            ref._value is value for ref, value in zip(refs, values)
        ):
            raise Disturbed(refs, values)
        if updates:
            commits.store(updates)


def rescue(refs: list[Ref], values: list[Any], returned: list[Any]) -> bool:
    """Called if a call is interrupted. If buffers of its refs were donated, writes the new
    values, because the old ones are gone. Returns whether it did.

    **Arguments:**

    - `refs`, `values`: the refs of the call, and what was read from them.
    - `returned`: a function that makes the outcome, then the result of the program, if it
        returned.
    """
    if len(returned) < 2 or not is_gone(values):
        return False
    outcome = returned[0](returned[-1])
    with commits.lock:
        commits.store(
            (refs[i], outcome.info.value(i, x))
            for i, x in outcome.updates.items()
            if refs[i]._value is values[i]
        )
    return True
