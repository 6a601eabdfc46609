"""Small programs of many kinds, as users write them, bit for bit as in JAX or Equinox."""

import contextlib

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array

import refx_eqx as rx


def test_a_beam_search_reorders_its_cache():
    class Cell(rx.Module):
        weight: rx.Param[Array]
        hidden: rx.Cache[Array]

        def __call__(self, tokens):
            self.hidden.value = jnp.tanh(
                self.hidden[...] @ self.weight[...] + tokens[:, None]
            )
            return jnp.sum(self.hidden[...], axis=-1)

    @rx.filter_jit
    def search(cell, tokens):
        def step(tokens, _):
            scores = cell(tokens)
            order = jnp.argsort(-scores)
            cell.hidden.value = cell.hidden[...][order]
            return tokens[order] + 1, scores[order]

        return rx.scan(step, tokens, None, length=4)

    @jax.jit
    def plain(weight, hidden, tokens):
        def step(carry, _):
            hidden, tokens = carry
            hidden = jnp.tanh(hidden @ weight + tokens[:, None])
            scores = jnp.sum(hidden, axis=-1)
            order = jnp.argsort(-scores)
            return (hidden[order], tokens[order] + 1), scores[order]

        return jax.lax.scan(step, (hidden, tokens), None, length=4)

    weight, hidden, tokens = (
        jr.normal(jr.key(0), (4, 4)),
        jnp.zeros((3, 4)),
        jnp.arange(3.0),
    )
    cell = Cell(weight, hidden)
    last, scores = search(cell, tokens)
    expected = plain(weight, hidden, tokens)
    assert eqx.tree_equal(((cell.hidden.value, last), scores), expected)


def test_a_particle_filter_resamples_in_a_branch():
    def weighed(particles, weights, observed, key):
        particles = particles + 0.1 * jr.normal(key, particles.shape)
        likely = jnp.exp(-jnp.sum((particles - observed[None]) ** 2, axis=-1))
        weights = weights * likely
        return particles, weights / jnp.sum(weights)

    uniform = jnp.ones(6) / 6

    @rx.filter_jit
    def run(particles, weights, keys, observations):
        def step(_, slices):
            key, observed = slices
            key1, key2 = jr.split(key)
            particles.value, weights.value = weighed(
                particles[...], weights[...], observed, key1
            )

            def resample():
                chosen = jr.choice(key2, 6, (6,), p=weights[...])
                particles.value, weights.value = particles[chosen], uniform

            rx.cond(1 / jnp.sum(weights[...] ** 2) < 5.0, resample, lambda: None)
            return None, weights[...] @ particles[...]

        return rx.scan(step, None, (keys, observations))[1]

    @jax.jit
    def plain(particles, weights, keys, observations):
        def step(carry, slices):
            key, observed = slices
            key1, key2 = jr.split(key)
            particles, weights = weighed(carry[0], carry[1], observed, key1)

            def resample():
                return particles[jr.choice(key2, 6, (6,), p=weights)], uniform

            few = 1 / jnp.sum(weights**2) < 5.0
            carry = jax.lax.cond(few, resample, lambda: (particles, weights))
            return carry, carry[1] @ carry[0]

        return jax.lax.scan(step, (particles, weights), (keys, observations))

    start = jr.normal(jr.key(0), (6, 2))
    data = jr.split(jr.key(1), 5), jr.normal(jr.key(2), (5, 2))
    particles, weights = rx.Ref(start), rx.Ref(uniform)
    means = run(particles, weights, *data)
    assert eqx.tree_equal(
        ((particles.value, weights.value), means), plain(start, uniform, *data)
    )


def test_the_best_model_is_kept_and_the_rate_halved_in_a_branch():
    xs = jr.normal(jr.key(1), (8, 2))
    loss = lambda model: jnp.mean((jax.vmap(model)(xs)[:, 0] - xs.sum(axis=1)) ** 2)

    @rx.filter_jit
    def step(model, kept, rate, best):
        value, grads = rx.filter_value_and_grad(loss)(model)
        rx.apply_updates(model, jax.tree.map(lambda g: -rate[...] * g, grads))

        def better():
            best.value = value
            rx.update_refs(kept, model)

        def worse():
            rate.value = rate[...] * 0.5

        rx.cond(value < 0.9 * best[...], better, worse)
        return value

    @eqx.filter_jit
    def plain_step(model, kept, rate, best):
        value, grads = eqx.filter_value_and_grad(loss)(model)
        model = eqx.apply_updates(model, jax.tree.map(lambda g: -rate * g, grads))
        pick = lambda new, old: jnp.where(value < 0.9 * best, new, old)
        kept = jax.tree.map(pick, model, kept)
        return (model, kept, pick(rate, rate * 0.5), pick(value, best)), value

    plain = eqx.nn.Linear(2, 1, key=jr.key(0))
    rate, best = jnp.array(1.5), jnp.array(jnp.inf)
    model = rx.as_refs(plain, "params")
    refs = model, rx.clone(model), rx.Ref(rate), rx.Ref(best)
    state = plain, plain, rate, best
    for _ in range(6):
        value = step(*refs)
        state, expected = plain_step(*state)
        assert value == expected
    assert eqx.tree_equal(rx.snapshot(refs), state) and refs[2].value < rate


def test_a_context_manager_swaps_a_value_for_a_while():
    @contextlib.contextmanager
    def swapped(ref, value):
        before = ref.value
        ref.value = value
        try:
            yield
        finally:
            ref.value = before

    def both(weight, x):
        with swapped(weight, jnp.array(10.0)):
            other = weight[...] * x
        return other + weight[...] * x**2

    weight = rx.Ref(jnp.array(2.0), "params")
    for transform in (lambda f: f, rx.filter_jit, rx.filter_checkpoint):
        assert transform(both)(weight, 3.0) == 48.0 and weight.value == 2.0
        # No gradient flows to the value while another is there.
        assert rx.filter_grad(transform(both))(weight, 3.0).value == 9.0


def test_an_inner_step_in_place_is_differentiated_through():
    def loss(weight, x):
        return jnp.sum((weight * x) ** 3)

    def outer(weight, x):
        inner = rx.filter_grad(lambda weight: loss(weight[...], x))(weight)
        weight.value = weight[...] - 0.1 * inner.value
        return loss(weight[...], x)

    def plain(weight, x):
        weight = weight - 0.1 * jax.grad(loss)(weight, x)
        return loss(weight, x), weight

    start, x = jnp.array([1.0, 2.0]), jnp.array([0.5, 0.25])
    weight = rx.Ref(start, "params")
    grads = rx.filter_grad(outer)(weight, x)
    expected = jax.grad(plain, has_aux=True)(start, x)
    assert eqx.tree_equal((grads.value, weight.value), expected)
