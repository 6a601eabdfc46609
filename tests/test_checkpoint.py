"""`filter_checkpoint` is exact: value, gradient and final refs are those of the bare function."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from raising import raises

import refx_eqx as rx


def make_model():
    shared = rx.Ref(jnp.array([0.3, -0.7]), "params")
    return {
        "w": shared,
        "tied": shared,
        "mean": rx.Ref(jnp.zeros(2), "batch_stats"),
        "count": rx.Ref(jnp.array(0), "counts"),
    }


def body(model, x):
    model["count"].value += 1
    model["mean"].value = 0.5 * model["mean"].value + model["w"].value * x
    return jnp.sum(jnp.sin(model["tied"].value * x) * model["mean"].value)


def values(model):
    return {key: ref.value for key, ref in model.items()}


def twice(fn):
    return lambda model, x: fn(model, x) + fn(model, x)


x = jnp.array([1.0, 2.0])


@pytest.mark.parametrize("wrap", [lambda f: f, rx.filter_jit], ids=["eager", "jit"])
@pytest.mark.parametrize("inner", [lambda f: f, rx.filter_jit], ids=["bare", "jitted"])
def test_value_gradient_and_refs_equal_those_of_the_function(wrap, inner):
    results = []
    for fn in (body, rx.filter_checkpoint(inner(body))):
        model = make_model()
        value, grads = wrap(rx.filter_value_and_grad(twice(fn)))(model, x)
        results.append((value, rx.snapshot(values(model)), jax.tree.leaves(grads)))
        assert model["w"] is model["tied"] and model["count"].value == 2
    a, b = results
    assert eqx.tree_equal(a, b, rtol=1e-6, atol=1e-6)


def test_called_without_a_gradient_it_is_the_function():
    model, other = make_model(), make_model()
    assert jnp.allclose(rx.filter_checkpoint(body)(model, x), body(other, x))
    assert eqx.tree_equal(values(model), values(other), rtol=1e-6)


def test_gradient_of_gradient():
    def second(fn):
        model = make_model()

        def inner(w):
            model["w"].value = w
            return fn(model, x)

        def squared(w):
            (g,) = jax.tree.leaves(rx.filter_grad(inner)(w))
            return jnp.sum(g**2)

        return rx.filter_grad(squared)(jnp.array([0.3, -0.7])), values(model)

    plain, checkpointed = second(body), second(rx.filter_checkpoint(body))
    assert eqx.tree_equal(plain, checkpointed, rtol=1e-5)
    assert checkpointed[1]["count"] == 1


def test_the_recomputation_is_there():
    model = make_model()
    policy = jax.checkpoint_policies.everything_saveable

    def n_sines(fn):
        step: Any = rx.filter_jit(rx.filter_value_and_grad(fn))
        lowered = step.lower(model, x)
        return lowered.as_text().count("stablehlo.sine")

    assert n_sines(rx.filter_checkpoint(body)) == n_sines(body) + 1
    assert n_sines(rx.filter_checkpoint(body, policy=policy)) == n_sines(body)


def test_no_second_trace_for_equal_structure(trace_counter):
    counted = trace_counter(body)
    checkpointed = rx.filter_checkpoint(counted)
    checkpointed(make_model(), x)
    assert counted.counter.count == 1
    checkpointed(make_model(), x)
    rx.filter_checkpoint(counted)(make_model(), x)
    assert counted.counter.count == 1
    untied = make_model()
    untied["tied"] = rx.clone(untied["w"])
    checkpointed(untied, x)
    assert counted.counter.count == 2


def test_as_a_decorator_with_arguments_on_a_method():
    class Model(rx.Module):
        w: rx.Param[jax.Array]
        uses: rx.Ref[jax.Array] = rx.field(collection="counts")

        @rx.filter_checkpoint(prevent_cse=False)
        def __call__(self, x):
            self.uses.value += 1
            return self.w.value * x

    model = Model(jnp.array(2.0), jnp.array(0))
    grads = rx.filter_grad(lambda m, x: m(x))(model, jnp.array(3.0))
    assert grads.w.value == 3.0 and model.uses.value == 1


def test_refs_reached_by_closure_only():
    w, count = rx.Ref(jnp.array(2.0)), rx.Ref(jnp.array(0))

    @rx.filter_checkpoint
    def f(x):
        count.value += 1
        return w.value * x**2

    assert rx.filter_grad(f)(jnp.array(3.0)) == 12.0
    assert count.value == 1
    w.value = jnp.array(1.0)
    assert f(jnp.array(3.0)) == 9.0 and count.value == 2


def test_under_vmap_the_mapped_refs_stay_mapped():
    model = {"w": rx.Ref(jnp.arange(3.0)), "count": rx.Ref(jnp.zeros(3))}

    @rx.filter_checkpoint
    def f(model, x):
        model["count"].value += x
        return model["w"].value ** 2 * x

    def loss(model, xs):
        return jnp.sum(rx.filter_vmap(f)(model, xs))

    grads = rx.filter_grad(loss, wrt=lambda r: r is model["w"])(model, jnp.ones(3))
    assert jnp.array_equal(grads["w"].value, 2 * jnp.arange(3.0))
    assert jnp.array_equal(model["count"].value, jnp.ones(3))


def test_scalars_of_python_in_refs():
    rate, count = rx.Ref(0.5), rx.Ref(1)

    @rx.filter_checkpoint
    def f(x):
        count.value += 1
        return rate.value * x

    assert rx.filter_grad(f)(jnp.array(3.0)) == 0.5
    assert count.value == 2


def test_a_failure_writes_nothing():
    model = make_model()

    @rx.filter_checkpoint
    def f(model):
        model["count"].value += 1
        raise RuntimeError("no")

    with raises(RuntimeError, match="no"):
        f(model)
    assert model["count"].value == 0


def test_a_ref_reached_by_a_global_name_is_refused():
    outer = rx.Ref(jnp.array(1.0), "params")
    namespace: dict[str, Any] = {"outer": outer}
    exec("def f(x):\n    return outer.value * x", namespace)
    with raises(rx.TraceLevelError, match="body of `filter_checkpoint`.*global"):
        rx.filter_checkpoint(namespace["f"])(jnp.array(1.0))
    # The remedy: pass it.
    f = rx.filter_checkpoint(lambda outer, x: outer.value * x)
    assert f(outer, jnp.array(2.0)) == 2.0
