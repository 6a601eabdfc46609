"""`filter_grad` and `filter_value_and_grad`, by reference."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from raising import raises

import refx_eqx as rx


def make_model():
    shared = rx.Ref(jnp.array([1.0, 2.0]), "params")
    return {
        "count": rx.Ref(jnp.array(0), "counts"),
        "encoder": shared,
        "mean": rx.Ref(jnp.zeros(2), "batch_stats"),
        "tied": [shared, "text"],
    }


def loss(model, x):
    model["count"].value += 1
    model["mean"].value = (model["mean"].value + model["encoder"].value * x) / 2
    return jnp.sum(model["encoder"].value * x * model["tied"][0].value)


x = jnp.array([3.0, 5.0])


@pytest.mark.parametrize("wrap", [lambda f: f, rx.filter_jit], ids=["eager", "jit"])
def test_a_shared_ref_has_one_gradient_and_the_state_is_written(wrap):
    model = make_model()
    value, grads = wrap(rx.filter_value_and_grad(loss))(model, x)
    assert value == 23.0
    assert jnp.array_equal(grads["encoder"].value, jnp.array([6.0, 20.0]))
    assert isinstance(grads["tied"][0], rx.Index) and grads["tied"][1] is None
    assert grads["count"].value is None and jnp.all(grads["mean"].value == 0)
    inexact = eqx.filter(rx.deref(model), eqx.is_inexact_array)
    assert jax.tree.structure(grads) == jax.tree.structure(inexact)
    assert model["count"].value == 1
    assert jnp.array_equal(model["mean"].value, jnp.array([1.5, 5.0]))
    assert type(model["mean"].value) is type(x)  # no tracer
    assert model["tied"][0] is model["encoder"]


def test_a_written_ref_that_is_read_again_carries_its_derivative():
    w = rx.Ref(jnp.array(3.0), "params")

    @rx.filter_grad
    def f(w):
        w.value = w.value**2
        return w.value**2

    assert f(w).value == 4 * 27.0
    assert w.value == 9.0  # the value, without its tangent


def test_wrt_narrows():
    model = make_model()
    for wrt in (
        "params",
        rx.path("encoder", "tied.0"),
        lambda r: r is model["encoder"],
    ):
        grads = rx.filter_grad(loss, wrt=wrt)(model, x)
        assert jnp.array_equal(grads["encoder"].value, jnp.array([6.0, 20.0]))
        assert grads["mean"].value is None
    with raises(rx.StructureError, match="at all of its places or at none"):
        rx.filter_grad(loss, wrt=rx.path("encoder"))(model, x)


def test_aux_may_be_anything_refs_included():
    model = make_model()

    @rx.filter_value_and_grad(has_aux=True, wrt="params")
    def f(model, *, x):
        return loss(model, x), {"same": model["encoder"], "new": rx.Ref(x), "n": 3}

    (value, aux), grads = f(model, x=x)
    assert value == 23.0 and aux["n"] == 3 and aux["same"] is model["encoder"]
    assert jnp.array_equal(aux["new"].value, x)
    assert grads["mean"].value is None
    grads, aux = rx.filter_grad(lambda m: (jnp.sum(m.value), "aux"), has_aux=True)(
        rx.Ref(x)
    )
    assert aux == "aux" and jnp.all(grads.value == 1)


def test_bare_arrays_and_values_that_are_trees():
    tree = {
        "bare": jnp.array(2.0),
        "ref": rx.Ref({"a": jnp.array(3.0), "n": jnp.array(1), "f": jnp.sin}),
        "n": 4,
    }

    def f(tree):
        value = tree["ref"].value
        return tree["bare"] * value["f"](value["a"]) * tree["n"]

    grads = rx.filter_grad(f)(tree)
    assert grads["bare"] == 4 * jnp.sin(3.0) and grads["n"] is None
    inside = grads["ref"].value
    assert inside["a"] == 8 * jnp.cos(3.0)
    assert inside["n"] is None and inside["f"] is None


def test_numbers_of_python_in_refs():
    rate, count = rx.Ref(0.5), rx.Ref(2)

    def f(refs):
        rate, count = refs
        count.value += 1
        return rate.value**2 if rate.value > 0 else rate.value

    for wrap in (lambda f: f, rx.filter_jit):
        branch = wrap is not rx.filter_jit
        g = wrap(rx.filter_grad(f if branch else lambda refs: refs[0].value ** 2))
        of_rate, of_count = g([rate, count])
        assert of_rate.value == 1.0 and of_count.value is None
    assert count.value == 3 and rate.value == 0.5


def test_complex_arrays():
    w = rx.Ref(jnp.array(1.0 + 2.0j))
    assert rx.filter_grad(lambda w: w.value**2, holomorphic=True)(w).value == 2 + 4j
    assert rx.filter_grad(lambda w: jnp.abs(w.value) ** 2)(w).value == 2 - 4j


def test_methods_closures_and_keywords():
    class Model(rx.Module):
        w: rx.Param[jax.Array]
        uses: rx.Ref[jax.Array] = rx.field(collection="counts")

        @rx.filter_grad
        def by_self(self, x):
            self.uses.value += 1
            return self.w.value * x

        def __call__(self, x, *, scale=1):
            self.uses.value += 1
            return self.w.value * x**2 * scale

    model = Model(jnp.array(2.0), jnp.array(0))
    assert model.by_self(jnp.array(3.0)).w.value == 3.0
    assert rx.filter_grad(model.__call__)(jnp.array(3.0)) == 12.0
    assert rx.filter_grad(model)(jnp.array(3.0), scale=2) == 24.0
    assert rx.filter_grad(lambda x: model(x))(jnp.array(3.0)) == 12.0
    assert model.uses.value == 4


def test_gradient_of_a_gradient():
    w, count = rx.Ref(jnp.array(2.0)), rx.Ref(jnp.array(0))

    def inner(w):
        count.value += 1
        return w.value**3

    def outer(w):
        return rx.filter_grad(inner)(w).value ** 2

    assert rx.filter_grad(outer)(w).value == 36 * 8.0
    assert count.value == 1 and w.value == 2.0


def test_against_equinox_on_plain_modules():
    linear = eqx.nn.MLP(2, "scalar", 3, 1, key=jax.random.key(0))

    def f(linear, x):
        return linear(x) ** 2

    ours = rx.filter_value_and_grad(f)(linear, x)
    theirs = eqx.filter_value_and_grad(f)(linear, x)
    assert eqx.tree_equal(ours, theirs, rtol=1e-6)


def test_a_constant_has_gradient_zero():
    assert rx.filter_grad(lambda w: 3.0)(rx.Ref(x)).value.tolist() == [0.0, 0.0]


def test_no_second_trace_under_jit(trace_counter):
    counted = trace_counter(loss)
    step = rx.filter_jit(rx.filter_grad(counted))
    step(make_model(), x)
    step(make_model(), x)
    assert counted.counter.count == 1
    untied = make_model()
    untied["tied"] = [rx.clone(untied["encoder"]), "text"]
    step(untied, x)
    assert counted.counter.count == 2


def test_what_is_refused():
    model = make_model()
    with raises(ValueError, match="`argnums` is not supported.*as a tuple"):
        rx.filter_grad(loss, argnums=1)
    with raises(TypeError, match="must return one scalar to differentiate. For"):
        rx.filter_grad(lambda m: (jnp.array(1.0), 2))(model)
    with raises(TypeError, match="`filter_grad.*must return a pair"):
        alone: Any = lambda m: jnp.array(1.0)
        rx.filter_grad(alone, has_aux=True)(model)
    with raises(TypeError, match="first argument, which must be passed by pos"):
        untyped: Any = rx.filter_grad(loss)
        untyped(model=model, x=x)
    # The remedy of the first.
    _, of_x = rx.filter_grad(lambda both: loss(*both))((model, x))
    assert jnp.array_equal(of_x, model["encoder"].value ** 2)
    assert model["count"].value == 1


def test_a_failure_writes_nothing():
    model = make_model()

    def fails(model):
        loss(model, x)
        raise RuntimeError("no")

    with raises(RuntimeError, match="no"):
        rx.filter_grad(fails)(model)
    assert model["count"].value == 0


@pytest.mark.parametrize("number", [3.0, np.float32(3.0)], ids=["python", "numpy"])
def test_what_is_made_of_a_number_is_an_array(number):
    """JAX hands a number over to an eager derivative as a number of its own kind."""
    w, copy = rx.Ref(number, "params"), rx.Ref(0.0)

    def loss(w):
        copy.value = w.value
        return w.value**2, jax.lax.stop_gradient(w.value)

    grads, aux = rx.filter_grad(loss, has_aux=True)(w)
    assert grads.value == 6.0 and aux == copy.value == 3.0
    assert isinstance(copy.value, jax.Array) and isinstance(aux, jax.Array)
    assert w.value is number  # nothing has written it
