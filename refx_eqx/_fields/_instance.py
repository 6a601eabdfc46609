"""Checks an instance of a module against the declared types of its fields.

The fields are checked together, so the axis names in their types are shared. Annotations
are read once per class; an instance only pays for the checks.
"""

import weakref
from typing import Any, NamedTuple

import equinox as eqx
import jax

from .._core._errors import RefTypeError
from .._core._ref import declare, Ref
from ._axis_names import AxisNames, name_scope, names_bound, NO_NAMES, union
from ._batched import BatchedHint
from ._bound import BoundType
from ._config import config
from ._conformance import why_not_of_type
from ._construction import keep_state
from ._declared import DeclaredRef
from ._field import RefField
from ._hints import hint_text
from ._module_fields import plain_hints


class _Plan(NamedTuple):
    """The fields of a class to check."""

    of_refs: tuple[RefField, ...]
    plain: tuple[tuple[str, Any], ...]
    # Results of earlier successful checks, by the shapes and dtypes of the refs.
    known: dict[tuple, tuple[BoundType | None, ...]]


_plans: weakref.WeakKeyDictionary[type, _Plan] = weakref.WeakKeyDictionary()


def plan_of(cls: type) -> _Plan:
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
    plan = plan_of(type(instance))
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
    for field in plan_of(cls).of_refs:
        # The field may be missing, while `__init__` runs.
        for declared, ref, _ in refs_held(field, fields.get(field.name), cls):
            if isinstance(ref, Ref):
                # A shard has other sizes (and shards exist only in a body).
                found.extend(
                    bound.names
                    for bound in ref._declared or ()
                    if bound.declared is declared
                    and (ref._body is None or not bound.is_part(ref))
                )
    return union(found) if found else NO_NAMES


def refs_held(
    field: RefField, value: Any, cls: type
) -> list[tuple[DeclaredRef, Any, str]]:
    try:
        return field.refs_in(value, cls.__name__)
    except RefTypeError:
        return []  # another structure: a tree that is being manipulated
