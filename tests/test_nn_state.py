"""The state of a layer keeps the dtype that it was made with."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import refx_eqx as rx


KEY = jr.key(0)
HALF = jnp.dtype("bfloat16")


def half_of_spectral_norm():
    normed = rx.nn.SpectralNorm(rx.nn.Linear(3, 2, dtype=HALF, key=KEY), key=KEY)
    normed.layer.weight.value = normed.layer.weight.value.astype(jnp.float32)
    return normed


LAYERS = {
    "GRUCell": lambda: rx.nn.GRUCell(3, 4, dtype=HALF, key=KEY),
    "LSTMCell": lambda: rx.nn.LSTMCell(3, 4, dtype=HALF, key=KEY),
    "BatchNorm": lambda: rx.nn.BatchNorm(3, dtype=HALF),
    "BatchNorm in mode ema": lambda: rx.nn.BatchNorm(3, dtype=HALF, mode="ema"),
    "SpectralNorm": half_of_spectral_norm,
}


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]()


def input_of(layer):
    return jnp.arange(6.0).reshape(2, 3) if hasattr(layer, "mean") else jnp.ones(3)


def state_of(layer):
    return jax.tree.leaves(rx.state_dict(layer, ~rx.collection("params")))


def test_an_input_of_another_dtype_does_not_change_it(layer, trace_counter):
    before = state_of(layer)
    assert HALF in {x.dtype for x in before}
    traced = trace_counter(lambda layer, x: layer(x))
    step = rx.filter_jit(traced)
    with jax.numpy_dtype_promotion("standard"):
        layer(input_of(layer))
        for _ in range(2):
            step(layer, input_of(layer))
    after = state_of(layer)
    assert [x.dtype for x in after] == [x.dtype for x in before]
    assert any((x != y).any() for x, y in zip(after, before))
    assert traced.counter.count == 1


def test_a_scan_carries_it(layer):
    xs = jnp.stack([input_of(layer)] * 3)
    before = [x.dtype for x in state_of(layer)]
    with jax.numpy_dtype_promotion("standard"):
        rx.scan(lambda layer, x: (layer, layer(x)), layer, xs)
    assert [x.dtype for x in state_of(layer)] == before


def test_the_file_of_a_run_fits_a_fresh_layer(tmp_path):
    norm, fresh = (rx.nn.BatchNorm(3, dtype=HALF) for _ in range(2))
    with jax.numpy_dtype_promotion("standard"):
        norm(jnp.ones((2, 3)))
    rx.save(tmp_path / "norm.safetensors", norm)
    rx.load(tmp_path / "norm.safetensors", fresh)
    assert eqx.tree_equal(fresh.mean.value, norm.mean.value)
