"""A training step needs the same memory on each device, and the same collectives, as the
hand-written JAX program."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxtyping import Array, Float

import refx_eqx as rx


if len(jax.devices()) < 8:
    pytest.skip("needs 8 devices", allow_module_level=True)

MESH = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
DEPTH, DIM, BATCH = 4, 128, 64


def put(x: jax.Array, *spec: Any) -> jax.Array:
    return jax.device_put(x, NamedSharding(MESH, P(*spec)))


class Layer(rx.Module):
    up: rx.Param[Float[Array, "hidden dim"]]
    down: rx.Param[Float[Array, "dim hidden"]]

    def __init__(self, key):
        up, down = jr.split(key)
        self.up = jr.normal(up, (4 * DIM, DIM)) / DIM**0.5
        self.down = jr.normal(down, (DIM, 4 * DIM)) / DIM**0.5

    def __call__(self, x):
        return x + jax.nn.gelu(x @ self.up.value.T) @ self.down.value.T


RULES = rx.axis_rules(hidden="tensor", dim="fsdp")


def make(rules: rx.axis_rules = RULES) -> Layer:
    layers = rx.filter_vmap(Layer)(jr.split(jr.key(0), DEPTH))
    rx.filter_shard(layers, rules.shardings(layers, MESH))
    return layers


def by_hand(layers: Layer) -> dict[str, jax.Array]:
    return {"up": layers.up.value, "down": layers.down.value}


def forward(layers, x, is_rematerialized=False):
    step = lambda x, layer: (layer(x), None)
    step = rx.filter_checkpoint(step) if is_rematerialized else step
    return rx.scan(step, x, layers)[0]


def forward_by_hand(params, x, is_rematerialized=False):
    def step(x, layer):
        return x + jax.nn.gelu(x @ layer["up"].T) @ layer["down"].T, None

    step = jax.checkpoint(step) if is_rematerialized else step
    return jax.lax.scan(step, x, params)[0]


def loss(layers, x, is_rematerialized=False):
    return jnp.mean(forward(layers, x, is_rematerialized) ** 2)


def loss_by_hand(params, x, is_rematerialized=False):
    return jnp.mean(forward_by_hand(params, x, is_rematerialized) ** 2)


def peak(compiled: Any) -> int:
    """Bytes on each device, with a donated buffer counted once."""
    stats = compiled.memory_analysis()
    return (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        + stats.temp_size_in_bytes
        - stats.alias_size_in_bytes
    )


COLLECTIVE = re.compile(
    r"= (?P<types>[^=]*?) (?P<kind>all-gather|all-reduce|all-to-all|reduce-scatter|"
    r"collective-permute)(?:-start)?\("
)
SIZES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1}


def collectives(compiled: Any) -> dict[str, int]:
    """The bytes that each kind of collective makes."""
    found: dict[str, int] = {}
    for types, kind in COLLECTIVE.findall(compiled.as_text()):
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", types):
            size = math.prod(int(n) for n in shape.split(",") if n) * SIZES[dtype]
            found[kind] = found.get(kind, 0) + size
    return found


def assert_as_by_hand(compiled: Any, compiled_by_hand: Any) -> None:
    assert collectives(compiled) == collectives(compiled_by_hand)
    assert peak(compiled) <= 1.03 * peak(compiled_by_hand)


def batch(*shape: int) -> jax.Array:
    spec = (*[None] * (len(shape) - 2), "fsdp")
    return put(jr.normal(jr.key(1), shape), *spec)


# Gradient accumulation.


def accumulated(layers, optimizer, xs):
    def add(total, x):
        grads = rx.filter_grad(loss, wrt="params")(layers, x)
        return jax.tree.map(jnp.add, total, grads), None

    zeros = jax.tree.map(jnp.zeros_like, rx.deref(layers))
    total, _ = rx.scan(add, zeros, xs)
    optimizer.update(layers, jax.tree.map(lambda g: g / len(xs), total))


def test_gradients_accumulated_by_scan():
    layers, xs = make(), batch(8, BATCH, DIM)
    tx = optax.sgd(0.1, momentum=0.9)
    optimizer = rx.Optimizer(layers, tx)
    step = rx.filter_jit(accumulated, donate="refs")

    def step_by_hand(params, state, xs):
        def add(total, x):
            return jax.tree.map(jnp.add, total, jax.grad(loss_by_hand)(params, x)), None

        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), xs)
        grads = jax.tree.map(lambda g: g / len(xs), total)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, by_hand(layers))
    state = tx.init(params)
    jitted = jax.jit(step_by_hand, donate_argnums=(0, 1))
    assert_as_by_hand(
        step.lower(layers, optimizer, xs).compile(),
        jitted.lower(params, state, xs).compile(),
    )
    step(layers, optimizer, xs)
    params, _ = jitted(params, state, xs)
    np.testing.assert_allclose(layers.up.value, params["up"], rtol=1e-5, atol=1e-6)


# Parameters in bfloat16, with float32 masters.


def cast_down(layers):
    return jax.tree.map(
        lambda ref: rx.Ref(ref.value.astype(jnp.bfloat16), "low"), layers
    )


def mixed(layers, low, optimizer, x):
    grads = rx.filter_grad(loss, wrt="low")(low, x)
    grads = [g.astype(jnp.float32) for g in jax.tree.leaves(grads)]
    of_masters = jax.tree.structure(rx.deref(layers))
    optimizer.update(layers, of_masters.unflatten(grads))

    def write(low, master):
        low.value = master.value.astype(low.dtype)

    jax.tree.map(write, low, layers)


def test_bfloat16_with_masters():
    layers, x = make(), batch(BATCH, DIM).astype(jnp.bfloat16)
    tx = optax.sgd(0.1, momentum=0.9)
    optimizer, low = rx.Optimizer(layers, tx), cast_down(layers)
    step = rx.filter_jit(mixed, donate="refs")

    def step_by_hand(masters, low, state, x):
        grads = jax.grad(loss_by_hand)(low, x)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        updates, state = tx.update(grads, state)
        masters = optax.apply_updates(masters, updates)
        low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), masters)
        return masters, low, state

    masters = jax.tree.map(jnp.copy, by_hand(layers))
    lows = jax.tree.map(lambda x: x.astype(jnp.bfloat16), masters)
    state = tx.init(masters)
    jitted = jax.jit(step_by_hand, donate_argnums=(0, 1, 2))
    assert_as_by_hand(
        step.lower(layers, low, optimizer, x).compile(),
        jitted.lower(masters, lows, state, x).compile(),
    )
    step(layers, low, optimizer, x)
    masters, lows, _ = jitted(masters, lows, state, x)
    np.testing.assert_allclose(layers.up.value, masters["up"], rtol=1e-5, atol=1e-6)
    assert low.up.dtype == jnp.bfloat16
    assert low.up.value.sharding == layers.up.value.sharding


# Ways to split the work.


SPLITS = {
    "data parallel": rx.axis_rules(),
    "FSDP": rx.axis_rules(dim="fsdp"),
    "tensor parallel": rx.axis_rules(hidden="tensor"),
    "both": RULES,
}


@pytest.mark.parametrize("name", SPLITS)
def test_the_split_of_the_work_costs_the_same_collectives(name):
    layers, x = make(SPLITS[name]), batch(BATCH, DIM)
    tx = optax.adam(1e-3)
    optimizer = rx.Optimizer(layers, tx)

    @rx.filter_jit(donate="refs")
    def step(layers, optimizer, x):
        value, grads = rx.filter_value_and_grad(loss, wrt="params")(layers, x)
        optimizer.update(layers, grads)
        return value

    def step_by_hand(params, state, x):
        value, grads = jax.value_and_grad(loss_by_hand)(params, x)
        updates, state = tx.update(grads, state)
        params = optax.apply_updates(params, updates)
        # As the library does it: what is written stays where it was.
        keep = jax.lax.with_sharding_constraint
        return value, jax.tree.map(keep, params, places), state

    params = by_hand(layers)
    places = jax.tree.map(lambda x: x.sharding, params)
    with jax.numpy_dtype_promotion("standard"):
        compiled = step.lower(layers, optimizer, x).compile()
        jitted = jax.jit(step_by_hand, donate_argnums=(0, 1))
        by_jax = jitted.lower(params, tx.init(params), x).compile()
    assert_as_by_hand(compiled, by_jax)
    assert collectives(compiled)


# Rematerialization, and donation.


@pytest.mark.parametrize("is_rematerialized", [False, True])
def test_a_scan_over_layers(is_rematerialized):
    layers, x = make(), batch(BATCH, DIM)

    @rx.filter_jit(donate="refs")
    def step(layers, x):
        grads = rx.filter_grad(loss, wrt="params")(layers, x, is_rematerialized)
        rx.apply_updates(layers, jax.tree.map(lambda g: -0.1 * g, grads))

    def step_by_hand(params, x):
        grads = jax.grad(loss_by_hand)(params, x, is_rematerialized)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    jitted = jax.jit(step_by_hand, donate_argnums=0)
    compiled = step.lower(layers, x).compile()
    assert_as_by_hand(compiled, jitted.lower(by_hand(layers), x).compile())
    if is_rematerialized:
        plain = rx.filter_jit(rx.filter_grad(loss, wrt="params"))
        less = plain.lower(layers, x).compile().memory_analysis().temp_size_in_bytes
        assert compiled.memory_analysis().temp_size_in_bytes < 0.8 * less


def test_all_of_a_sharded_ref_that_is_overwritten_is_donated():
    layers, x = make(), batch(BATCH, DIM)

    @rx.filter_jit(donate="refs")
    def step(layers, x):
        grads = rx.filter_grad(loss, wrt="params")(layers, x)
        rx.apply_updates(layers, jax.tree.map(lambda g: -0.1 * g, grads))

    of_device = [x.addressable_shards[0].data.nbytes for x in by_hand(layers).values()]
    stats = step.lower(layers, x).compile().memory_analysis()
    assert stats.alias_size_in_bytes == sum(of_device)
    # No more than the table of the results comes on top.
    assert stats.output_size_in_bytes - stats.alias_size_in_bytes < 100
