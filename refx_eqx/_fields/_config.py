"""`config`: the switch of the run-time type checks."""

import contextlib
import os
import threading
from collections.abc import Iterator

import jaxtyping


__tracebackhide__ = True


def _parse(text: str) -> bool:
    if text.lower() in ("0", "false"):
        return False
    if text.lower() in ("1", "true"):
        return True
    raise ValueError(
        f"REFX_CHECK_TYPES={text!r} is not understood. Set REFX_CHECK_TYPES=0 to turn the "
        "checks of declared types off, or REFX_CHECK_TYPES=1 (the default) to have them."
    )


def _checked(value: bool) -> bool:
    if not isinstance(value, bool):
        raise TypeError(
            f"`rx.config.check_types` is a bool, and was given {value!r}. Set it to `True` "
            "or `False`."
        )
    return value


class Config:
    """Settings of the library. There is one instance: `refx_eqx.config`.

    !!! Example

        ```python
        import jax.numpy as jnp
        import refx_eqx as rx
        from jaxtyping import Array, Float

        class Linear(rx.Module):
            weight: rx.Param[Float[Array, "out in"]]

        with rx.config(check_types=False):
            linear = Linear(jnp.zeros(3))  # of the wrong rank, and nobody looks
        assert linear.weight.shape == (3,)
        ```

    Assigning to `rx.config.check_types` sets it for the whole program. The `with` block
    sets it for the running thread, and ends with the block.
    """

    # Nothing else can be set: a misspelled name would be without effect.
    __slots__ = ("_everywhere", "_here")

    def __init__(self):
        self._everywhere = _parse(os.environ.get("REFX_CHECK_TYPES", "1"))
        self._here = threading.local()

    @property
    def check_types(self) -> bool:
        """Whether the values of refs are checked against the declared types.

        `True` unless the environment variable `REFX_CHECK_TYPES` is `0` at import. It is
        `False` whenever jaxtyping itself is turned off (`JAXTYPING_DISABLE=1`).
        """
        if jaxtyping.config.jaxtyping_disable:
            return False
        return getattr(self._here, "check_types", self._everywhere)

    @check_types.setter
    def check_types(self, value: bool) -> None:
        self._everywhere = _checked(value)

    @contextlib.contextmanager
    def __call__(self, *, check_types: bool) -> Iterator[None]:
        """Sets `check_types` on this thread for the duration of a `with` block."""
        check = _checked(check_types)
        before = vars(self._here).copy()
        self._here.check_types = check
        try:
            yield
        finally:
            vars(self._here).clear()
            vars(self._here).update(before)

    def __repr__(self) -> str:
        return f"rx.config(check_types={self.check_types})"


config = Config()
