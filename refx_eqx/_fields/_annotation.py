"""String annotations, whose names are looked up from the class body."""

import builtins
import sys
import types
from collections.abc import Iterator
from typing import Any, ForwardRef, Union


def resolve_annotation(owner: type, annotation: Any) -> Any:
    """Evaluates an annotation that is a string because of `from __future__ import
    annotations` or quotes (`Optional["Param[Array]"]`)."""
    for _ in range(2):  # A quoted annotation is then a string in a string.
        if isinstance(annotation, ForwardRef):
            annotation = annotation.__forward_arg__
        if isinstance(annotation, str):
            annotation = eval(annotation, {}, _Namespace(owner))
    return annotation


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


class _Namespace(dict):
    """The names that a string annotation may use. Unknown names are not errors."""

    def __init__(self, owner: type):
        super().__init__()
        module = _globals_around(owner)
        self.scopes = [vars(owner), *_enclosing_locals(module), module, vars(builtins)]

    def __missing__(self, name: str) -> Any:
        for scope in self.scopes:
            if name in scope:
                return scope[name]
        return _Unknown()


def _globals_around(owner: type) -> dict:
    """The globals of the module of a class; for a class made by `exec`, those given to
    it."""
    for frame in _frames():
        if frame.f_globals.get("__name__", "builtins") == owner.__module__:
            return frame.f_globals
    return vars(sys.modules[owner.__module__])


def _enclosing_locals(module: dict) -> list[dict]:
    """The locals of the functions around a class body while it is being executed."""
    return [frame.f_locals for frame in _frames() if frame.f_globals is module]


def _frames() -> Iterator[types.FrameType]:
    """The running frames, from the inside out."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
