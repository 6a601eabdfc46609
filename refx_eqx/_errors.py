"""The errors of the library, and how a message names a ref.

Every message answers three questions: which ref, where, and what to do about it. The
texts live beside the checks that raise them; what they share is here.
"""

from collections.abc import Hashable


class RefError(Exception):
    """The base of every error that this library raises.

    Catch one of its subclasses to be specific:

    - [`refx_eqx.TraceLevelError`][]: a ref was touched where JAX would go stale;
    - [`refx_eqx.StructureError`][]: two trees, or a tree before and after, do not fit;
    - [`refx_eqx.CollectionError`][]: a ref of one collection where another is declared;
    - [`refx_eqx.RefTypeError`][]: a value that breaks the declared type of a ref;
    - [`refx_eqx.ImmutableError`][]: a write that [`refx_eqx.mutable`][] does not allow;
    - [`refx_eqx.ConcurrencyError`][]: a donated ref was changed by another thread.
    """


class TraceLevelError(RefError, ValueError):
    """A ref was read or written inside a JAX trace that must not see it."""


class StructureError(RefError, ValueError):
    """A tree of refs does not have the structure that was asked for."""


class CollectionError(RefError, ValueError):
    """A ref belongs to another collection than the one declared."""


class RefTypeError(RefError, TypeError):
    """A value does not have the type that its ref declares."""


class ImmutableError(RefError, ValueError):
    """A write was refused by [`refx_eqx.mutable`][]."""


class ConcurrencyError(RefError, RuntimeError):
    """Another thread changed a ref while a donating call was using its buffer."""


def describe(name: str | None, collection: Hashable) -> str:
    """How every message refers to a ref: `` `Linear.weight` (collection 'params')``."""
    which = "an unnamed ref" if name is None else f"`{name}`"
    if collection is None:
        return f"{which} (no collection)"
    return f"{which} (collection {collection!r})"
