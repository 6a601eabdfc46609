"""`rx.nn.EMA`: a model that follows another."""

# A static checker objects to what is wrong on purpose here, or made at run time.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

import copy
import functools
import pickle
import types
from typing import Any

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


class Scale(rx.Module):
    """Holds its weight directly, and in a function."""

    w: rx.Param[jax.Array]
    f: Any


def by_weight(w, x):
    return w[...] * x


def in_partial(w):
    return functools.partial(by_weight, w)


def in_closure(w):
    return lambda x: by_weight(w, x)


def in_bound_method(w):
    return types.MethodType(by_weight, w)


HOLDERS = [in_partial, in_closure, in_bound_method]


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_function_of_the_average_holds_the_average(holder):
    w = rx.Ref(jnp.ones(2), "params")
    model = Scale(w, holder(w))
    ema = rx.nn.EMA(model, 0.5)

    def step(model, ema):
        model.w.value *= 9.0
        ema.update(model)

    for run, average in (step, 5.0), (rx.filter_jit(step), 43.0):
        run(model, ema)
        np.testing.assert_array_equal(ema.model.w.value, [average] * 2)
        np.testing.assert_array_equal(ema.model.f(1.0), [average] * 2)
        np.testing.assert_array_equal(model.f(1.0), model.w.value)
    assert len(rx.aliases(ema.model)) == 1
    ema.swap(model)
    np.testing.assert_array_equal(model.f(1.0), [43.0, 43.0])
    np.testing.assert_array_equal(ema.model.f(1.0), [81.0, 81.0])


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_ref_that_only_a_function_holds_is_averaged(holder):
    w = rx.Ref(jnp.ones(2), "params")
    model = {"f": holder(w)}
    ema = rx.nn.EMA(model, 0.5)
    w.value = jnp.full(2, 9.0)
    ema.update(rx.clone(model))
    np.testing.assert_array_equal(ema.model["f"](1.0), [5.0, 5.0])
    (average,) = rx.aliases(ema.model)
    assert average.collection == "ema" and average.dtype == jnp.float32
    with raises(rx.MismatchError, match="neither the model.*nothing at `f"):
        ema.update({"f": None})


NEITHER = "neither the model that the average was made from nor a copy of it"
REMEDY = (
    r".*by `rx.clone`; for another model.*make another.*`rx.nn.EMA\(model, decay\)`"
)


def check_is_refused(ema, other, message, error=rx.MismatchError):
    """Neither method takes `other`, nothing changes, and the remedy runs."""
    before = rx.snapshot((ema, other))
    for call in ema.update, ema.swap:
        with raises(error, match=f"(?s){NEITHER}.*{message}{REMEDY}"):
            call(other)
    assert eqx.tree_equal(before, rx.snapshot((ema, other)))
    another = rx.nn.EMA(other, 0.9, wrt=True)
    another.update(other)
    another.update(rx.clone(other))


def test_another_model_is_refused():
    model = rx.nn.Linear(3, 2, key=KEY)
    ema = rx.nn.EMA(model, 0.9)
    check_is_refused(ema, make(), "JAX says of the root of the tree")
    other = rx.nn.Linear(3, 2, use_bias=False, key=KEY)
    check_is_refused(ema, other, "JAX says of the root of the tree")
    with raises(
        rx.MismatchError, match=NEITHER + r".*`weight` it has f32\[2,3\], and not"
    ):
        ema.update(rx.snapshot(model))
    ema.update(model)
    ema.update(rx.clone(model))


def test_a_model_of_other_shapes_or_dtypes_is_refused():
    one = rx.nn.Linear(3, 2, key=KEY)
    many = rx.filter_vmap(lambda key: rx.nn.Linear(3, 2, key=key))(jr.split(KEY, 4))
    holds = r"Its `weight` \(collection 'params'\) at `weight` holds "
    text = holds + r"f32\[4,2,3\], and the average of it is f32\[2,3\]"
    check_is_refused(rx.nn.EMA(one, 0.5), many, text)
    text = holds + r"f32\[2,3\], and the average of it is f32\[4,2,3\]"
    check_is_refused(rx.nn.EMA(many, 0.5), one, text)
    x = jnp.ones(2)
    ema = rx.nn.EMA([rx.Ref(x, "params")], 0.5)
    for value in x.astype(jnp.bfloat16), jnp.ones(2, int), jnp.ones(3), 1.0, (x, x):
        check_is_refused(ema, [rx.Ref(value, "params")], "at `0` holds")
    ema = rx.nn.EMA([rx.Ref({"a": x}, "params")], 0.5)
    check_is_refused(ema, [rx.Ref({"b": x}, "params")], "at `0` holds")


def test_a_model_of_other_collections_is_refused():
    x = jnp.ones(2)
    model = {"w": rx.Ref(x, "params"), "n": rx.Ref(x, "counts")}
    ema = rx.nn.EMA(model, 0.5)
    for name in model:
        other = model | {name: rx.Ref(x, "other")}
        check_is_refused(
            ema, other, f"`{name}`.*'other'.*instead of a ref of collection"
        )
    check_is_refused(ema, ema.model, "'ema'.*of collection 'params'")


def test_a_model_of_other_ties_is_refused():
    w = rx.Ref(jnp.ones(2), "params")
    tied, untied = {"a": w, "b": w}, {"a": w, "b": rx.clone(w)}
    check_is_refused(
        rx.nn.EMA(tied, 0.5), untied, "two refs at `a` and `b`, instead of one"
    )
    check_is_refused(
        rx.nn.EMA(untied, 0.5), tied, "one ref at `a` and `b`, instead of two"
    )


def test_options_in_a_value_are_those_of_the_model():
    model = {"drop": rx.Ref(eqx.nn.Dropout(0.5), "params"), "w": rx.Ref(1.0, "params")}
    ema = rx.nn.EMA(model, 0.5)
    model["drop"].value = eqx.nn.Dropout(0.25)
    model["w"].value = 3.0
    ema.update(model)
    assert ema.model["drop"].value.p == 0.25
    assert isinstance(ema.model["drop"].value.p, float)
    np.testing.assert_array_equal(ema.model["w"].value, 2.0)


def test_a_number_and_an_array_are_of_one_type():
    ref = rx.Ref(1.0, "params")
    ema = rx.nn.EMA([ref], 0.5)
    for value in 3.0, jnp.array(3.0), np.float32(3.0):
        ref.value = value
        ema.update([ref])
    assert ema.model[0].dtype == jnp.float32
    np.testing.assert_array_equal(ema.model[0].value, 2.75)


def test_wrong_arguments_are_errors():
    model = rx.nn.Linear(3, 2, key=KEY)
    with raises(rx.StructureError, match="selects no ref.*nothing to average"):
        rx.nn.EMA(model, 0.9, wrt=False)
    for decay in 99, -0.1, float("nan"), jnp.array(3.0), np.array([0.5, 2.0]):
        with raises(ValueError, match="between 0 and 1, but was"):
            rx.nn.EMA(model, decay)
    for decay in "0.5", None, 0.5j, jnp.array(0.5 + 1j), KEY:
        with raises(TypeError, match="`decay` must be a real number"):
            rx.nn.EMA(model, decay)


def test_a_decay_is_checked_in_a_trace_if_its_value_is_known():
    model, known = [rx.Ref(jnp.ones(2), "params")], jnp.array(3.0)
    with raises(ValueError, match="between 0 and 1, but was"):
        rx.filter_jit(lambda model: rx.nn.EMA(model, known))(model)
    rx.filter_jit(rx.nn.EMA)(model, known)


def test_an_array_decay_of_each_model_of_an_ensemble():
    models = [rx.Ref(jnp.ones((2, 3)), "params")]
    ema = rx.nn.EMA(models, jnp.array([0.0, 0.5]))
    models[0].value *= 3
    rx.filter_vmap(lambda ema, model: ema.update(model))(ema, models)
    np.testing.assert_array_equal(ema.model[0].value[:, 0], [3.0, 2.0])
