"""Whether a value has a type, according to beartype and jaxtyping, with the reason."""

import operator
import types
from typing import Annotated, Any, get_args, get_origin, Union

import jax
import jax.tree_util as jtu
import jaxtyping


def conforms(value: Any, hint: Any) -> bool:
    """Whether `value` has the type `hint`, given the axis names bound so far.

    As beartype, but checks every item of a tuple, list or dict: beartype checks one at
    random.
    """
    if hint is Any:
        return True
    if isinstance(hint, type) and not isinstance(hint, types.GenericAlias):
        # The same answer as beartype, without its set-up, and without its lock, which is
        # not re-entrant (beartype 0.23) and is held while it calls our `__instancecheck__`.
        try:
            return isinstance(value, hint)
        except TypeError:  # a `TypedDict`, a protocol without `runtime_checkable`
            pass
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(conforms(value, member) for member in args)
    if origin is Annotated and not any(map(_is_validator, args[1:])):
        return conforms(value, args[0])
    items = _typed_items(value, origin, args)
    if items is not None:
        return all(conforms(item, item_hint) for item, item_hint in items)
    # Here, because importing beartype takes as long as importing this library.
    from beartype.door import is_bearable
    from beartype.roar import BeartypeDecorHintException

    try:
        # (pyright: `hint` may be any object that represents a type.)
        return is_bearable(value, hint)  # pyright: ignore[reportArgumentType]
    except BeartypeDecorHintException:
        return True  # an annotation without a meaning at run time


def _is_validator(metadata: Any) -> bool:
    return type(metadata).__module__.startswith("beartype.")


def _typed_items(value: Any, origin: Any, args: tuple) -> list[tuple[Any, Any]] | None:
    """The items of a container, each with its type. `None` if it is not a known container,
    or not the required one."""
    if origin not in (tuple, list, dict) or not isinstance(value, origin):
        return None
    if isinstance(value, dict):
        key, item = args
        return [*zip(value, (key,) * len(value))] + [(v, item) for v in value.values()]
    if origin is list or args[1:] == (Ellipsis,):
        return [(item, args[0]) for item in value]
    return list(zip(value, args)) if len(value) == len(args) else None


def why_not_of_type(value: Any, hint: Any) -> str | None:
    """The reason why `value` does not have the type `hint`; or `None`.

    The reason is empty if there is nothing more to say.
    """
    try:
        if conforms(value, hint):
            return None
    except (jaxtyping.AnnotationError, AttributeError, NameError):
        # An axis such as "n+1" whose "n" is not bound: there is nothing to check.
        return None
    explain = getattr(hint, "__instancecheck_str__", None)
    reason = "" if explain is None else explain(value)
    reason, of_dtypes, _ = reason.partition(", not any of ")
    if of_dtypes:  # it continues with a list of every dtype
        reason += f", which is not {hint.dtype.__name__}"
    if "the underlying array type" in reason:
        reason = f"its type is {type(value).__name__}, not {hint_text(hint.array_type)}"
    return reason


def has_placeholder(value: Any) -> bool:
    """Whether a shape stands for an array, as in a model that was made without allocating it."""
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jtu.tree_leaves(value))


def hint_text(hint: Any) -> str:
    """A type as the user wrote it: `Float[Array, "out in"]`."""
    is_class = isinstance(hint, type) and not isinstance(hint, types.GenericAlias)
    text = hint.__name__ if is_class else str(hint)
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
    value, given = alias.__value__, dict(zip(alias.__type_params__, get_args(hint)))
    needed = tuple(given[x] for x in getattr(value, "__parameters__", ()) if given)
    return value[needed] if needed else value


def without_aliases(hint: Any, inside: tuple = ()) -> Any:
    """`hint`, with each type alias replaced with its type.

    **Arguments:**

    - `inside`: the enclosing aliases. A recursive alias is left unchanged.

    **Raises:**

    - `NameError`: if an alias uses a name that is not defined, or not yet.
    """
    alias = alias_of(hint)
    if alias is not None and alias not in inside:
        return without_aliases(value_of_alias(hint), (*inside, alias))
    args = get_args(hint)
    new: Any = tuple(without_aliases(x, inside) for x in args)
    if all(map(operator.is_, new, args)):
        return hint
    origin: Any = get_origin(hint)
    if origin is types.UnionType:
        origin = Union
    return origin[new if len(new) > 1 else new[0]]
