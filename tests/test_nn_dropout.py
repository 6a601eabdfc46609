"""`rx.nn.Dropout` draws its own keys."""

# A static checker objects to what is wrong on purpose here, or made at run time.
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from raising import raises

import refx_eqx as rx


X = jnp.linspace(1.0, 2.0, 200)


def test_with_a_key_it_is_that_of_equinox():
    for p in 0.0, 0.1, 0.5, 0.9:
        ours, theirs = rx.nn.Dropout(p), eqx.nn.Dropout(p)
        for i in range(3):
            key = jr.key(i)
            np.testing.assert_array_equal(ours(X, key=key), theirs(X, key=key))


def test_it_draws_from_the_stream():
    ours = rx.nn.Dropout(0.3, rngs=rx.Rngs(0, dropout=1))
    stream = rx.Rngs(0, dropout=1).dropout
    for _ in range(3):
        want = eqx.nn.Dropout(0.3)(X, key=stream())
        np.testing.assert_array_equal(ours(X), want)
    assert ours.stream.count.value == 3


def test_layers_share_a_stream():
    rngs = rx.Rngs(0)
    first, second = rx.nn.Dropout(rngs=rngs), rx.nn.Dropout(rngs=rngs)
    assert (first(X) != second(X)).any()
    assert first.stream.count is second.stream.count
    noise = rx.nn.Dropout(rngs=rx.Rngs(0, noise=3).noise)
    assert noise.stream.key.collection == "rng"
    noise(X)


def test_it_is_the_same_under_transforms_as_outside_of_them():
    plain, jitted = (rx.nn.Dropout(rngs=rx.Rngs(0)) for _ in range(2))
    call = rx.filter_jit(lambda layer, x: layer(x))
    for _ in range(3):
        np.testing.assert_array_equal(plain(X), call(jitted, X))
    assert jitted.stream.count.value == 3

    # The gradient sees the mask that the value saw.
    grad = rx.filter_grad(lambda x: jnp.sum(plain(x)))(X)
    np.testing.assert_allclose(grad * X, jitted(X), rtol=1e-6)


def test_each_example_and_each_step_draws_its_own_mask():
    layer = rx.nn.Dropout(rngs=rx.Rngs(0))
    xs = jnp.ones((4, 200))
    apply = rx.filter_vmap(lambda layer, x: layer(x), in_axes=(None, 0))
    steps = rx.scan(lambda layer, x: (layer, layer(x)), layer, xs)[1]
    for masks in apply(layer, xs), apply(layer, xs), steps:
        assert len({tuple(m.tolist()) for m in np.asarray(masks)}) == 4
        np.testing.assert_allclose(np.mean(masks), 1, atol=0.15)


def test_in_inference_mode_nothing_is_drawn():
    layer = rx.nn.Dropout(rngs=rx.Rngs(0))
    np.testing.assert_array_equal(eqx.nn.inference_mode(layer)(X), X)
    np.testing.assert_array_equal(layer(X, inference=True), X)
    np.testing.assert_array_equal(rx.nn.Dropout(0.0)(X), X)
    assert layer.stream.count.value == 0
    again = eqx.nn.inference_mode(eqx.nn.inference_mode(layer), value=False)
    assert (again(X) == 0).any() and layer.stream.count.value == 1


def test_a_layer_that_is_the_value_of_a_ref_has_the_mode_of_the_ref():
    ref = rx.Ref(eqx.nn.Dropout(0.5))
    evaluated = rx.nn.inference_mode({"layer": ref})
    assert evaluated["layer"] is ref and not ref.value.inference
    ref.value = rx.nn.inference_mode(ref.value)
    assert ref.value.inference


def test_all_is_dropped_without_a_nan():
    layer = rx.nn.Dropout(1.0, rngs=rx.Rngs(0))
    assert (layer(X) == 0).all()
    assert (rx.filter_grad(lambda x: jnp.sum(layer(x)))(X) == 0).all()


def test_p_may_be_an_array():
    layer = rx.nn.Dropout(jnp.array(0.25), rngs=rx.Rngs(0))
    out = rx.filter_jit(lambda layer, x: layer(x))(layer, X)
    kept = np.asarray(out != 0)
    np.testing.assert_allclose(out[kept], X[kept] / 0.75, rtol=1e-6)
    assert 0.6 < kept.mean() < 0.9


def test_without_randomness_it_says_what_is_missing():
    layer = rx.nn.Dropout(0.5)
    message = r"no randomness.*rngs=rx.Rngs\(0\).*`key=`.*inference_mode"
    with raises(RuntimeError, match=message):
        layer(X)
    rx.nn.Dropout(0.5, rngs=rx.Rngs(0))(X)  # the remedies
    layer(X, key=jr.key(0))
    eqx.nn.inference_mode(layer)(X)


def test_p_is_a_fraction():
    for p in 50, -0.1, np.float32(2.0), float("nan"):
        with raises(ValueError, match="between 0 and 1, but was"):
            rx.nn.Dropout(p)
    for p in "0.5", True, None:
        with raises(TypeError, match=f"between 0 and 1, but was {p!r}"):
            rx.nn.Dropout(p)


@pytest.mark.parametrize("rngs", [0, jr.key(0)], ids=["seed", "key"])
def test_a_seed_is_not_a_source_of_keys(rngs):
    with raises(
        TypeError, match="`rngs` must be an `rx.Rngs` or .*`rngs=rx.Rngs\\(0\\)`"
    ):
        rx.nn.Dropout(0.5, rngs=rngs)


@pytest.mark.parametrize(
    "dtype", [int, bool, "uint8", "bfloat16", "float32", "complex64"]
)
@pytest.mark.parametrize("p", [0.5, 1.0, np.float32(0.25), jnp.array(0.25)])
def test_it_is_that_of_equinox_for_each_dtype(dtype, p):
    x, key = jnp.ones(50, dtype), jr.key(0)
    with jax.numpy_dtype_promotion("standard"):
        theirs = eqx.nn.Dropout(p)(x, key=key)
    ours = rx.nn.Dropout(p)(x, key=key)
    if not jnp.issubdtype(dtype, jnp.inexact):
        assert ours.dtype == theirs.dtype == jnp.float32
    else:
        assert ours.dtype == x.dtype
    np.testing.assert_array_equal(ours, theirs.astype(ours.dtype))


def test_a_plain_vmap_does_not_write_the_stream():
    layer = rx.nn.Dropout(rngs=rx.Rngs(0))
    with raises(rx.TraceLevelError, match="Cannot mutate ref"):
        jax.vmap(layer)(jnp.ones((2, 3)))
    assert layer.stream.count.value == 0
