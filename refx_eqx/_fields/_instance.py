"""An instance of a module, held against what its class declares of the fields.

The fields are checked together, so the axis names in their types are shared. What an
annotation says is worked out once a class; an instance pays for the checks alone.
"""

import weakref
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np

from .._core import _trace
from .._core._deref import path_of
from .._core._errors import RefTypeError
from .._core._nodes import is_node
from .._core._ref import declare, Ref
from ._axis_names import AxisNames, name_scope, names_bound, NO_NAMES, union
from ._batched import BatchedHint
from ._config import config
from ._construction import keep_state
from ._declaration import Declaration
from ._field import check_declared, Declared, plain_hints, RefSpec
from ._hints import hint_text, why_not_of_type


__tracebackhide__ = True


class _Plan(NamedTuple):
    """Which fields of a class there are to check."""

    of_refs: tuple[tuple[str, RefSpec], ...]
    plain: tuple[tuple[str, Any], ...]
    # What was found right before, by the shapes and dtypes of the refs.
    known: dict[tuple, tuple[Declaration | None, ...]]


_plans: weakref.WeakKeyDictionary[type, _Plan] = weakref.WeakKeyDictionary()


def _plan_of(cls: type) -> _Plan:
    plan = _plans.get(cls)
    if plan is None:
        of_refs, plain = [], []
        hints = plain_hints(cls)
        for name, field in cls.__dataclass_fields__.items():  # type: ignore[attr-defined]
            spec = field.metadata.get("converter")
            if isinstance(spec, RefSpec) and spec.is_ref_field:
                of_refs.append((name, spec))
            elif name in hints and field._field_type.name == "_FIELD":
                plain.append((name, hints[name]))
        plan = _plans[cls] = _Plan(tuple(of_refs), tuple(plain), {})
    return plan


def check_instance(instance: Any) -> None:
    """Checks the fields of a new instance, and declares the types of its refs.

    **Raises:**

    - `RefTypeError`: if a field is not of its type. No ref has been given a type then.
    """
    plan = _plan_of(type(instance))
    if not plan.of_refs and not plan.plain:
        return
    fields, class_name = vars(instance), type(instance).__name__
    shapes = _shapes_of(plan, fields)
    if shapes in plan.known:
        for (name, _), declaration in zip(plan.of_refs, plan.known[shapes]):
            if declaration is not None:
                keep_state(fields[name])
                declare(fields[name], declaration)
        return
    checked = []
    declarations: dict[tuple, Declaration] = {}
    with name_scope(instance=instance):
        for name, hint in plan.plain:
            _check_plain(fields[name], hint, f"{class_name}.{name}")
        for name, spec in plan.of_refs:
            for ref, where, declared in spec.refs_in(fields[name], class_name):
                check_declared(ref, where, declared)
                checked.append((ref, declared.type))
        # Only now are all names bound.
        for ref, declared_type in checked:
            names = declared_type.names(instance)
            declarations[id(ref), declared_type] = Declaration(declared_type, names)
    for ref, declared_type in checked:
        keep_state(ref)
        declare(ref, declarations[id(ref), declared_type])
    if shapes is not None and len(plan.known) < _MAX_KNOWN:
        plan.known[shapes] = tuple(
            declarations.get((id(fields[name]), *spec.declared_types))
            for name, spec in plan.of_refs
        )


_MAX_KNOWN = 1000


def _shapes_of(plan: _Plan, fields: dict[str, Any]) -> tuple | None:
    """The shapes and dtypes of the refs, if nothing else matters to the check."""
    if plan.plain:
        return None
    shapes: list[Any] = []
    for name, spec in plan.of_refs:
        declared, ref = spec.declared, fields[name]
        if not isinstance(declared, Declared) or not declared.type.by_shape:
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
    """A field without refs. Only an array is held to the type: Equinox is free with what
    else stands in for one."""
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
    """The names that the fields of an instance bound when it was made, for its methods.

    They are read off its refs, because JAX rebuilds instances and refs survive that. A ref
    that was put there later (by `eqx.tree_at`) may disagree with the others: then the name
    is free.
    """
    if not config.check_types:
        return NO_NAMES
    fields, found = vars(instance), []
    for name, spec in _plan_of(type(instance)).of_refs:
        try:
            refs = spec.refs_in(fields[name], "")
        except (KeyError, RefTypeError):
            continue  # in `__init__` still, or in a tree that is being manipulated
        for ref, _, declared in refs:
            if isinstance(ref, Ref):
                mine = (d for d in ref._declared or () if d.type is declared.type)
                found.extend(declaration.names for declaration in mine)
    return union(found) if found else NO_NAMES


# What `__getattribute__` below asks on each access: real classes, so it is quick. (The
# `jax.Array` of the annotations answers `isinstance` in Python.)
_ARRAYS = (_trace.ConcreteArray, jax.core.Tracer, np.ndarray)
MAY_HOLD_ARRAYS = (*_ARRAYS, tuple, list, dict)


def check_field(instance: Any, name: str, value: Any) -> None:
    """That a field which is declared a ref, and is being read, holds one.

    Equinox's own functions (`tree_at`, `combine`, ...) make instances without `__init__`,
    so they may put an array in the place of a ref. Writing to that would do nothing: JAX
    lets any attribute of an array be set. It is not always a mistake: in what `snapshot`
    makes *all* refs are arrays. So it is one if the instance has a ref besides, or if
    something was written already.

    **Raises:**

    - `RefTypeError`: if there is an array by mistake.
    """
    field = type(instance).__dataclass_fields__.get(name)
    spec = None if field is None else field.metadata.get("converter")
    if not isinstance(spec, RefSpec) or not spec.is_ref_field:
        return
    for x, where, declared in _held(spec, value, type(instance)):
        if not isinstance(x, _ARRAYS):
            continue
        lost = "value" in getattr(x, "__dict__", ())
        if lost or _has_refs(instance):
            raise _not_a_ref(x, where, declared, lost)


def check_refs_in_place(tree: Any, failure: str) -> None:
    """That the fields which are declared refs hold refs, in every module of a tree.

    **Raises:**

    - `RefTypeError`: if there is something array-like in the place of a ref.
    """

    def visit(x: Any) -> bool:
        if isinstance(x, eqx.Module):
            for _, spec in _plan_of(type(x)).of_refs:
                found = _held(spec, vars(x).get(spec.field_name), type(x))
                for leaf, where, declared in found:
                    if not isinstance(leaf, Ref) and eqx.is_array_like(leaf):
                        place = path_of(tree, lambda other: other is leaf)
                        raise _not_a_ref(leaf, where, declared, False, failure, place)
        return is_node(x)

    jtu.tree_flatten(tree, is_leaf=visit)


def _held(spec: RefSpec, value: Any, cls: type) -> list[tuple[Any, str, Declared]]:
    try:
        return spec.refs_in(value, cls.__name__)
    except RefTypeError:
        return []  # of another structure: a tree that is being manipulated


def _has_refs(instance: Any) -> bool:
    cls, fields = type(instance), vars(instance)
    return any(
        isinstance(x, Ref)
        for name, spec in _plan_of(cls).of_refs
        for x, _, _ in _held(spec, fields.get(name), cls)
    )


def _not_a_ref(
    x: Any,
    where: str,
    declared: Declared,
    lost: bool,
    failure: str = "",
    place: str = "",
) -> RefTypeError:
    collection = declared.collection
    made = "rx.Ref(value)" if collection is None else f"rx.Ref(value, {collection!r})"
    return RefTypeError(
        (f"{failure}: " if failure else "")
        + f"`{where}`{f' at {place}' if place else ''} is declared a ref, and holds "
        + f"{eqx.tree_pformat(x)} instead"
        + (", to which a value was written that no ref took" if lost else "")
        + f". Where it is put there (by `eqx.tree_at`, `eqx.combine`, ...), put `{made}`. "
        "In a module whose refs are all arrays, as in a snapshot, read the fields only."
    )
