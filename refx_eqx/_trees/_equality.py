"""What things are equal by, in a tree and in the key of a cache."""

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import jax.tree_util as jtu


class Shared:
    """A leaf that is one thing wherever it is in a tree. There is one class of them: `Ref`,
    of which this room knows no more."""

    __slots__ = ()


class ByValue:
    """A node of a tree that is passed by value: what is changed in it is not to be carried
    back."""

    __slots__ = ()


def is_same_tree(is_same: Callable[[Any, Any], bool], a: Any, b: Any) -> bool:
    """Whether two trees are of one structure, and their leaves the same by `is_same`."""
    a_leaves, a_def = jtu.tree_flatten(a)
    b_leaves, b_def = jtu.tree_flatten(b)
    return a_def == b_def and all(map(is_same, a_leaves, b_leaves))


class Unlike:
    """An object that stands for something which no value can: equal to itself alone, also
    where it is pickled.

    - `name`: of the global variable that has it; `text`: for messages.
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
"""An argument that was not given, where `None` is one that was."""


class Identity:
    """Stands for an object; equal for the same object. Holds it weakly if it is to, and can."""

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
        # What is gone is equal to nothing: its id may be another's by now.
        return self._is_alive() and other._is_alive()

    def _is_alive(self) -> bool:
        return not isinstance(self.recall, weakref.ref) or self.recall() is not None

    def __hash__(self) -> int:
        return self._id


class Ignored(tuple):
    """A part of a structure that does not count for what it is equal to, such as a name:
    any two are equal."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ignored)

    def __ne__(self, other: object) -> bool:
        return not isinstance(other, Ignored)

    def __hash__(self) -> int:
        return 0
