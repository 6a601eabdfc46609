"""The work to be done, in neutral terms: pure functions of lists of dicts of arrays.

A problem is a state (for each layer, its arrays by name) and a pure function of the state
and an input, which gives a result and the new values of what is to be written. Every
contender holds the state in its own way, and does exactly this work.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.random as jr


Layers = list[dict[str, jax.Array]]
Updates = dict[tuple[int, str], jax.Array]


@dataclasses.dataclass
class Problem:
    name: str
    make: Callable[[], Layers]
    work: Callable[[Layers, jax.Array], tuple[jax.Array, Updates]]
    x: jax.Array


def calls(n: int, written: str, shape: tuple[int, ...] = (1,)) -> Problem:
    """A call with `n` refs and next to no computation."""

    def make() -> Layers:
        return [
            {"weight": jnp.ones(shape), "bias": jnp.zeros(shape)} for _ in range(n // 2)
        ]

    def work(layers: Layers, x: jax.Array) -> tuple[jax.Array, Updates]:
        updates = {}
        if written == "one":
            updates[0, "weight"] = layers[0]["weight"] + x
        elif written == "all":
            for i, layer in enumerate(layers):
                for name, value in layer.items():
                    updates[i, name] = value + x
        return x + 1.0, updates

    return Problem(f"{n} refs, {written} written", make, work, jnp.float32(1.0))


def decode() -> Problem:
    """One step of a decoder with a key-value cache: the parameters are only read."""
    n_layers, width, length = 8, 32, 64

    def make() -> Layers:
        keys = jr.split(jr.key(0), n_layers)
        layers: Layers = [
            {
                **{
                    name: jr.normal(k, (width, width)) / width**0.5
                    for name, k in zip(
                        ("query", "key", "value", "out", "up", "down"), jr.split(key, 6)
                    )
                },
                "keys": jnp.zeros((length, width)),
                "values": jnp.zeros((length, width)),
            }
            for key in keys
        ]
        return [*layers, {"position": jnp.zeros((), jnp.int32)}]

    def work(layers: Layers, x: jax.Array) -> tuple[jax.Array, Updates]:
        *blocks, last = layers
        position = last["position"] % length
        updates: Updates = {(n_layers, "position"): last["position"] + 1}
        for i, block in enumerate(blocks):
            keys = block["keys"].at[position].set(block["key"] @ x)
            values = block["values"].at[position].set(block["value"] @ x)
            scores = keys @ (block["query"] @ x) / width**0.5
            scores = jnp.where(jnp.arange(length) <= position, scores, -jnp.inf)
            x = x + block["out"] @ (jax.nn.softmax(scores) @ values)
            x = x + block["down"] @ jax.nn.relu(block["up"] @ x)
            updates[i, "keys"], updates[i, "values"] = keys, values
        return x, updates

    return Problem("a decode step", make, work, jnp.ones(width) * 0.1)


@dataclasses.dataclass
class Training:
    """What is trained: the parameters, and the loss of them and a batch."""

    name: str
    params: Callable[[], Layers]
    loss: Callable[[Layers, jax.Array], jax.Array]
    x: jax.Array


def with_adam(training: Training) -> Problem:
    """A training step: the gradient of the loss, and Adam. Everything is written."""
    params, loss = training.params, training.loss

    def make() -> Layers:
        layers: Layers = [
            {
                f"{kind}{key}": value if kind == "" else jnp.zeros_like(value)
                for key, value in layer.items()
                for kind in ("", "mean_", "square_")
            }
            for layer in params()
        ]
        return [*layers, {"step": jnp.zeros((), jnp.int32)}]

    def work(layers: Layers, x: jax.Array) -> tuple[jax.Array, Updates]:
        *blocks, last = layers
        weights = [
            {k: v for k, v in block.items() if "mean_" + k in block} for block in blocks
        ]
        value, grads = jax.value_and_grad(loss)(weights, x)
        step = last["step"] + 1
        t = step.astype(jnp.float32)
        updates: Updates = {(len(blocks), "step"): step}
        for i, (block, grad) in enumerate(zip(blocks, grads)):
            for k, g in grad.items():
                mean = 0.9 * block["mean_" + k] + 0.1 * g
                square = 0.999 * block["square_" + k] + 0.001 * g**2
                scale = jnp.sqrt(square / (1 - 0.999**t)) + 1e-8
                updates[i, k] = block[k] - 1e-3 * (mean / (1 - 0.9**t)) / scale
                updates[i, "mean_" + k], updates[i, "square_" + k] = mean, square
        return value, updates

    return Problem(training.name, make, work, training.x)


def mlp() -> Training:
    sizes = [64, *[128] * 6, 10]

    def params() -> Layers:
        keys = jr.split(jr.key(0), len(sizes))
        return [
            {"weight": jr.normal(key, (a, b)) / a**0.5, "bias": jnp.zeros(b)}
            for key, a, b in zip(keys, sizes, sizes[1:])
        ]

    def loss(layers: Layers, x: jax.Array) -> jax.Array:
        for layer in layers:
            x = jax.nn.relu(x @ layer["weight"] + layer["bias"][None])
        return jnp.mean(x**2)

    return Training("training: MLP", params, loss, jr.normal(jr.key(1), (32, 64)))


def conv() -> Training:
    channels = [1, 8, 16, 16, 10]

    def params() -> Layers:
        keys = jr.split(jr.key(0), len(channels))
        return [
            {"kernel": jr.normal(key, (b, a, 3, 3)) / 3.0, "bias": jnp.zeros(b)}
            for key, a, b in zip(keys, channels, channels[1:])
        ]

    def loss(layers: Layers, x: jax.Array) -> jax.Array:
        for layer in layers:
            x = jax.lax.conv(x, layer["kernel"], (1, 1), "SAME")
            x = jax.nn.relu(x + layer["bias"][None, :, None, None])
        return jnp.mean(x**2)

    return Training(
        "training: convolutional", params, loss, jr.normal(jr.key(1), (8, 1, 8, 8))
    )


def transformer(n_layers: int = 4) -> Training:
    width = 64
    shapes = {
        "query": (width, width),
        "key": (width, width),
        "value": (width, width),
        "out": (width, width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }

    def params() -> Layers:
        return [
            {
                **{
                    name: jr.normal(key, shape) / shape[0] ** 0.5
                    for key, (name, shape) in zip(jr.split(k, 6), shapes.items())
                },
                "scale1": jnp.ones(width),
                "scale2": jnp.ones(width),
            }
            for k in jr.split(jr.key(0), n_layers)
        ]

    def normed(x: jax.Array, scale: jax.Array) -> jax.Array:
        mean_square = jnp.mean(x**2, axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(mean_square + 1e-6) * scale[None, None]

    def loss(layers: Layers, x: jax.Array) -> jax.Array:
        for p in layers:
            y = normed(x, p["scale1"])
            scores = jnp.einsum("bik,bjk->bij", y @ p["query"], y @ p["key"]) / 8.0
            x = x + (jax.nn.softmax(scores) @ (y @ p["value"])) @ p["out"]
            x = x + jax.nn.relu(normed(x, p["scale2"]) @ p["up"]) @ p["down"]
        return jnp.mean(x**2)

    return Training(
        "training: transformer", params, loss, jr.normal(jr.key(1), (4, 16, width))
    )
