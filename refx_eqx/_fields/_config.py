"""`config`: the switch of the run-time type checks."""

import contextlib
import contextvars
import os
from collections.abc import Iterator

import jaxtyping


def _parse(text: str) -> bool:
    if text.lower() in ("0", "false"):
        return False
    if text.lower() in ("1", "true"):
        return True
    raise ValueError(
        f"REFX_CHECK_TYPES={text!r} is invalid. Set REFX_CHECK_TYPES=0 to turn the checks "
        "of declared types off, or REFX_CHECK_TYPES=1 (the default) to keep them on."
    )


def _checked(value: bool) -> bool:
    if not isinstance(value, bool):
        raise TypeError(
            f"`rx.config.check_types` must be a bool, but was given {value!r}. Set it to "
            "`True` or `False`."
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
            linear = Linear(jnp.zeros(3))  # wrong rank, but not checked
        assert linear.weight.shape == (3,)
        ```

    Assigning to `rx.config.check_types` sets it for the whole program. A `with` block sets
    it for the current thread and `asyncio` task, until the block ends.
    """

    # Nothing else can be set: a misspelled name would have no effect.
    __slots__ = ("_everywhere", "_here")

    def __init__(self):
        self._everywhere = _parse(os.environ.get("REFX_CHECK_TYPES", "1"))
        # Per `asyncio` task, thus per thread: all start without one.
        self._here: contextvars.ContextVar[tuple[tuple[object, bool], ...]]
        self._here = contextvars.ContextVar("refx_eqx.config", default=())

    @property
    def check_types(self) -> bool:
        """Whether the values of refs are checked against the declared types.

        `True` unless the environment variable `REFX_CHECK_TYPES` is `0` at import. It is
        `False` whenever jaxtyping itself is turned off (`JAXTYPING_DISABLE=1`).
        """
        if jaxtyping.config.jaxtyping_disable:
            return False
        here = self._here.get()
        return here[-1][1] if here else self._everywhere

    @check_types.setter
    def check_types(self, value: bool) -> None:
        self._everywhere = _checked(value)

    @contextlib.contextmanager
    def __call__(self, *, check_types: bool) -> Iterator[None]:
        """Sets `check_types` in this task for the duration of a `with` block."""
        mine = object(), _checked(check_types)
        try:
            self._here.set((*self._here.get(), mine))
            yield
        finally:
            # Not the previous value: a generator may end in between.
            self._here.set(tuple(x for x in self._here.get() if x is not mine))

    def __repr__(self) -> str:
        return f"rx.config(check_types={self.check_types})"


config = Config()
