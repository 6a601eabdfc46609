"""A ref that holds an Equinox module: its Python numbers are options, as in Equinox."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

import refx_eqx as rx


class Scaled(eqx.Module):
    weight: jax.Array
    power: int
    rate: float

    def __call__(self, x):
        return self.rate * (self.weight * x) ** self.power


def scaled():
    return Scaled(jnp.array(2.0), 2, 0.5)


@pytest.mark.parametrize("inference", [True, False])
def test_dropout_in_a_ref(inference):
    ref = rx.Ref({"drop": eqx.nn.Dropout(0.5, inference=inference), "n": 0})
    x, key = jnp.ones(4), jax.random.key(0)

    def call(ref, x, key):
        ref.value = {**ref.value, "n": ref.value["n"] + 1}
        return ref.value["drop"](x, key=key)

    expected = ref.value["drop"](x, key=key)
    assert jnp.array_equal(rx.filter_jit(call)(ref, x, key), expected)
    assert ref.value["n"] == 1  # outside of the module a number is state
    out, _ = rx.scan(lambda x, _: (call(ref, x, key), None), x, length=1)
    assert jnp.array_equal(out, expected)
    assert ref.value["drop"].inference is inference and ref.value["n"] == 2


def test_another_option_is_another_program():
    ref = rx.Ref(scaled())
    call = rx.filter_jit(lambda ref, x: ref.value(x))
    for power in (2, 3, 2):
        ref.value = eqx.tree_at(lambda m: m.power, ref.value, power)
        for _ in range(3):
            assert call(ref, 1.0) == 0.5 * 2.0**power


def test_an_option_may_be_written_inside():
    ref = rx.Ref(scaled())

    @rx.filter_jit
    def to_three(ref):
        ref.value = eqx.tree_at(lambda m: m.power, ref.value, 3)

    to_three(ref)
    assert ref.value.power == 3 and isinstance(ref.value.rate, float)


def test_an_option_has_no_gradient_as_in_equinox():
    ref = rx.Ref(scaled())
    loss = lambda ref: ref.value(1.0)
    grads = rx.filter_grad(loss)(ref)
    expected = eqx.filter_grad(lambda m: m(1.0))(ref.value)
    assert eqx.tree_equal(grads.value, expected)
    assert rx.filter_vmap(lambda x: ref.value(x))(jnp.ones(3)).shape == (3,)


def test_the_optimizer_trains_what_has_a_gradient():
    ref = rx.Ref(scaled(), "params")
    optimizer = rx.Optimizer(ref, optax.sgd(0.1), wrt="params")
    grads = rx.filter_grad(lambda ref: ref.value(1.0), wrt="params")(ref)
    optimizer.update(ref, grads)
    assert jnp.allclose(ref.value.weight, 2.0 - 0.1 * 2.0)
    assert ref.value.power == 2 and ref.value.rate == 0.5
