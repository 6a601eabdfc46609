"""`MultiheadAttention`, with a cache of keys and values for decoding.

A cache of `n` slots holds the last `n` positions: position `p` is in slot `p % n`. So one
formula gives the position in a slot, and one mask, causal by position, works for early and
late tokens, and for plain and rolling caches.
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
from .._engine._carry import whole_number
from .._fields._collection import Cache
from .._fields._module import Module
from .._rng import Rngs, RngStream
from .._transforms._vmap import filter_vmap
from ._dropout import drop, Dropout
from ._stateless import with_params


_FULL = (
    "`rx.nn.MultiheadAttention`: the cache is full. Make the layer with a larger "
    "`cache_size`, start a new sequence with `reset_cache()`, or keep only the last "
    "positions with `rolling=True`."
)


class MultiheadAttention(Module):
    """As `equinox.nn.MultiheadAttention`, with a cache for decoding and a stream for
    dropout.

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

    **With `cache=True`** the keys and values of a call are appended to those of earlier
    calls, and each query attends to its own position and all positions before it. A call
    takes any number of positions, for prefill and decoding alike. With `rolling=True` the
    cache holds the last `cache_size` positions, and queries attend to these: a sliding
    window over a sequence of any length.

    The cache is `cache_key`, `cache_value` and `cache_length`, refs of collection
    `"cache"`. For a batch, use one cache per element: `rx.add_axis(model, batch_size,
    "cache")` and `in_axes=rx.axes(cache=0, default=None)`. For prompts of different
    lengths, pad them at the end and write the true lengths to `cache_length` after the
    prefill: the padding is not attended to, and is overwritten. A rolling cache cannot be
    set back like that, because the padding may have replaced older positions.

    **Arguments:**

    - `num_heads`, `query_size`, `key_size`, `value_size`, `output_size`, `qk_size`, `vo_size`,
        `use_query_bias`, `use_key_bias`, `use_value_bias`, `use_output_bias`, `dropout_p`,
        `inference`, `dtype`, `key`: as in `equinox.nn.MultiheadAttention`.
    - `cache_size`: the number of positions in the cache; `None` for no cache.
    - `rolling`: whether the cache drops older positions instead of filling up.
    - `rngs`: the source of keys for dropout, as in [`refx_eqx.nn.Dropout`][].

    **Raises:**

    - `TypeError`: if `cache_size` is not an integer.
    - `ValueError`: if `cache_size` is less than one, if keys and values differ in length, if `process_heads` changes a shape,
        or if a call with `cache=True` has no cache, has a mask, or has more positions than
        fit in the cache.
    - `RuntimeError`: from Equinox, when the program runs, if the cache is full. Then no ref
        has changed. A rolling cache is never full, and has no such check.
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
            name = "rx.nn.MultiheadAttention"
            cache_size = whole_number(cache_size, name, "`cache_size`", 1)
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
        - `mask`: of shape `(q_seq, kv_seq)` or `(num_heads, q_seq, kv_seq)`, with `False`
            for positions to ignore. Not with `cache=True`, which makes its own.
        - `key`: a `jax.random` key for dropout, instead of one from the stream.
        - `inference`: overrides the mode of `dropout`.
        - `process_heads`: a function that takes and returns the heads of query, key and
            value, of shape `(seq, num_heads, size)`, for position embeddings. With
            `cache=True` it is given the new ones, the first of which is at position
            `cache_length`.
        - `cache`: whether to append the keys and values to the cache, and attend to
            everything in it.

        **Returns:**

        An array of shape `(q_seq, output_size)`.
        """
        if key_.shape[0] != value.shape[0]:
            raise ValueError(
                "`rx.nn.MultiheadAttention`: there must be one value for each key, but "
                f"there are {key_.shape[0]} keys and {value.shape[0]} values."
            )
        q = self._heads(self.query_proj, query)
        k = self._heads(self.key_proj, key_)
        v = self._heads(self.value_proj, value)
        if process_heads is not None:
            q, k, v = _processed(process_heads, (q, k, v))
        if cache:
            k, v, mask = self._extend(q, k, v, mask)
        weights = self._drop(_weights(q, k, mask), key, inference)
        # In this order `einsum` computes the same product per head as Equinox, and so the
        # same numbers to the last bit. (In the other order it swaps the operands.)
        attended = jnp.einsum("Shd,hsS->shd", v, weights)
        n_heads, size = attended.shape[1:]
        return _each(self.output_proj, attended.reshape(-1, n_heads * size))

    def reset_cache(self) -> None:
        """Empties the cache, for a new sequence."""
        _, _, length = self._cache
        length.value = jnp.zeros_like(length.value)

    def _heads(self, proj: Any, x: Array) -> Array:
        heads = _each(proj, x)
        return heads.reshape(-1, self.num_heads, heads.shape[1] // self.num_heads)

    def _drop(self, weights: Array, key: Any, inference: bool | None) -> Array:
        if not self.dropout.is_active(inference):
            return weights
        key = self.dropout.key() if key is None else key
        keys = jr.split(key, self.num_heads)  # as Equinox does
        return jax.vmap(lambda x, key: drop(x, self.dropout.p, key))(weights, keys)

    def _extend(
        self, query: Array, key: Array, value: Array, mask: Any
    ) -> tuple[Array, Array, Array]:
        """Appends keys and values to the cache. Returns those to attend to, and a mask."""
        cache_key, cache_value, length = self._cache
        n, size = key.shape[0], cache_key.shape[0]
        if mask is not None or query.shape[0] != n:
            raise ValueError(
                "`rx.nn.MultiheadAttention`: with `cache=True` each position has a query, "
                "a key and a value, and attends to those before it: there is no `mask`, "
                f"and as many queries as keys (there are {query.shape[0]} and {n}). Call "
                "the layer without `cache=True` for anything else."
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
            # The last new positions may have taken slots that the first ones attend to.
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
    """The position of the first of `n` new ones, if they fit."""
    if n > size:
        raise ValueError(f"{_FULL} (It has {size} slots, and {n} are needed.)")
    return eqx.error_if(start, start + n > size, _FULL)


def _put(cache: Array, new: Array, start: Array) -> Array:
    """The cache with new positions from `start` on; if they do not all fit, the last
    ones."""
    size, n = cache.shape[0], new.shape[0]
    n_kept = min(n, size)
    slots = (start + n - n_kept + jnp.arange(n_kept)) % size
    return cache.at[slots].set(new[n - n_kept :], unique_indices=True)


def _positions(length: Array, size: int) -> Array:
    """The position in each slot after `length` positions; negative for an empty slot."""
    last = length - 1
    return last - (last - jnp.arange(size)) % size


def _weights(query: Array, key: Array, mask: Array | None) -> Array:
    logits = jnp.einsum("shd,Shd->hsS", query / math.sqrt(query.shape[-1]), key)
    if mask is not None:
        one, each = logits.shape[1:], logits.shape
        if mask.shape not in (one, (1, *one), each):
            raise ValueError(
                f"`rx.nn.MultiheadAttention`: the mask has shape {mask.shape}, but must "
                f"have shape {one}, or {each} for one per head."
            )
        mask = mask if mask.ndim == 3 else mask[None]
        logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(logits.dtype, jnp.float32)
    # In float32 at least, because it sums over many positions.
    return jax.nn.softmax(logits.astype(dtype)).astype(logits.dtype)


def _processed(process_heads: Callable, heads: tuple) -> tuple:
    processed = tuple(process_heads(*heads))
    if [x.shape for x in processed] != [x.shape for x in heads]:
        raise ValueError(
            "`rx.nn.MultiheadAttention`: `process_heads` returned heads of the shapes "
            f"{[x.shape for x in processed]}, but was given {[x.shape for x in heads]}. It "
            "must return three arrays of the shapes it is given."
        )
    return processed


def _each(layer: Any, xs: Array) -> Array:
    # Our `filter_vmap`, because the layer may be stateful, like `SpectralNorm`.
    return filter_vmap(lambda layer, x: layer(x), in_axes=(None, 0))(layer, xs)
