"""The models that the tests of states and files save and load."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import refx_eqx as rx


class Linear(rx.Module):
    weight: rx.Param[Float[Array, "n"]]
    uses: rx.Ref[Int[Array, ""]] = rx.field(collection="counts")

    def __init__(self, value=0.0):
        self.weight = jnp.full(2, value, jnp.float32)
        self.uses = jnp.array(int(value), jnp.int32)


class Model(rx.Module):
    encoder: Linear
    layers: list[Linear]
    name: str = "a model"


def make(value=0.0):
    return Model(Linear(value), [Linear(value + 1), Linear(value + 2)])


def make_tied(value=0.0):
    model = make(value)
    return eqx.tree_at(lambda m: m.layers[1].weight, model, model.encoder.weight)
