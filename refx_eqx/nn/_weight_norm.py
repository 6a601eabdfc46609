"""`WeightNorm`: a weight given by a direction and a length."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._engine._carry import whole_number
from .._fields._collection import Param
from .._fields._module import Module
from ._stateless import with_params
from ._weights import weight_of, with_weight


class WeightNorm(Module):
    """As `equinox.nn.WeightNorm`: a layer whose weight is `g * weight / |weight|`.

    !!! Example

        ```python
        import jax
        import jax.numpy as jnp
        import refx_eqx as rx

        linear = rx.nn.Linear(3, 2, key=jax.random.key(0))
        normed = rx.nn.WeightNorm(linear)
        x = jnp.ones(3)
        assert jnp.allclose(normed(x), linear(x), atol=1e-6)  # at first nothing has changed

        linear.weight.value *= 7  # only the direction of the weight matters
        assert jnp.allclose(normed(x), linear(x) / 7 + linear.bias[...] * 6 / 7, atol=1e-6)
        ```

    **Arguments:**

    - `layer`: any layer, from this library or not. It is shared, and keeps its refs.
    - `weight_name`: the field of the layer that holds its weight.
    - `axis`: the length is taken over all axes except this one; `None` for all axes.

    **Raises:**

    - `ValueError`: if the layer has no such field, or its weight no such axis.
    - `TypeError`: if `axis` is not an integer.
    """

    layer: Any
    g: Param[Float[Array, "..."]]
    weight_name: str = eqx.field(static=True)
    axis: int | None = eqx.field(static=True)

    def __init__(
        self, layer: eqx.Module, weight_name: str = "weight", axis: int | None = 0
    ):
        weight = weight_of(layer, weight_name)
        if axis is not None:
            axis = whole_number(axis, "rx.nn.WeightNorm", "`axis`")
            if not -weight.ndim <= axis < weight.ndim:
                raise ValueError(
                    f"`rx.nn.WeightNorm`: `axis` is {axis}, but `{weight_name}` has shape "
                    f"{weight.shape}. Pass one of its axes, or `None` for all."
                )
        self.layer = with_params(layer)
        self.weight_name = weight_name
        self.axis = axis
        self.g = self._length(weight)

    def __call__(self, x: Array, *, key: PRNGKeyArray | None = None) -> Array:
        """**Arguments:**

        - `x`: the input of the layer.
        - `key`: not used.

        **Returns:**

        The output of the layer.
        """
        v = weight_of(self.layer, self.weight_name)
        weight = self.g[...] * v / self._length(v)
        return with_weight(self.layer, self.weight_name, weight)(x)

    def _length(self, v: Array) -> Array:
        over = [
            i for i in range(v.ndim) if self.axis is None or i != self.axis % v.ndim
        ]
        return jnp.sqrt(jnp.sum(jnp.square(jnp.abs(v)), over, keepdims=True))
