"""`Rngs`: named streams of randomness, with their state in refs.

Both refs of a stream have collection "rng". `_engine/_rng_split.py` explains what that
means under `filter_vmap`, `scan` and `map`.
"""

import zlib
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array

from ._core._ref import Ref
from ._engine._rng_split import is_key
from ._fields._field import field
from ._fields._module import Module


DEFAULT = "default"


class RngStream(Module):
    """One stream of a [`refx_eqx.Rngs`][]: call it for a fresh key.

    The key never changes, and the count says how many keys were drawn. So a stream can be
    checkpointed, and set back: `stream.count.value = jnp.array(0)`.

    !!! Example

        ```python
        import refx_eqx as rx

        stream = rx.Rngs(0).default
        first, second = stream(), stream()
        assert stream.count.value == 2 and first != second
        ```

    **Arguments:**

    - `key`: a `jax.random` key, typed or raw. It is kept unchanged.
    """

    key: Ref[Array] = field(collection="rng")
    # Signed, so that it is never taken for a raw key.
    count: Ref[Array] = field(collection="rng")

    def __init__(self, key: Array):
        self.key = key
        self.count = jnp.zeros((), jnp.int32)

    def __call__(self) -> Array:
        """A fresh key, typed."""
        key = self.key.value
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jr.wrap_key_data(key)
        count = self.count.value
        self.count.value = count + 1
        return jr.fold_in(key, count)


# Attributes that are not streams. `eqx.nn.inference_mode` (Equinox 0.13) sets `inference`
# of every node that has it: the default stream would be replaced with a `bool`.
_NO_STREAM = ("streams", "inference")


class Rngs(Module):
    """Named streams of randomness.

    `rngs.dropout()` is a fresh key from the stream `dropout`: no key is split or threaded
    by hand. A name without a stream draws from the default stream, if there is one.

    !!! Example

        ```python
        import jax.numpy as jnp
        import jax.random as jr
        import refx_eqx as rx

        rngs = rx.Rngs(0, dropout=1)  # a default stream, and one for dropout
        weight = jr.normal(rngs.params(), (3,))  # from the default stream
        assert rngs.dropout() != rngs.dropout()

        def dropout(rngs, x):
            return jnp.where(jr.bernoulli(rngs.dropout(), 0.5, x.shape), 2 * x, 0)

        # Each element draws its own mask, and the next call draws others.
        rx.filter_vmap(dropout, in_axes=(None, 0))(rngs, jnp.ones((4, 3)))
        assert rngs.dropout.count.value == 3
        ```

    It is a [`refx_eqx.Module`][], so it can be a field of a model, or an argument. Its refs
    have collection `"rng"`, and the lifted transforms carry them like all refs. Under
    [`refx_eqx.filter_vmap`][] each element has its own keys, and under [`refx_eqx.scan`][]
    and [`refx_eqx.map`][] each step; `in_axes=rx.axes(rng=None, ...)` gives the same keys
    to all.

    **Arguments:**

    - `default`: seed of the default stream (optional, positional only).
    - `**streams`: the seed of each named stream: an `int`, or a `jax.random` key. A typed
        key stays typed in the ref; a seed gives a raw key, which every file format can
        store. Streams with equal seeds but different names differ.

    **Raises:**

    - `AttributeError`: if there is no stream of the requested name, and no default stream.
    - `TypeError`: if the default stream is given twice, or if a seed is neither an `int`
        nor a key.
    - `ValueError`: if a stream has the name of a module attribute, or one with an underscore
        in front.
    """

    streams: dict[str, RngStream]

    def __init__(self, default: int | Array | None = None, /, **streams: int | Array):
        if default is not None:
            if DEFAULT in streams:
                raise TypeError(
                    "`rx.Rngs`: the default stream was given twice, by position and as "
                    "`default=`. Give it once."
                )
            streams = {DEFAULT: default, **streams}
        for name in streams:
            if _is_no_stream(name) or hasattr(Module, name):
                raise ValueError(
                    f"`rx.Rngs`: a stream cannot be named {name!r}, because a module has "
                    "an attribute of that name, or Python may ask for one. Choose another "
                    "name, without an underscore in front."
                )
        self.streams = {
            name: RngStream(_key_of(name, seed)) for name, seed in streams.items()
        }

    def __getattr__(self, name: str) -> RngStream:
        # Called for attributes that are not found otherwise.
        if _is_no_stream(name):
            raise AttributeError(name)
        stream = self.streams.get(name, self.streams.get(DEFAULT))
        if stream is None:
            raise AttributeError(
                f"`rx.Rngs` has no stream {name!r}, and no default stream: it has "
                f"{', '.join(map(repr, self.streams)) or 'none'}. Make it with one: "
                f"`rx.Rngs({name}=seed)` or `rx.Rngs(seed)`."
            )
        return stream


def _is_no_stream(name: str) -> bool:
    # Names with an underscore belong to Python and its tools, which look up many that do
    # not exist.
    return name.startswith("_") or name in _NO_STREAM


def _key_of(name: str, seed: Any) -> Array:
    is_int = _is_int(seed)
    if not is_int and not (hasattr(seed, "dtype") and _is_one_key(seed)):
        raise TypeError(
            f"`rx.Rngs`: the seed of the stream {name!r} must be an int or one "
            f"`jax.random` key, but is {eqx.tree_pformat(seed)}. Pass, for example, `rx.Rngs(0)` or "
            "`rx.Rngs(jax.random.key(0))`."
        )
    # A seed gives a raw key, which every file format can store (Equinox 0.13 and NumPy
    # refuse typed ones); a key is unchanged.
    key = jr.key_data(jr.key(seed)) if is_int else seed
    # So that one seed for several streams does not give the same numbers twice.
    return _fold_in(key, zlib.crc32(name.encode()))


def _is_one_key(x: Any) -> bool:
    is_typed = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return is_key(x) and x.ndim == (0 if is_typed else 1)


def _is_int(x: Any) -> bool:
    is_scalar = eqx.is_array_like(x) and jnp.shape(x) == ()
    return is_scalar and jnp.issubdtype(jnp.result_type(x), jnp.integer)


def _fold_in(key: Array, data: int) -> Array:
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return jr.fold_in(key, data)
    return jr.key_data(jr.fold_in(jr.wrap_key_data(key), data))
