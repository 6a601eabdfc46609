"""The fields of an `rx.Module`, which are declared by annotations alone."""

import dataclasses
import inspect
import weakref
from typing import Any

import equinox as eqx
import jaxtyping

from .._trees._equality import UNSET
from ._annotation import Annotation
from ._batched import BatchedHint
from ._field import RefField, refuse_shared


_plain_hints: weakref.WeakKeyDictionary[type, dict[str, Any]] = (
    weakref.WeakKeyDictionary()
)


def plain_hints(cls: type) -> dict[str, Any]:
    """The types of the fields without refs that can be checked: jaxtyping arrays, and
    stacks."""
    hints: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        hints.update(_plain_hints.get(base, {}))
    for name, field in getattr(cls, "__dataclass_fields__", {}).items():
        if isinstance(field, RefField):
            hints[name] = field.plain_hint
    return {name: hint for name, hint in hints.items() if _is_checkable(hint)}


def _is_checkable(hint: Any) -> bool:
    if isinstance(hint, BatchedHint):
        return True
    return isinstance(hint, type(jaxtyping.AbstractArray))


def declare_ref_fields(cls: type) -> None:
    """Gives a `RefField` to every field of `cls` that is annotated as a ref.

    A class body with `weight: rx.Param[Array]` behaves as if it were `weight:
    rx.Param[Array] = rx.field()`.
    """
    hints = _plain_hints[cls] = {}
    slots = cls.__dict__.get("__slots__")
    if slots:
        raise TypeError(
            f"`{cls.__name__}` has `__slots__ = {slots!r}`: a module keeps its fields in "
            "its `__dict__`, as Equinox does. Leave `__slots__` out."
        )
    for name, annotation in inspect.get_annotations(cls).items():
        default = cls.__dict__.get(name, dataclasses.MISSING)
        if isinstance(default, RefField):
            continue
        annotation = Annotation(cls, name, annotation)
        if annotation.is_of_instance():
            is_field = isinstance(default, dataclasses.Field)
            refuse_shared(default.default if is_field else default)
        if annotation.is_plain():
            hints[name] = annotation.hint()
            continue
        if isinstance(default, dataclasses.Field):
            plain = default
        elif default is dataclasses.MISSING:
            plain = eqx.field()
        else:
            plain = eqx.field(default=default)
        made = RefField(plain, UNSET, plain.metadata.get("converter"))
        made.bind(annotation)
        setattr(cls, name, made)
