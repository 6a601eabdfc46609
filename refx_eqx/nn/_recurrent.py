"""`GRUCell` and `LSTMCell`, which keep their state between calls."""

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from .._fields._collection import Cache
from .._fields._module import Module
from ._state import write_state
from ._stateless import with_params


class GRUCell(Module):
    """As `equinox.nn.GRUCell`, with its hidden state in a ref: it is called with just the
    input of the step.

    !!! Example

        ```python
        import jax
        import jax.numpy as jnp
        import refx_eqx as rx

        gru = rx.nn.GRUCell(3, 4, key=jax.random.key(0))
        xs = jnp.ones((10, 3))
        _, hs = rx.scan(lambda gru, x: (gru, gru(x)), gru, xs)  # a sequence
        assert hs.shape == (10, 4) and (gru.hidden.value == hs[-1]).all()
        h = gru(xs[0])  # goes on where the sequence has ended
        gru.reset()

        # A batch: a state for each element, and weights that all share.
        grus = rx.add_axis(gru, 8, "cache")
        step = rx.filter_vmap(
            lambda gru, x: gru(x), in_axes=(rx.axes(cache=0, default=None), 0)
        )
        assert step(grus, jnp.ones((8, 3))).shape == (8, 4)
        assert grus.hidden.shape == (8, 4) and grus.cell.bias is gru.cell.bias
        ```

    The weights are in `cell`, an `equinox.nn.GRUCell` with refs of collection `"params"`.
    The state is `hidden`, of collection `"cache"`. Gradients go through the steps inside
    one `filter_grad`; between calls of a training step the state is a constant.

    **Arguments:**

    - `input_size`: the length of an input.
    - `hidden_size`: the length of the state.
    - `use_bias`: whether to add biases.
    - `dtype`: the dtype of weights and state, which inputs of another dtype do not change;
        by default JAX's default float.
    - `key`: for the initial weights.
    """

    cell: eqx.nn.GRUCell
    hidden: Cache[Float[Array, "hidden_size"]]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        cell = eqx.nn.GRUCell(input_size, hidden_size, use_bias, dtype, key=key)
        self.cell = with_params(cell)
        self.hidden = jnp.zeros(hidden_size, cell.weight_hh.dtype)

    def __call__(self, input: Array, *, key: PRNGKeyArray | None = None) -> Array:
        """**Arguments:**

        - `input`: of shape `(input_size,)`.
        - `key`: not used.

        **Returns:**

        The new state, of shape `(hidden_size,)`, which is also in `hidden`.
        """
        write_state(self.hidden, self.cell(input, self.hidden.value))
        return self.hidden.value

    def reset(self) -> None:
        """Sets the state to zero, before another sequence."""
        self.hidden.value = jnp.zeros_like(self.hidden.value)


class LSTMCell(Module):
    """As `equinox.nn.LSTMCell`, with its hidden state in a ref: it is called with just the
    input of the step.

    !!! Example

        ```python
        import jax
        import jax.numpy as jnp
        import refx_eqx as rx

        lstm = rx.nn.LSTMCell(3, 4, key=jax.random.key(0))
        for x in jnp.ones((2, 3)):
            out = lstm(x)
        h, c = lstm.hidden.value
        assert (out == h).all()
        lstm.reset()
        ```

    It behaves like [`refx_eqx.nn.GRUCell`][]. The state is a pair `(h, c)` in one ref.

    **Arguments:**

    - `input_size`: the length of an input.
    - `hidden_size`: the length of each half of the state.
    - `use_bias`: whether to add a bias.
    - `dtype`: the dtype of weights and state, which inputs of another dtype do not change;
        by default JAX's default float.
    - `key`: for the initial weights.
    """

    cell: eqx.nn.LSTMCell
    hidden: Cache[tuple[Float[Array, "hidden_size"], Float[Array, "hidden_size"]]]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        cell = eqx.nn.LSTMCell(input_size, hidden_size, use_bias, dtype, key=key)
        self.cell = with_params(cell)
        # One ref for the pair, because the two are always written together.
        zeros = jnp.zeros(hidden_size, cell.weight_hh.dtype)
        self.hidden = (zeros, zeros)

    def __call__(self, input: Array, *, key: PRNGKeyArray | None = None) -> Array:
        """**Arguments:**

        - `input`: of shape `(input_size,)`.
        - `key`: not used.

        **Returns:**

        The output `h`, of shape `(hidden_size,)`. The new `(h, c)` is in `hidden`.
        """
        write_state(self.hidden, self.cell(input, self.hidden.value))
        return self.hidden.value[0]

    def reset(self) -> None:
        """Sets the state to zero, before another sequence."""
        self.hidden.value = jtu.tree_map(jnp.zeros_like, self.hidden.value)
