"""Whether a value has a type, with the reason.

Classes answer for themselves (`isinstance`), jaxtyping's arrays among them; beartype answers
for what has no parts. What has parts (a container, a union, a named tuple) is taken apart
here: *every* part is checked, in order, so the answer is always the same, and the parts share
the axis names. (beartype checks one item of a container, at random.)
"""

import types
from typing import Annotated, Any, ForwardRef, get_args, get_origin, Literal, Union

import jax
import jax.errors
import jax.tree_util as jtu
import jaxtyping

from ._axis_names import tried
from ._hints import hint_text, is_class, meaning_of
from ._numbers import number_like
from ._parts import has_parts, is_without_instances, parts_of


def conforms(value: Any, hint: Any) -> bool:
    """Whether `value` has the type `hint`, given the axis names bound so far. Names are
    bound only if it does.

    An array without axes counts as a number of its kind: where a number is declared, a
    lifted call makes an array of it.
    """
    if hint is Any:
        return True
    if is_class(hint):
        # The same answer as beartype, without its set-up, and without its lock, which is
        # not re-entrant (beartype 0.23) and is held while it calls our `__instancecheck__`.
        try:
            is_instance = isinstance(value, hint)
        except TypeError:
            if not is_without_instances(hint):
                raise
            return tried(_parts_conform, value, hint)
        if not is_instance:
            if type(hint) is _PyTreeHint:
                return tried(_leaves_conform, value, hint)
            number = number_like(value)
            return number is not None and isinstance(number, hint)
        if not has_parts(hint):
            return True
    return tried(_parts_conform, value, hint)


_PyTreeHint = type(jaxtyping.PyTree)


def _leaves_conform(value: Any, hint: Any) -> bool:
    """As jaxtyping, but an array without axes counts as a number."""
    if hint.structure is not None:
        return False
    is_leaf = lambda x: conforms(x, hint.leaftype)
    return all(map(is_leaf, jtu.tree_leaves(value, is_leaf=is_leaf)))


def _parts_conform(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(conforms(value, member) for member in args)
    if origin is Annotated:
        return conforms(value, args[0]) and _is_valid(value, args[1:])
    if origin is Literal and number_like(value) is not None:
        return any(conforms(value, type(x)) for x in args)
    if isinstance(hint, str | ForwardRef):
        name = getattr(hint, "__forward_arg__", hint)
        raise TypeError(
            f"The name {name!r} is in quotes inside a type, where it is looked up for the "
            "value of a ref in the field of a module. Put the quotes around all of the "
            f'annotation: `"rx.Ref[{name}]"` instead of `rx.Ref["{name}"]`.'
        )
    meaning = meaning_of(hint)
    if meaning is not hint:
        return conforms(value, meaning)
    parts = parts_of(value, hint)
    if parts is None:
        return _is_bearable(value, hint)
    return all(conforms(x, type_of_part) for x, type_of_part in parts)


def _is_valid(value: Any, metadata: tuple) -> bool:
    """According to the validators of beartype in the metadata of `Annotated`."""
    validators = [x for x in metadata if type(x).__module__.startswith("beartype.")]
    if not validators:
        return True
    from beartype.roar import BeartypeValeValidationException

    try:
        # So that it can look at an array that is known while JAX traces.
        with jax.ensure_compile_time_eval():
            return _is_bearable(value, Annotated[(object, *validators)])
    except BeartypeValeValidationException as e:
        if isinstance(e.__cause__, jax.errors.ConcretizationTypeError):
            return True  # it looks at an array that is not known
        raise


def _is_bearable(value: Any, hint: Any) -> bool:
    # Here, because importing beartype takes as long as importing this library.
    from beartype.door import is_bearable
    from beartype.roar import BeartypeDecorHintException

    try:
        # (pyright: `hint` may be any object that represents a type.)
        return is_bearable(value, hint)  # pyright: ignore[reportArgumentType]
    except BeartypeDecorHintException:
        return True  # an annotation without a meaning at run time


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
