"""Raises an exception at one line of the package after the other."""

import ast
import functools
import pathlib
import sys

import refx_eqx as rx


PACKAGE = str(pathlib.Path(rx.__file__).parent)


class Injected(BaseException):
    """As `KeyboardInterrupt`, which `except Exception` does not catch either."""


class Injector:
    """Raises at the `at`-th line of the package that runs.

    Only where CPython may raise, or handle a signal. It may not at a `try:`, between a `try`
    and its `finally`, nor at the end of a `with` block before `__exit__` is called; a trace
    function may.
    """

    def __init__(self, at):
        self.at, self.count, self.where = at, 0, None

    def __call__(self, frame, event, arg):
        return self.line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def line(self, frame, event, arg):
        if event == "line" and self.where is None and _may_raise(frame):
            self.count += 1
            if self.count == self.at:
                file = frame.f_code.co_filename[len(PACKAGE) + 1 :]
                self.where = f"{file}:{frame.f_lineno}"
                raise Injected
        return self.line

    def run(self, call):
        """Returns whether it came to raise. (Where Python runs an `__eq__` or a `__del__` for
        JAX, another exception may come of it, or none.)"""
        sys.settrace(self)
        try:
            call()
        except BaseException:
            if self.where is None:
                raise
        finally:
            sys.settrace(None)
        return self.where is not None


@functools.cache
def _special_lines(file):
    """The lines that have a `try:`, or stand in a `finally`; and those that have a `with`."""
    nodes = list(ast.walk(ast.parse(pathlib.Path(file).read_text())))
    tries = [node for node in nodes if isinstance(node, ast.Try)]
    closed = {node.lineno for node in tries}
    for node in tries:
        for last in node.finalbody:
            closed.update(range(last.lineno, (last.end_lineno or last.lineno) + 1))
    return closed, {node.lineno for node in nodes if isinstance(node, ast.With)}


def _may_raise(frame):
    line = frame.f_lineno
    closed, withs = _special_lines(frame.f_code.co_filename)
    if line in closed:
        return False
    if line in withs:
        first = min(o for o, _, at in frame.f_code.co_lines() if at == line)
        return frame.f_lasti <= first
    return True
