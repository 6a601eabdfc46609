"""An exception at any line of a lifted call: all refs are old, or all are new.

The suite raises at some of the lines. `nox -s interrupts` raises at each of them.
"""

# What is wrong on purpose here, or made at run time, is wrong to a static checker too.
# pyright: reportOptionalOperand=false

import ast
import os
import pathlib
import signal
import sys
import threading
import time

import jax
import jax.numpy as jnp
import pytest

import refx_eqx as rx
from refx_eqx._core import _trace
from refx_eqx._core._ref import commits


EVERY = int(os.environ.get("REFX_INTERRUPT_EVERY", "251"))
PACKAGE = str(pathlib.Path(rx.__file__).parent)

ONE = jnp.array(1.0)
XS = jnp.arange(2.0)


def make():
    return [rx.Ref(jnp.array(float(i)), "params") for i in range(3)]


def step(refs, x):
    for ref in refs:
        ref.value = ref.value + x
    return refs[0].value * x


def scanned(refs):
    def body(refs, x):
        step(refs, x)
        return refs, None

    rx.scan(body, refs, XS)


def looped(refs):
    def body(refs):
        step(refs, ONE)
        return refs

    rx.while_loop(lambda refs: refs[0].value < 1, body, refs)


def mapped(refs):
    rx.filter_vmap(lambda refs, x: step(refs, ONE), in_axes=(None, 0))(refs, XS)


jitted = rx.filter_jit(step)
donating = rx.filter_jit(step, donate="refs")
checkpointed = rx.filter_checkpoint(step)

CALLS = {
    "filter_jit": lambda refs: jitted(refs, ONE),
    "a first filter_jit": lambda refs: rx.filter_jit(lambda r: step(r, ONE))(refs),
    "donate": lambda refs: donating(refs, ONE),
    "filter_grad": lambda refs: rx.filter_grad(step)(refs, ONE),
    "filter_jvp": lambda refs: rx.filter_jvp(step, (refs, ONE), (None, ONE)),
    "filter_vmap": mapped,
    "filter_checkpoint": lambda refs: checkpointed(refs, ONE),
    "scan": scanned,
    "while_loop": looped,
    "fori_loop": lambda refs: rx.fori_loop(
        0, 1, lambda i, r: (step(r, ONE), r)[1], refs
    ),
    "cond": lambda refs: rx.cond(True, step, step, refs, ONE),
    "nested": lambda refs: rx.filter_jit(rx.filter_grad(step))(refs, ONE),
    "update_refs": lambda refs: rx.update_refs(
        refs, [jnp.array(i + 1.0) for i in range(3)]
    ),
}


class Injected(BaseException):
    """As `KeyboardInterrupt`, which `except Exception` does not catch either."""


class Injector:
    """Raises at the `at`-th line of the package that runs.

    Only where CPython may handle a signal. It may not between a `try` and its `finally`, nor
    at the end of a `with` block before `__exit__` is called; a trace function may.
    """

    def __init__(self, at):
        self.at, self.count, self.done = at, 0, False

    def __call__(self, frame, event, arg):
        return self.line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def line(self, frame, event, arg):
        if event == "line" and not self.done and _may_interrupt(frame):
            self.count += 1
            if self.count == self.at:
                self.done = True
                raise Injected
        return self.line

    def run(self, call):
        sys.settrace(self)
        try:
            call()
        except BaseException as e:
            while e is not None and not isinstance(e, Injected):
                # What is raised in an `__eq__` JAX hands on as the cause of a `ValueError`.
                e = e.__cause__
            if e is None:
                raise
            return True
        finally:
            sys.settrace(None)
        return False


_closed: dict[str, tuple[set, set]] = {}


def _may_interrupt(frame):
    file, line = frame.f_code.co_filename, frame.f_lineno
    if file not in _closed:
        tree = ast.parse(pathlib.Path(file).read_text())
        nodes = list(ast.walk(tree))
        ends = {
            line
            for node in nodes
            if isinstance(node, ast.Try)
            for last in node.finalbody
            for line in range(last.lineno, last.end_lineno + 1)
        }
        _closed[file] = ends, {n.lineno for n in nodes if isinstance(n, ast.With)}
    ends, withs = _closed[file]
    if line in ends:
        return False
    if line in withs:
        first = min(o for o, _, at in frame.f_code.co_lines() if at == line)
        return frame.f_lasti <= first
    return True


def values(refs):
    return [float(ref.value) for ref in refs]


def is_clean():
    state = _trace.thread.state
    clean = not state.bodies and not state.calls and not _trace.guards.get()
    return clean and _trace.is_evaluating() and not commits.lock.locked()


OLD = [0.0, 1.0, 2.0]
NEW = [1.0, 2.0, 3.0]


@pytest.mark.parametrize("name", CALLS)
def test_an_exception_at_a_line_changes_all_or_nothing(name):
    call = CALLS[name]
    for _ in range(3):  # and later by a plan, where there is one
        refs = make()
        call(refs)
        assert values(refs) == NEW
    at, interrupted = 1 + EVERY // 2, 0
    while True:
        refs = make()
        if name == "filter_jit":
            jitted(refs, jnp.array(0.0))  # once before, so that a plan is learnt
            jitted(refs, jnp.array(0.0))
        raised = Injector(at).run(lambda refs=refs: call(refs))
        assert is_clean(), at
        assert values(refs) in (OLD, NEW), at
        if not raised:
            break
        interrupted += 1
        refs = make()
        call(refs)
        assert values(refs) == NEW, at
        at += EVERY
    assert interrupted > 0


@pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals"
)
def test_a_real_signal_changes_all_or_nothing():
    refs = [rx.Ref(jnp.array(0.0)) for _ in range(50)]
    increment = rx.filter_jit(
        lambda refs: [r.__setitem__(..., r[...] + 1) for r in refs] and None
    )
    for _ in range(3):
        increment(refs)
    before = signal.getsignal(signal.SIGALRM)

    def interrupt(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    hits, end = 0, time.monotonic() + 20
    try:
        while hits < 100 and time.monotonic() < end:
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-4 + hits * 1e-5)
                while True:
                    increment(refs)
            except KeyboardInterrupt:
                hits += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert is_clean()
            assert len(set(values(refs))) == 1
    finally:
        signal.signal(signal.SIGALRM, before)
    assert hits > 10
    then = values(refs)[0]
    increment(refs)
    assert values(refs)[0] == then + 1


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize(
    "transform", [rx.filter_jit, rx.filter_grad, rx.filter_vmap, rx.filter_checkpoint]
)
def test_an_error_in_the_function_changes_nothing(transform, error):
    refs = make()
    failing = True

    def run(x):
        step(refs, ONE)
        if failing:
            raise error
        return x

    xs = XS if transform is rx.filter_vmap else ONE
    with pytest.raises(error):
        transform(run)(xs)
    assert values(refs) == OLD and is_clean()
    failing = False
    transform(run)(xs)
    assert values(refs) == NEW


def test_a_failing_callback_changes_nothing():
    refs = make()

    def fail(x):
        raise MemoryError("no more")

    @rx.filter_jit
    def f(refs, x):
        step(refs, x)
        return jax.pure_callback(fail, x, x)

    with pytest.raises(Exception, match="no more"):
        f(refs, ONE)
    assert values(refs) == OLD and is_clean()
