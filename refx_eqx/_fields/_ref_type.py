"""`Ref[T]` as a type, for editors, jaxtyping and beartype.

`Ref[Float[Array, "out in"]]` is a class whose `isinstance` checks the *value* of a ref. So
it works with every run-time type checker, in signatures and fields, and its axis names are
those of the running jaxtyping context.
"""

import dataclasses
import functools
from typing import Any, TypeVar, Union

from .._core._access import peek
from .._core._ref import Ref
from ._conformance import conforms, has_placeholder


class RefHint(type):
    """The class of `Ref[T]`: a type whose instances are refs with a `T` inside."""

    ref_type: type
    value_hint: Any

    def __new__(mcs, name: str, bases: tuple, namespace: dict, **kwargs: Any):
        # `class MyRef(rx.Ref[Array]): ...` subclasses `rx.Ref`, not the hint.
        bases = tuple(b.ref_type if isinstance(b, RefHint) else b for b in bases)
        return type(bases[0])(name, bases, namespace, **kwargs)

    def __instancecheck__(cls, obj: Any) -> bool:
        if not isinstance(obj, cls.ref_type):
            return False
        # Not `obj.value`: the type may be checked where the value may not be read.
        value = peek(obj)
        return conforms(value, cls.value_hint) or has_placeholder(value)

    def __subclasscheck__(cls, other: type) -> bool:
        return other is cls or issubclass(other, cls.ref_type)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        # `Ref[Float[Array, "n"]](x)` makes a ref, as a subscripted generic class does.
        return cls.ref_type(*args, **kwargs)

    def __reduce__(cls):
        return subscript, (cls.ref_type, cls.value_hint)


@dataclasses.dataclass(frozen=True, repr=False)
class OpenRefHint:
    """`Ref[T]` for a type variable `T`, from which `Param[...]` and the like are made.

    It has the attributes that `typing` requires of a generic alias (`__parameters__`,
    `__getitem__`), so `Annotated[Ref[T], ...][X]` becomes `Annotated[Ref[X], ...]`.
    """

    ref_type: type
    value_hint: Any

    @property
    def __parameters__(self) -> tuple:
        return _type_variables(self.value_hint)

    def __getitem__(self, params: Any) -> Any:
        if not isinstance(params, tuple):
            params = (params,)
        hint = self.value_hint
        hint = params[0] if isinstance(hint, TypeVar) else hint[params]
        return subscript(self.ref_type, hint)

    def __or__(self, other: Any) -> Any:
        return Union[self, other]

    def __ror__(self, other: Any) -> Any:
        return Union[other, self]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.ref_type(*args, **kwargs)

    def __mro_entries__(self, bases: tuple) -> tuple:
        return (self.ref_type,)

    def __repr__(self) -> str:
        return f"{self.ref_type.__name__}[{self.value_hint}]"


def _type_variables(hint: Any) -> tuple:
    if isinstance(hint, TypeVar):
        return (hint,)
    if isinstance(hint, type):
        # jaxtyping builds a class immediately, which loses the type variable of its dtype.
        return ()
    return tuple(getattr(hint, "__parameters__", ()))


def subscript(ref_type: type, hint: Any) -> Any:
    """The type `ref_type[hint]`; the same object for equal arguments."""
    if _type_variables(hint):
        return OpenRefHint(ref_type, hint)
    try:
        return _cached_ref_hint(ref_type, hint)
    except TypeError:  # an unhashable hint, such as `Annotated[int, []]`
        return _ref_hint(ref_type, hint)


def _ref_hint(ref_type: type, value_hint: Any) -> RefHint:
    inside = value_hint.__name__ if isinstance(value_hint, type) else str(value_hint)
    namespace = {"ref_type": ref_type, "value_hint": value_hint}
    return type.__new__(RefHint, f"{ref_type.__name__}[{inside}]", (), namespace)


_cached_ref_hint = functools.lru_cache(maxsize=None)(_ref_hint)


# `Ref` itself knows nothing about types: the meaning of `Ref[T]` is defined here.
Ref.__class_getitem__ = classmethod(subscript)  # type: ignore[method-assign]
