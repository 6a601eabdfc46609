"""`config`: the switch of the run-time type checks."""

import contextlib
import os
from collections.abc import Iterator

import jaxtyping

from .._core._blocks import Block, Blocks


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


class _Setting(Block):
    __slots__ = ("check_types",)

    def __init__(self, check_types: bool):
        super().__init__()
        self.check_types = check_types


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
    it for the current thread and `asyncio` task, until the block ends (in
    whichever thread or task, if a generator is suspended in it).
    """

    # Nothing else can be set: a misspelled name would have no effect.
    __slots__ = ("_everywhere", "_here")

    def __init__(self):
        self._everywhere = _parse(os.environ.get("REFX_CHECK_TYPES", "1"))
        self._here: Blocks[_Setting] = Blocks("refx_eqx.config")

    @property
    def check_types(self) -> bool:
        """Whether the values of refs are checked against the declared types.

        `True` unless the environment variable `REFX_CHECK_TYPES` is `0` at import. It is
        `False` whenever jaxtyping itself is turned off (`JAXTYPING_DISABLE=1`).
        """
        if jaxtyping.config.jaxtyping_disable:
            return False
        here = self._here.begun() and self._here.running()
        return here[-1].check_types if here else self._everywhere

    @check_types.setter
    def check_types(self, value: bool) -> None:
        self._everywhere = _checked(value)

    @contextlib.contextmanager
    def __call__(self, *, check_types: bool) -> Iterator[None]:
        """Sets `check_types` in this task for the duration of a `with` block."""
        setting = _Setting(_checked(check_types))
        try:
            self._here.begin(setting)
            yield
        finally:
            setting.ended = True
            self._here.running()

    def __repr__(self) -> str:
        return f"rx.config(check_types={self.check_types})"


config = Config()
