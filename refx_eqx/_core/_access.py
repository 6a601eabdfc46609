"""The checks before a ref is read or written, before a value is stored, and before JAX
flattens a tree.
"""

from typing import Any

from .._trees._cells import held_by, holds_itself, is_lookup, may_carry
from .._trees._changes import copied, is_writeable, try_leaves
from .._trees._equality import ByValue, StandsForShared
from . import _jax, _trace
from ._errors import (
    CarryError,
    describe,
    DonatedError,
    ImmutableError,
    StructureError,
    TraceLevelError,
)


class Withheld:
    """Replaces the value of a ref that the function of a transform can reach but may not
    touch: `reason` says why. It is carried, and stays withheld, like any value.

    It is also the owner of the ref. As it is not a trace, the common check already fails.
    """

    __slots__ = ("reason",)

    def __init__(self, reason: str):
        self.reason = reason

    # Called like the weak reference to a trace that is gone.
    def __call__(self) -> None:
        return None

    def __repr__(self) -> str:
        return "withheld"

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Withheld) and self.reason == other.reason

    def __hash__(self) -> int:
        return hash(self.reason)


def check_readable(ref: Any) -> None:
    owner = ref._trace
    if type(owner) is Withheld:
        reason = owner.reason
    else:
        reason = _trace.why_not_readable(ref, owner)
    if reason is not None:
        raise TraceLevelError(
            f"Cannot read ref from different trace level: {describe(ref)}: {reason}"
        )


def check_unleaked(ref: Any, value: Any) -> list[Any] | None:
    """Notices an in-place change of a list or dict in the value, made where the ref may be
    read but not written; and a list or dict that holds itself. Returns
    `try_leaves(value)`."""
    if isinstance(value, _jax.Tracer):
        return [value]
    leaves = try_leaves(value)
    if leaves is None:
        refuse_cycle(value, ref)
    for leaf in leaves or ():
        reason = _trace.why_not_alive(leaf)
        if reason is not None:
            raise TraceLevelError(
                f"Cannot read ref from different trace level: {describe(ref)}: a list or a "
                "dict in its value was changed in place, where it may only be read: "
                f"{reason} Then write a new value: `ref.value = ...`."
            )
    return leaves


def check_carried(ref: Any, value: Any) -> None:
    """The checks before the value of a ref is carried somewhere else: a consumed state may
    be read, to be replaced, but it cannot be flattened."""
    if check_unleaked(ref, value) is None:
        raise _consumed(f"Cannot carry {describe(ref)}: its value holds")


def check_taken(ref: Any, value: Any) -> None:
    """The checks before the value of a ref is given to other code: its buffers are not
    gone. A plain read allows that: the shapes are still there, for a new value."""
    if type(value) is not _jax.ConcreteArray:
        check_carried(ref, value)
    if is_gone(value):
        raise donated(ref)


def is_gone(value: Any) -> bool:
    """Whether the buffer of an array in a value was donated, or deleted."""
    if type(value) is _jax.ConcreteArray:
        return value.is_deleted()
    return any(map(_jax.is_deleted, try_leaves(value) or ()))


def donated(ref: Any) -> DonatedError:
    return DonatedError(
        f"The buffer of {describe(ref)} is gone: its array was also used elsewhere, and "
        "donated or deleted there (`jax.jit(..., donate_argnums=...)`, `.delete()`), or a "
        "call that donated it failed. Donate a copy: `jnp.array(ref.value, copy=True)`."
    )


def _consumed(what: str) -> StructureError:
    return StructureError(
        f"{what} an `eqx.nn.State` that was consumed by a layer, and so has no arrays "
        "anymore. Write the new one, which the layer returns: "
        "`out, ref.value = layer(x, ref.value)`."
    )


def check_writable(ref: Any) -> None:
    """The two checks before a write: the trace rule, and `mutable`."""
    owner = ref._trace
    if not _trace.is_at_home(owner):
        if type(owner) is Withheld:
            reason = owner.reason
        else:
            reason = _trace.why_not_writable(ref, owner)
        if reason is not None:
            raise TraceLevelError(
                f"Cannot mutate ref from different trace level: {describe(ref)}: {reason}"
            )
    where = why_immutable(ref)
    if where is not None:
        raise ImmutableError(f"Cannot write {describe(ref)}: this code runs {where}")


def why_immutable(ref: Any) -> str | None:
    """Where this code runs, for messages, if `mutable` forbids the write; else `None`."""
    # A rule that runs after its call does not know which ref it is given. The contexts
    # around the rule are checked where the write comes out.
    body = ref._body
    depth = 0 if body is None or ref._outer is not None else body.depth
    for guard in _trace.guards.begun():
        if not guard.ended and guard.depth >= depth and not guard.allows(ref):
            return guard.where
    return None


def check_value(ref: Any, value: Any) -> Any:
    """Checks that a value may go into `ref`: it has no ref inside, does not stand for one,
    is alive here, and has its type.

    Returns the value to store: a Python scalar becomes an array if an array is declared.
    """
    if type(value) is _jax.ConcreteArray:
        check_not_deleted(ref, value)
    else:
        leaves = try_leaves(value, _is_stand_in_or_lookup)
        if leaves is None:
            refuse_cycle(value, ref)
            raise _consumed(f"Cannot write {describe(ref)}: the new value holds")
        if any(map(is_writeable, leaves)):
            value = copied(value)
        for leaf in leaves:
            # A derefed tree as part of a value has its use: the state that Optax makes for
            # one. But what stands for this one ref is a forgotten `.value`.
            if isinstance(leaf, ByValue) or (
                leaf is value and isinstance(leaf, StandsForShared)
            ):
                raise _stand_in(ref, leaf)
            inside = held_by(leaf)
            if inside is not None:
                raise _nested(ref, inside, may_carry(leaf))
            reason = _trace.why_not_alive(leaf)
            if reason is not None:
                raise TraceLevelError(
                    "Cannot mutate ref from different trace level: "
                    f"{describe(ref)}: {reason}"
                )
            check_not_deleted(ref, leaf)
    for bound in ref._declared or ():
        value = bound.checked(ref, value)
    return value


def _is_stand_in_or_lookup(x: Any) -> bool:
    return isinstance(x, StandsForShared) or is_lookup(x)


def _stand_in(ref: Any, node: StandsForShared) -> StructureError:
    remedy = "the value, such as `grads.weight.value`."
    if isinstance(node, ByValue):
        remedy = "the values: `rx.snapshot(dag.value)`."
    return StructureError(
        f"The value of a ref cannot hold an `rx.{type(node).__name__}`, which stands for refs: "
        f"{describe(ref)} was given one. Give it {remedy}"
    )


def _nested(ref: Any, inside: Any, is_in_function: bool) -> StructureError:
    where, remedy = "", "Put the two refs side by side in a tuple or a module."
    if is_in_function:
        where = ", in a function"
        remedy = "Call the function with that ref, or with a module that has it, as an argument."
    return StructureError(
        f"The value of a ref cannot hold a ref: {describe(ref)} was given one that holds "
        f"{describe(inside)}{where}. {remedy}"
    )


def refuse_cycle(tree: Any, ref: Any = None) -> None:
    """Refuses a tree that contains itself, which JAX could not flatten. If it is the value
    of a ref, the message names that.

    **Raises:**

    - `StructureError`: if a list, a dict or another node in it holds itself.
    """
    if holds_itself(tree):
        where = "" if ref is None else f" in {describe(ref)}"
        raise CarryError(
            f"A {type(tree).__name__}{where} holds itself, or something in it does, so it "
            "is not a pytree. Remove the cycle."
        )


def peek(ref: Any) -> Any:
    """The value of a ref without the trace rule, to look at its structure or types.

    **Raises:**

    - `StructureError`: if it contains itself.
    """
    refuse_cycle(ref._value, ref)
    return ref._value


def check_not_deleted(ref: Any, leaf: Any) -> None:
    if _jax.is_deleted(leaf):
        raise DonatedError(
            f"Cannot put a deleted array into {describe(ref)}: its "
            f"buffer ({leaf.dtype}{list(leaf.shape)}) was donated to a call, or deleted, "
            "and its numbers are gone. Give that call a copy: `jnp.array(x, copy=True)`."
        )
