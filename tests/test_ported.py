"""Whole programs, ported from plain Equinox: they equal the originals, bit for bit.

Each program is written twice, for `eqx` and by reference. After some steps, every parameter
and every state is compared.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jaxtyping import Array

import refx_eqx as rx


@pytest.fixture(autouse=True)
def _promotion():
    # Optax relies on it.
    with jax.numpy_dtype_promotion("standard"):
        yield


KEY = jr.key(0)
XS = jr.normal(jr.key(1), (6, 3))
STEPS = 3


def assert_same_bits(mine, expected):
    """Of the arrays in two trees, in their order."""
    mine = jax.tree.leaves(eqx.filter(rx.snapshot(mine), eqx.is_array))
    expected = jax.tree.leaves(eqx.filter(expected, eqx.is_array))
    assert len(mine) == len(expected) > 0
    for a, b in zip(mine, expected):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def mlp(seed, n_out=2):
    return eqx.nn.MLP(3, n_out, 8, 1, key=jr.key(seed))


def is_param(x):
    return eqx.is_inexact_array(x)


# A method that scans its own layers.


def block(linear, scale, x):
    return jnp.tanh(linear(x)) * scale


class Deep(eqx.Module):
    layers: eqx.nn.Linear
    scale: Array

    def __call__(self, x):
        arrays, static = eqx.partition(self.layers, eqx.is_array)

        def step(x, arrays):
            return block(eqx.combine(arrays, static), self.scale, x), None

        return jax.lax.scan(step, x, arrays)[0]


class DeepByReference(rx.Module):
    layers: Any
    scale: rx.Param[Array]

    def __call__(self, x):
        def step(x, layer):
            return block(layer, self.scale[...], x), None

        return rx.scan(step, x, self.layers)[0]


def test_a_method_that_scans_its_own_layers():
    keys = jr.split(KEY, 4)
    layers = eqx.filter_vmap(lambda key: eqx.nn.Linear(3, 3, key=key))(keys)
    plain = Deep(layers, jnp.array(0.5))
    mine = DeepByReference(rx.as_refs(layers, "params"), jnp.array(0.5))

    def loss(model):
        return jnp.mean(jax.vmap(model)(XS) ** 2)

    @eqx.filter_jit
    def plain_step(model):
        grads = eqx.filter_grad(loss)(model)
        return eqx.apply_updates(model, jax.tree.map(lambda g: -0.1 * g, grads))

    @rx.filter_jit
    def step(model):
        grads = rx.filter_grad(lambda m: jnp.mean(rx.filter_vmap(m)(XS) ** 2))(model)
        rx.apply_updates(model, jax.tree.map(lambda g: -0.1 * g, grads))

    for _ in range(STEPS):
        plain = plain_step(plain)
        step(mine)
    assert_same_bits((mine.layers, mine.scale), (plain.layers, plain.scale))


# A moving average, under donation.


def averaged(a, w):
    return 0.9 * a + 0.1 * w


def test_a_moving_average_under_donation():
    def loss(model):
        return jnp.mean(jax.vmap(model)(XS) ** 2)

    plain, average = mlp(0), mlp(0)
    tx = optax.adam(1e-2)
    state = tx.init(eqx.filter(plain, is_param))

    @eqx.filter_jit(donate="all")
    def plain_step(model, average, state):
        grads = eqx.filter_grad(loss)(model)
        updates, state = tx.update(grads, state, eqx.filter(model, is_param))
        model = eqx.apply_updates(model, updates)
        new, static = eqx.partition(average, is_param)
        new = jax.tree.map(averaged, new, eqx.filter(model, is_param))
        return model, eqx.combine(new, static), state

    model = rx.as_refs(mlp(0), "params")
    ema, first = rx.clone(model), rx.snapshot(model)
    optimizer = rx.Optimizer(model, tx)

    @rx.filter_jit(donate="refs")
    def step(model, ema, optimizer):
        grads = rx.filter_grad(loss, wrt="params")(model)
        optimizer.update(model, grads)
        new = jax.tree.map(averaged, rx.state_dict(ema), rx.state_dict(model))
        rx.load_state_dict(ema, new)

    for _ in range(STEPS):
        plain, average, state = plain_step(plain, average, state)
        step(model, ema, optimizer)
    assert_same_bits(model, plain)
    assert_same_bits(ema, average)
    assert_same_bits(first, mlp(0))


# Equinox's own BatchNorm, with its `State`: passed on, or in a ref.


class Normed(eqx.Module):
    linear: eqx.nn.Linear
    norm: eqx.nn.BatchNorm

    def __init__(self, key):
        self.linear = eqx.nn.Linear(3, 2, key=key)
        self.norm = eqx.nn.BatchNorm(2, "batch", mode="batch")

    def __call__(self, x, state):
        return self.norm(self.linear(x), state)


def normed_loss(vmap):
    def loss(model, state, xs):
        batched = vmap(model, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
        out, state = batched(xs, state)
        return jnp.mean(out**3), state

    return loss


@pytest.mark.parametrize("in_ref", [False, True])
def test_batch_norm_of_equinox_with_its_state(in_ref):
    plain, state = eqx.nn.make_with_state(Normed)(KEY)
    model, own = eqx.nn.make_with_state(Normed)(KEY)
    ref = rx.Ref(own, "state")

    def updated(model, grads):
        return eqx.apply_updates(model, jax.tree.map(lambda g: -0.1 * g, grads))

    @eqx.filter_jit
    def plain_step(model, state, xs):
        grads, state = eqx.filter_grad(normed_loss(jax.vmap), has_aux=True)(
            model, state, xs
        )
        return updated(model, grads), state

    @rx.filter_jit
    def step(model, state, xs):
        grads, state = rx.filter_grad(normed_loss(rx.filter_vmap), has_aux=True)(
            model, state, xs
        )
        return updated(model, grads), state

    @rx.filter_jit
    def step_of_ref(model, ref, xs):
        model, ref.value = step(model, ref.value, xs)
        return model

    for _ in range(STEPS):
        plain, state = plain_step(plain, state, XS)
        if in_ref:
            model = step_of_ref(model, ref, XS)
        else:
            model, own = step(model, own, XS)
    assert_same_bits((model, ref.value if in_ref else own), (plain, state))


# A low-rank change around a frozen layer.


class LowRank(eqx.Module):
    layer: eqx.nn.Linear
    a: Array
    b: Array

    def __call__(self, x):
        return self.layer(x) + 1.0 * ((x @ self.a.T) @ self.b.T)


def test_low_rank_adaptation():
    linear = eqx.nn.Linear(3, 2, key=KEY)
    adapted = rx.nn.LoRA(rx.as_refs(linear, "params"), rank=2, key=jr.key(2))
    plain = LowRank(linear, adapted.a.value, adapted.b.value)
    tx = optax.adam(1e-2)

    def loss(model):
        return jnp.mean((jax.vmap(model)(XS) - 1.0) ** 2)

    only_change = eqx.tree_at(
        lambda m: (m.a, m.b), jax.tree.map(lambda _: False, plain), (True, True)
    )
    state = tx.init(eqx.filter(plain, only_change))

    @eqx.filter_jit
    def plain_step(model, state):
        change, frozen = eqx.partition(model, only_change)
        grads = eqx.filter_grad(lambda c: loss(eqx.combine(c, frozen)))(change)
        updates, state = tx.update(grads, state, change)
        return eqx.apply_updates(model, updates), state

    optimizer = rx.Optimizer(adapted, tx, wrt="lora")

    @rx.filter_jit
    def step(model, optimizer):
        optimizer.update(model, rx.filter_grad(loss, wrt="lora")(model))

    for _ in range(STEPS):
        plain, state = plain_step(plain, state)
        step(adapted, optimizer)
    assert_same_bits((adapted.a, adapted.b), (plain.a, plain.b))
    assert_same_bits(adapted.layer, linear)
    assert adapted.b.value.any()


# Two networks that play against each other, each with an optimizer.


def fooled(generator, discriminator, zs):
    return -jnp.mean(jax.vmap(lambda z: discriminator(generator(z)))(zs))


def told_apart(discriminator, generator, zs):
    real = jnp.mean(jax.vmap(discriminator)(XS))
    return real - jnp.mean(jax.vmap(lambda z: discriminator(generator(z)))(zs))


def test_a_gan_with_two_optimizers():
    tx_g, tx_d = optax.adam(1e-2), optax.rmsprop(1e-2)
    g, d = mlp(0, n_out=3), mlp(1, n_out=1)
    s_g, s_d = (tx.init(eqx.filter(x, is_param)) for tx, x in ((tx_g, g), (tx_d, d)))

    @eqx.filter_jit
    def plain_step(g, d, s_g, s_d, key):
        zs = jr.normal(key, XS.shape)
        grads = eqx.filter_grad(told_apart)(d, g, zs)
        updates, s_d = tx_d.update(grads, s_d, eqx.filter(d, is_param))
        d = eqx.apply_updates(d, updates)
        grads = eqx.filter_grad(fooled)(g, d, zs)
        updates, s_g = tx_g.update(grads, s_g, eqx.filter(g, is_param))
        return eqx.apply_updates(g, updates), d, s_g, s_d

    generator, discriminator = (rx.as_refs(x, "params") for x in (g, d))
    o_g, o_d = rx.Optimizer(generator, tx_g), rx.Optimizer(discriminator, tx_d)

    @rx.filter_jit(donate="refs")
    def step(g, d, o_g, o_d, key):
        zs = jr.normal(key, XS.shape)
        o_d.update(d, rx.filter_grad(told_apart, wrt="params")(d, g, zs))
        o_g.update(g, rx.filter_grad(fooled, wrt="params")(g, d, zs))

    for key in jr.split(KEY, STEPS):
        g, d, s_g, s_d = plain_step(g, d, s_g, s_d, key)
        step(generator, discriminator, o_g, o_d, key)
    assert_same_bits((generator, discriminator), (g, d))


# Q-learning: all of it one program, `jit(scan(cond(grad)))`; and with `vmap`, for two seeds.

Q_STATIC = eqx.filter(mlp(0), is_param, inverse=True)
Q_OPTIMIZER = optax.sgd(1e-1, momentum=0.5)


def q_loss(q, target, x, action, reward):
    best = jnp.max(target(jnp.roll(x, 1)))
    return (q(x)[action] - (reward + 0.9 * best)) ** 2


def act(q, x, key):
    return jnp.where(jr.bernoulli(key, 0.3), 0, jnp.argmax(q(x)))


def seen(key):
    return jr.normal(key, (3,)), jr.split(key)[0]


def plain_agent(key):
    params = eqx.filter(eqx.nn.MLP(3, 2, 8, 1, key=key), is_param)
    return params, params, Q_OPTIMIZER.init(params), jnp.array(0), jnp.array(0.0)


def plain_learning(agent, keys):
    def step(agent, key):
        params, target, state, n, total = agent
        x, own = seen(key)
        action = act(eqx.combine(params, Q_STATIC), x, own)
        reward = x[action]

        def learn(params, state):
            def loss(params):
                q, t = (eqx.combine(p, Q_STATIC) for p in (params, target))
                return q_loss(q, t, x, action, reward)

            updates, state = Q_OPTIMIZER.update(jax.grad(loss)(params), state, params)
            return eqx.apply_updates(params, updates), state

        params, state = jax.lax.cond(
            n % 2 == 1, learn, lambda *both: both, params, state
        )
        target = jax.lax.cond(n % 3 == 2, lambda: params, lambda: target)
        return (params, target, state, n + 1, total + reward), None

    return jax.lax.scan(step, agent, keys)[0]


def agent_by_reference(key):
    q = rx.as_refs(eqx.nn.MLP(3, 2, 8, 1, key=key), "params")
    return {
        "q": q,
        "target": rx.clone(q),
        "optimizer": rx.Optimizer(q, Q_OPTIMIZER),
        "n": rx.Ref(jnp.array(0), "steps"),
        "total": rx.Ref(jnp.array(0.0), "rewards"),
    }


def learning_by_reference(agent, keys):
    q, target, n = agent["q"], agent["target"], agent["n"]

    def step(_, key):
        x, own = seen(key)
        action = act(q, x, own)
        reward = x[action]

        def learn():
            grads = rx.filter_grad(q_loss, wrt="params")(q, target, x, action, reward)
            agent["optimizer"].update(q, grads)

        rx.cond(n.value % 2 == 1, learn, lambda: None)
        rx.cond(n.value % 3 == 2, lambda: rx.update_refs(target, q), lambda: None)
        n.value += 1
        agent["total"].value += reward
        return None, None

    rx.scan(step, None, keys)


def assert_same_learning(plain, agent, learn_plain, learn, keys, n_conditionals):
    """Of two programs, from equal agents on: the conditionals, and every bit."""
    plain_program = jax.jit(learn_plain).lower(plain, keys)
    program = rx.filter_jit(learn).lower(agent, keys)
    for lowered in (plain_program, program):
        assert lowered.as_text().count("stablehlo.case") == n_conditionals

    q, target, state, n, total = plain_program.compile()(plain, keys)
    program.compile()(agent, keys)
    assert_same_bits((agent["q"], agent["target"]), (q, target))
    # By name: the optimizer has its state in a dict.
    mine = rx.state_dict(agent["optimizer"].opt_state)
    expected = rx.state_dict(rx.as_refs(state, "opt_state"))
    assert mine.keys() == expected.keys()
    assert_same_bits(mine, expected)
    assert_same_bits((agent["n"], agent["total"]), (n, total))


def test_q_learning_in_one_program():
    key, keys = jr.key(3), jr.split(KEY, 8)
    plain, agent = plain_agent(key), agent_by_reference(key)
    assert_same_learning(plain, agent, plain_learning, learning_by_reference, keys, 2)


# The predicates depend on the count. If it is mapped, `vmap` computes both branches and
# selects; if it is not, the conditionals stay. XLA rounds the two differently: it makes either
# of two fused multiply-adds of `g * x + momentum * m`. So both programs map it, or neither.
@pytest.mark.parametrize("axis, n_conditionals", [(0, 0), (None, 2)])
def test_q_learning_of_two_seeds_in_one_program(axis, n_conditionals):
    seeds, keys = jr.split(jr.key(3)), jr.split(KEY, (2, 8))
    plain_axes, axes = (0, 0, 0, axis, 0), rx.axes(steps=axis, default=0)
    assert_same_learning(
        jax.vmap(plain_agent, out_axes=plain_axes)(seeds),
        rx.filter_vmap(agent_by_reference, out_axes=axes)(seeds),
        jax.vmap(plain_learning, in_axes=(plain_axes, 0), out_axes=plain_axes),
        rx.filter_vmap(learning_by_reference, in_axes=(axes, 0)),
        keys,
        n_conditionals,
    )
