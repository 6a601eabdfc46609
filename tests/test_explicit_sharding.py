"""Meshes with explicit axes, where the type of an array says how it is split."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax import P
from jax.sharding import AxisType, NamedSharding
from raising import raises

import refx_eqx as rx


if len(jax.devices()) < 4:
    pytest.skip("needs 4 devices", allow_module_level=True)

MESH = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)


def put(x: Any, *spec: Any) -> jax.Array:
    return jax.device_put(x, NamedSharding(MESH, P(*spec)))


def make(is_split: bool) -> tuple[dict[str, rx.Ref], jax.Array]:
    place = put if is_split else lambda x, *_: x
    weight = jr.normal(jr.key(0), (4, 2))
    model = {
        "w": rx.Ref(place(weight, None, "tensor"), "params"),
        "mean": rx.Ref(place(jnp.zeros(2), "tensor"), "batch_stats"),
        "n": rx.Ref(place(jnp.array(0)), "counts"),
    }
    return model, place(jr.normal(jr.key(1), (8, 4)), "data")


def forward(model, x):
    y = x @ model["w"].value
    model["mean"].value = 0.9 * model["mean"].value + 0.1 * jnp.mean(y, 0)
    model["n"].value += 1
    return y


def loss(model, x):
    return jnp.mean(forward(model, x) ** 2)


def repeated(model, x):
    step = lambda carry, _: (carry + loss(model, x), None)
    return rx.scan(step, jnp.array(0.0), length=3)[0]


def while_it_counts(model, x):
    def body(model):
        forward(model, x)
        return model

    rx.while_loop(lambda model: model["n"].value < 3, body, model)
    return model["mean"].value


def counted(model, x):
    return rx.fori_loop(0, 3, lambda i, y: y + loss(model, x), jnp.array(0.0))


def chosen(model, x):
    return rx.cond(model["n"].value < 3, loss, lambda model, x: jnp.zeros(()), model, x)


def trained(model, x):
    optimizer = rx.Optimizer(model, optax.sgd(1e-2, momentum=0.9))
    for _ in range(2):
        optimizer.update(model, rx.filter_grad(loss, wrt="params")(model, x))
    return model["w"].value


PROGRAMS = {
    "jit": forward,
    "grad": lambda model, x: rx.filter_grad(loss, wrt="params")(model, x)["w"].value,
    "checkpoint": lambda model, x: (
        rx.filter_grad(rx.filter_checkpoint(loss), wrt="params")(model, x)["w"].value
    ),
    "jvp": lambda model, x: rx.filter_jvp(forward, (model, x), (None, x))[1],
    "vjp": lambda model, x: rx.filter_vjp(lambda x: loss(model, x), x)[1](
        jnp.array(1.0)
    )[0],
    "vmap": lambda model, x: rx.filter_vmap(
        lambda model, x: x @ model["w"].value, in_axes=(None, 0)
    )(model, x),
    "scan": repeated,
    "map": lambda model, x: rx.map(lambda y: loss(model, y), jnp.stack([x, 2 * x])),
    "associative_scan": lambda model, x: rx.associative_scan(jnp.add, x, axis=1),
    "while_loop": while_it_counts,
    "fori_loop": counted,
    "cond": chosen,
    "Optimizer": trained,
}


@pytest.mark.parametrize("in_context", [True, False], ids=["set_mesh", "no context"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_gives_what_it_gives_on_one_device(name, in_context):
    program = rx.filter_jit(PROGRAMS[name])
    expected_model, x = make(is_split=False)
    expected = program(expected_model, x)
    model, x = make(is_split=True)
    types = {key: jax.typeof(ref.value) for key, ref in model.items()}
    if in_context:
        with jax.set_mesh(MESH):
            out = program(model, x)
    else:
        out = program(model, x)
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=1e-6)
    for key, ref in model.items():
        np.testing.assert_allclose(
            ref.value, expected_model[key].value, rtol=2e-5, atol=1e-6
        )
        assert jax.typeof(ref.value).sharding.spec == types[key].sharding.spec


def test_what_says_how_its_result_is_split_may_be_used_inside():
    model, x = make(is_split=True)

    @rx.filter_jit
    def step(model, x):
        mean = jnp.einsum("bi,io->o", x, model["w"].value, out_sharding=P("tensor"))
        model["mean"].value = jax.sharding.reshard(mean, P(None))

    with jax.set_mesh(MESH):
        step(model, x)
    assert model["mean"].value.sharding.is_fully_replicated


@pytest.mark.parametrize("is_jitted", [False, True])
def test_an_indexed_write_keeps_how_the_ref_is_split(is_jitted):
    def write(model):
        model["w"][0] = 1.0
        model["w"][1:3, 0] = 2.0
        model["mean"][1] = 3.0

    model, _ = make(is_split=True)
    (rx.filter_jit(write) if is_jitted else write)(model)
    assert jax.typeof(model["w"].value).sharding.spec == P(None, "tensor")
    assert np.asarray(model["w"].value)[:3, 0].tolist() == [1.0, 2.0, 2.0]
    assert model["mean"].value.tolist() == [0.0, 3.0]


@pytest.mark.parametrize("is_jitted", [False, True])
@pytest.mark.parametrize("in_context", [True, False], ids=["set_mesh", "no context"])
def test_randomness_is_split_along_an_axis_that_devices_share(is_jitted, in_context):
    def drop(rngs, x):
        return jnp.where(jr.bernoulli(rngs.dropout(), 0.5, x.shape), x, 0.0)

    mapped = rx.filter_vmap(drop, in_axes=(None, 0))
    mapped = rx.filter_jit(mapped) if is_jitted else mapped
    x = jnp.ones((8, 16))
    expected = mapped(rx.Rngs(0), x)
    if in_context:
        with jax.set_mesh(MESH):
            out = mapped(rx.Rngs(0), put(x, "data"))
    else:
        out = mapped(rx.Rngs(0), put(x, "data"))
    assert jax.typeof(out).sharding.spec == P("data", None)
    np.testing.assert_array_equal(out, expected)


def test_a_key_that_is_written_along_such_an_axis_is_the_first_one():
    def advance(key, x):
        key.value = jr.split(key.value)[0]
        return x * 2.0

    keys = []
    for x in (jnp.ones(8), put(jnp.ones(8), "data")):
        key = rx.Ref(jr.key(0), "rng")
        rx.filter_jit(rx.filter_vmap(advance, in_axes=(None, 0)))(key, x)
        keys.append(jr.key_data(key.value).tolist())
    assert keys[0] == keys[1]


def reshard_each_step(ref, spec):
    def step(carry, _):
        ref.value = jax.sharding.reshard(ref.value * 2.0, spec)
        return carry, None

    rx.scan(step, jnp.array(0.0), length=2)


def test_a_carried_ref_that_a_step_splits_otherwise_is_named_with_the_remedy():
    ref = rx.Ref(put(jnp.ones((4, 2)), "data"), "state")
    message = (
        r"`scan` carries .*\(collection 'state'\).*split by `P\('data', None\)` before.*"
        r"by `P\(None, 'tensor'\)` after.*jax.sharding.reshard\(x, P\('data', None\)\)"
    )
    with jax.set_mesh(MESH):
        with raises(rx.MismatchError, match=message):
            rx.filter_jit(reshard_each_step)(ref, P(None, "tensor"))
        rx.filter_jit(reshard_each_step)(ref, P("data", None))
    assert np.asarray(ref.value)[0, 0] == 4.0


def test_branches_that_split_a_ref_otherwise_are_refused():
    ref = rx.Ref(put(jnp.ones((4, 2)), "data"), "state")

    def gather(ref):
        ref.value = jax.sharding.reshard(ref.value, P(None))

    choose = rx.filter_jit(
        lambda ref: rx.cond(ref.value.sum() > 0, gather, lambda ref: None, ref)
    )
    with (
        jax.set_mesh(MESH),
        raises(rx.MismatchError, match=r"'state'\) is split over the mesh: it is"),
    ):
        choose(ref)


def test_a_stack_is_not_sliced_along_an_axis_that_devices_share():
    ref = rx.Ref(put(jnp.ones((4, 2)), "data"), "params")
    run = lambda ref: rx.scan(lambda c, r: (c + r.value, None), put(jnp.zeros(2)), ref)
    message = (
        r"`scan` slices .*'params'\) along axis 0.*'data'.*reshard\(x, P\(None, None\)"
    )
    with raises(rx.MismatchError, match=message):
        run(ref)
    ref.value = jax.sharding.reshard(ref.value, NamedSharding(MESH, P(None, None)))
    assert run(ref)[0].tolist() == [4.0, 4.0]


def test_shard_map_takes_the_specs_of_the_types():
    model, x = make(is_split=True)
    shapes = []

    def step(model, x):
        shapes.append((model["w"].shape, x.shape))
        model["w"].value = model["w"].value * 2.0
        model["n"].value += 1
        return x[:, :1] * 2.0

    sharded = rx.filter_shard_map(step, mesh=MESH, out_specs=P("data"))
    before = model["w"].value
    out = sharded(model, x)
    assert shapes == [((4, 1), (4, 4))] and out.shape == (8, 1)
    np.testing.assert_allclose(model["w"].value, 2 * np.asarray(before))
    assert jax.typeof(model["w"].value).sharding.spec == P(None, "tensor")


def test_specs_that_contradict_the_types_are_told_by_the_ref():
    model, x = make(is_split=True)
    message = r"\(collection 'batch_stats'\).*by `P\('data',?\)`.*the type of the array.*'tensor'"
    with raises(rx.MismatchError, match=message):
        rx.filter_shard_map(
            forward, mesh=MESH, in_specs=(P("data"), P("data")), out_specs=P("data")
        )(model, x)


def test_filter_shard_inside_changes_the_type():
    ref = rx.Ref(jnp.arange(4.0))

    @rx.filter_jit
    def split(ref):
        x = rx.filter_shard(ref.value, NamedSharding(MESH, P("data")))
        assert jax.typeof(x).sharding.spec == P("data")
        return 2.0 * x

    with jax.set_mesh(MESH):
        assert split(ref).tolist() == [0.0, 2.0, 4.0, 6.0]


def test_host_arrays_are_loaded_onto_the_mesh_outside_of_its_context(tmp_path):
    model, _ = make(is_split=True)
    model["keys"] = rx.Ref(put(jr.split(jr.key(0), 4), "data"), "rng")
    state = {k: np.asarray(x) for k, x in rx.state_dict(model).items()}
    rx.save(tmp_path / "model.safetensors", model)
    before = {k: ref.value.sharding for k, ref in model.items()}
    loads = (
        lambda: rx.load_state_dict(model, state),
        lambda: rx.load_state_dict(model, {**state, "n": 3}),
        lambda: rx.load(tmp_path / "model.safetensors", model),
    )
    for load in loads:
        load()
        assert {k: ref.value.sharding for k, ref in model.items()} == before
        with jax.set_mesh(MESH):
            load()
        assert {k: ref.value.sharding for k, ref in model.items()} == before


def test_a_loaded_array_does_not_share_memory_with_the_host():
    array = np.ones((4, 2), np.float32)
    ref = rx.Ref(put(jnp.zeros((4, 2)), "data"))
    rx.load_state_dict(ref, {"": array})
    array[0] = 5.0
    assert ref.value.max() == 1.0
