"""Equality of objects in trees and in cache keys."""

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import jax.tree_util as jtu


class Shared:
    """A leaf that is the same object wherever it occurs in a tree. The only subclass is
    `Ref`, about which this room knows nothing else."""

    __slots__ = ()


class StandsForShared:
    """A tree node that stands for shared leaves: a `Value`, an `Index` or a `Dag`."""

    __slots__ = ()


class ByValue(StandsForShared):
    """A tree node that is passed by value: changes to it are not carried back."""

    __slots__ = ()


def is_same_tree(is_same: Callable[[Any, Any], bool], a: Any, b: Any) -> bool:
    """Whether two trees have the same structure, and leaves that are the same by
    `is_same`."""
    a_leaves, a_def = jtu.tree_flatten(a)
    b_leaves, b_def = jtu.tree_flatten(b)
    return a_def == b_def and all(map(is_same, a_leaves, b_leaves))


class Unlike:
    """A sentinel: equal only to itself, even after pickling.

    - `name`: the global variable that holds it; `text`: for messages.
    """

    def __init__(self, module: str, name: str, text: str = ""):
        self.__module__ = module
        self._name = name
        self._text = text or name

    def __repr__(self) -> str:
        return self._text

    def __reduce__(self) -> str:
        return self._name


UNSET: Any = Unlike(__name__, "UNSET")
"""An argument that was not given, where `None` is a valid argument."""


class Identity:
    """Stands for an object; equal for the same object. Holds it weakly if asked to, and if
    possible."""

    __slots__ = ("_id", "recall")

    def __init__(self, obj: Any, weak: bool = True):
        self._id = id(obj)
        self.recall: Callable[[], Any] = lambda: obj
        if weak:
            with contextlib.suppress(TypeError):
                self.recall = weakref.ref(obj)

    def mortal(self) -> list[Any]:
        """The object, if it is held weakly."""
        return [self.recall()] if isinstance(self.recall, weakref.ref) else []

    def __eq__(self, other: Any) -> bool:
        if self is other:
            return True
        if not isinstance(other, Identity) or self._id != other._id:
            return False
        # A dead object equals nothing: its id may have been reused.
        return self._is_alive() and other._is_alive()

    def _is_alive(self) -> bool:
        return not isinstance(self.recall, weakref.ref) or self.recall() is not None

    def __hash__(self) -> int:
        return self._id


class Ignored(tuple):
    """A part of a structure that is ignored in comparisons, such as a name: any two are
    equal."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ignored)

    def __ne__(self, other: object) -> bool:
        return not isinstance(other, Ignored)

    def __hash__(self) -> int:
        return 0
