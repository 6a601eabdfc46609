"""`rx.nn.EMA`: a model that follows another."""

# A static checker objects to what is wrong on purpose here, or made at run time.
# pyright: reportAttributeAccessIssue=false

import copy
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from raising import raises

import refx_eqx as rx


KEY = jr.key(0)


@pytest.fixture(autouse=True)
def _settings():
    with jax.check_tracer_leaks(False):
        yield


def make():
    k1, k2 = jr.split(KEY)
    return rx.nn.Sequential(
        [
            rx.nn.Linear(3, 4, key=k1),
            rx.nn.BatchNorm(4, "batch"),
            rx.nn.Linear(4, 2, key=k2),
        ]
    )


def equal(a, b):
    return eqx.tree_equal(rx.snapshot(a), rx.snapshot(b))


def test_it_is_the_average_that_optax_computes():
    model = rx.nn.MLP(3, 2, 4, 1, key=KEY)
    ema = rx.nn.EMA(model, decay=0.9)
    want = rx.snapshot(model)

    @rx.filter_jit(donate="refs")
    def step(model, ema, by):
        for ref in rx.aliases(model):
            ref.value = ref.value * by + 1.0
        ema.update(model)

    for i in range(4):
        step(model, ema, jnp.float32(i))
        new = rx.snapshot(model)
        want = jax.tree.map(
            lambda new, old: (
                optax.incremental_update(new, old, 0.1) if eqx.is_array(new) else old
            ),
            new,
            want,
        )
        got = rx.snapshot(ema.model)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            eqx.filter(got, eqx.is_array),
            eqx.filter(want, eqx.is_array),
        )


def test_the_copy_outlives_a_step_that_donates():
    model = rx.nn.Linear(3, 2, key=KEY)
    before = np.asarray(model.weight.value)
    ema = rx.nn.EMA(model, 0.9)

    @rx.filter_jit(donate="refs")
    def step(model):
        model.weight.value += 1

    step(model)
    np.testing.assert_array_equal(ema.model.weight.value, before)


def test_what_is_not_averaged_is_that_of_the_model():
    model = make()
    ema = rx.nn.EMA(model, 0.9)
    assert ema.model[1].mean is model[1].mean
    assert ema.model[0].weight is not model[0].weight
    assert ema.model[0].weight.collection == "ema"
    assert {ref.collection for ref in rx.aliases(ema)} == {"ema", "batch_stats"}
    both = rx.nn.EMA(model, 0.9, wrt=rx.collection("params", "batch_stats"))
    assert both.model[1].mean is not model[1].mean
    model[1].mean.value += 1.0
    model[1].count.value += 1
    both.update(model)
    np.testing.assert_allclose(both.model[1].mean.value, 0.1 * jnp.ones(4), rtol=1e-6)
    assert both.model[1].count.value == 1  # a count has no average


def test_the_average_is_a_model():
    model = make()
    ema = rx.nn.EMA(model, 0.5)
    xs = jr.normal(KEY, (4, 3))
    evaluated = rx.nn.inference_mode(ema.model)
    want = jax.vmap(rx.nn.inference_mode(model))(xs)
    np.testing.assert_array_equal(jax.vmap(evaluated)(xs), want)
    for other in copy.deepcopy(ema), pickle.loads(pickle.dumps(ema)), rx.clone(ema):
        assert equal(other.model, model)
        assert other.model[0].weight.collection == "ema"
    model[0].weight.value *= 0
    ema.update(model)
    assert (jax.vmap(evaluated)(xs) != want).any()


def test_a_tied_weight_is_averaged_once_and_stays_tied():
    ref = rx.Ref(jnp.ones(2), "params")
    model = {"a": ref, "b": ref, "static": "x"}
    ema = rx.nn.EMA(model, 0.5)
    assert ema.model["a"] is ema.model["b"] is not ref
    ref.value *= 3
    ema.update(model)
    np.testing.assert_array_equal(ema.model["a"].value, [2.0, 2.0])


def test_swapping_twice_changes_nothing():
    model = rx.nn.Linear(3, 2, key=KEY)
    ema = rx.nn.EMA(model, 0.0)
    old, new = model.weight.value, model.weight.value + 1
    model.weight.value = new
    swap = rx.filter_jit(lambda ema, model: ema.swap(model))
    swap(ema, model)
    np.testing.assert_array_equal(model.weight.value, old)
    np.testing.assert_array_equal(ema.model.weight.value, new)
    ema.swap(model)
    np.testing.assert_array_equal(model.weight.value, new)
    np.testing.assert_array_equal(ema.model.weight.value, old)
    ema.update(model)  # of decay zero: a target that is set
    np.testing.assert_array_equal(ema.model.weight.value, new)


def test_it_runs_under_scan_and_for_an_ensemble():
    model = rx.nn.Linear(3, 2, key=KEY)
    by_hand, scanned = rx.nn.EMA(model, 0.9), rx.nn.EMA(model, 0.9)
    start = model.weight.value

    def body(both, x):
        model, ema = both
        model.weight.value += x
        ema.update(model)
        return both, None

    rx.scan(body, (model, scanned), jnp.arange(4.0))
    model.weight.value = start
    for x in jnp.arange(4.0):
        body((model, by_hand), x)
    np.testing.assert_allclose(
        scanned.model.weight.value, by_hand.model.weight.value, rtol=1e-6
    )

    models = rx.filter_vmap(lambda key: rx.nn.Linear(3, 2, key=key))(jr.split(KEY, 2))
    ema = rx.nn.EMA(models, 0.5)
    models.weight.value *= 3
    rx.filter_vmap(lambda ema, model: ema.update(model))(ema, models)
    np.testing.assert_allclose(
        ema.model.weight.value, models.weight.value * 2 / 3, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.complex64])
def test_an_average_has_the_dtype_of_its_value(dtype):
    ref = rx.Ref(jnp.ones(2, dtype), "params")
    ema = rx.nn.EMA([ref], jnp.array(0.5))
    ref.value *= 3
    ema.update([ref])
    assert ema.model[0].dtype == dtype
    np.testing.assert_array_equal(ema.model[0].value, 2 * jnp.ones(2, dtype))


def test_another_model_is_refused():
    model = rx.nn.Linear(3, 2, key=KEY)
    ema = rx.nn.EMA(model, 0.9)
    message = "another structure than the one that the average was made from.*rx.clone"
    for other in (
        make(),
        rx.nn.Linear(3, 2, use_bias=False, key=KEY),
        rx.snapshot(model),
    ):
        for call in ema.update, ema.swap:
            with raises(rx.StructureError, match=message):
                call(other)
    wide = rx.nn.Linear(4, 2, key=KEY)
    with pytest.raises((rx.RefTypeError, rx.StructureError, ValueError, TypeError)):
        ema.update(wide)
    assert equal(ema.model, model)
    ema.update(rx.clone(model))  # the remedy
    rx.nn.EMA(wide, 0.9).update(wide)


def test_wrong_arguments_are_errors():
    model = rx.nn.Linear(3, 2, key=KEY)
    with raises(rx.StructureError, match="selects no ref.*nothing to average"):
        rx.nn.EMA(model, 0.9, wrt=False)
    with raises(ValueError, match="between 0 and 1, but was 99"):
        rx.nn.EMA(model, 99)
