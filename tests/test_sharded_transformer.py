"""A transformer on a mesh of 8 simulated devices: the same as on one, with the collectives
of the hand-written program."""

import math
import re
from collections import Counter
from typing import Any

import equinox as eqx
import jax
import jax.export
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxtyping import Array, Float

import refx_eqx as rx


pytestmark = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 devices")

VOCAB, EMBED, HEADS, FFN, DEPTH, LENGTH, BATCH = 32, 16, 4, 64, 2, 8, 8
AXES = ("fsdp", "tensor")


@pytest.fixture(autouse=True)
def _settings():
    # Optax relies on standard promotion. Without traces that are kept, this takes minutes.
    with jax.numpy_dtype_promotion("standard"), jax.check_tracer_leaks(False):
        yield


def mesh_of(*sizes: int) -> Any:
    devices = np.array(jax.devices()[: math.prod(sizes)]).reshape(sizes)
    return jax.sharding.Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 2)


def normal(key, *shape):
    return jr.normal(key, shape) / shape[-1] ** 0.5


def normalized(x, scale):
    return (
        scale[None, None]
        * x
        * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    )


def attention(q, k, v):  # each: (batch, length, heads, dim)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    mask = jnp.tril(jnp.ones(logits.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(mask[None, None], logits, -1e9))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


class FeedForward(rx.Module):
    up: rx.Param[Float[Array, "ffn embed"]]
    down: rx.Param[Float[Array, "embed ffn"]]

    def __init__(self, key):
        self.up = normal(key, FFN, EMBED)
        self.down = normal(key, EMBED, FFN)

    def __call__(self, x):
        return jax.nn.gelu(x @ self.up.value.T) @ self.down.value.T


class Block(rx.Module):
    qkv: rx.Param[Float[Array, "3 heads head embed"]]
    out: rx.Param[Float[Array, "embed heads head"]]
    scale: rx.Param[Float[Array, "embed"]]

    def __init__(self, key):
        self.qkv = normal(key, 3, HEADS, EMBED // HEADS, EMBED)
        self.out = normal(key, EMBED, HEADS, EMBED // HEADS)
        self.scale = jnp.ones(EMBED)

    def __call__(self, x, feed_forward):
        h = normalized(x, self.scale.value)
        q, k, v = jnp.einsum("bte,nhde->nbthd", h, self.qkv.value)
        x = x + jnp.einsum("bthd,ehd->bte", attention(q, k, v), self.out.value)
        return x + feed_forward(x)


class Transformer(rx.Module):
    table: rx.Param[Float[Array, "vocab embed"]]
    blocks: rx.Batched[Block, "depth"]
    feed_forward: FeedForward  # one for all blocks

    def __init__(self, key):
        self.table = normal(key, VOCAB, EMBED)
        self.blocks = rx.filter_vmap(Block)(jr.split(key, DEPTH))
        self.feed_forward = FeedForward(key)

    def __call__(self, tokens):
        def step(x, block):
            return block(x, self.feed_forward), None

        x, _ = rx.scan(step, self.table.value[tokens], self.blocks)
        return x @ self.table.value.T


def cross_entropy(logits, tokens):
    logits, targets = logits[:, :-1], tokens[:, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def loss(model, tokens):
    return cross_entropy(model(tokens), tokens)


TX = optax.adam(1e-2)


def make(key):
    model = Transformer(key)
    return model, rx.Optimizer(model, TX)


def train(model, optimizer, tokens):
    value, grads = rx.filter_value_and_grad(loss, wrt="params")(model, tokens)
    optimizer.update(model, grads)
    return value


def by_hand(params, tokens):
    def step(x, block):
        h = normalized(x, block["scale"])
        q, k, v = jnp.einsum("bte,nhde->nbthd", h, block["qkv"])
        x = x + jnp.einsum("bthd,ehd->bte", attention(q, k, v), block["out"])
        return x + jax.nn.gelu(x @ params["up"].T) @ params["down"].T, None

    x, _ = jax.lax.scan(step, params["table"][tokens], params["blocks"])
    return cross_entropy(x @ params["table"].T, tokens)


def train_by_hand(params, state, tokens):
    value, grads = jax.value_and_grad(by_hand)(params, tokens)
    updates, state = TX.update(grads, state)
    return value, optax.apply_updates(params, updates), state


RULES = {
    "data parallel": rx.axis_rules(),
    "FSDP": rx.axis_rules(embed=AXES),
    "tensor parallel": rx.axis_rules(ffn="tensor", heads="tensor"),
    "both": rx.axis_rules(ffn="tensor", heads="tensor", embed="fsdp"),
}


def batch_of(mesh, rules) -> Any:
    tokens = jr.randint(jr.key(1), (BATCH, LENGTH), 0, VOCAB)
    axes = "fsdp" if "ffn" in rules.by_axis else AXES
    return jax.device_put(tokens, NamedSharding(mesh, P(axes)))


def made(mesh, rules) -> Any:
    with jax.set_mesh(mesh):
        return rx.filter_jit(make, out_shardings=rules)(jr.key(0))


@pytest.fixture(scope="module")
def losses():
    """Of one device."""
    with jax.numpy_dtype_promotion("standard"), jax.check_tracer_leaks(False):
        model, optimizer = made(mesh_of(1, 1), RULES["both"])
        tokens = batch_of(mesh_of(1, 1), RULES["both"])
        step = rx.filter_jit(train)
        return [float(step(model, optimizer, tokens)) for _ in range(4)]


COLLECTIVE = re.compile(
    r"= (?P<types>[^=]*?) (?P<kind>all-gather|all-reduce|all-to-all|reduce-scatter|"
    r"collective-permute)(?:-start)?\("
)
SIZES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1}


def collectives(compiled: Any) -> Counter[tuple[str, int]]:
    """How often there is a collective of this kind, and this many bytes."""
    found: Counter[tuple[str, int]] = Counter()
    for types, kind in COLLECTIVE.findall(compiled.as_text()):
        n = sum(
            math.prod(int(n) for n in shape.split(",") if n) * SIZES[dtype]
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", types)
        )
        found[kind, n] += 1
    return found


def mesh_in(model: Transformer) -> Any:
    sharding: Any = model.table.value.sharding
    return sharding.mesh


def compiled_by_hand(model: Transformer, tokens: Any) -> Any:
    """The same step with the same weights at the same places."""
    blocks, feed_forward = model.blocks, model.feed_forward
    params = {
        "table": model.table.value,
        "blocks": {
            "qkv": blocks.qkv.value,
            "out": blocks.out.value,
            "scale": blocks.scale.value,
        },
        "up": feed_forward.up.value,
        "down": feed_forward.down.value,
    }
    of_params = jax.tree.map(lambda x: x.sharding, params)
    state: Any = TX.init(params)
    adam, empty = state
    counter = NamedSharding(mesh_in(model), P())
    of_state = type(adam)(counter, of_params, of_params), empty
    step = jax.jit(train_by_hand, out_shardings=(None, of_params, of_state))
    return step.lower(params, jax.device_put(state, of_state), tokens).compile()


@pytest.mark.parametrize("name", RULES)
def test_other_rules_give_the_same_losses_and_the_collectives_by_hand(name, losses):
    mesh, rules = mesh_of(2, 4), RULES[name]
    model, optimizer = made(mesh, rules)
    tokens = batch_of(mesh, rules)
    places = [x.sharding for x in rx.values((model, optimizer))]
    if name == "both":
        moment = optimizer.opt_state[0].mu["blocks.out"].value
        assert model.blocks.out.value.sharding.spec == P(None, "fsdp", "tensor")
        assert moment.sharding.spec == P(None, "fsdp", "tensor")
        assert model.feed_forward.up.value.sharding.spec == P("tensor", "fsdp")
    step = rx.filter_jit(train).lower(model, optimizer, tokens).compile()
    by_hand = compiled_by_hand(model, tokens)
    found, expected = collectives(step), collectives(by_hand)
    assert expected  # something is exchanged
    assert found == expected  # in kind, size and number
    memory, memory_by_hand = step.memory_analysis(), by_hand.memory_analysis()
    assert memory.temp_size_in_bytes <= 1.03 * memory_by_hand.temp_size_in_bytes
    values = [float(step(model, optimizer, tokens)) for _ in range(4)]
    np.testing.assert_allclose(values, losses, rtol=1e-5)
    assert [x.sharding for x in rx.values((model, optimizer))] == places


def test_a_step_is_compiled_ahead_of_time_and_its_state_goes_to_other_meshes(
    losses, tmp_path
):
    mesh, rules = mesh_of(2, 4), RULES["both"]
    model, optimizer = made(mesh, rules)
    tokens = batch_of(mesh, rules)
    step = rx.filter_jit(train, donate="refs")
    compiled = step.lower(model, optimizer, tokens).compile()
    found = [float(compiled(model, optimizer, tokens)) for _ in range(2)]
    np.testing.assert_allclose(found, losses[:2], rtol=1e-5)
    np.savez(tmp_path / "state.npz", **rx.state_dict((model, optimizer)))
    for sizes in ((2, 2), (1, 1)):
        mesh = mesh_of(*sizes)
        other = rx.filter_eval_shape(make, jr.key(0))
        rx.filter_shard(other, rules.shardings(other, mesh))
        with np.load(tmp_path / "state.npz") as state:
            rx.load_state_dict(other, state)
        assert mesh_in(other[0]).size == math.prod(sizes)
        tokens = batch_of(mesh, rules)
        found = [float(rx.filter_jit(train)(*other, tokens)) for _ in range(2)]
        np.testing.assert_allclose(found, losses[2:], rtol=1e-5)


def test_a_sharded_step_is_exported(losses):
    mesh, rules = mesh_of(2, 4), RULES["both"]
    model, optimizer = made(mesh, rules)
    args = rx.deref((model, optimizer, batch_of(mesh, rules)))
    arrays, rest = eqx.partition(args, eqx.is_array)
    leaves, treedef = jax.tree.flatten(arrays)

    def flat(*leaves):
        step = rx.functionalize(train)
        out, _ = step(*eqx.combine(treedef.unflatten(leaves), rest))
        return out

    exported = jax.export.export(jax.jit(flat))(*leaves)
    again: Any = jax.export.deserialize(exported.serialize())
    assert again.nr_devices == 8
    out = jax.jit(again.call)(*leaves)
    np.testing.assert_allclose(out, losses[0], rtol=1e-5)
