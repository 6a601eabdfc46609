"""Arrays in the places of refs: in fields that are declared refs, but hold none.

Equinox's own functions (`tree_at`, `combine`, ...) make instances without `__init__`, so
they can replace a ref with an array. It is not always a mistake: in a snapshot *all* refs
are arrays.
"""

import collections
import re
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax.tree_util as jtu
import numpy as np

from .._calls._body import explanations
from .._core import _jax
from .._core._access import refuse_cycle
from .._core._deref import is_whole, path_of
from .._core._errors import RefTypeError, wrapped
from .._core._ref import Ref
from .._trees._cells import is_opaque, reachable
from .._trees._closure import opened
from ._declared import DeclaredRef
from ._field import RefField
from ._instance import plan_of, refs_held


# Checked by `rx.Module.__getattribute__` on each access: concrete classes, to be fast.
# (`isinstance` of the `jax.Array` in annotations runs Python code.)
_ARRAYS = (_jax.ConcreteArray, _jax.Tracer, np.ndarray)
MAY_HOLD_ARRAYS = (*_ARRAYS, tuple, list, dict)


def check_field(instance: Any, name: str, value: Any) -> None:
    """Checks, when a field that is declared a ref is read, that it holds one.

    Writing to an array would do nothing: JAX allows setting any attribute of one. So it is
    an error if the instance also has a ref, or if something was already written. What
    prints the module, or puts a ref in the place of the array, may read the field.

    **Raises:**

    - `RefTypeError`: if there is an array by mistake, here or where one was last read.
    """
    error = _lost_write() or _misplaced(instance, name, value)
    if error is not None and not _is_seen_as_a_tree():
        _last_read.array = None
        raise error


class _LastRead(threading.local):
    """The last array read from a field that is declared a ref, with its place. A write to
    it cannot be prevented, but is noticed at the next check."""

    array: "tuple[Callable[[], Any], str, DeclaredRef] | None" = None


_last_read = _LastRead()


def _lost_write() -> RefTypeError | None:
    if _last_read.array is not None:
        recall, where, declared = _last_read.array
        x = recall()
        if x is not None and "value" in x.__dict__:
            return _not_a_ref(x, where, declared, lost=True)
    return None


def _misplaced(instance: Any, name: str, value: Any) -> RefTypeError | None:
    field = type(instance).__dataclass_fields__.get(name)
    if not isinstance(field, RefField):
        return None
    for declared, x, where in refs_held(field, value, type(instance)):
        if not isinstance(x, _ARRAYS):
            continue
        lost = "value" in getattr(x, "__dict__", ())
        if lost or _has_refs(instance):
            return _not_a_ref(x, where, declared, lost)
        if type(x) is _jax.ConcreteArray:
            _last_read.array = weakref.ref(x), where, declared
    return None


def _has_refs(instance: Any) -> bool:
    cls, fields = type(instance), vars(instance)
    return any(
        isinstance(x, Ref)
        for field in plan_of(cls).of_refs
        for _, x, _ in refs_held(field, fields.get(field.name), cls)
    )


# Code that prints, hashes or replaces a part of a module, and computes with none.
_OF_TREES = ("equinox._", "wadler_lindig", "treescope", "dataclasses")


def _is_seen_as_a_tree() -> bool:
    """Whether a field of a module is read because the module is a tree: by code that prints
    it, or by the `where` of `eqx.tree_at`. Otherwise it is read to be used."""
    frame = sys._getframe(3)  # that which reads the field
    if frame.f_globals.get("__name__", "").startswith(_OF_TREES):
        return True
    while frame is not None:
        if frame.f_code is eqx.tree_at.__code__:
            return True
        frame = frame.f_back
    return False


def check_refs_in_place(tree: Any, failure: str) -> None:
    """Checks that fields declared as refs hold refs, in every module of a tree, also in its
    functions that hold refs.

    **Raises:**

    - `RefTypeError`: if something array-like replaces a ref.
    """
    refuse_cycle(tree)

    def visit(x: Any) -> bool:
        for declared, leaf, where in instead_of_refs(x):
            place = path_of(tree, lambda other: other is leaf)
            raise _not_a_ref(leaf, where, declared, False, failure, place)
        return is_whole(x)

    jtu.tree_flatten(opened(tree), is_leaf=visit)


def instead_of_refs(x: Any) -> Iterator[tuple[DeclaredRef, Any, str]]:
    """What is array-like in the fields of a module that are declared refs."""
    if isinstance(x, eqx.Module):
        for field in plan_of(type(x)).of_refs:
            held = refs_held(field, vars(x).get(field.name), type(x))
            for declared, leaf, where in held:
                if not isinstance(leaf, Ref) and eqx.is_array_like(leaf):
                    yield declared, leaf, where


# What Python and JAX say of an array that is used as if it were a ref.
_USED_AS_A_REF = re.compile(
    "has no attribute '?(value|collection|name)'?$|^JAX arrays are immutable"
)


def _explain(error: Exception, trees: Any) -> None:
    """Adds a note if a function used an array in the place of a ref as if it were one.
    (That there is an array is no error: a function may read a snapshot.)"""
    if not _USED_AS_A_REF.search(str(error)):
        return
    found: list[tuple[DeclaredRef, Any, str]] = []

    def visit(x: Any) -> bool:
        found.extend(instead_of_refs(x))
        return is_opaque(x)

    collections.deque(reachable(trees, visit), maxlen=0)
    used = getattr(error, "obj", None)  # `None` if it was written to
    if used is not None:
        found = [item for item in found if item[1] is used]
    if not found:
        return
    declared, _, where = found[0]
    names = list(dict.fromkeys(f"`{where}`" for _, _, where in found))
    more = [f"{len(names) - _NAMED} more"] if len(names) > _NAMED else []
    note = wrapped(
        "This call has arrays in fields that are declared refs, as a snapshot has: "
        f"{', '.join(names[:_NAMED] + more)}. To read, use `self.{_field_of(where)}[...]`, "
        "which works for refs and arrays, not `.value`. To write, put a ref there: "
        f"`{_remedy(declared, where)}`."
    )
    if note not in getattr(error, "__notes__", ()):  # by an inner transform
        error.add_note(note)


_NAMED = 4
explanations.append(_explain)


def _not_a_ref(
    x: Any,
    where: str,
    declared: DeclaredRef,
    lost: bool,
    failure: str = "",
    place: str = "",
) -> RefTypeError:
    return RefTypeError(
        (f"{failure}: " if failure else "")
        + f"`{where}`{f' at {place}' if place else ''} is declared a ref, but holds "
        + f"{eqx.tree_pformat(x)} instead"
        + (", and a value written to it was lost" if lost else "")
        + f". Put a ref there: `{_remedy(declared, where)}`. If all refs of the module are "
        f"arrays, as in a snapshot, only read: `self.{_field_of(where)}[...]`."
    )


def _remedy(declared: DeclaredRef, where: str) -> str:
    kind, collection = declared.ref_type, declared.collection
    made = "rx.Ref" if kind is Ref else kind.__name__
    made += "(value)" if collection is None else f"(value, {collection!r})"
    return f"eqx.tree_at(lambda m: m.{_field_of(where)}, module, {made})"


def _field_of(where: str) -> str:
    return where.partition(".")[2]
