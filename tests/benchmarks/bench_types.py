"""What the checks of declared types cost: run it as a script.

Prints, with the checks on and off: the time to make a module of 100 layers against the same
of plain Equinox, the time to trace a training step, and the time of a compiled step.
"""

import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

import refx_eqx as rx


N_LAYERS = 100


class PlainLayer(eqx.Module):
    weight: Float[Array, "out in"]
    bias: Float[Array, "out"]

    def __init__(self, key):
        self.weight = jr.normal(key, (3, 3))
        self.bias = jnp.zeros(3)


class Layer(rx.Module):
    weight: rx.Param[Float[Array, "out in"]]
    bias: rx.Param[Float[Array, "out"]]

    def __init__(self, key):
        self.weight = jr.normal(key, (3, 3))
        self.bias = jnp.zeros(3)


def best(*fns, repeats=15):
    """The least time of each, in seconds of the processor: taken in turns, so that what
    else runs on the machine disturbs all of them alike."""
    times = [[] for _ in fns]
    for fn in fns:
        fn()
    for _ in range(repeats):
        for fn, mine in zip(fns, times):
            start = time.process_time()
            fn()
            mine.append(time.process_time() - start)
    return [min(mine) for mine in times]


def unchecked(fn):
    def run():
        with rx.config(check_types=False):
            fn()

    return run


def construction(keys):
    make = lambda: [Layer(key) for key in keys]
    plain, on, off = best(
        lambda: [PlainLayer(key) for key in keys], make, unchecked(make)
    )
    print(f"construction of {N_LAYERS} layers: eqx.Module {plain * 1e3:.2f} ms")
    print(f"  rx.Module, checks on  {on * 1e3:.2f} ms, {on / plain:.2f}x")
    print(f"  rx.Module, checks off {off * 1e3:.2f} ms, {off / plain:.2f}x")


def step(layers, x):
    for layer in layers:
        x = jnp.tanh(layer.weight.value @ x + layer.bias.value)
        layer.weight.value = layer.weight.value * 0.99
        layer.bias.value = layer.bias.value * 0.99
    return jnp.sum(x)


def tracing(layers):
    x = jnp.ones(3)
    trace = lambda: rx.filter_eval_shape(step, layers, x)
    on, off = best(trace, unchecked(trace))
    print(f"tracing a step with {2 * N_LAYERS} writes: {on / off:.3f}x of checks off")


def compiled(layers):
    x = jnp.ones(3)
    jitted = rx.filter_jit(step)
    run = lambda: [jax.block_until_ready(jitted(layers, x)) for _ in range(20)]
    on, off = best(run, unchecked(run))
    print(f"a compiled step: {on / off:.3f}x of checks off")


if __name__ == "__main__":
    keys = jr.split(jr.key(0), N_LAYERS)
    construction(list(keys))
    layers = [Layer(key) for key in keys]
    tracing(layers)
    compiled(layers)
