"""`Dropout`, which draws from a stream of `Rngs`."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from .._fields._module import Module
from .._rng import Rngs, RngStream


class Dropout(Module):
    """As `equinox.nn.Dropout`, with its own stream of randomness: there is no key to split
    and pass.

    !!! Example

        ```python
        import equinox as eqx
        import jax.numpy as jnp
        import refx_eqx as rx

        dropout = rx.nn.Dropout(0.5, rngs=rx.Rngs(0))
        x = jnp.ones(100)
        assert (dropout(x) != dropout(x)).any()  # another mask each time

        # Each example of a batch draws its own.
        ys = rx.filter_vmap(lambda layer, x: layer(x), in_axes=(None, 0))(dropout, jnp.ones((2, 100)))
        assert (ys[0] != ys[1]).any()

        assert (eqx.nn.inference_mode(dropout)(x) == x).all()
        ```

    Any number of layers may share one [`refx_eqx.Rngs`][]. Its refs have collection
    `"rng"`: [`refx_eqx.filter_vmap`][], [`refx_eqx.scan`][] and [`refx_eqx.map`][] give
    each place on the axis, and each step, its own keys.

    **Arguments:**

    - `p`: the fraction of entries to set to zero, on average.
    - `inference`: the mode; in inference mode nothing is set to zero.
        `equinox.nn.inference_mode` sets it.
    - `rngs`: the source of keys: a [`refx_eqx.Rngs`][], whose stream `dropout` (or default
        stream) is used, or a single stream, such as `rngs.noise`. Optional if each call is
        given a `key`.

    **Raises:**

    - `ValueError`: if `p` is not between 0 and 1.
    - `TypeError`: if `p` is neither a number nor an array, or `rngs` is not a source of keys.
    - `RuntimeError`: if it is called in training mode with neither a `key` nor `rngs`.
    """

    # Not static, so that `equinox.tree_at` can change them.
    p: Any
    inference: bool
    stream: RngStream | None

    def __init__(
        self,
        p: float = 0.5,
        inference: bool = False,
        *,
        rngs: Rngs | RngStream | None = None,
    ):
        _check(p, rngs)
        self.p = p
        self.inference = inference
        self.stream = rngs.dropout if isinstance(rngs, Rngs) else rngs

    def __call__(
        self,
        x: Array,
        *,
        key: PRNGKeyArray | None = None,
        inference: bool | None = None,
    ) -> Array:
        """**Arguments:**

        - `x`: an array of any shape.
        - `key`: a `jax.random` key, instead of one from the stream.
        - `inference`: overrides `self.inference`.

        **Returns:**

        An array of the same shape, with entries set to zero or divided by `1 - p`. It has
        the dtype of `x`, or, for integers and `bool`s, a floating-point one.
        """
        if not self.is_active(inference):
            return x
        return drop(x, self.p, self.key() if key is None else key)

    def is_active(self, inference: bool | None = None) -> bool:
        """Whether a call draws a key. `inference` overrides the mode of the layer."""
        inference = self.inference if inference is None else inference
        return not inference and not (isinstance(self.p, int | float) and self.p == 0)

    def key(self) -> Array:
        """A fresh key from the stream."""
        if self.stream is None:
            raise RuntimeError(
                "`rx.nn.Dropout` is in training mode and has no randomness. Make it with "
                "a stream, `rx.nn.Dropout(p, rngs=rx.Rngs(0))`; pass `key=` to the call; "
                "or, if nothing should be dropped, put the model into inference mode with "
                "`eqx.nn.inference_mode(model)`."
            )
        return self.stream()


def _check(p: Any, rngs: Any) -> None:
    fraction = (
        "`rx.nn.Dropout`: `p` is the fraction of entries to set to zero, between 0 and 1, "
        f"but was {p!r}."
    )
    if isinstance(p, bool) or not eqx.is_array_like(p):
        raise TypeError(fraction)
    if isinstance(p, int | float | np.floating) and not 0 <= p <= 1:
        raise ValueError(fraction)
    if not isinstance(rngs, Rngs | RngStream | None):
        raise TypeError(
            "`rx.nn.Dropout`: `rngs` must be an `rx.Rngs` or one of its streams, but was "
            f"{eqx.tree_pformat(rngs)}. Pass, for example, `rngs=rx.Rngs(0)`."
        )


def drop(x: Array, p: Any, key: Any) -> Array:
    """`x` with a fraction `p` of its entries set to zero, and the others scaled."""
    keep = 1 - jax.lax.stop_gradient(p)
    mask = jr.bernoulli(key, keep, x.shape)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        # As any division of integers, with a floating-point result.
        with jax.numpy_dtype_promotion("standard"):
            x = x.astype(jnp.result_type(x, keep))
    # With `p = 1` nothing is kept, and the division is by one instead of zero.
    scale = jnp.where(keep > 0, keep, 1).astype(x.dtype)
    return jnp.where(mask, x / scale, 0)
