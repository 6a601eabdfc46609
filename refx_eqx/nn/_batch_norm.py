"""`BatchNorm`: normalization by batch statistics, with running averages in refs."""

import math
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .._fields._collection import BatchStat, Param
from .._fields._module import Module
from ._state import write_state


class BatchNorm(Module):
    """As `equinox.nn.BatchNorm`, with its running statistics in refs: there is no `State` to
    pass in and out.

    !!! Example

        ```python
        import equinox as eqx
        import jax.numpy as jnp
        import jax.random as jr
        import refx_eqx as rx

        norm = rx.nn.BatchNorm(3)
        xs = 5.0 + 2.0 * jr.normal(jr.key(0), (64, 3))  # a batch of 64
        assert jnp.allclose(norm(xs).mean(axis=0), 0, atol=1e-5)
        assert jnp.allclose(norm.mean.value, xs.mean(axis=0))

        # The same refs, in another mode.
        evaluated = eqx.nn.inference_mode(norm)
        want = (xs - norm.mean[...][None]) / norm.var[...][None] ** 0.5
        assert jnp.allclose(evaluated(xs), want, atol=1e-4)

        # As a layer for one example, mapped over the batch.
        norm = rx.nn.BatchNorm(3, axis_name="batch")
        apply = rx.filter_vmap(lambda norm, x: norm(x), in_axes=(None, 0), axis_name="batch")
        assert apply(norm, xs).shape == (64, 3) and norm.count.value == 1
        ```

    **Without `axis_name`** it is called on a batch, of shape `(batch, input_size,
    *spatial)`. **With `axis_name`** it is called on one example, of shape `(input_size,
    *spatial)`, inside a map over an axis of that name: `rx.filter_vmap(...,
    axis_name=...)`, where the statistics are one value for the whole axis.

    In training mode it normalizes by the statistics of the batch, and averages them in the
    refs `mean` and `var`. In inference mode it normalizes by these averages. The
    conventions are those of Equinox:

    - `momentum` is the fraction that the running statistics *keep* (in PyTorch it is the
        fraction they lose: `0.99` here is `0.01` there);
    - the variance of the batch is biased: divided by `n`, not by `n - 1`;
    - `eps` is added to the variance, inside the square root.

    The one difference: from the first batch on, `mean` and `var` are not biased toward
    their initial values. Equinox 0.13.8 corrects both as if they had started at zero, but
    starts the variance at one.

    **Arguments:**

    - `input_size`: the number of channels.
    - `axis_name`: the name of the mapped axis, or several. `None` for a batch.
    - `eps`: added to the variance.
    - `channelwise_affine`: whether to have a `weight` and a `bias`, of collection
        `"params"`.
    - `momentum`: the fraction that the running statistics keep, between 0 and 1.
    - `inference`: the mode. `equinox.nn.inference_mode` sets it.
    - `dtype`: the dtype of parameters and statistics, which inputs of another dtype do not
        change; by default JAX's default float.
    - `mode`: `"batch"`, or `"ema"`, which normalizes by the running statistics in training
        mode too.

    **Raises:**

    - `ValueError`: if `mode` or `momentum` is invalid, or if an input does not have
        `input_size` channels.
    - `NameError`: if there is no mapped axis of that name.
    """

    weight: Param[Float[Array, "input_size"]] | None
    bias: Param[Float[Array, "input_size"]] | None
    mean: BatchStat[Float[Array, "input_size"]]
    var: BatchStat[Float[Array, "input_size"]]
    count: BatchStat[Int[Array, ""]]
    axis_name: Hashable | Sequence[Hashable]
    inference: bool
    input_size: int = eqx.field(static=True)
    eps: float = eqx.field(static=True)
    channelwise_affine: bool = eqx.field(static=True)
    momentum: float = eqx.field(static=True)
    mode: Literal["ema", "batch"] = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        axis_name: Hashable | Sequence[Hashable] = None,
        eps: float = 1e-5,
        channelwise_affine: bool = True,
        momentum: float = 0.99,
        inference: bool = False,
        dtype: DTypeLike | None = None,
        mode: Literal["ema", "batch"] = "batch",
    ):
        if mode not in ("ema", "batch"):
            raise ValueError(
                f"`rx.nn.BatchNorm`: `mode` must be 'batch' or 'ema', but was {mode!r}."
            )
        if not 0 <= momentum < 1:
            raise ValueError(
                "`rx.nn.BatchNorm`: `momentum` is the fraction that the running "
                f"statistics keep, at least 0 and less than 1, but was {momentum!r}."
            )
        dtype = jnp.result_type(float) if dtype is None else dtype
        self.weight = jnp.ones(input_size, dtype) if channelwise_affine else None
        self.bias = jnp.zeros(input_size, dtype) if channelwise_affine else None
        self.mean = jnp.zeros(input_size, dtype)
        self.var = jnp.ones(input_size, dtype)
        self.count = jnp.array(0)
        self.axis_name = axis_name
        self.inference = inference
        self.input_size = input_size
        self.eps = eps
        self.channelwise_affine = channelwise_affine
        self.momentum = momentum
        self.mode = mode

    def __call__(
        self,
        x: Array,
        *,
        key: PRNGKeyArray | None = None,
        inference: bool | None = None,
    ) -> Array:
        """**Arguments:**

        - `x`: an array of shape `(input_size, *spatial)`, or `(batch, input_size, *spatial)`
            if there is no `axis_name`.
        - `key`: not used.
        - `inference`: overrides `self.inference`.

        **Returns:**

        An array of the same shape.
        """
        self._check(x)
        inference = self.inference if inference is None else inference
        mean, var = (self.mean[...], self.var[...]) if inference else self._train(x)
        along = lambda y: jnp.expand_dims(y, self._others(x))
        out = (x - along(mean)) / jnp.sqrt(along(var) + self.eps)
        if self.weight is None or self.bias is None:
            return out
        return out * along(self.weight[...]) + along(self.bias[...])

    def _train(self, x: Array) -> tuple[Array, Array]:
        """Writes the running statistics, and returns those to normalize by."""
        mean, var = self._statistics(x)
        count = self.count[...] + 1
        share = self._share(count, var.dtype)
        running_mean = (1 - share) * self.mean[...] + share * mean
        running_var = (1 - share) * self.var[...] + share * var
        self.count.value = count
        write_state(self.mean, running_mean)
        write_state(self.var, running_var)
        return (mean, var) if self.mode == "batch" else (running_mean, running_var)

    def _share(self, count: Array, dtype: Any) -> Array:
        """The weight of a batch in the running statistics: one for the first batch."""
        if self.momentum == 0:
            return jnp.ones((), dtype)
        if self.mode == "ema":
            return jnp.where(count == 1, 1, 1 - self.momentum).astype(dtype)
        # (1 - momentum) / (1 - momentum**count): the weighted mean of all batches so far.
        # `expm1`, because the difference of two numbers near 1 loses precision.
        log = math.log(self.momentum)
        share = math.expm1(log) / jnp.expm1(log * count.astype(jnp.float32))
        return jnp.where(count == 1, 1, share).astype(dtype)

    def _statistics(self, x: Array) -> tuple[Array, Array]:
        over = self._others(x)

        def average(y: Array) -> Array:
            y = jnp.mean(y, over, keepdims=True)
            return y if self.axis_name is None else jax.lax.pmean(y, self.axis_name)

        try:
            mean = average(x)
        except NameError as e:
            raise NameError(
                f"`rx.nn.BatchNorm`: there is no mapped axis named {self.axis_name!r} "
                "here. Call the layer inside `rx.filter_vmap(..., "
                f"axis_name={self.axis_name!r})`, or make it without `axis_name` and call "
                "it on a batch."
            ) from e
        # In a second pass, because `mean(x**2) - mean(x)**2` loses digits.
        var = average(jnp.square(jnp.abs(x - mean))).astype(mean.dtype)
        return jnp.squeeze(mean, over), jnp.squeeze(var, over)

    @property
    def _channels(self) -> int:
        """The channel axis of an input."""
        return 1 if self.axis_name is None else 0

    def _others(self, x: Array) -> tuple[int, ...]:
        return tuple(i for i in range(x.ndim) if i != self._channels)

    def _check(self, x: Array) -> None:
        if x.ndim <= self._channels or x.shape[self._channels] != self.input_size:
            one = "(input_size, ...)"
            axis, shape = (
                ("set", one)
                if self._channels == 0
                else ("not set", f"(batch, {one[1:]}")
            )
            raise ValueError(
                f"`rx.nn.BatchNorm`: the input has shape {x.shape}, but because "
                f"`axis_name` is {axis} it must have shape {shape}, with "
                f"input_size={self.input_size}. Without `axis_name` the layer is called on "
                "a batch; with it, on one example."
            )
