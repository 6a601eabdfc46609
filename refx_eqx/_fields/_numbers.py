"""Python numbers, and the arrays without axes that JAX makes of them."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp


# In order: a number can be promoted to any later kind, but a bool to none.
_KINDS = {
    bool: jnp.bool_,
    int: jnp.integer,
    float: jnp.floating,
    complex: jnp.complexfloating,
}


def number_like(value: Any) -> Any:
    """A Python number of the kind of an array without axes; `None` for anything else."""
    if isinstance(value, jax.Array) and value.ndim == 0:
        for number, kind in _KINDS.items():
            if jnp.issubdtype(value.dtype, kind):
                return number()
    return None


def promotions(value: Any, old: Any = None) -> Iterator[Any]:
    """What a Python number can be promoted to: numbers, and arrays.

    As in `x.at[...].set(1.0)`, an array is weakly typed: it takes the dtype of `old`, the
    value it replaces, if that is an array.
    """
    numbers = list(_KINDS)
    if type(value) not in numbers:
        return
    wider = numbers[numbers.index(type(value)) :] if type(value) is not bool else [bool]
    try:
        if not isinstance(old, jax.Array):
            yield from (number(value) for number in wider)
            yield from (_array(value, jnp.result_type(number)) for number in wider)
        elif old.ndim == 0 and any(jnp.issubdtype(old.dtype, _KINDS[t]) for t in wider):
            yield _array(value, old.dtype)
    except OverflowError:  # 300, for an `int8`
        return


def _array(value: Any, dtype: Any) -> jax.Array:
    with jax.ensure_compile_time_eval():  # so that a validator can look at it
        return jnp.asarray(value, dtype)
