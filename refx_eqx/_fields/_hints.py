"""Type hints: their texts, their parts, and the aliases in them."""

import operator
import types
from collections.abc import Callable
from typing import (
    Annotated,
    Any,
    Final,
    ForwardRef,
    get_args,
    get_origin,
    Literal,
    NewType,
    NotRequired,
    Required,
    TypeVar,
    Union,
)

import jaxtyping


def is_class(hint: Any) -> bool:
    """Whether it is a class. (`list[int]` is not, though it is an instance of `type`.)"""
    return isinstance(hint, type) and not isinstance(hint, types.GenericAlias)


def hint_text(hint: Any) -> str:
    """A type as the user wrote it: `Float[Array, "out in"]`."""
    text = hint.__name__ if is_class(hint) else str(hint)
    for prefix in ("jaxtyping.", "typing.", "jaxlib._jax."):
        text = text.replace(prefix, "")
    return text.replace("'", '"')


def split_hint(hint: Any) -> tuple[Any, tuple]:
    """`Annotated[T, *metadata]` as `(T, metadata)`; any other hint as `(hint, ())`."""
    if get_origin(hint) is Annotated:
        inner, *metadata = get_args(hint)
        return inner, tuple(metadata)
    return hint, ()


def alias_of(hint: Any) -> Any:
    """The type alias (`type Name[T] = ...`) that `hint` is, with or without arguments; or
    `None`."""
    alias = get_origin(hint) or hint
    # Not `isinstance`: `typing` has the class from 3.12 on, `typing_extensions` before.
    return alias if type(alias).__name__ == "TypeAliasType" else None


def value_of_alias(hint: Any) -> Any:
    """What a type alias stands for, given its arguments.

    **Raises:**

    - `NameError`: if it uses a name that is not defined, or not yet.
    """
    alias = alias_of(hint)
    given = dict(zip(alias.__type_params__, get_args(hint)))
    return with_parameters(alias.__value__, given)


def meaning_of(hint: Any) -> Any:
    """The type that another stands for, such as an alias; any other type unchanged.

    **Raises:**

    - `NameError`: if an alias uses a name that is not defined, or not yet.
    """
    if alias_of(hint) is not None:
        return value_of_alias(hint)
    if isinstance(hint, NewType):
        return hint.__supertype__
    if isinstance(hint, TypeVar):
        if hint.__constraints__:
            return Union[hint.__constraints__]
        # (A bound in quotes is for static checkers.)
        is_known = not isinstance(hint.__bound__, ForwardRef | None)
        return hint.__bound__ if is_known else Any
    if get_origin(hint) in (Final, Required, NotRequired):
        return get_args(hint)[0]
    return hint


def with_parameters(hint: Any, given: dict[Any, Any]) -> Any:
    """`hint`, with its type variables replaced."""
    if isinstance(hint, TypeVar):
        return given.get(hint, hint)
    if not given or is_class(hint):
        return hint
    needed = tuple(given.get(x, x) for x in getattr(hint, "__parameters__", ()))
    return hint[needed] if needed else hint


def without_names(
    hint: Any, evaluate: Callable[[Any], Any] = lambda x: x, inside: tuple = ()
) -> Any:
    """`hint`, with each type alias, and each type in quotes, replaced with its type.

    **Arguments:**

    - `evaluate`: gives the type in quotes, and anything else unchanged.
    - `inside`: the enclosing aliases. A recursive alias is left unchanged.

    **Raises:**

    - `NameError`: if an alias, or `evaluate`, uses a name that is not defined, or not yet.
    """
    hint = evaluate(hint)
    alias = alias_of(hint)
    if alias is not None and alias not in inside:
        return without_names(value_of_alias(hint), evaluate, (*inside, alias))
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return hint
    if isinstance(hint, type(jaxtyping.PyTree)) and hasattr(hint, "leaftype"):
        origin, args = jaxtyping.PyTree, (hint.leaftype, hint.structure)
        args = args[:1] if hint.structure is None else args
    types_inside = args[:1] if origin in (Annotated, jaxtyping.PyTree) else args
    new: Any = tuple(without_names(x, evaluate, inside) for x in types_inside)
    new += args[len(new) :]
    if all(map(operator.is_, new, args)):
        return hint
    if origin is types.UnionType:
        origin = Union
    return origin[new if len(new) > 1 else new[0]]  # pyright: ignore[reportOptionalSubscript]
