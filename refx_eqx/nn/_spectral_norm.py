"""`SpectralNorm`: a weight whose largest singular value is one."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._engine._carry import whole_number
from .._fields._collection import BatchStat
from .._fields._module import Module
from ._state import write_state
from ._stateless import with_params
from ._weights import weight_of, with_weight


class SpectralNorm(Module):
    """As `equinox.nn.SpectralNorm`, with its singular vectors in refs: there is no `State` to
    pass in and out.

    !!! Example

        ```python
        import jax
        import jax.numpy as jnp
        import refx_eqx as rx

        k1, k2 = jax.random.split(jax.random.key(0))
        linear = rx.nn.Linear(3, 2, use_bias=False, key=k1)
        normed = rx.nn.SpectralNorm(linear, key=k2)
        for _ in range(10):
            normed(jnp.ones(3))  # each call in training mode improves the estimate
        weight = linear.weight[...] / jnp.linalg.norm(linear.weight[...], ord=2)
        assert jnp.allclose(normed(jnp.ones(3)), weight @ jnp.ones(3), atol=1e-5)
        ```

    In training mode each call makes steps of power iteration, from the vectors `u` and `v`
    of the previous call; in inference mode it uses these unchanged.

    **Arguments:**

    - `layer`: any layer, from this library or not. It is shared, and keeps its refs.
    - `weight_name`: the field of the layer that holds its weight, of two dimensions or
        more. It is reshaped to a matrix with the rows of its first axis.
    - `num_power_iterations`: the number of steps per call.
    - `eps`: the smallest length that a vector is divided by.
    - `inference`: the mode. `equinox.nn.inference_mode` sets it.
    - `key`: for the initial vectors.

    **Raises:**

    - `ValueError`: if the layer has no such field, if its weight has one dimension, or if
        the number of steps is negative.
    - `TypeError`: if the number of steps is not an integer.
    """

    layer: Any
    u: BatchStat[Float[Array, "rows"]]
    v: BatchStat[Float[Array, "columns"]]
    weight_name: str = eqx.field(static=True)
    num_power_iterations: int = eqx.field(static=True)
    eps: float = eqx.field(static=True)
    inference: bool

    def __init__(
        self,
        layer: eqx.Module,
        weight_name: str = "weight",
        num_power_iterations: int = 1,
        eps: float = 1e-12,
        inference: bool = False,
        *,
        key: PRNGKeyArray,
    ):
        weight = weight_of(layer, weight_name)
        if weight.ndim < 2:
            raise ValueError(
                f"`rx.nn.SpectralNorm`: `{weight_name}` has shape {weight.shape}, but must "
                "have two dimensions or more to have singular values."
            )
        self.layer = with_params(layer)
        self.weight_name = weight_name
        self.num_power_iterations = whole_number(
            num_power_iterations, "rx.nn.SpectralNorm", "`num_power_iterations`", 0
        )
        self.eps = eps
        self.inference = inference
        matrix = weight.reshape(weight.shape[0], -1)
        key_u, key_v = jr.split(key)
        u = jr.normal(key_u, matrix.shape[:1], matrix.dtype)
        v = jr.normal(key_v, matrix.shape[1:], matrix.dtype)
        # So that even the first calls have a good estimate.
        self.u, self.v = self._iterate(matrix, u, v, 15)

    def __call__(
        self,
        x: Array,
        *,
        key: PRNGKeyArray | None = None,
        inference: bool | None = None,
    ) -> Array:
        """**Arguments:**

        - `x`: the input of the layer.
        - `key`: not used.
        - `inference`: overrides `self.inference`.

        **Returns:**

        The output of the layer.
        """
        # As in Equinox, a convolution is taken as a matrix with one row per output channel.
        weight = weight_of(self.layer, self.weight_name)
        matrix = weight.reshape(weight.shape[0], -1)
        u, v = self.u[...], self.v[...]
        if not (self.inference if inference is None else inference):
            # Derivatives treat the vectors as constants.
            fixed = jax.lax.stop_gradient(matrix)
            u, v = self._iterate(fixed, u, v, self.num_power_iterations)
            write_state(self.u, u)
            write_state(self.v, v)
        normed = weight / (u @ matrix @ v)
        return with_weight(self.layer, self.weight_name, normed)(x)

    def _iterate(
        self, matrix: Array, u: Array, v: Array, n: int
    ) -> tuple[Array, Array]:
        for _ in range(n):
            u = self._direction(matrix @ v)
            v = self._direction(matrix.T @ u)
        return u, v

    def _direction(self, x: Array) -> Array:
        return x / jnp.maximum(self.eps, jnp.sqrt(jnp.sum(x**2)))
