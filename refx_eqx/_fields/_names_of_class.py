"""String annotations, whose names are looked up from the class body.

A class may be made before everything its annotations name. So a name that is not found is
looked up again when the first instance is made: see `_annotation.py`.
"""

import builtins
import functools
import sys
import types
from collections.abc import Iterator
from typing import Any, ForwardRef, Union


class _Unknown:
    """Stands for a name in an annotation that exists only for the type checker."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, item: Any) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __or__(self, other: Any) -> Any:
        return Union[Any, other]

    __ror__ = __or__


def is_unknown(hint: Any) -> bool:
    """Whether the name of a type exists only for the type checker."""
    return isinstance(hint, _Unknown)


class Names(dict):
    """The names that the annotations of a class may use. A name that was found is kept: it
    may be local to a function that has returned when it is needed again.

    - `is_last`: whether a name that is not found exists only for the type checker.
    """

    def __init__(self, owner: type):
        super().__init__()
        self.owner = owner
        self.is_last = False

    def evaluate(self, annotation: Any) -> Any:
        """Evaluates an annotation that is a string because of `from __future__ import
        annotations` or quotes (`Optional["Param[Array]"]`).

        **Raises:**

        - `NameError`: if a name in it is not found, and may be defined later.
        """
        for _ in range(2):  # A quoted annotation is then a string in a string.
            if isinstance(annotation, ForwardRef):
                annotation = annotation.__forward_arg__
            if isinstance(annotation, str):
                annotation = eval(annotation, {}, self)
        return annotation

    def __missing__(self, name: str) -> Any:
        for scope in self._scopes():
            if name in scope:
                return self.setdefault(name, scope[name])
        if self.is_last:
            return _Unknown()
        raise NameError(f"name {name!r} is not defined", name=name)

    def _scopes(self) -> Iterator[Any]:
        yield vars(self.owner)
        yield from _enclosing_locals(self._globals)
        yield self._globals
        yield vars(builtins)

    @functools.cached_property
    def _globals(self) -> dict:
        """Those of the module of the class; for a class made by `exec`, those given to
        it."""
        for frame in _frames():
            if frame.f_globals.get("__name__", "builtins") == self.owner.__module__:
                return frame.f_globals
        return vars(sys.modules[self.owner.__module__])


def _enclosing_locals(module: dict) -> list[dict]:
    """The locals of the functions around a class body while it is being executed."""
    return [frame.f_locals for frame in _frames() if frame.f_globals is module]


def _frames() -> Iterator[types.FrameType]:
    """The running frames, from the inside out."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
