"""Translates the errors of compiled programs."""

import itertools
import logging
import re
from collections.abc import Iterable
from typing import Any

import equinox as eqx
from equinox import _jit as equinox_jit

from .._calls._commit import explain_donated
from .._core._ref import Ref


def has_runtime_check(equations: Iterable[Any]) -> bool:
    """Whether a program calls back into Python, which may raise, as `eqx.error_if` does."""
    for eqn in equations:
        if eqn.primitive.name in ("pure_callback", "io_callback"):
            return True
        for param in eqn.params.values():
            for sub in param if isinstance(param, (tuple, list)) else (param,):
                sub = getattr(sub, "jaxpr", sub)
                if hasattr(sub, "eqns") and has_runtime_check(sub.eqns):
                    return True
    return False


_CHECK_FAILED = "_EquinoxRuntimeError: "


def explain(error: Exception, refs: list[Ref], values: list[Any]) -> None:
    """Raises a better error than JAX's, if possible.

    `values` are the values of `refs` read by the call.

    **Raises:**

    - `equinox.EquinoxRuntimeError`: if a run-time check failed.
    - What `explain_donated` raises.
    """
    text = str(error)
    callback = _CALLBACK_FAILED.search(text)
    if callback and int(callback[1]) in _callback_errors:
        raise _callback_errors.pop(int(callback[1])) from None
    if _CHECK_FAILED in text:
        raise _runtime_error(text) from None
    explain_donated(error, refs, values)


# Equinox looks for this variable in each frame of the stack of a check.
JIT_ID = b"refx_eqx"


def _runtime_error(text: str) -> eqx.EquinoxRuntimeError:
    """The error that `eqx.filter_jit` raises, with the stack inside the program.

    JAX passes on the message of a callback as text, followed by Equinox's advice (to use
    `filter_jit`); Equinox keeps the stack in a global variable.
    """
    message = text.split(_CHECK_FAILED, 1)[1].split("\n\n\n-----", 1)[0]
    info = getattr(equinox_jit, "last_error_info", None)
    template = getattr(equinox_jit, "_on_error_msg", None)
    if template is None or info is None or info[0] != message:  # another thread's
        return eqx.EquinoxRuntimeError(message)
    # From the inside out: a text for each frame, and an id for each program.
    stack = list(info[1])
    if JIT_ID in stack:
        stack = stack[: len(stack) - 1 - stack[::-1].index(JIT_ID)]
    frames = [x for x in reversed(stack) if isinstance(x, str)]
    return eqx.EquinoxRuntimeError(template.format(msg=message, stack="".join(frames)))


class CallbackFailed(Exception):
    """Replaces an exception in a callback. JAX passes it on as text, with a number from
    which `explain` finds the original exception."""

    def __init__(self, error: Exception):
        number = next(_callback_numbers)
        _callback_errors[number] = error
        while len(_callback_errors) > _MAX_CALLBACK_ERRORS:  # never asked for
            _callback_errors.pop(next(iter(_callback_errors)))
        super().__init__(f"[callback {number}] {type(error).__name__}: {error}")


_CALLBACK_FAILED = re.compile(r"CallbackFailed: \[callback (\d+)\]")


_MAX_CALLBACK_ERRORS = 100


_callback_numbers = itertools.count()


_callback_errors: dict[int, Exception] = {}


class _QuietChecks(logging.Filter):
    """JAX logs the traceback of every callback that raises. The user gets a failed
    `eqx.error_if` as an exception, and once is enough."""

    def filter(self, record: logging.LogRecord) -> bool:
        kind = record.exc_info[0] if record.exc_info else None
        quiet = ("_EquinoxRuntimeError", CallbackFailed.__name__)
        return kind is None or kind.__name__ not in quiet


logging.getLogger("jax._src.callback").addFilter(_QuietChecks())
