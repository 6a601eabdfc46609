"""Training a model with a tied weight, compared with the same by hand in JAX and Optax."""

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


class Tied(rx.Module):
    """Predicts the next token; the embedding is the output layer too."""

    embedding: rx.Param[Array]
    hidden: rx.Param[Array]
    output: rx.Param[Array]
    seen: rx.Ref[Array] = rx.field(collection="counts")

    def __init__(self, vocabulary, size, *, key):
        k1, k2 = jr.split(key)
        self.embedding = jr.normal(k1, (vocabulary, size))
        self.hidden = jr.normal(k2, (size, size))
        self.output = self.embedding
        self.seen = jnp.array(0)

    def __call__(self, token):
        self.seen.value += 1
        x = jnp.tanh(self.hidden[...] @ self.embedding[token])
        return self.output[...] @ x


@pytest.fixture(autouse=True)
def _promotion():
    # Optax relies on it.
    with jax.numpy_dtype_promotion("standard"):
        yield


TOKENS = jnp.array([1, 4, 2, 0, 3])
NEXT = jnp.array([4, 2, 0, 3, 1])
OPTIMIZER = optax.adamw(1e-1, weight_decay=1e-2)


def _cross_entropy(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, NEXT).mean()


def _params(model):
    opened = rx.deref(model)
    return eqx.filter(opened, rx.filter_spec(model, "params"))


def _loss(model):
    # The counter is broadcast, and written with one value for all lanes.
    return _cross_entropy(rx.filter_vmap(model)(TOKENS))


def _train_by_reference(donate, n_steps):
    model = Tied(5, 3, key=jr.key(0))
    state = rx.Ref(OPTIMIZER.init(_params(model)), "optimizer")

    @rx.filter_jit(donate=donate)
    def step(model, state):
        loss, grads = rx.filter_value_and_grad(_loss, wrt="params")(model)
        params = _params(model)
        updates, state.value = OPTIMIZER.update(grads, state.value, params)
        rx.update_refs(model, optax.apply_updates(params, updates))
        return loss

    return model, [step(model, state) for _ in range(n_steps)]


def _train_by_hand(n_steps):
    model = Tied(5, 3, key=jr.key(0))
    params = {"tied": model.embedding.value, "hidden": model.hidden.value}
    state = OPTIMIZER.init(params)

    def loss(params):
        def logits(token):
            return params["tied"] @ jnp.tanh(params["hidden"] @ params["tied"][token])

        return _cross_entropy(jax.vmap(logits)(TOKENS))

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = OPTIMIZER.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for _ in range(n_steps):
        params, state, value = step(params, state)
        losses.append(value)
    return params, losses


@pytest.mark.parametrize("donate", ["none", "refs", "all"])
def test_training_a_tied_model_equals_training_by_hand(donate):
    model, losses = _train_by_reference(donate, n_steps=3)
    params, expected = _train_by_hand(n_steps=3)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    np.testing.assert_allclose(model.embedding.value, params["tied"], rtol=1e-6)
    np.testing.assert_allclose(model.hidden.value, params["hidden"], rtol=1e-6)
    assert losses[-1] < losses[0]
    assert model.output is model.embedding
    assert model.seen.value == 3


def test_a_tied_weight_has_one_optimizer_slot():
    model = Tied(5, 3, key=jr.key(0))
    state: Any = OPTIMIZER.init(_params(model))
    adam = state[0]
    assert [x.shape for x in jax.tree.leaves(adam.mu)] == [(5, 3), (3, 3)]
    assert [x.shape for x in jax.tree.leaves(adam.nu)] == [(5, 3), (3, 3)]


def test_training_traces_once(trace_counter):
    model = Tied(5, 3, key=jr.key(0))
    loss = trace_counter(_loss)

    @rx.filter_jit(donate="refs")
    def step(model):
        grads = rx.filter_grad(loss, wrt="params")(model)
        rx.update_refs(model, jax.tree.map(lambda p, g: p - g, _params(model), grads))

    for _ in range(3):
        step(model)
    step(Tied(5, 3, key=jr.key(1)))
    assert loss.counter.count == 1


def test_a_model_tied_after_the_fact_trains_as_tied():
    model = Tied(5, 3, key=jr.key(0))
    untied = eqx.tree_at(lambda m: m.output, model, rx.clone(model.output))
    tied_again = eqx.tree_at(lambda m: m.output, untied, untied.embedding)
    grads = rx.filter_grad(_loss, wrt="params")(tied_again)
    expected = rx.filter_grad(_loss, wrt="params")(model)
    assert jnp.array_equal(grads.embedding.value, expected.embedding.value)
    grads = rx.filter_grad(_loss, wrt="params")(untied)
    assert not jnp.allclose(grads.embedding.value, expected.embedding.value)
    summed = grads.embedding.value + grads.output.value
    np.testing.assert_allclose(summed, expected.embedding.value, rtol=1e-5)
