"""Fine-tunes a small network by LoRA, and keeps an exponential moving average of it.

    python examples/ema_and_lora.py --steps 400 --seed 0

A network learns scikit-learn's digits. Then it is adapted to the mirrored digits, by
low-rank changes of its weights. What to look at:

- `Lora`: a collection of one's own is one line, and everything that takes a filter knows it.
- The adapted network holds the *same* refs as the one it is made of. Nothing is copied.
- The average is a clone: the same structure, with refs of its own.
- `rx.mutable` makes sure that nothing but the adapters is written.
"""

import argparse
from typing import Annotated, Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import refx_eqx as rx


T = TypeVar("T")
Lora = Annotated[rx.Ref[T], rx.Collection("lora")]


class Linear(rx.Module):
    weight: rx.Param[Float[Array, "out in"]]
    bias: rx.Param[Float[Array, " out"]]

    def __init__(self, n_in: int, n_out: int, *, key: PRNGKeyArray):
        self.weight = jr.normal(key, (n_out, n_in)) / jnp.sqrt(n_in)
        self.bias = jnp.zeros(n_out)

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " out"]:
        return self.weight.value @ x + self.bias.value


class Adapted(rx.Module):
    """A linear layer, and a low-rank change of it."""

    base: Linear
    down: Lora[Float[Array, "rank in"]]
    up: Lora[Float[Array, "out rank"]]

    def __init__(self, base: Linear, rank: int, *, key: PRNGKeyArray):
        n_out, n_in = base.weight.shape
        self.base = base
        self.down = jr.normal(key, (rank, n_in)) / jnp.sqrt(n_in)
        self.up = jnp.zeros((n_out, rank))  # at first there is no change

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " out"]:
        return self.base(x) + self.up.value @ (self.down.value @ x)


class Network(rx.Module):
    layers: list[Any]  # `Linear` or `Adapted`

    def __init__(self, *, key: PRNGKeyArray):
        sizes = (64, 128, 128, 10)
        keys = jr.split(key, 3)
        pairs = zip(sizes[:-1], sizes[1:], keys)
        self.layers = [Linear(n_in, n_out, key=k) for n_in, n_out, k in pairs]

    def __call__(self, x: Float[Array, " 64"]) -> Float[Array, " 10"]:
        *hidden, last = self.layers
        for layer in hidden:
            x = jax.nn.relu(layer(x))
        return last(x)


class Data(NamedTuple):
    images: Float[Array, "batch 64"]
    labels: Int[Array, " batch"]


def load_data() -> tuple[Data, Data]:
    """The digits, and the digits in a mirror."""
    pixels, digits = load_digits(return_X_y=True)
    images = jnp.asarray(pixels, jnp.float32).reshape(-1, 8, 8) / 16
    labels = jnp.asarray(digits, jnp.int32)
    mirrored = jnp.flip(images, axis=2)
    return Data(images.reshape(-1, 64), labels), Data(mirrored.reshape(-1, 64), labels)


def split(data: Data) -> tuple[Data, Data]:
    """The data to train on, and those to test with, of other writers."""
    return Data(*(x[:1300] for x in data)), Data(*(x[1300:] for x in data))


def loss_fn(model: Network, data: Data) -> Float[Array, ""]:
    logits = jax.vmap(model)(data.images)  # refs may be read under a plain `jax.vmap`
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, data.labels)
    return jnp.mean(losses)


@rx.filter_jit
def accuracy(model: Network, data: Data) -> Float[Array, ""]:
    guesses = jnp.argmax(jax.vmap(model)(data.images), axis=1)
    return jnp.mean(guesses == data.labels)


def train(
    model: Network, data: Data, wrt: Any, *, steps: int, key: PRNGKeyArray
) -> Network:
    """Trains what `wrt` selects, in place. Returns the average of the model."""
    average = rx.clone(model)
    tx = optax.adamw(optax.cosine_decay_schedule(1e-2, steps))
    optimizer = rx.Optimizer(model, tx, wrt=wrt)

    # `step` closes over `model`, `average` and `optimizer`. Their refs are carried as those
    # of arguments are: what is written is there after the call, and no value is baked in.
    @rx.filter_jit(donate="refs")
    def step(batch: Data) -> None:
        optimizer.update(model, rx.filter_grad(loss_fn, wrt=wrt)(model, batch))
        new = rx.state_dict(model, wrt)
        old = rx.state_dict(average, wrt)
        moved = jax.tree.map(lambda a, x: a + 0.05 * (x - a), old, new)
        rx.load_state_dict(average, moved, wrt)

    for step_key in jr.split(key, steps):
        rows = jr.randint(step_key, (128,), 0, len(data.images))
        step(Data(data.images[rows], data.labels[rows]))
    return average


def main() -> None:
    parser = argparse.ArgumentParser(description="LoRA, and a moving average.")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    plain, mirrored = load_data()
    train_plain, test_plain = split(plain)
    train_mirrored, test_mirrored = split(mirrored)
    keys = jr.split(jr.key(args.seed), 6)
    steps = args.steps

    model = Network(key=keys[0])
    average = train(model, train_plain, "params", steps=steps, key=keys[1])
    before = rx.snapshot(model)  # plain values: what comes later does not change them

    adapters = [Adapted(x, 8, key=k) for x, k in zip(model.layers, keys[2:5])]
    adapted = eqx.tree_at(lambda m: m.layers, model, adapters)
    assert adapted.layers[0].base.weight is model.layers[0].weight
    with rx.mutable(rx.collection("lora", "opt_state")):
        adapted_average = train(
            adapted, train_mirrored, "lora", steps=steps, key=keys[5]
        )
    assert eqx.tree_equal(rx.snapshot(model), before)

    table = Table("network", "trained", title="Accuracy on the test digits")
    table.add_column("plain", justify="right")
    table.add_column("mirrored", justify="right")
    for name, network, wrt in (
        ("trained on plain", model, "params"),
        ("  its average", average, "params"),
        ("adapted to mirrored", adapted, "lora"),
        ("  its average", adapted_average, "lora"),
    ):
        numbers = f"{rx.count(network, wrt):,} {wrt}"
        both = (f"{accuracy(network, x):.1%}" for x in (test_plain, test_mirrored))
        table.add_row(name, numbers, *both)
    Console().print(table)


if __name__ == "__main__":
    main()
