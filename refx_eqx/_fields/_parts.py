"""The parts of a value, each with its declared type: the items of a container, the fields of
a named tuple, the keys of a `TypedDict`."""

import types
import weakref
from collections import Counter
from collections.abc import (
    Collection,
    Container,
    ItemsView,
    Iterable,
    Iterator,
    Mapping,
    Reversible,
    Sequence,
    Set,
    ValuesView,
)
from typing import (
    Annotated,
    Any,
    Generic,
    get_args,
    get_origin,
    get_type_hints,
    NotRequired,
    Protocol,
    Required,
    TypeVarTuple,
    Union,
    Unpack,
)

import jax
import jax.tree_util as jtu
import jaxtyping

from ._hints import hint_text, is_class, meaning_of, with_parameters
from ._names_of_class import Names


Part = tuple[Any, Any]


class _NoValue:
    """The type of no value: of a part that is missing, or one too many."""


def has_parts(cls: type) -> bool:
    """Whether the instances of a class have parts of declared types, as known to the class:
    `class Rows(list[int])`, or a named tuple."""
    is_generic = hasattr(cls, "__orig_bases__")
    return is_generic or _is_named_tuple(cls) or _is_typed_dict(cls)


def _is_named_tuple(cls: type) -> bool:
    return issubclass(cls, tuple) and hasattr(cls, "_fields")


def is_without_instances(cls: Any) -> bool:
    """Whether `isinstance` raises an error: for a `TypedDict`, and for a protocol without
    `runtime_checkable`."""
    is_protocol = getattr(cls, "_is_protocol", False)
    is_checkable = getattr(cls, "_is_runtime_protocol", False)
    return _is_typed_dict(cls) or (is_protocol and not is_checkable)


def _is_typed_dict(cls: type) -> bool:
    return hasattr(cls, "__required_keys__")


def parts_of(value: Any, hint: Any) -> list[Part] | None:
    """The parts of a value, if it is an instance of the class of the type; else `_NoValue`
    is there. `None` if the type has no parts, or none that can be looked at twice, as the
    items of an iterator.
    """
    kind, args = get_origin(hint) or hint, get_args(hint)
    if not is_class(kind) or (kind is hint and not has_parts(kind)):
        return None
    given = dict(zip(getattr(kind, "__parameters__", ()), args))
    if _is_typed_dict(kind):
        hints = {k: with_parameters(h, given) for k, h in _hints_of(kind).items()}
        return _parts_of_typed_dict(value, kind, hints)
    if is_without_instances(kind):
        return None
    if not isinstance(value, kind):
        return [(value, _NoValue)]
    if _is_named_tuple(kind):
        hints = _hints_of(kind)
        named = zip(kind._fields, value)  # pyright: ignore[reportAttributeAccessIssue]
        return [(x, with_parameters(hints.get(name, Any), given)) for name, x in named]
    if hasattr(kind, "__orig_bases__"):  # generic, or a subclass of such a class
        bases: Any = vars(kind).get("__orig_bases__", kind.__bases__)
        return [
            (value, with_parameters(base, given))
            for base in bases
            if (base if is_class(base) else get_origin(base)) not in _WITHOUT_PARTS
        ]
    if not hasattr(hint, "__args__"):  # `typing.Tuple`
        return []
    return _items(value, kind, args)


# (`None`: the function `NamedTuple`.)
_WITHOUT_PARTS = None, Generic, Protocol


def texts_in(hint: Any, inside: tuple = ()) -> Iterator[str]:
    """The text of a type, and of all types of its parts, which may be declared elsewhere."""
    if any(x is hint for x in inside):
        return  # a recursive type
    yield hint_text(hint)
    kind, inside = get_origin(hint) or hint, (*inside, hint)
    parts = [*get_args(hint), meaning_of(hint)]
    if is_class(kind):
        is_named = _is_typed_dict(kind) or _is_named_tuple(kind)
        parts += _hints_of(kind).values() if is_named else ()
        # (`PyTree` has a `leaftype`.)
        parts += *getattr(kind, "__orig_bases__", ()), getattr(kind, "leaftype", Any)
    for part in parts:
        yield from texts_in(part, inside)


def arrays_in(value: Any, hint: Any) -> Iterator[Part]:
    """The arrays in a value, each with its type; in a union, with that of each member."""
    meaning = meaning_of(hint)
    if isinstance(hint, type(jaxtyping.AbstractArray)):
        yield value, hint
    elif meaning is not hint:
        yield from arrays_in(value, meaning)
    elif get_origin(hint) in (Union, types.UnionType):
        for member in get_args(hint):
            yield from arrays_in(value, member)
    elif get_origin(hint) is Annotated:
        yield from arrays_in(value, get_args(hint)[0])
    elif hasattr(hint, "leaftype"):  # a `PyTree`
        for leaf in jtu.tree_leaves(value):
            yield from arrays_in(leaf, hint.leaftype)
    else:
        for part, hint_of_part in parts_of(value, hint) or ():
            yield from arrays_in(part, hint_of_part)


def _items(value: Any, kind: type, args: tuple) -> list[Part] | None:
    if issubclass(kind, tuple):
        hints = _types_of_items(args, len(value))
        return [(value, _NoValue)] if hints is None else list(zip(value, hints))
    if issubclass(kind, Counter):
        args = (*args, int)
    if issubclass(kind, ItemsView):
        return [(item, tuple[args]) for item in value]
    if issubclass(kind, Mapping):
        return [(x, t) for item in value.items() for x, t in zip(item, args)]
    if issubclass(kind, (Sequence, Set, ValuesView)) or kind in _ITERABLES:
        # An array is no container: to iterate over it would compute.
        if isinstance(value, Collection) and not isinstance(value, jax.Array):
            return [(item, args[0]) for item in value]
    return None


_ITERABLES = Iterable, Collection, Container, Reversible


def _types_of_items(args: tuple, n: int) -> tuple | None:
    """The type of each item of a tuple of `n` items; `None` if it has another number."""
    if args[1:] == (Ellipsis,):
        return args[:1] * n
    for i, arg in enumerate(args):
        if get_origin(arg) is Unpack:  # `*tuple[int, ...]`, or `*Ts`
            (arg,) = get_args(arg)
        elif not getattr(arg, "__unpacked__", False):
            continue
        of_star = (Any, Ellipsis) if isinstance(arg, TypeVarTuple) else get_args(arg)
        rest = n - len(args) + 1
        star = _types_of_items(of_star, rest) if rest >= 0 else None
        return None if star is None else (*args[:i], *star, *args[i + 1 :])
    return args if len(args) == n else None


def _parts_of_typed_dict(value: Any, kind: Any, hints: dict[str, Any]) -> list[Part]:
    if not isinstance(value, dict):
        return [(value, _NoValue)]
    parts = []
    for key, hint in hints.items():
        # Where annotations are strings, the class does not know which say `NotRequired`.
        qualifier = get_origin(hint)
        is_required = qualifier is not NotRequired and (
            qualifier is Required or key in kind.__required_keys__
        )
        if key in value:
            parts.append((value[key], hint))
        elif is_required:
            parts.append((value, _NoValue))
    return parts


def _hints_of(cls: Any) -> dict[str, Any]:
    """The types of the fields of a named tuple or `TypedDict`. A name that is not defined
    stands for any type."""
    hints = _known.get(cls)
    if hints is None:
        try:
            hints = get_type_hints(cls, include_extras=True)
        except NameError:  # local to a function, or only for the type checker
            names = Names(cls)
            names.is_last = True
            hints = get_type_hints(cls, localns=names, include_extras=True)
        _known[cls] = hints
    return hints


_known: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()
