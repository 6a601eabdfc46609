"""Checks an instance of a module against the declared types of its fields.

The fields are checked together, so the axis names in their types are shared. Annotations
are read once per class; an instance only pays for the checks.
"""

import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np

from .._core import _jax
from .._core._access import refuse_cycle
from .._core._deref import path_of
from .._core._errors import RefTypeError
from .._core._nodes import is_node
from .._core._ref import declare, Ref
from ._axis_names import AxisNames, name_scope, names_bound, NO_NAMES, union
from ._batched import BatchedHint
from ._bound import BoundType
from ._config import config
from ._construction import keep_state
from ._declared import DeclaredRef
from ._field import plain_hints, RefField
from ._hints import hint_text, why_not_of_type


class _Plan(NamedTuple):
    """The fields of a class to check."""

    of_refs: tuple[RefField, ...]
    plain: tuple[tuple[str, Any], ...]
    # Results of earlier successful checks, by the shapes and dtypes of the refs.
    known: dict[tuple, tuple[BoundType | None, ...]]


_plans: weakref.WeakKeyDictionary[type, _Plan] = weakref.WeakKeyDictionary()


def _plan_of(cls: type) -> _Plan:
    plan = _plans.get(cls)
    if plan is None:
        of_refs, plain = [], []
        hints = plain_hints(cls)
        for name, field in cls.__dataclass_fields__.items():  # type: ignore[attr-defined]
            if isinstance(field, RefField) and field.declared is not None:
                of_refs.append(field)
            elif name in hints and field._field_type.name == "_FIELD":
                plain.append((name, hints[name]))
        plan = _plans[cls] = _Plan(tuple(of_refs), tuple(plain), {})
    return plan


def check_instance(instance: Any) -> None:
    """Checks the fields of a new instance, and declares the types of its refs.

    **Raises:**

    - `RefTypeError`: if a field does not have its type. Then no ref has been given a type.
    """
    plan = _plan_of(type(instance))
    if not plan.of_refs and not plan.plain:
        return
    fields, class_name = vars(instance), type(instance).__name__
    shapes = _shapes_of(plan, fields)
    if shapes in plan.known:
        for field, bound in zip(plan.of_refs, plan.known[shapes]):
            if bound is not None:
                keep_state(fields[field.name])
                declare(fields[field.name], bound)
        return
    with name_scope(instance=instance):
        for name, hint in plan.plain:
            _check_plain(fields[name], hint, f"{class_name}.{name}")
        found = [
            held
            for field in plan.of_refs
            for held in field.refs_in(fields[field.name], class_name)
        ]
        for declared, ref, where in found:
            declared.check(ref, where, instance)
        # All names are bound only now.
        all_bound = {declared: declared.bound(instance) for declared, _, _ in found}
    for declared, ref, _ in found:
        keep_state(ref)
        declare(ref, all_bound[declared])
    if shapes is not None and len(plan.known) < _MAX_KNOWN:
        plan.known[shapes] = tuple(
            all_bound.get(declared) for field in plan.of_refs for declared in field.refs
        )


_MAX_KNOWN = 1000


def _shapes_of(plan: _Plan, fields: dict[str, Any]) -> tuple | None:
    """The shapes and dtypes of the refs, if nothing else matters for the check."""
    if plan.plain:
        return None
    shapes: list[Any] = []
    for field in plan.of_refs:
        declared, ref = field.declared, fields[field.name]
        if not isinstance(declared, DeclaredRef) or not declared.by_shape:
            return None
        if ref is None and declared.optional:
            shapes.append(None)
            continue
        value = ref._value if isinstance(ref, declared.ref_type) else None
        if not isinstance(value, jax.Array):
            return None
        shapes.append((value.shape, value.dtype))
    return tuple(shapes)


def _check_plain(value: Any, hint: Any, where: str) -> None:
    """Checks a field without refs. Only arrays are checked: Equinox allows other objects in
    their place."""
    if not isinstance(hint, BatchedHint) and not isinstance(value, jax.Array):
        return
    reason = why_not_of_type(value, hint)
    if reason is None:
        return
    names = str(names_bound())
    raise RefTypeError(
        f"`{where}` is declared `{hint_text(hint)}`"
        + (f" with {names}" if names else "")
        + f", and cannot hold {eqx.tree_pformat(value)}"
        + (f": {reason}" if reason else "")
        + ". Assign a value of the declared type, or declare a wider one."
    )


def names_of_instance(instance: Any) -> AxisNames:
    """The names bound by the fields of an instance when it was made, for its methods.

    They are read from its refs, which survive when JAX rebuilds instances. A ref that was
    put there later (by `eqx.tree_at`) may disagree with the others: then the name is free.
    """
    if not config.check_types:
        return NO_NAMES
    cls, fields, found = type(instance), vars(instance), []
    for field in _plan_of(cls).of_refs:
        # The field may be missing, while `__init__` runs.
        for declared, ref, _ in _refs_held(field, fields.get(field.name), cls):
            if isinstance(ref, Ref):
                # A shard has other sizes (and shards exist only in a body).
                found.extend(
                    bound.names
                    for bound in ref._declared or ()
                    if bound.declared is declared
                    and (ref._body is None or not bound.is_part(ref))
                )
    return union(found) if found else NO_NAMES


# Checked by `__getattribute__` below on each access: concrete classes, to be fast.
# (`isinstance` of the `jax.Array` in annotations runs Python code.)
_ARRAYS = (_jax.ConcreteArray, _jax.Tracer, np.ndarray)
MAY_HOLD_ARRAYS = (*_ARRAYS, tuple, list, dict)


def check_field(instance: Any, name: str, value: Any) -> None:
    """Checks, when a field that is declared a ref is read, that it holds one.

    Equinox's own functions (`tree_at`, `combine`, ...) make instances without `__init__`,
    so they can replace a ref with an array. Writing to it would do nothing: JAX allows
    setting any attribute of an array. It is not always a mistake: in a snapshot *all* refs
    are arrays. So it is an error if the instance also has a ref, or if something was
    already written.

    **Raises:**

    - `RefTypeError`: if there is an array by mistake, here or where one was last read.
    """
    _check_last_read()
    field = type(instance).__dataclass_fields__.get(name)
    if not isinstance(field, RefField):
        return
    for declared, x, where in _refs_held(field, value, type(instance)):
        if not isinstance(x, _ARRAYS):
            continue
        lost = "value" in getattr(x, "__dict__", ())
        if lost or _has_refs(instance):
            raise _not_a_ref(x, where, declared, lost)
        if type(x) is _jax.ConcreteArray:
            _last_read.array = weakref.ref(x), where, declared


class _LastRead(threading.local):
    """The last array read from a field that is declared a ref, with its place. A write to
    it cannot be prevented, but is noticed at the next check."""

    array: "tuple[Callable[[], Any], str, DeclaredRef] | None" = None


_last_read = _LastRead()


def _check_last_read() -> None:
    if _last_read.array is not None:
        (recall, where, declared), _last_read.array = _last_read.array, None
        x = recall()
        if x is not None and "value" in x.__dict__:
            raise _not_a_ref(x, where, declared, lost=True)


def check_refs_in_place(tree: Any, failure: str) -> None:
    """Checks that fields declared as refs hold refs, in every module of a tree.

    **Raises:**

    - `RefTypeError`: if something array-like replaces a ref.
    """
    refuse_cycle(tree)

    def visit(x: Any) -> bool:
        if isinstance(x, eqx.Module):
            for field in _plan_of(type(x)).of_refs:
                held = _refs_held(field, vars(x).get(field.name), type(x))
                for declared, leaf, where in held:
                    if not isinstance(leaf, Ref) and eqx.is_array_like(leaf):
                        place = path_of(tree, lambda other: other is leaf)
                        raise _not_a_ref(leaf, where, declared, False, failure, place)
        return is_node(x)

    jtu.tree_flatten(tree, is_leaf=visit)


def _refs_held(
    field: RefField, value: Any, cls: type
) -> list[tuple[DeclaredRef, Any, str]]:
    try:
        return field.refs_in(value, cls.__name__)
    except RefTypeError:
        return []  # another structure: a tree that is being manipulated


def _has_refs(instance: Any) -> bool:
    cls, fields = type(instance), vars(instance)
    return any(
        isinstance(x, Ref)
        for field in _plan_of(cls).of_refs
        for _, x, _ in _refs_held(field, fields.get(field.name), cls)
    )


def _not_a_ref(
    x: Any,
    where: str,
    declared: DeclaredRef,
    lost: bool,
    failure: str = "",
    place: str = "",
) -> RefTypeError:
    collection = declared.collection
    made = "rx.Ref(value)" if collection is None else f"rx.Ref(value, {collection!r})"
    return RefTypeError(
        (f"{failure}: " if failure else "")
        + f"`{where}`{f' at {place}' if place else ''} is declared a ref, but holds "
        + f"{eqx.tree_pformat(x)} instead"
        + (", and a value written to it was lost" if lost else "")
        + f". Where it is put there (by `eqx.tree_at`, `eqx.combine`, ...), put `{made}`. "
        "In a module whose refs are all arrays, as in a snapshot, read the fields only."
    )
