"""Randomness: refs of collection "rng" are split by lane, and by step of a scan.

A ref of this collection that is broadcast holds, inside the function, a key of that lane
or step: the key outside with the number of the lane folded in. So dropout differs from
lane to lane, and nobody threads a key. What the function writes to it stays one value for
all lanes: a counter is the same in each, and of a key it is the first lane's.
"""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr

from .._core._call import Opened


__tracebackhide__ = True


def is_key(x: jax.Array) -> bool:
    """Whether these are keys: typed ones, or raw ones of the default implementation."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return True
    raw = jax.eval_shape(lambda: jr.key_data(jr.key(0)))
    return x.dtype == raw.dtype and x.shape[-1:] == raw.shape


# Folded in before the number of the lane. Without it the key of lane 3 would be the one
# that a user, or a stream of `Rngs`, gets by folding in 3.
_OF_LANES = 0x6C616E65


def fold_in(keys: jax.Array, lane: jax.Array) -> jax.Array:
    """Keys of one lane, for keys of any shape."""
    is_typed = jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
    one: Any = lambda key, lane: jr.fold_in(jr.fold_in(key, _OF_LANES), lane)
    for _ in range(keys.ndim if is_typed else keys.ndim - 1):
        one = jax.vmap(one, in_axes=(0, None))
    return one(keys, lane)


def split_keys(opened: Opened, split: tuple[int, ...], arrays: list, lane: Any) -> list:
    """The arrays of a call as one lane sees them.

    **Arguments:**

    - `split`: the numbers of the refs that are split.
    - `arrays`: the flat arrays of the call.
    - `lane`: the number of the lane, or of the step. May be `None` if `split` is empty.
    """
    arrays = list(arrays)
    for number in split:
        for i in range(*opened.spans[number]):
            x = jnp.asarray(arrays[i])
            if is_key(x):
                arrays[i] = fold_in(x, lane)
    return arrays
