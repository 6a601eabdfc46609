"""`Ref[T]` as a type: for the editor, for jaxtyping, for beartype.

`Ref[Float[Array, "out in"]]` is a class whose `isinstance` check looks at the *value* of a
ref. So it means something to every run-time type checker, in a signature and in a field,
and the axis names in it are those of the running jaxtyping context.
"""

import functools
import types
from typing import Annotated, Any, ClassVar, get_args, get_origin, TypeVar, Union

import jax
import jax.tree_util as jtu
import jaxtyping
from beartype.door import is_bearable
from beartype.roar import BeartypeDecorHintException


def conforms(value: Any, hint: Any) -> bool:
    """Whether `value` is of the type `hint`, under the axis names bound so far.

    As beartype, and in every item of a tuple, list or dict: beartype looks at one of them,
    drawn at random.
    """
    if hint is Any:
        return True
    if isinstance(hint, type) and not isinstance(hint, types.GenericAlias):
        # The same answer as beartype's, without its set-up. And without its lock, which is
        # not re-entrant (beartype 0.23): it calls our `__instancecheck__` while it holds it.
        try:
            return isinstance(value, hint)
        except TypeError:  # a `TypedDict`, a protocol that is not for run time
            pass
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(conforms(value, member) for member in args)
    if origin is Annotated and not any(map(_is_validator, args[1:])):
        return conforms(value, args[0])
    items = _items(value, origin, args)
    if items is not None:
        return all(conforms(item, item_hint) for item, item_hint in items)
    try:
        # (pyright: `hint` may be any object that stands for a type.)
        return is_bearable(value, hint)  # pyright: ignore[reportArgumentType]
    except BeartypeDecorHintException:
        return True  # an annotation that means nothing at run time


def _is_validator(metadata: Any) -> bool:
    return type(metadata).__module__.startswith("beartype.")


def _items(value: Any, origin: Any, args: tuple) -> list[tuple[Any, Any]] | None:
    """The items of a container, each with its type. `None` if it is none that we know, or
    not the one that is asked for."""
    if origin not in (tuple, list, dict) or not isinstance(value, origin):
        return None
    if isinstance(value, dict):
        key, item = args
        return [*zip(value, (key,) * len(value))] + [(v, item) for v in value.values()]
    if origin is list or args[1:] == (Ellipsis,):
        return [(item, args[0]) for item in value]
    return list(zip(value, args)) if len(value) == len(args) else None


def why_not_of_type(value: Any, hint: Any) -> str | None:
    """The reason why `value` is not of the type `hint`; or `None`.

    The reason is empty where there is no more to say than that it is not.
    """
    try:
        if conforms(value, hint):
            return None
    except (jaxtyping.AnnotationError, AttributeError, NameError):
        # An axis such as "n+1" whose "n" is bound nowhere: there is nothing to hold it to.
        return None
    explain = getattr(hint, "__instancecheck_str__", None)
    reason = "" if explain is None else explain(value)
    reason, of_dtypes, _ = reason.partition(", not any of ")
    if of_dtypes:  # it goes on with every dtype there is
        reason += f", which is no {hint.dtype.__name__}"
    if "the underlying array type" in reason:
        reason = f"its type is {type(value).__name__}, not {hint_text(hint.array_type)}"
    return reason


def _is_shape_only(value: Any) -> bool:
    """Whether this is the value of a model that was made without its memory."""
    leaves = jtu.tree_leaves(value)
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def hint_text(hint: Any) -> str:
    """A type as the user wrote it: `Float[Array, "out in"]`."""
    is_class = isinstance(hint, type) and not isinstance(hint, types.GenericAlias)
    text = hint.__name__ if is_class else str(hint)
    for prefix in ("jaxtyping.", "typing.", "jaxlib._jax."):
        text = text.replace(prefix, "")
    return text.replace("'", '"')


class RefHint(type):
    """The class of `Ref[T]`: a type, all of whose instances are refs with a `T` inside."""

    ref_type: type
    value_hint: Any

    def __new__(mcs, name: str, bases: tuple, namespace: dict, **kwargs: Any):
        # `class MyRef(rx.Ref[Array]): ...` subclasses `rx.Ref`, not the hint.
        bases = tuple(b.ref_type if isinstance(b, RefHint) else b for b in bases)
        return type(bases[0])(name, bases, namespace, **kwargs)

    def __instancecheck__(cls, obj: Any) -> bool:
        if not isinstance(obj, cls.ref_type):
            return False
        # Not `obj.value`: the type of a ref may be asked where its value may not be read.
        value = obj._value
        return conforms(value, cls.value_hint) or _is_shape_only(value)

    def __subclasscheck__(cls, other: type) -> bool:
        return other is cls or issubclass(other, cls.ref_type)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        # `Ref[Float[Array, "n"]](x)` makes a ref, as a subscripted generic class does.
        return cls.ref_type(*args, **kwargs)

    def __reduce__(cls):
        return subscript, (cls.ref_type, cls.value_hint)


class OpenRefHint:
    """`Ref[T]` for a type variable `T`: what `Param[...]` and the like are made of.

    It has what `typing` asks of a generic alias (`__parameters__`, `__getitem__`), so that
    `Annotated[Ref[T], ...][X]` becomes `Annotated[Ref[X], ...]`.
    """

    __parameters__: ClassVar[tuple] = ()

    def __init__(self, ref_type: type, value_hint: Any):
        self.ref_type = ref_type
        self.value_hint = value_hint
        self.__parameters__ = _type_variables(value_hint)  # type: ignore[misc]

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

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, OpenRefHint) and (
            (self.ref_type, self.value_hint) == (other.ref_type, other.value_hint)
        )

    def __hash__(self) -> int:
        return hash((self.ref_type, self.value_hint))


def _type_variables(hint: Any) -> tuple:
    if isinstance(hint, TypeVar):
        return (hint,)
    if isinstance(hint, type):
        # jaxtyping builds a class at once; the type variable of its dtype is lost in it.
        return ()
    return tuple(getattr(hint, "__parameters__", ()))


def subscript(ref_type: type, hint: Any) -> Any:
    """The type `ref_type[hint]`; one and the same object for equal arguments."""
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


def split_hint(hint: Any) -> tuple[Any, tuple]:
    """`Annotated[T, *metadata]` as `(T, metadata)`; any other hint as `(hint, ())`."""
    if get_origin(hint) is Annotated:
        inner, *metadata = get_args(hint)
        return inner, tuple(metadata)
    return hint, ()
