"""An `eqx.nn.State` in a ref, which a layer consumes: `out, ref.value = layer(x, ref.value)`."""

import copy
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from raising import raises

import refx_eqx as rx


X = jnp.arange(3.0)


def make():
    linear = eqx.nn.Linear(3, 3, key=jr.key(0))
    make_norm = eqx.nn.make_with_state(eqx.nn.SpectralNorm)
    return make_norm(linear, "weight", key=jr.key(1))


def step(norm, ref, x):
    out, ref.value = norm(x, ref.value)
    return out


def by_grad(norm, ref, x):
    def loss(x):
        out = step(norm, ref, x)
        return jnp.sum(out), out

    return rx.filter_grad(loss, has_aux=True)(x)[1]


WAYS = {
    "eager": step,
    "jit": rx.filter_jit(step),
    "donate": rx.filter_jit(step, donate="refs"),
    "checkpoint": rx.filter_checkpoint(step),
    "grad": by_grad,
    "vmap": lambda *args: rx.filter_vmap(lambda _: step(*args))(X)[0],
    "scan": lambda *args: rx.scan(lambda c, _: (c, step(*args)), 0, length=1)[1][0],
    "cond": lambda *args: rx.cond(True, lambda: step(*args), lambda: args[-1]),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_new_state_replaces_the_consumed_one(way):
    norm, state = make()
    ref = rx.Ref(make()[1], "batch_stats")
    for k in range(4):  # the later ones by a plan
        out, state = norm(X + k, state)
        assert jnp.allclose(WAYS[way](norm, ref, X + k), out)
        assert rx.tree_equal(ref.value, state, rtol=1e-5)


class Normed(rx.Module):
    norm: eqx.nn.SpectralNorm
    state: rx.Ref[eqx.nn.State] = rx.field(collection="batch_stats")

    def __call__(self, x):
        return step(self.norm, self.state, x)


@pytest.mark.parametrize("transform", [lambda fn: fn, rx.filter_jit])
def test_a_declared_ref_takes_the_new_state(transform):
    norm, state = make()
    model = Normed(norm, make()[1])
    call = transform(lambda model, x: model(x))
    for k in range(3):
        out, state = norm(X + k, state)
        assert jnp.allclose(call(model, X + k), out)
    with raises(rx.RefTypeError, match="`Normed.state`"):
        model.state.value = X  # type: ignore[assignment]


@pytest.mark.parametrize("transform", [lambda fn: fn, rx.filter_jit])
def test_a_state_in_a_dict_is_replaced_in_place(transform):
    norm, state = make()
    ref = rx.Ref({"norm": make()[1], "count": jnp.array(0)})

    def in_place(ref, x):
        out, ref.value["norm"] = norm(x, ref.value["norm"])
        ref.value["count"] += 1
        return out

    call = transform(in_place)
    for k in range(3):
        out, state = norm(X + k, state)
        assert jnp.allclose(call(ref, X + k), out)
    assert ref.value["count"] == 3


def consumed(value=lambda state: state):
    norm, state = make()
    _, new = norm(X, state)
    ref = rx.Ref(value(make()[1]), "batch_stats")
    norm(X, jax.tree.leaves(ref.value, is_leaf=lambda x: type(x) is eqx.nn.State)[0])
    return ref, value(new)


@pytest.mark.parametrize(
    "value", [lambda state: state, lambda state: (state, jnp.ones(2))]
)
def test_a_consumed_state_can_always_be_replaced(value):
    ref, new = consumed(value)
    assert "~old~" in repr(ref)
    ref.value = new
    ref, new = consumed(value)
    rx.update_refs(ref, rx.Ref(new, "batch_stats"))
    assert rx.tree_equal(ref.value, new)
    ref, new = consumed(value)
    ref.value = 0
    assert ref.value == 0


def test_a_consumed_state_cannot_be_carried():
    norm, _ = make()
    ref, new = consumed()
    double = rx.filter_jit(lambda ref: jax.tree.map(lambda x: 2 * x, ref.value))
    match = (
        "Cannot carry an unnamed ref .*batch_stats.*consumed by a layer.* returns: `out"
    )
    by_name = lambda ref: rx.state_dict({"ref": ref})
    doors = (
        double,
        by_name,
        rx.deref,
        rx.clone,
        rx.snapshot,
        copy.deepcopy,
        pickle.dumps,
    )
    for door in doors:
        with raises(rx.StructureError, match=match):
            door(ref)
    with raises(rx.StructureError, match="Cannot write .*: the new value holds"):
        ref.value = (ref.value, 1.0)
    with raises(ValueError, match="Attempted to use old state"):
        norm(X, ref.value)  # type: ignore[arg-type]
    ref.value = new
    _, ref.value = norm(X, ref.value)  # the remedy
    double(ref)


def test_a_consumed_state_under_mutable():
    norm, state = make()
    ref = rx.Ref({"norm": state})
    with raises(rx.ImmutableError, match="was changed in place, and has been restored"):
        with rx.mutable(False):
            norm(X, ref.value["norm"])
    norm(X, ref.value["norm"])


def test_a_program_notices_a_state_that_left_its_mesh():
    auto = (AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("x",), auto, devices=jax.devices()[:2])
    there = NamedSharding(mesh, PartitionSpec())
    norm, state = make()
    ref = rx.Ref(jax.device_put(state, there))

    @rx.filter_jit
    def double(ref):
        ref.value = jax.tree.map(lambda x: 2 * x, ref.value)

    for _ in range(3):
        double(ref)
        assert jax.tree.leaves(ref.value)[0].sharding == there
    norm(X, ref.value)  # consumes it
    ref.value = state
    double(ref)
    assert jax.tree.leaves(ref.value)[0].devices() == {jax.devices()[0]}
