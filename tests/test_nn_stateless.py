"""The layers of Equinox that have no state, made with refs."""

# A static checker objects to what is wrong on purpose here, or made at run time.
# pyright: reportAttributeAccessIssue=false, reportIncompatibleMethodOverride=false, reportIndexIssue=false

import copy
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import refx_eqx as rx


KEY = jr.key(0)
ARGUMENTS = {
    "Linear": ((3, 2), (3,)),
    "MLP": ((3, 2, 4, 2), (3,)),
    "Conv": ((1, 2, 3, 3), (2, 8)),
    "Conv1d": ((2, 3, 3), (2, 8)),
    "Conv2d": ((2, 3, 3), (2, 6, 6)),
    "Conv3d": ((2, 3, 2), (2, 4, 4, 4)),
    "ConvTranspose": ((1, 2, 3, 3), (2, 8)),
    "ConvTranspose1d": ((2, 3, 3), (2, 8)),
    "ConvTranspose2d": ((2, 3, 3), (2, 6, 6)),
    "ConvTranspose3d": ((2, 3, 2), (2, 4, 4, 4)),
    "Embedding": ((5, 3), ()),
    "GroupNorm": ((2, 4), (4, 3)),
    "LayerNorm": ((3,), (3,)),
    "PReLU": ((), (3,)),
    "RMSNorm": ((3,), (3,)),
}
UNKEYED = {"GroupNorm", "LayerNorm", "PReLU", "RMSNorm"}
PLAIN = [
    name
    for name in vars(eqx.nn)
    if getattr(rx.nn, name, None) is getattr(eqx.nn, name) and name[0] != "_"
]


def make(module, name):
    arguments, _ = ARGUMENTS[name]
    keyed = {} if name in UNKEYED else {"key": KEY}
    return getattr(module, name)(*arguments, **keyed)


def test_every_layer_of_equinox_has_one_of_ours():
    state = {"State", "StateIndex", "StatefulLayer", "Shared"}
    classes = {name for name, x in vars(eqx.nn).items() if isinstance(x, type)}
    assert classes - state <= set(dir(rx.nn))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_layer_is_that_of_equinox_with_refs_for_its_arrays(name):
    layer, plain = make(rx.nn, name), make(eqx.nn, name)
    assert isinstance(layer, getattr(eqx.nn, name))
    assert isinstance(layer, getattr(rx.nn, name))
    assert not isinstance(plain, getattr(rx.nn, name))
    assert eqx.tree_equal(rx.snapshot(layer), plain)
    assert jax.tree.structure(layer) == jax.tree.structure(rx.as_refs(plain, "params"))
    refs = [x for x in jax.tree.leaves(layer) if rx.is_ref(x)]
    assert refs and {ref.collection for ref in refs} == {"params"}
    x = jnp.array(2) if name == "Embedding" else jr.normal(KEY, ARGUMENTS[name][1])
    np.testing.assert_array_equal(layer(x), plain(x))


@pytest.mark.parametrize("name", PLAIN)
def test_what_has_no_arrays_is_that_of_equinox(name):
    assert name.startswith(("Adaptive", "Avg", "Max", "Pool")) or name in (
        "Identity",
        "Lambda",
        "RotaryPositionalEmbedding",
        "inference_mode",
    )


def test_a_layer_is_copied_and_pickled():
    linear = rx.nn.Linear(3, 2, key=KEY)
    for other in copy.deepcopy(linear), pickle.loads(pickle.dumps(linear)):
        assert isinstance(other, rx.nn.Linear)
        assert other.weight is not linear.weight
        np.testing.assert_array_equal(other.weight.value, linear.weight.value)


def test_a_subclass_has_refs_too():
    class Double(rx.nn.Linear):
        def __init__(self, size, *, key):
            super().__init__(size, size, use_bias=False, key=key)

        def __call__(self, x):
            return 2 * super().__call__(x)

    double = Double(3, key=KEY)
    assert isinstance(double, Double) and isinstance(double, eqx.nn.Linear)
    assert double.weight.collection == "params"
    x = jnp.ones(3)
    np.testing.assert_allclose(double(x), 2 * (double.weight.value @ x), rtol=1e-6)
    assert not isinstance(rx.nn.Linear(3, 3, key=KEY), Double)


def test_a_weight_is_given_to_another_layer():
    embed = rx.nn.Embedding(5, 3, key=KEY)
    again = rx.nn.Embedding(weight=embed.weight)
    assert again.weight is embed.weight
    embed.weight.value = jnp.zeros((5, 3))
    assert (again(jnp.array(1)) == 0).all()


def test_layers_of_both_kinds_are_a_sequence():
    k1, k2 = jr.split(KEY)
    model = rx.nn.Sequential(
        [
            rx.nn.Linear(3, 4, key=k1),
            rx.nn.BatchNorm(4, axis_name="batch"),
            rx.nn.Lambda(jax.nn.relu),
            rx.nn.Sequential([rx.nn.Dropout(0.5, rngs=rx.Rngs(0))]),
            eqx.nn.Linear(4, 2, key=k2),
        ]
    )
    assert isinstance(model, eqx.nn.Sequential) and not model.is_stateful()
    assert rx.is_ref(model[0].weight) and rx.is_ref(model[4].weight)
    xs = jr.normal(KEY, (8, 3))

    @rx.filter_jit
    def step(model, xs):
        def loss(model):
            apply = rx.filter_vmap(
                lambda m, x: m(x), in_axes=(None, 0), axis_name="batch"
            )
            return jnp.sum(apply(model, xs) ** 2)

        grads = rx.filter_grad(loss, wrt="params")(model)
        params = [ref for ref in rx.aliases(model) if ref.collection == "params"]
        for ref, grad in zip(params, jax.tree.leaves(grads), strict=True):
            ref.value -= 0.01 * grad

    before = rx.snapshot(model)
    for _ in range(3):
        step(model, xs)
    assert model[1].count.value == 3 and model[3][0].stream.count.value == 3
    assert (model[0].weight.value != before[0].weight).any()
    assert (model[4].weight.value != before[4].weight).any()
    evaluated = eqx.nn.inference_mode(model)
    ys = jax.vmap(evaluated)(xs)
    np.testing.assert_array_equal(ys, jax.vmap(evaluated)(xs))
    assert model[1].count.value == 3


def test_going_between_the_modes_traces_each_once(trace_counter):
    @trace_counter
    def apply(model, x):
        return model(x)

    jitted = rx.filter_jit(apply)
    model = rx.nn.Sequential([rx.nn.BatchNorm(3), rx.nn.Dropout(0.5, rngs=rx.Rngs(0))])
    evaluated = rx.nn.inference_mode(model)
    x = jr.normal(KEY, (4, 3))
    with jax.check_tracer_leaks(False):
        for _ in range(3):
            jitted(model, x)
            jitted(evaluated, x)
            jitted(rx.nn.inference_mode(model), x)  # a new one each time
            jitted(rx.nn.inference_mode(evaluated, value=False), x)
    assert apply.counter.count == 2
    assert model[0].count.value == evaluated[0].count.value == 6
