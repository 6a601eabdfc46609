"""What a function from leaf to option says about a ref.

A ref is a leaf, so such a function may decide by its collection, and its answer holds. But
most know only arrays (`eqx.if_array(0)`): for these a ref is not an array, which says nothing
about the arrays in it. The two kinds may give the same answer, `None`, for a ref; so we look
at how they come to it. A function *looks at* a ref if

1. it answers differently for the ref than for any object; or
2. it asks the two different questions. `None if rx.is_ref(x) else ...` has its answer for
    the ref, and goes on to ask the object whether it is an array.

The questions are noted by stand-ins for the ref and for the object. Only what goes through an
object can be noted: not `x is ref`, nor `type(x) is rx.Ref`.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from .._core._ref import Ref


_NO_ANSWER = object()


def answer_about_ref(ask: Callable[[Any, Any], Any], function: Any, ref: Ref) -> Any:
    """The answer of `function` for a ref; the function itself if it does not look at the
    ref, so that it is to be called for each array in it.

    **Arguments:**

    - `ask`: calls the function for a leaf, and checks the answer.
    """
    if isinstance(function, eqx.if_array):
        return function

    def attempt(leaf: Any) -> Any:
        try:
            return ask(function, leaf)
        except Exception:
            return _NO_ANSWER

    def asked(thing: Any) -> tuple[Any, list[Any]]:
        questions: list[Any] = []
        return attempt(_StandIn(thing, questions)), questions

    if asked(ref) == asked(object()):
        answer = attempt(ref)
        if answer is _NO_ANSWER or answer == attempt(object()):
            return function
    return ask(function, ref)


class _StandIn:
    """Answers as another object would, and notes what it is asked.

    It has no attribute that an array has too: to ask for that is not to look at a ref.
    """

    __slots__ = ("_asked", "_thing")

    def __init__(self, thing: Any, asked: list[Any]):
        self._thing = thing
        self._asked = asked

    def __getattribute__(self, name: str) -> Any:
        thing, asked = _thing_of(self), _asked_of(self)
        if name == "__class__":
            asked.append(name)
            return type(thing)
        is_private = name.startswith("_") or hasattr(jax.Array, name)
        found = _NO_ANSWER if is_private else getattr(thing, name, _NO_ANSWER)
        asked.append((name, found is not _NO_ANSWER))
        if found is _NO_ANSWER:
            raise AttributeError(name)
        return found

    def __eq__(self, other: object) -> bool:
        _asked_of(self).append("==")
        return _thing_of(self) == other

    def __hash__(self) -> int:
        _asked_of(self).append("hash")
        return hash(_thing_of(self))


# Past its own `__getattribute__`.
_thing_of = _StandIn.__dict__["_thing"].__get__
_asked_of = _StandIn.__dict__["_asked"].__get__
