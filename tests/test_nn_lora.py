"""`rx.nn.LoRA`: a low-rank change around frozen weights."""

# A static checker objects to what is wrong on purpose here, or made at run time.
# pyright: reportOptionalSubscript=false

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from flax import nnx
from raising import raises

import refx_eqx as rx


KEY, KEY2 = jr.key(0), jr.key(1)
X = jnp.linspace(-1.0, 1.0, 8)


@pytest.fixture(autouse=True)
def _settings():
    with jax.check_tracer_leaks(False):
        yield


def adapted(alpha=None):
    lora = rx.nn.LoRA(rx.nn.Linear(8, 4, key=KEY), rank=2, alpha=alpha, key=KEY2)
    lora.b.value = jr.normal(KEY, (4, 2))
    return lora


def test_it_computes_what_that_of_flax_does():
    ours = adapted()
    base = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    base.kernel[...], base.bias[...] = ours.layer.weight.value.T, ours.layer.bias.value
    theirs = nnx.LoRA(8, 2, 4, base_module=base, rngs=nnx.Rngs(0))
    theirs.lora_a[...], theirs.lora_b[...] = ours.a.value.T, ours.b.value.T
    loss = lambda layer: jnp.sum(jnp.sin(layer(X)))
    for _ in range(3):
        np.testing.assert_allclose(ours(X), theirs(X), rtol=1e-5, atol=1e-6)
        want = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(theirs)
        got = rx.filter_grad(loss, wrt="lora")(ours)
        assert got.layer.weight.value is None
        np.testing.assert_allclose(
            got.a.value, want["lora_a"][...].T, rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(
            got.b.value, want["lora_b"][...].T, rtol=1e-5, atol=1e-6
        )
        ours.a.value -= 0.1 * got.a.value
        ours.b.value -= 0.1 * got.b.value
        theirs.lora_a[...] = theirs.lora_a[...] - 0.1 * want["lora_a"][...]
        theirs.lora_b[...] = theirs.lora_b[...] - 0.1 * want["lora_b"][...]


def test_training_changes_nothing_else():
    model = rx.nn.MLP(8, 1, 8, 1, key=KEY)
    keys = iter(jr.split(KEY2, 2))
    with_lora = eqx.tree_at(
        lambda m: m.layers,
        model,
        tuple(rx.nn.LoRA(layer, rank=2, key=next(keys)) for layer in model.layers),
    )
    assert with_lora.layers[0].layer.weight is model.layers[0].weight
    before = rx.snapshot(model)
    optimizer = rx.Optimizer(with_lora, optax.sgd(0.2, momentum=0.9), wrt="lora")
    xs = jr.normal(KEY, (32, 8))

    @rx.filter_jit
    def step(model, optimizer):
        loss = lambda m: jnp.mean((jax.vmap(m)(xs)[:, 0] - xs[:, 0]) ** 2)
        value, grads = rx.filter_value_and_grad(loss, wrt="lora")(model)
        optimizer.update(model, grads)
        return value

    losses = [step(with_lora, optimizer) for _ in range(60)]
    assert losses[-1] < losses[0] / 4
    assert eqx.tree_equal(rx.snapshot(model), before)

    merged = rx.nn.merge_lora(with_lora)
    assert jax.tree.structure(merged) == jax.tree.structure(model)
    np.testing.assert_allclose(
        jax.vmap(merged)(xs), jax.vmap(with_lora)(xs), rtol=1e-4, atol=1e-5
    )
    assert eqx.tree_equal(rx.snapshot(model), before)


@pytest.mark.parametrize("alpha, scale", [(None, 1), (2, 1), (8, 4)])
def test_the_change_is_scaled_and_merged(alpha, scale):
    lora = adapted(alpha)
    weight = lora.layer.weight.value + scale * lora.b.value @ lora.a.value
    np.testing.assert_allclose(
        lora(X), weight @ X + lora.layer.bias.value, rtol=1e-5, atol=1e-5
    )
    merged = rx.nn.merge_lora({"layer": lora})["layer"]
    np.testing.assert_allclose(merged.weight.value, weight, rtol=1e-5, atol=1e-6)
    assert merged.weight.collection == "params" and merged.bias is lora.layer.bias
    assert merged.weight is not lora.layer.weight


HOLDERS = {
    "partial": lambda lora: functools.partial(lambda layer, x: layer(x), lora),
    "partial of the class": lambda lora: functools.partial(rx.nn.LoRA.__call__, lora),
    "closure": lambda lora: lambda x: lora(x),
    "method": lambda lora: lora.__call__,
    "method of another": lambda lora: rx.nn.Sequential([lora]).__call__,
}


@pytest.mark.parametrize("holder", HOLDERS.values(), ids=HOLDERS)
@pytest.mark.parametrize("convert", [lambda tree: tree, rx.snapshot])
def test_a_change_in_a_function_is_merged(holder, convert):
    lora, other = adapted(), rx.Ref(jnp.ones(2))
    tree = {"f": holder(lora), "layer": lora, "g": lambda: other, "h": jnp.tanh}
    tree = convert(tree)
    merged = rx.nn.merge_lora(tree)
    np.testing.assert_allclose(merged["f"](X), lora(X), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(merged["f"](X), merged["layer"](X))
    alone = rx.nn.merge_lora(tree["f"])
    lora.b.value = tree["layer"].b[...] * 0  # no more used
    np.testing.assert_array_equal(alone(X), merged["layer"](X))
    assert merged["g"] is tree["g"] and merged["h"] is jnp.tanh
    if convert is not rx.snapshot:
        places = list(rx.aliases(merged).values())
        assert {ref.collection for ref in rx.aliases(merged)} == {"params", None}
        assert len(places) == 3  # the weight and the bias, each at two places
        merged["layer"].weight.value *= 0
        np.testing.assert_array_equal(merged["f"](X), merged["layer"](X))


def test_one_change_at_two_places_is_one_weight_when_merged():
    lora = adapted()
    alone = rx.nn.LoRA(lora.layer, rank=2, key=KEY)
    merged = rx.nn.merge_lora([lora, lora, alone])
    assert merged[0].weight is merged[1].weight
    assert merged[2].weight is not merged[0].weight


def test_a_change_of_a_change_is_merged_whole():
    inner = adapted()
    outer = rx.nn.LoRA(inner, rank=1, key=KEY, weight_name="a")
    assert outer.a.shape == (1, 8)
    # Around `a` itself it is no layer; around the layer inside, twice:
    twice = rx.nn.LoRA(rx.nn.merge_lora(inner), rank=1, key=KEY)
    twice.b.value = jnp.ones((4, 1))
    merged = rx.nn.merge_lora(twice)
    np.testing.assert_allclose(merged(X), twice(X), rtol=1e-5, atol=1e-5)


def test_layers_of_others_are_adapted():
    class Mine(rx.Module):
        kernel: rx.Param[jax.Array]

        def __call__(self, x):
            return x @ self.kernel[...].T

    mine = Mine(jr.normal(KEY, (4, 8)))
    lora = rx.nn.LoRA(mine, rank=2, weight_name="kernel", key=KEY2)
    lora.b.value = jnp.ones((4, 2))
    xs = jr.normal(KEY, (5, 8))
    merged = rx.nn.merge_lora(lora)
    assert type(merged) is Mine
    np.testing.assert_allclose(merged(xs), lora(xs), rtol=1e-5, atol=1e-5)

    plain = rx.nn.LoRA(eqx.nn.Linear(8, 4, key=KEY), rank=2, key=KEY2)
    assert plain.layer.weight.collection == "params"


def test_a_stack_of_layers_has_a_stack_of_changes():
    keys = jr.split(KEY, 3)
    layers = rx.filter_vmap(lambda key: rx.nn.Linear(8, 8, key=key))(keys)
    with raises(ValueError, match=r"has shape \(3, 8, 8\).*filter_vmap"):
        rx.nn.LoRA(layers, rank=2, key=KEY)
    rank = 2
    loras = rx.filter_vmap(lambda layer, key: rx.nn.LoRA(layer, rank, key=key))(
        layers, keys
    )
    assert loras.layer.weight is layers.weight and loras.a.shape == (3, 2, 8)
    out, _ = rx.scan(lambda x, layer: (layer(x), None), X, loras)
    want, _ = rx.scan(lambda x, layer: (layer(x), None), X, layers)
    np.testing.assert_allclose(out, want, rtol=1e-6)


@pytest.mark.parametrize("sizes", [(3, "scalar"), ("scalar", 3), ("scalar", "scalar")])
def test_a_scalar_layer_stays_one(sizes):
    layer = rx.nn.Linear(*sizes, key=KEY)
    lora = rx.nn.LoRA(layer, rank=2, key=KEY)
    x = jnp.array(0.5) if sizes[0] == "scalar" else jnp.arange(3.0)
    assert lora(x).shape == layer(x).shape and (lora(x) == layer(x)).all()
    lora.b.value += 1
    merged = rx.nn.merge_lora(lora)
    assert lora(x).shape == layer(x).shape and (lora(x) != layer(x)).all()
    np.testing.assert_allclose(lora(x), merged(x), rtol=1e-6)


def test_what_does_not_fit_is_an_error():
    with raises(ValueError, match="`rank` must be at least 1, but is 0"):
        rx.nn.LoRA(rx.nn.Linear(8, 4, key=KEY), rank=0, key=KEY)
    table = rx.nn.LoRA(rx.nn.Embedding(8, 4, key=KEY), rank=2, key=KEY)
    with raises(ValueError, match=r"input has shape \(\), but its last axis .* 4"):
        table(jnp.array(2))
