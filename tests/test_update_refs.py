"""`update_refs` writes all of the values of its source, or none of them."""

import functools
import operator
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from raising import message_of, raises

import refx_eqx as rx


class Linear(rx.Module):
    weight: rx.Param[jax.Array]
    count: rx.Ref[jax.Array] = rx.field(collection="counts")


def make(value=0.0):
    return Linear(jnp.full((2,), value), jnp.array(int(value)))


def test_from_a_tree_of_refs():
    target, source = make(0.0), make(1.0)
    weight = target.weight
    rx.update_refs(target, source)
    assert target.weight is weight
    assert target.weight.value is source.weight.value
    assert target.count.value == 1


def test_from_a_derefed_tree():
    target = make()
    rx.update_refs(target, rx.deref(make(1.0)))
    assert target.weight.value.tolist() == [1.0, 1.0]
    assert target.count.value == 1


def test_from_bare_values():
    target = make()
    rx.update_refs(target, rx.snapshot(make(1.0)))
    assert target.weight.value.tolist() == [1.0, 1.0]
    assert target.count.value == 1


@pytest.mark.parametrize("missing", [None, rx.NOTHING])
def test_none_and_nothing_mean_leave_it(missing):
    a, b = rx.Ref(1), rx.Ref(2)
    rx.update_refs([a, b], [missing, 5])
    assert (a.value, b.value) == (1, 5)


def test_from_a_part_of_a_partition():
    target, source = make(), make(1.0)
    params, _ = rx.partition(source, "params")
    rx.update_refs(target, params)
    assert target.weight.value.tolist() == [1.0, 1.0]
    assert target.count.value == 0


def test_from_a_path_keyed_partition():
    target = make()
    params = rx.get_partition(target, "params")
    rx.update_refs(params, jax.tree.map(lambda x: x + 1, rx.deref(params)))
    assert target.weight.value.tolist() == [1.0, 1.0]


def test_from_a_part_made_by_equinox():
    target, source = make(), make(1.0)
    opened = rx.deref(source)
    params, _ = eqx.partition(opened, rx.filter_spec(source, "params"))
    rx.update_refs(target, params)  # the counts are `Value(None)` there
    assert target.weight.value.tolist() == [1.0, 1.0]
    assert target.count.value == 0


def test_what_is_not_a_ref_stays():
    ref = rx.Ref(1)
    target = {"a": ref, "b": 2, "c": None}
    rx.update_refs(target, {"a": 5, "b": 7, "c": None})
    assert ref.value == 5 and target["b"] == 2


def test_a_shared_ref_is_written_once_through_its_value():
    ref = rx.Ref(1)
    rx.update_refs((ref, ref), (rx.Value(7, 0), rx.Index(0)))
    assert ref.value == 7


def test_an_index_stands_for_its_value_where_the_target_does_not_share():
    source = rx.Ref(5)
    a, b = rx.Ref(1), rx.Ref(2)
    rx.update_refs((a, b), rx.deref((source, source)))
    assert (a.value, b.value) == (5, 5)


def test_an_index_without_its_value_is_refused():
    a, b = rx.Ref(1), rx.Ref(2)
    with raises(
        rx.StructureError,
        match=(
            r"Index 3 of the source, at `1`, has no Value in it. Deref the whole source "
            "at once, or put `rx.NOTHING` there."
        ),
    ):
        rx.update_refs((a, b), (5, rx.Index(3)))
    assert (a.value, b.value) == (1, 2)
    rx.update_refs((a, b), (5, rx.NOTHING))  # the remedy
    assert (a.value, b.value) == (5, 2)


def test_a_derefed_target_is_refused():
    # Nothing could be written to it, in silence.
    target = make()
    with raises(
        rx.StructureError,
        match=(
            r"Cannot update refs: the target is derefed: it has a Value at `weight`. Pass "
            "the tree of refs itself."
        ),
    ):
        rx.update_refs(rx.deref(target), make(1.0))
    rx.update_refs(target, make(1.0))  # the remedy
    assert target.weight.value.tolist() == [1.0, 1.0]


def test_two_different_values_for_one_ref_are_refused():
    ref = rx.Ref(1, "params")
    with raises(
        rx.StructureError,
        match=(
            r"\(collection 'params'\) is one ref at `0` and `1` of the target, but the source has a different value at each. Give one of them at one place, and `rx.NOTHING` at "
            "the other."
        ),
    ):
        rx.update_refs((ref, ref), (5, 6))
    assert ref.value == 1
    rx.update_refs((ref, ref), (5, rx.NOTHING))  # the remedy
    assert ref.value == 5


def test_another_structure_is_refused():
    a, b = rx.Ref(1), rx.Ref(2)
    with raises(
        rx.StructureError,
        match=(
            r"target and source do not have the same structure. JAX says of the root of the "
            "tree: .*The source must be a tree aligned with the target"
        ),
    ):
        rx.update_refs([a, b], [5])
    assert (a.value, b.value) == (1, 2)


def test_the_place_of_another_structure_is_named():
    a, b = rx.Ref(1), rx.Ref(2)
    hold = lambda ref, x: functools.partial(max, ref, x)
    target = {"f": hold(b, [a, a]), "x": [a, None, (b, {"y": b})]}
    for source, where in [
        ({"f": hold(b, [a, a]), "x": [1, None, (2, {"z": 2})]}, "x.2.1"),
        ({"f": hold(b, [a, a]), "x": [1, 2, [2, {"y": 2}]]}, "x.2"),
        ({"f": hold(b, [a, a]), "x": [1, 2, 3]}, "x.2"),
        ({"f": hold(b, (a, a)), "x": rx.NOTHING}, "x"),
        ({"f": hold(b, (a, a)), "x": [1, None, (2, {"y": 2})]}, "f.args.1"),
    ]:
        with raises(rx.MismatchError, match=f"JAX says of `{re.escape(where)}`: "):
            rx.update_refs(target, source)
    assert (a.value, b.value) == (1, 2)


@pytest.mark.parametrize(
    "wrong",
    [
        jnp.zeros(3),  # shape
        jnp.zeros((2, 1)),
        jnp.zeros(2, jnp.int32),  # dtype
        jnp.zeros(2, jnp.float16),
        1.0,
        "x",
        (jnp.zeros(2), jnp.zeros(2)),
    ],
)
def test_another_shape_dtype_or_kind_is_refused_and_nothing_is_written(wrong):
    first, second = rx.Ref(jnp.ones(2)), rx.Ref(jnp.ones(2), "params")
    with raises(
        rx.StructureError,
        match=(
            r"\(collection 'params'\) at `1` holds f32\[2\], and the source has .*If the change is intended, write it: `ref.value = ...`."
        ),
    ):
        rx.update_refs([first, second], [jnp.zeros(2), rx.Value(wrong, 0, "params")])
    assert first.value.tolist() == [1.0, 1.0]
    second.value = wrong  # the remedy
    assert second.value is wrong


def test_a_scalar_of_python_keeps_its_kind():
    ref = rx.Ref(1.0)
    rx.update_refs(ref, jnp.array(2.0))
    assert ref.value == 2.0
    with raises(
        rx.StructureError, match=r"holds weak_f32\[\], and the source has weak_i32"
    ):
        rx.update_refs(ref, jnp.array(2))


def test_another_collection_is_refused():
    a, b = rx.Ref(1, "params"), rx.Ref(2, "params")
    with raises(
        rx.CollectionError,
        match=(
            r"at `1` the target has an unnamed ref \(collection 'params'\), but the source has collection 'counts'. Align the two trees"
        ),
    ):
        rx.update_refs([a, b], [rx.Ref(5, "params"), rx.Ref(6, "counts")])
    assert (a.value, b.value) == (1, 2)


def test_a_guarded_ref_leaves_all_unwritten():
    a, b = rx.Ref(1, "counts"), rx.Ref(2, "params")
    with rx.mutable("counts"), raises(rx.ImmutableError, match="Cannot write"):
        rx.update_refs([a, b], [5, 6])
    assert (a.value, b.value) == (1, 2)


def test_a_ref_of_another_trace_leaves_all_unwritten():
    outer = rx.Ref(jnp.array(1.0))

    def body(x):
        inner = rx.Ref(x)
        with raises(rx.TraceLevelError, match="Cannot mutate ref"):
            rx.update_refs([inner, outer], [x + 1, x + 1])
        assert inner.value is x
        return x

    jax.jit(body)(jnp.array(0.0))
    assert outer.value == 1.0


def test_a_nested_value_is_replaced_whole():
    ref = rx.Ref({"a": jnp.ones(2), "b": "relu"})
    rx.update_refs(ref, rx.Value({"a": jnp.zeros(2), "b": "relu"}, 0))
    assert ref.value["a"].tolist() == [0.0, 0.0]
    with raises(rx.StructureError, match="and the source has"):
        rx.update_refs(ref, rx.Value({"a": jnp.zeros(2)}, 0))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_number_goes_into_a_scalar_of_any_floating_type(dtype):
    ref = rx.Ref(jnp.array(1.0, dtype))
    rx.update_refs(ref, 2.0)
    assert ref.value == 2.0
    rx.update_refs(ref, jnp.array(3.0, dtype))
    assert ref.value == 3.0
    with raises(rx.StructureError, match="and the source has 2\\. If the"):
        rx.update_refs(ref, 2)


@pytest.mark.parametrize("new", [3, 2.5, True, jnp.array(3)])
def test_a_key_is_replaced_by_a_key_alone(new):
    ref = rx.Ref(jax.random.key(0), "rng")
    with raises(rx.MismatchError, match=r"`key` holds key<fry>\[\], and .*") as e:
        rx.update_refs({"key": ref}, {"key": new})
    assert "jnp.asarray" not in message_of(e.value)  # which makes no keys
    rx.update_refs({"key": ref}, {"key": jax.random.key(1)})
    assert ref.value == jax.random.key(1)


def plain_layers():
    layers = [eqx.nn.Linear(2, 2, key=jr.key(0)), eqx.nn.MLP(2, 2, 3, 1, key=jr.key(1))]
    return {"layers": layers, "scale": jnp.ones(2)}


def tied_layers():
    layer = rx.nn.Linear(2, 2, key=jr.key(0))
    return {"in": layer, "out": layer, "norm": rx.nn.BatchNorm(2)}


def functions():
    layer = rx.nn.Linear(2, 2, key=jr.key(0))
    shift, scale = rx.Ref(jnp.ones(2), "params"), jnp.ones(2)
    double = functools.partial(lambda layer, x: 2 * layer(x), layer)
    nested = lambda x, base=rx.Ref(jnp.zeros(2), "params"): (
        base[...] + double(x) * scale
    )
    return {"method": layer.__call__, "nested": nested, "f": lambda x: shift[...] + x}


MODELS = {
    "as_refs": lambda: rx.as_refs(plain_layers(), "params"),
    "layers": lambda: rx.nn.MLP(2, 2, 3, 1, key=jr.key(0)),
    "tied": tied_layers,
    "functions": functions,
    "module": lambda: make(1.0),
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def test_a_snapshot_restores_a_model(model):
    refs, before = list(rx.aliases(model)), rx.values(model)
    best = rx.snapshot(model)
    for ref in refs:
        ref.value = ref.value + 1
    rx.update_refs(model, best)
    assert list(rx.aliases(model)) == refs
    for old, ref in zip(before, refs):
        assert ref.dtype == old.dtype
        assert np.asarray(ref.value).tobytes() == np.asarray(old).tobytes()


@pytest.mark.parametrize("name", ["as_refs", "layers", "module"])
def test_gradients_of_a_snapshot_are_gradients_of_the_model(name):
    model = MODELS[name]()

    def loss(tree):
        arrays = eqx.filter(rx.snapshot(tree), eqx.is_inexact_array)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(arrays))

    grads = rx.filter_grad(loss, wrt="params")(model)
    of_snapshot = jax.tree.map(
        lambda x: jnp.cos(x) if eqx.is_inexact_array(x) else None, rx.snapshot(model)
    )

    def step(other, grads):
        rx.Optimizer(other, optax.sgd(0.1)).update(other, grads)

    for update in rx.apply_updates, step:
        one, two = rx.clone(model), rx.clone(model)
        update(one, of_snapshot)
        update(two, grads)
        assert rx.tree_equal(one, two, rtol=1e-6)
        assert not rx.tree_equal(one, model)


def test_tangents_and_cotangents_may_have_the_classes_of_a_snapshot():
    layer = rx.nn.Linear(2, 2, key=jr.key(0))
    ones = jax.tree.map(jnp.ones_like, rx.snapshot(layer))
    total = lambda layer: jnp.sum(layer(jnp.ones(2)))
    _, tangent = rx.filter_jvp(total, (layer,), (ones,))
    assert tangent == 6.0
    _, pullback = rx.filter_vjp(lambda layer: layer, layer)
    (cotangent,) = pullback(ones)
    assert cotangent.bias.value.tolist() == [1.0, 1.0]


def test_axes_and_shardings_may_have_the_classes_of_a_snapshot():
    keys = jr.split(jr.key(0), 3)
    stack = rx.filter_vmap(lambda key: rx.nn.Linear(2, 2, key=key))(keys)
    axes = jax.tree.map(lambda _: 0, rx.snapshot(stack))
    call = lambda layer, x: layer(x)
    out = rx.filter_vmap(call, in_axes=(axes, None))(stack, jnp.ones(2))
    assert (out == rx.filter_vmap(call, in_axes=(0, None))(stack, jnp.ones(2))).all()
    place = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    shardings = jax.tree.map(lambda _: place, rx.snapshot(stack))
    placed = rx.filter_shard(stack, shardings)
    assert [x.sharding for x in rx.values(placed)] == [place, place]


def test_different_gradients_at_the_places_of_one_ref_are_to_be_added():
    model = tied_layers()
    grads = jax.tree.map(jnp.ones_like, rx.snapshot(model))
    with raises(
        rx.MismatchError, match="has a different value .* Give their sum at one"
    ):
        rx.apply_updates(model, grads)
    total = jax.tree.map(jnp.add, grads["in"], grads["out"])
    before = model["in"].bias.value
    nothing = jax.tree.map(lambda _: rx.NOTHING, grads)
    rx.apply_updates(model, {**nothing, "in": total})  # the remedy
    assert (model["out"].bias.value == before + 2).all()


def test_a_function_without_gradient_stays_unchanged():
    model = functions()
    before = rx.values(model)
    rx.apply_updates(model, {"method": None, "nested": None, "f": rx.NOTHING})
    assert all(map(operator.is_, rx.values(model), before))
    wrong = {**model, "f": lambda x: x}
    with raises(rx.MismatchError, match=r"function at `f` carries \['shift'\], and is"):
        rx.update_refs(model, wrong)


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs 2 devices")
def test_an_array_that_jax_may_move_goes_where_the_ref_is():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    there = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    keys = jr.split(jr.key(0), 2)
    for old, new in (jnp.zeros(2), jnp.ones(2)), (keys, jr.split(jr.key(1), 2)):
        for sharding in split, there:
            ref = rx.Ref(jax.device_put(old, sharding))
            rx.update_refs({"a": ref}, {"a": new})
            assert ref.value.sharding == sharding and (ref.value == new).all()
        # One that was put somewhere stays there.
        ref = rx.Ref(jax.device_put(old, split))
        rx.update_refs(ref, jax.device_put(new, there))
        assert ref.value.sharding == there
