"""Raises an exception where a chosen line runs for the n-th time.

A call runs some lines thousands of times. So `runs_of` counts how often each line runs, and
`moments` takes its first run, its last, and one in between.
"""

import ast
import collections
import functools
import pathlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import jax

import refx_eqx as rx


PACKAGE = str(pathlib.Path(rx.__file__).parent)
JAX = str(pathlib.Path(jax.__file__).parent)

# An exception while JAX sets its trace leaves it set, for JAX too (0.10 to 0.12).
NOT_SAFE = str(pathlib.Path(JAX, "_src", "core.py"))

Line = tuple[str, int]


class Injected(BaseException):
    """As `KeyboardInterrupt`, which `except Exception` does not catch either."""


def runs_of(call: Callable[[], Any], root: str = PACKAGE) -> dict[Line, int]:
    """How often each line of the files below `root` runs, ordered by its first run.

    Only where CPython may raise, or handle a signal. It may not at a `try:`, between a `try`
    and its `finally`, nor at the end of a `with` block before `__exit__` is called; a trace
    function may.
    """
    runs = collections.Counter()

    def on_call(frame: FrameType, event: str, arg: Any) -> Any:
        file = frame.f_code.co_filename
        return on_line if file.startswith(root) and file != NOT_SAFE else None

    def on_line(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line" and _may_raise(frame):
            runs[frame.f_code.co_filename, frame.f_lineno] += 1
        return on_line

    with _tracing(on_call):
        call()
    return dict(runs)


def moments(runs: dict[Line, int]) -> list[tuple[Line, int]]:
    return [
        (line, n)
        for line, count in runs.items()
        for n in sorted({1, (count + 1) // 2, count})
    ]


class Injector:
    """Raises at the `n`-th run of a line, once.

    **Attributes:**

    - `came`: whether it came to that.
    - `went_unseen`: whether Python swallowed the exception, as it must in a `__del__` and in
        what a weak reference calls.
    """

    def __init__(self, line: Line, n: int):
        self.line, self.n, self.left = line, n, n
        self.came = self.went_unseen = False

    def __str__(self):
        file, number = self.line
        return f"{pathlib.Path(file).name}:{number}, run {self.n}"

    def run(self, call: Callable[[], Any]) -> bool:
        """Whether the call was broken off. (Where Python runs an `__eq__` for JAX, another
        exception may come of this one.)"""
        hook, sys.unraisablehook = sys.unraisablehook, self._on_unraisable
        try:
            with _tracing(self._on_call):
                call()
        except BaseException:
            if not self.came:
                raise
            return True
        finally:
            sys.unraisablehook = hook
        return False

    def _on_call(self, frame: FrameType, event: str, arg: Any) -> Any:
        is_there = frame.f_code.co_filename == self.line[0] and not self.came
        return self._on_line if is_there else None

    def _on_line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line" and frame.f_lineno == self.line[1] and _may_raise(frame):
            self.left -= 1
            if self.left == 0:
                self.came = True
                raise Injected
        return self._on_line

    def _on_unraisable(self, unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, Injected):
            sys.__unraisablehook__(unraisable)
        self.went_unseen = True


@contextmanager
def _tracing(on_call: Callable[..., Any]) -> Iterator[None]:
    before = sys.gettrace()  # a debugger, or a measurement of what the tests cover
    sys.settrace(on_call)
    try:
        yield
    finally:
        sys.settrace(before)


@functools.cache
def _special_lines(file: str) -> tuple[set[int], set[int]]:
    """The lines that have a `try:`, or stand in a `finally`; and those that have a `with`."""
    nodes = list(ast.walk(ast.parse(pathlib.Path(file).read_text())))
    tries = [node for node in nodes if isinstance(node, ast.Try)]
    closed = {node.lineno for node in tries}
    for node in tries:
        for last in node.finalbody:
            closed.update(range(last.lineno, (last.end_lineno or last.lineno) + 1))
    return closed, {node.lineno for node in nodes if isinstance(node, ast.With)}


def _may_raise(frame: FrameType) -> bool:
    line = frame.f_lineno
    closed, withs = _special_lines(frame.f_code.co_filename)
    if line in closed:
        return False
    if line in withs:
        first = min(o for o, _, at in frame.f_code.co_lines() if at == line)
        return frame.f_lasti <= first
    return True
