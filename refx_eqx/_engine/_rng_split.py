"""Randomness: refs of collection "rng" are split along a mapped axis, and by step of a scan.

Inside the function, a broadcast ref of this collection holds a separate key for each place
on the axis or each step: the outer key with its number folded in. So dropout differs along
the axis without threading keys. A write to the ref is still one value for the whole axis: a
counter is the same everywhere, and of the keys the first is taken.
"""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu

from .._calls._structure import Leaves, map_values


def is_key(x: jax.Array) -> bool:
    """Whether these are keys: typed ones, or raw ones of the default implementation."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return True
    raw = jax.eval_shape(lambda: jr.key_data(jr.key(0)))
    return x.dtype == raw.dtype and x.shape[-1:] == raw.shape


# Folded in before the number of the place. Otherwise the key of place 3 would be the one
# that a user, or a stream of `Rngs`, gets by folding in 3. (ASCII for "lane".)
_MARK = 0x6C616E65


def fold_in(keys: jax.Array, place: jax.Array) -> jax.Array:
    """Keys of one place, for keys of any shape."""
    is_typed = jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
    one: Any = lambda key, place: jr.fold_in(jr.fold_in(key, _MARK), place)
    for _ in range(keys.ndim if is_typed else keys.ndim - 1):
        one = jax.vmap(one, in_axes=(0, None))
    return one(keys, place)


def split_keys(
    split: tuple[int, ...], arrays: list[Leaves], place: Any
) -> list[Leaves]:
    """The arrays of a call as seen at one place on the mapped axis.

    **Arguments:**

    - `split`: the numbers of the refs that are split.
    - `arrays`: the arrays of the call.
    - `place`: the number of the place, or of the step. May be `None` if `split` is empty.
    """

    def of_place(x: Any) -> Any:
        x = jnp.asarray(x)
        return fold_in(x, place) if is_key(x) else x

    def of_ref(i: int, value: Any) -> Any:
        return jtu.tree_map(of_place, value) if i in split else value

    return [map_values(of_ref, leaves) for leaves in arrays]
