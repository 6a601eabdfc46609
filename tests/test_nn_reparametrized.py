"""`rx.nn.WeightNorm` and `rx.nn.SpectralNorm` compute what Equinox's do."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from raising import raises

import refx_eqx as rx


KEY, KEY2 = jr.key(0), jr.key(1)
LAYERS = {
    "Linear": (lambda nn: nn.Linear(3, 2, key=KEY), (3,)),
    "Conv2d": (lambda nn: nn.Conv2d(2, 3, 3, key=KEY), (2, 6, 6)),
}


class Mine(rx.Module):
    """A layer of somebody, written for refs."""

    kernel: rx.Param[jax.Array]
    uses: rx.Ref[jax.Array] = rx.field(collection="counts")

    def __call__(self, x):
        self.uses.value += 1
        return self.kernel[...] @ x


@pytest.fixture(autouse=True)
def _settings():
    with jax.check_tracer_leaks(False):
        yield


def close(a, b, rtol=2e-5, atol=2e-6):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def spectral_of_equinox(layer):
    return eqx.nn.make_with_state(eqx.nn.SpectralNorm)(layer, "weight", key=KEY2)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("axis", [0, 1, None])
def test_weight_norm_is_that_of_equinox(name, axis):
    make, shape = LAYERS[name]
    ours = rx.nn.WeightNorm(make(rx.nn), axis=axis)
    theirs = eqx.nn.WeightNorm(make(eqx.nn), axis=axis)
    x = jr.normal(KEY2, shape)
    loss = lambda layer: jnp.sum(jnp.sin(layer(x)))
    for _ in range(2):
        close(ours(x), theirs(x))
        want = eqx.filter_grad(loss)(theirs)
        got = rx.filter_grad(loss, wrt="params")(ours)
        close(got.g.value, want.g)
        close(got.layer.weight.value, want.layer.weight, atol=2e-5)
        rx.apply_updates(ours, jax.tree.map(lambda g: -0.1 * g, got))
        theirs = eqx.apply_updates(theirs, jax.tree.map(lambda g: -0.1 * g, want))


@pytest.mark.parametrize("name", LAYERS)
def test_spectral_norm_is_that_of_equinox(name):
    make, shape = LAYERS[name]
    ours = rx.nn.SpectralNorm(make(rx.nn), num_power_iterations=1, key=KEY2)
    theirs, state = spectral_of_equinox(make(eqx.nn))
    x = jr.normal(KEY2, shape)
    call = rx.filter_jit(lambda layer, x: layer(x))

    def loss_of_theirs(layer, state):
        out, state = layer(x, state)
        return jnp.sum(jnp.sin(out)), state

    for _ in range(3):
        want, state = eqx.filter_grad(loss_of_theirs, has_aux=True)(theirs, state)
        got = rx.filter_grad(lambda layer: jnp.sum(jnp.sin(layer(x))), wrt="params")(
            ours
        )
        close(got.layer.weight.value, want.layer.weight, atol=2e-5)
        u, v = state.get(theirs.uv_index)
        close(ours.u.value, u)
        close(ours.v.value, v)
        out, _ = eqx.nn.inference_mode(theirs)(x, state)
        close(call(eqx.nn.inference_mode(ours), x), out)
        close(ours.u.value, u)
        # Another weight, so that the vectors move.
        rx.apply_updates(ours, jax.tree.map(lambda g: -g, got))
        theirs = eqx.apply_updates(theirs, jax.tree.map(lambda g: -g, want))


def test_spectral_norm_under_scan_and_vmap_keeps_one_pair_of_vectors():
    make, shape = LAYERS["Linear"]
    xs = jr.normal(KEY, (3, *shape))
    by_hand, scanned, mapped = (
        rx.nn.SpectralNorm(make(rx.nn), key=KEY2) for _ in range(3)
    )
    for norm in by_hand, scanned, mapped:
        norm.layer.weight.value += 1.0
    outs = jnp.stack([by_hand(x) for x in xs])
    close(rx.scan(lambda norm, x: (norm, norm(x)), scanned, xs)[1], outs)
    close(scanned.u.value, by_hand.u.value)
    out = rx.filter_vmap(lambda norm, x: norm(x), in_axes=(None, 0))(mapped, xs)
    close(out[0], outs[0])
    assert mapped.u.shape == (2,)


@pytest.mark.parametrize("norm", ["WeightNorm", "SpectralNorm"])
def test_a_layer_written_for_refs_is_normed_too(norm):
    kernel = jr.normal(KEY, (2, 3))
    mine = Mine(kernel, jnp.array(0))
    keyed = {"key": KEY2} if norm == "SpectralNorm" else {}
    normed = getattr(rx.nn, norm)(mine, "kernel", **keyed)
    assert normed.layer.kernel is mine.kernel
    x = jnp.ones(3)
    plain = eqx.nn.Linear(3, 2, use_bias=False, key=KEY)
    plain = eqx.tree_at(lambda p: p.weight, plain, kernel)
    close(normed(x), getattr(rx.nn, norm)(plain, **keyed)(x))
    # What the layer writes is written; its weight is what it was.
    assert mine.uses.value == 1
    np.testing.assert_array_equal(mine.kernel.value, kernel)


@pytest.mark.parametrize("norm", ["WeightNorm", "SpectralNorm"])
def test_a_field_that_is_not_there_is_named(norm):
    keyed = {"key": KEY2} if norm == "SpectralNorm" else {}
    with raises(ValueError, match="`Mine` has no ref or array `weight`.*weight_name="):
        getattr(rx.nn, norm)(Mine(jnp.ones((2, 3)), jnp.array(0)), **keyed)


def test_a_vector_has_no_singular_values():
    with raises(ValueError, match=r"`bias` has shape \(2,\)"):
        rx.nn.SpectralNorm(rx.nn.Linear(3, 2, key=KEY), "bias", key=KEY2)
