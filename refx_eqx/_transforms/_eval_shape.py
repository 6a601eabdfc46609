"""`filter_eval_shape`."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax

from .._calls._call import Call, close_result
from .._calls._structure import Leaves, Outcome


T = TypeVar("T")


def filter_eval_shape(fun: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """As `equinox.filter_eval_shape`: what a call would return, without computing it.

    Nothing is written. Refs in the result are new and hold `jax.ShapeDtypeStruct`s, even
    where `fun` returns the caller's own.

    !!! Example

        ```python
        import jax
        import jax.numpy as jnp
        import refx_eqx as rx

        ref = rx.filter_eval_shape(lambda n: rx.Ref(jnp.zeros((n, 2)), "params"), 3)
        assert ref.value == jax.ShapeDtypeStruct((3, 2), jnp.float32)
        ```

    **Arguments:**

    - `fun`: the function to evaluate; pass a module class to see what it would allocate.
    - `*args`, `**kwargs`: its arguments. Arrays may be `jax.ShapeDtypeStruct`s.

    **Returns:**

    The result of `fun`, with `jax.ShapeDtypeStruct` instead of arrays.

    **Raises:**

    - `TraceLevelError`: if `fun` touches a ref that it reaches through a global name.
    """
    derefed = Call(fun, args, kwargs)

    def body(arrays: list[Leaves]) -> Outcome:
        return derefed.run("filter_eval_shape", arrays, transparent=False)

    # The result gets new refs: the caller's own cannot hold shapes instead of arrays.
    outcome = jax.eval_shape(body, derefed.arrays)
    arrays = jax.eval_shape(lambda x: x, derefed.arrays)
    return close_result(outcome, derefed.structure.refs_after(outcome, arrays))
