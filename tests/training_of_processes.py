"""What `test_multiprocess.py` trains, in one process and in two."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, Int

import refx_eqx as rx


class Linear(rx.Module):
    weight: rx.Param[Float[Array, "out in"]]
    bias: rx.Param[Float[Array, "out"]]
    mean: rx.BatchStat[Float[Array, "in"]]
    count: rx.Ref[Int[Array, ""]] = rx.field(collection="counts")

    def __call__(self, x: Array) -> Array:
        self.count.value += 1
        self.mean.value = 0.9 * self.mean.value + 0.1 * jnp.mean(x, 0)
        return (x - self.mean.value[None]) @ self.weight.value.T + self.bias.value[None]


def make() -> Linear:
    weight = jr.normal(jr.key(0), (8, 3))
    return Linear(weight, jnp.zeros(8), jnp.zeros(3), jnp.array(0))


def optimizer_of(model: Linear) -> rx.Optimizer:
    return rx.Optimizer(model, optax.sgd(1.0, momentum=0.5))


def loss(model: Linear, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((model(x) - y) ** 2)


def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    for _ in range(5):
        x = rng.normal(size=(16, 3)).astype(np.float32)
        yield x, np.tile(x.sum(1, keepdims=True), 8)
