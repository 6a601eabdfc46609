"""`MultiheadAttention`, with a cache of keys and values for decoding.

A cache of `n` slots holds the last `n` positions: position `p` is in slot `p % n`. So one
formula says which position is in a slot, and one mask, causal by position, is right for the
first tokens and the later ones, for a cache that is filled and one that rolls.
"""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from .._core._ref import Ref
from .._fields._collection import Cache
from .._fields._module import Module
from .._rng import Rngs, RngStream
from .._transforms._vmap import filter_vmap
from ._dropout import drop, Dropout
from ._stateless import with_params


_FULL = (
    "`rx.nn.MultiheadAttention`: the cache is full. Make the layer with a larger "
    "`cache_size`, begin another sequence by `reset_cache()`, or let the cache keep only the "
    "last positions, by `rolling=True`."
)


class MultiheadAttention(Module):
    """As `equinox.nn.MultiheadAttention`, with a cache for decoding, and a stream for dropout.

    !!! Example

        ```python
        import jax
        import jax.numpy as jnp
        import jax.random as jr
        import refx_eqx as rx

        attention = rx.nn.MultiheadAttention(
            2, 8, cache_size=16, rolling=True, key=jr.key(0)
        )
        xs = jr.normal(jr.key(1), (10, 8))
        causal = jnp.tril(jnp.ones((10, 10), bool))
        whole = attention(xs, xs, xs, causal)  # as Equinox's: the cache has no part in it

        @rx.filter_jit(donate="refs")
        def extend(attention, xs):
            return attention(xs, xs, xs, cache=True)

        prompt = extend(attention, xs[:7])  # prefill
        assert jnp.allclose(prompt, whole[:7], atol=1e-5)
        for i in range(7, 10):  # decode: one position at a time
            assert jnp.allclose(extend(attention, xs[i : i + 1])[0], whole[i], atol=1e-5)
        assert attention.cache_length.value == 10
        attention.reset_cache()
        ```

    **With `cache=True`** the keys and values of a call are put behind those of the calls
    before, and each query attends to its own position and to all that are before it. Any
    number of positions is taken at once, so prefill and decode are one call. With `rolling=
    True` the cache holds the last `cache_size` positions, and a query attends to these: a
    sliding window, over a sequence of any length.

    The cache is `cache_key`, `cache_value` and `cache_length`, refs of collection `"cache"`. A
    batch has one for each element: `rx.add_axis(model, batch_size, "cache")` and
    `in_axes=rx.axes(cache=0, default=None)`. For prompts of different lengths, fill them up
    behind and write the true lengths to `cache_length` after the prefill: what is behind is not
    looked at, and is overwritten. A rolling cache cannot be set back like that, because the
    filling may have taken the place of older positions.

    **Arguments:**

    - `num_heads`, `query_size`, `key_size`, `value_size`, `output_size`, `qk_size`, `vo_size`,
        `use_query_bias`, `use_key_bias`, `use_value_bias`, `use_output_bias`, `dropout_p`,
        `inference`, `dtype`, `key`: as in `equinox.nn.MultiheadAttention`.
    - `cache_size`: the number of positions in the cache; `None` for no cache.
    - `rolling`: whether the cache forgets what is older, instead of being full.
    - `rngs`: of the dropout, as in [`refx_eqx.nn.Dropout`][].

    **Raises:**

    - `ValueError`: if keys and values differ in length, if `process_heads` changes a shape, or
        if a call with `cache=True` has no cache, has a mask, or has more positions than the
        cache has place for.
    - `RuntimeError`: of Equinox, while the program runs, if the cache is full. No ref has
        changed then. A rolling cache is never full, and has no such check.
    """

    query_proj: Any
    key_proj: Any
    value_proj: Any
    output_proj: Any
    dropout: Dropout
    cache_key: Cache[Float[Array, "cache_size num_heads qk_size"]] | None
    cache_value: Cache[Float[Array, "cache_size num_heads vo_size"]] | None
    cache_length: Cache[Int[Array, ""]] | None
    num_heads: int = eqx.field(static=True)
    rolling: bool = eqx.field(static=True)

    def __init__(
        self,
        num_heads: int,
        query_size: int,
        key_size: int | None = None,
        value_size: int | None = None,
        output_size: int | None = None,
        qk_size: int | None = None,
        vo_size: int | None = None,
        use_query_bias: bool = False,
        use_key_bias: bool = False,
        use_value_bias: bool = False,
        use_output_bias: bool = False,
        dropout_p: float = 0.0,
        inference: bool = False,
        dtype: DTypeLike | None = None,
        *,
        cache_size: int | None = None,
        rolling: bool = False,
        rngs: Rngs | RngStream | None = None,
        key: PRNGKeyArray,
    ):
        # Made only for its projections, so that sizes and initial weights are Equinox's.
        plain = eqx.nn.MultiheadAttention(
            num_heads,
            query_size,
            key_size,
            value_size,
            output_size,
            qk_size,
            vo_size,
            use_query_bias,
            use_key_bias,
            use_value_bias,
            use_output_bias,
            dtype=dtype,
            key=key,
        )
        self.query_proj = with_params(plain.query_proj)
        self.key_proj = with_params(plain.key_proj)
        self.value_proj = with_params(plain.value_proj)
        self.output_proj = with_params(plain.output_proj)
        self.dropout = Dropout(dropout_p, inference, rngs=rngs)
        self.num_heads = num_heads
        self.rolling = rolling
        self.cache_key = self.cache_value = self.cache_length = None
        if cache_size is not None:
            dtype = plain.key_proj.weight.dtype
            self.cache_key = jnp.zeros((cache_size, num_heads, plain.qk_size), dtype)
            self.cache_value = jnp.zeros((cache_size, num_heads, plain.vo_size), dtype)
            self.cache_length = jnp.array(0)

    def __call__(
        self,
        query: Float[Array, "q_seq q_size"],
        key_: Float[Array, "kv_seq k_size"],
        value: Float[Array, "kv_seq v_size"],
        mask: Bool[Array, "..."] | None = None,
        *,
        key: PRNGKeyArray | None = None,
        inference: bool | None = None,
        process_heads: Callable | None = None,
        cache: bool = False,
    ) -> Float[Array, "q_seq o_size"]:
        """**Arguments:**

        - `query`: of shape `(q_seq, query_size)`.
        - `key_`: of shape `(kv_seq, key_size)`.
        - `value`: of shape `(kv_seq, value_size)`.
        - `mask`: of shape `(q_seq, kv_seq)` or `(num_heads, q_seq, kv_seq)`: `False` for what
            is not attended to. Not with `cache=True`, which makes its own.
        - `key`: a key of `jax.random` for dropout, instead of one of the stream.
        - `inference`: the mode, instead of that of `dropout`.
        - `process_heads`: a function of the heads of query, key and value, of shape `(seq,
            num_heads, size)`, that returns the same: for positions. With `cache=True` it is
            given the new ones, of which the first is at position `cache_length`.
        - `cache`: whether to put the keys and values into the cache, and to attend to all
            that it holds.

        **Returns:**

        An array of shape `(q_seq, output_size)`.
        """
        if key_.shape[0] != value.shape[0]:
            raise ValueError(
                "`rx.nn.MultiheadAttention`: there is one value for each key, and there are "
                f"{key_.shape[0]} keys and {value.shape[0]} values."
            )
        q = self._heads(self.query_proj, query)
        k = self._heads(self.key_proj, key_)
        v = self._heads(self.value_proj, value)
        if process_heads is not None:
            q, k, v = _processed(process_heads, (q, k, v))
        if cache:
            k, v, mask = self._extend(q, k, v, mask)
        weights = self._drop(_weights(q, k, mask), key, inference)
        # In this order `einsum` makes the product that Equinox makes for each head, and so the
        # same numbers to the last bit. (In the other it exchanges the two.)
        attended = jnp.einsum("Shd,hsS->shd", v, weights)
        return _each(self.output_proj, attended.reshape(query.shape[0], -1))

    def reset_cache(self) -> None:
        """Empties the cache, before another sequence."""
        _, _, length = self._cache
        length.value = jnp.zeros_like(length.value)

    def _heads(self, proj: Any, x: Array) -> Array:
        return _each(proj, x).reshape(x.shape[0], self.num_heads, -1)

    def _drop(self, weights: Array, key: Any, inference: bool | None) -> Array:
        if not self.dropout.is_active(inference):
            return weights
        key = self.dropout.key() if key is None else key
        keys = jr.split(key, self.num_heads)  # as Equinox does
        return jax.vmap(lambda x, key: drop(x, self.dropout.p, key))(weights, keys)

    def _extend(
        self, query: Array, key: Array, value: Array, mask: Any
    ) -> tuple[Array, Array, Array]:
        """Puts keys and values into the cache. Returns those to attend to, and a mask."""
        cache_key, cache_value, length = self._cache
        n, size = key.shape[0], cache_key.shape[0]
        if mask is not None or query.shape[0] != n:
            raise ValueError(
                "`rx.nn.MultiheadAttention`: with `cache=True` each position brings a query, "
                "a key and a value, and attends to those before it: there is no `mask`, and "
                f"queries are as many as keys (they are {query.shape[0]} and {n}). Call the "
                "layer without `cache=True` for anything else."
            )
        start = length.value
        if not self.rolling:
            start = _checked_position(start, n, size)
        key, value = key.astype(cache_key.dtype), value.astype(cache_value.dtype)
        old = cache_key.value, cache_value.value
        cache_key.value = _put(old[0], key, start)
        cache_value.value = _put(old[1], value, start)
        length.value = start + n
        at = start + jnp.arange(n)
        if self.rolling and n > 1:
            # The last of the new ones may have taken the slots of what the first look at.
            key = jnp.concatenate([old[0], key])
            value = jnp.concatenate([old[1], value])
            positions = jnp.concatenate([_positions(start, size), at])
        else:
            key, value = cache_key.value, cache_value.value
            positions = _positions(start + n, size)
        age = at[:, None] - positions[None, :]
        return key, value, (positions[None, :] >= 0) & (age >= 0) & (age < size)

    @property
    def _cache(self) -> tuple[Ref, Ref, Ref]:
        cache: Any = self.cache_key, self.cache_value, self.cache_length
        if None in cache:
            raise ValueError(
                "`rx.nn.MultiheadAttention`: the layer has no cache. Make "
                "it with `cache_size=`."
            )
        return cache


def _checked_position(start: Array, n: int, size: int) -> Array:
    """The position of the first of `n` new ones, if there is place for them."""
    if n > size:
        raise ValueError(f"{_FULL} (It has {size} places, and {n} are needed.)")
    return eqx.error_if(start, start + n > size, _FULL)


def _put(cache: Array, new: Array, start: Array) -> Array:
    """The cache with the positions from `start` on; of more than it holds, the last ones."""
    size, n = cache.shape[0], new.shape[0]
    n_kept = min(n, size)
    slots = (start + n - n_kept + jnp.arange(n_kept)) % size
    return cache.at[slots].set(new[n - n_kept :], unique_indices=True)


def _positions(length: Array, size: int) -> Array:
    """Which position is in each slot, after `length` of them; negative for none."""
    last = length - 1
    return last - (last - jnp.arange(size)) % size


def _weights(query: Array, key: Array, mask: Array | None) -> Array:
    logits = jnp.einsum("shd,Shd->hsS", query / math.sqrt(query.shape[-1]), key)
    if mask is not None:
        mask = mask if mask.ndim == 3 else mask[None]
        if mask.shape[1:] != logits.shape[1:] or mask.shape[0] not in (1, len(logits)):
            raise ValueError(
                f"`rx.nn.MultiheadAttention`: the mask has shape {mask.shape}, and is to have "
                f"shape {logits.shape[1:]}, or {logits.shape} for one of each head."
            )
        logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(logits.dtype, jnp.float32)
    # In float32 at least, because a sum over many positions is.
    return jax.nn.softmax(logits.astype(dtype)).astype(logits.dtype)


def _processed(process_heads: Callable, heads: tuple) -> tuple:
    processed = tuple(process_heads(*heads))
    if [x.shape for x in processed] != [x.shape for x in heads]:
        raise ValueError(
            "`rx.nn.MultiheadAttention`: `process_heads` returns heads of the shapes "
            f"{[x.shape for x in processed]}, and was given {[x.shape for x in heads]}. It "
            "is to return three arrays of the shapes that it is given."
        )
    return processed


def _each(layer: Any, xs: Array) -> Array:
    # Ours, because the layer may be one that keeps a state, as `SpectralNorm` does.
    return filter_vmap(lambda layer, x: layer(x), in_axes=(None, 0))(layer, xs)
