"""Equinox's own functions on modules of refs: a ref is a leaf, so all of them work."""

# A static checker objects to what is wrong on purpose here, or made at run time.
# pyright: reportAttributeAccessIssue=false

import copy
import io
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest
from jaxtyping import Array, Float
from raising import message_of, raises

import refx_eqx as rx


class Linear(rx.Module):
    weight: rx.Param[Float[Array, "out in"]]
    bias: rx.Param[Float[Array, "out"]] | None

    def __init__(self, n_in, n_out, *, use_bias=True, key):
        self.weight = jr.normal(key, (n_out, n_in))
        self.bias = jnp.zeros(n_out) if use_bias else None

    def __call__(self, x):
        y = self.weight[...] @ x
        return y if self.bias is None else y + self.bias[...]


class Pair(rx.Module):
    first: Linear
    second: Linear
    name: str = eqx.field(static=True, default="pair")

    def __call__(self, x):
        return self.second(self.first(x))


def make_pair(key=0):
    key1, key2 = jr.split(jr.key(key))
    return Pair(Linear(2, 2, key=key1), Linear(2, 2, key=key2))


def tie(pair):
    return eqx.tree_at(lambda p: p.second.weight, pair, pair.first.weight)


# eqx.tree_at


def test_tree_at_replaces_a_ref():
    pair = make_pair()
    new = rx.Ref(jnp.ones((2, 2)), "params")
    changed = eqx.tree_at(lambda p: p.first.weight, pair, new)
    assert changed.first.weight is new
    assert changed.second.weight is pair.second.weight
    assert pair.first.weight is not new


def test_tree_at_replaces_with_a_function_of_the_ref():
    pair = make_pair()

    def doubled(ref):
        return rx.Ref(2 * ref.value, ref.collection)

    changed = eqx.tree_at(lambda p: p.first.weight, pair, replace_fn=doubled)
    assert eqx.tree_equal(changed.first.weight.value, 2 * pair.first.weight.value)


def test_tree_at_replaces_a_submodule():
    pair = make_pair()
    changed = eqx.tree_at(lambda p: p.second, pair, pair.first)
    assert changed.second.weight is pair.first.weight
    assert changed.second.bias is pair.first.bias


def test_tree_at_ties_after_the_fact():
    tied = tie(make_pair())
    tied.first.weight.value = jnp.ones((2, 2))
    assert tied.second.weight[0, 0] == 1.0

    grads = rx.filter_grad(lambda p, x: jnp.sum(p(x)))(tied, jnp.ones(2))
    w = tied.first.weight.value
    by_hand = jax.grad(lambda w: jnp.sum(w @ (w @ jnp.ones(2))))(w)
    assert jnp.allclose(grads.first.weight.value, by_hand)
    assert isinstance(grads.second.weight, rx.Index)


def test_tree_at_unties():
    tied = tie(make_pair())
    copied = rx.Ref(tied.first.weight.value, "params")
    untied = eqx.tree_at(lambda p: p.second.weight, tied, copied)
    untied.first.weight.value = jnp.zeros((2, 2))
    assert jnp.any(untied.second.weight.value != 0)


def test_tree_at_finds_one_of_the_places_of_a_tied_ref():
    tied = tie(make_pair())
    new = rx.Ref(jnp.ones((2, 2)), "params")
    changed = eqx.tree_at(lambda p: p.second.weight, tied, new)
    assert changed.second.weight is new
    assert changed.first.weight is tied.first.weight


def test_tree_at_on_the_derefed_tree_changes_a_value():
    opened = rx.deref(make_pair())
    changed = eqx.tree_at(lambda p: p.first.weight.value, opened, jnp.ones((2, 2)))
    assert rx.reref(changed).first.weight[0, 0] == 1.0


def test_tree_at_fills_a_none():
    linear = Linear(2, 2, use_bias=False, key=jr.key(0))
    bias = rx.Ref(jnp.zeros(2), "params")
    changed = eqx.tree_at(lambda m: m.bias, linear, bias, is_leaf=lambda x: x is None)
    assert changed.bias is bias


# eqx.partition, combine, filter


def test_partition_and_combine_keep_refs_by_identity():
    model = tie(make_pair())
    params, rest = eqx.partition(model, rx.collection("params"))
    assert params.first.weight is params.second.weight is model.first.weight
    assert jax.tree.leaves(rest) == []
    assert eqx.combine(params, rest) == model


def test_partition_of_the_derefed_tree_takes_equinox_predicates():
    model = tie(make_pair())
    arrays, static = eqx.partition(rx.deref(model), eqx.is_array)
    assert len(jax.tree.leaves(arrays)) == 3  # one for the tied weight
    again = rx.reref(eqx.combine(arrays, static))
    assert again.first.weight is again.second.weight
    assert eqx.tree_equal(again.first.weight.value, model.first.weight.value)


def test_filter_selects_refs():
    class Counted(rx.Module):
        weight: rx.Param[Array]
        uses: rx.Ref[Array] = rx.field(collection="counts")

    model = Counted(jnp.ones(2), jnp.array(0))
    kept = eqx.filter(model, rx.collection("counts"))
    assert kept.weight is None and kept.uses is model.uses


# Printing


class Printed(rx.Module):
    weight: rx.Param[Float[Array, "3 2"]]
    tied: rx.Param[Float[Array, "3 2"]]
    plain: rx.Ref[int]


def test_tree_pformat_shows_shape_dtype_and_collection():
    weight = rx.Ref(jnp.zeros((3, 2)))
    printed = eqx.tree_pformat(Printed(weight, weight, 1))
    assert printed == (
        "Printed(\n"
        '  weight=Ref(f32[3,2], "params"), tied=Ref(f32[3,2], "params"), plain=Ref(1)\n'
        ")"
    )
    assert repr(weight) == 'Ref(f32[3,2], "params")'


def test_tree_pformat_shows_values_on_request():
    text = eqx.tree_pformat(rx.Ref(jnp.zeros(2), "params"), short_arrays=False)
    assert text.replace("\n", "") == 'Ref(Array([0., 0.], dtype=float32), "params")'


def test_tree_pformat_shows_a_subclass_and_any_collection():
    class Lora(rx.Ref):
        pass

    assert eqx.tree_pformat(Lora(1.0, ("a", 1))) == "Lora(1.0, ('a', 1))"


# eqx.nn


def test_inference_mode_keeps_refs():
    class Net(rx.Module):
        linear: Linear
        dropout: eqx.nn.Dropout

    net = Net(Linear(2, 2, key=jr.key(0)), eqx.nn.Dropout(0.5))
    frozen = eqx.nn.inference_mode(net)
    assert frozen.dropout.inference is True and net.dropout.inference is False
    assert frozen.linear.weight is net.linear.weight


def test_layers_of_equinox_inside_a_module_of_refs():
    class Net(rx.Module):
        scale: rx.Param[Float[Array, ""]]
        layer: eqx.nn.Linear

        def __call__(self, x):
            return self.scale[...] * self.layer(x)

    net = Net(jnp.array(2.0), eqx.nn.Linear(2, 2, key=jr.key(0)))
    x = jnp.ones(2)
    assert jnp.allclose(rx.filter_jit(net)(x), 2 * net.layer(x))
    grads = rx.filter_grad(lambda net, x: jnp.sum(net(x)))(net, x)
    assert jnp.allclose(grads.scale.value, jnp.sum(net.layer(x)))
    assert jnp.allclose(grads.layer.bias, 2.0)
    only_refs = rx.filter_grad(lambda net, x: jnp.sum(net(x)), wrt="params")(net, x)
    assert only_refs.layer.bias is None and only_refs.scale.value is not None


def test_as_refs_of_an_equinox_network_trains():
    mlp = eqx.nn.MLP(2, 1, 4, 1, key=jr.key(0))
    model = rx.as_refs(mlp, "params")
    assert model.layers[0].weight.name == "layers.0.weight"

    def loss(model, x):
        return jnp.sum(rx.snapshot(model)(x) ** 2)

    x = jnp.ones(2)
    grads = rx.filter_grad(loss)(model, x)
    by_hand = eqx.filter_grad(lambda mlp, x: jnp.sum(mlp(x) ** 2))(mlp, x)
    assert eqx.tree_equal(rx.snapshot(rx.reref(grads)).layers, by_hand.layers)


def test_a_tie_by_assignment_in_place_of_nn_shared():
    class Autoencoder(rx.Module):
        encoder: rx.Param[Float[Array, "n n"]]
        decoder: rx.Param[Float[Array, "n n"]]

        def __init__(self, key):
            self.encoder = jr.normal(key, (3, 3))
            self.decoder = self.encoder

        def __call__(self, x):
            return self.decoder[...].T @ (self.encoder[...] @ x)

    model = Autoencoder(jr.key(0))
    assert model.decoder is model.encoder
    assert rx.aliases(model) == {model.encoder: ("encoder", "decoder")}
    optimizer = optax.sgd(0.1)
    opt_state = optimizer.init(eqx.filter(rx.deref(model), eqx.is_array))
    grads = rx.filter_grad(lambda m, x: jnp.sum(m(x)))(model, jnp.ones(3))
    updates, _ = optimizer.update(grads, opt_state)
    new = eqx.apply_updates(rx.deref(model), updates)
    before = model.encoder.value
    rx.update_refs(model, new)
    assert jnp.allclose(model.decoder.value, before - 0.1 * grads.encoder.value)


# Updates and checkpoints


def test_apply_updates_on_the_derefed_tree():
    model = tie(make_pair())
    opened = rx.deref(model)
    ones = jax.tree.map(jnp.ones_like, eqx.filter(opened, eqx.is_array))
    updated = rx.reref(eqx.apply_updates(opened, ones))
    assert updated.first.weight is updated.second.weight
    expected = model.first.weight.value + 1
    assert eqx.tree_equal(updated.second.weight.value, expected)


@pytest.mark.parametrize("to_file", [False, True])
def test_serialise_and_deserialise_the_derefed_tree(to_file, tmp_path):
    model = tie(make_pair())
    file = tmp_path / "model.eqx" if to_file else io.BytesIO()
    eqx.tree_serialise_leaves(file, rx.deref(model))
    if isinstance(file, io.BytesIO):
        file.seek(0)
    like = rx.filter_eval_shape(lambda: tie(make_pair(1)))
    loaded = rx.reref(eqx.tree_deserialise_leaves(file, rx.deref(like)))
    assert eqx.tree_equal(rx.deref(loaded), rx.deref(model))
    assert loaded.first.weight is loaded.second.weight
    assert jnp.all(loaded(jnp.ones(2)) == model(jnp.ones(2)))


def test_deserialise_into_the_refs_of_a_model():
    saved, model = make_pair(), make_pair(1)
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, rx.deref(saved))
    file.seek(0)
    weight = model.first.weight
    rx.update_refs(model, eqx.tree_deserialise_leaves(file, rx.deref(model)))
    assert model.first.weight is weight
    assert eqx.tree_equal(weight.value, saved.first.weight.value)


def test_a_checkpoint_of_a_tree_that_is_not_derefed_is_refused():
    # Equinox leaves out what it takes for no array: the file would have no parameters.
    model = make_pair()
    with raises(RuntimeError, match="Error at leaf with path") as caught:
        eqx.tree_serialise_leaves(io.BytesIO(), model)
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, rx.TraceLevelError):
        error = error.__cause__
    assert error is not None
    assert "`Linear.weight` (collection 'params')" in message_of(error)
    assert "open the tree with `rx.deref` before it" in message_of(error)

    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, rx.deref(model))  # the remedy
    file.seek(0)
    with raises(RuntimeError, match="Error at leaf with path"):
        eqx.tree_deserialise_leaves(file, model)


# Comparing and checking


def test_tree_equal_compares_refs_by_identity_and_derefed_trees_by_value():
    model = tie(make_pair())
    other = rx.clone(model)
    assert eqx.tree_equal(model, model)
    assert not eqx.tree_equal(model, other)
    assert eqx.tree_equal(rx.deref(model), rx.deref(other))
    other.first.weight.value += 1
    assert not eqx.tree_equal(rx.deref(model), rx.deref(other))
    assert not eqx.tree_equal(rx.deref(model), rx.deref(make_pair()))  # not tied


def test_tree_check_allows_a_tied_ref():
    # It forbids one *node* at two places, which would be torn apart. A ref is a leaf.
    eqx.tree_check(tie(make_pair()))
    linear = Linear(2, 2, key=jr.key(0))
    with raises(ValueError, match="appears in the PyTree multiple times"):
        eqx.tree_check(Pair(linear, linear))
    eqx.tree_check(Pair(linear, jax.tree.map(lambda ref: ref, linear)))


def test_hash_and_equality_are_those_of_the_refs():
    model = make_pair()
    same = Pair(model.first, model.second)
    assert model == same and hash(model) == hash(same)
    assert model != rx.clone(model)


# Copies


def test_deepcopy_keeps_sharing_and_makes_new_refs():
    model = tie(make_pair())
    copied = copy.deepcopy(model)
    assert copied.first.weight is copied.second.weight
    assert copied.first.weight is not model.first.weight
    assert copied.first.weight.collection == "params"
    assert copied.first.weight.name == "Linear.weight"
    copied.first.weight.value += 1
    assert not eqx.tree_equal(copied.first.weight.value, model.first.weight.value)


def test_copy_shares_the_refs():
    model = make_pair()
    assert copy.copy(model).first.weight is model.first.weight


def test_pickle_keeps_values_sharing_collections_and_names():
    model = tie(make_pair())
    loaded = pickle.loads(pickle.dumps(model))
    assert eqx.tree_equal(rx.deref(loaded), rx.deref(model))
    assert loaded.first.weight is loaded.second.weight
    assert loaded.first.weight.name == "Linear.weight"
    loaded.first.weight.value = jnp.ones((2, 2))
    assert loaded.second.weight[0, 0] == 1.0


# Shapes


def test_filter_eval_shape_makes_a_model_without_its_memory():
    model = rx.filter_eval_shape(Linear, 3, 2, key=jr.key(0))
    assert model.weight.value == jax.ShapeDtypeStruct((2, 3), jnp.float32)
    assert model.weight.shape == (2, 3) and model.weight.collection == "params"


def test_equinox_filter_eval_shape_leaves_no_usable_tracer():
    # To it a ref is a leaf that is not an array, so a tracer stays inside.
    with jax.check_tracer_leaks(False):
        model = eqx.filter_eval_shape(Linear, 3, 2, key=jr.key(0))
    with raises(
        rx.TraceLevelError, match="eturn the ref from the transformed function"
    ):
        _ = model.weight.value


def test_equinox_transforms_say_what_to_use():
    model = make_pair()
    with raises(rx.TraceLevelError, match=r"`rx\.filter_jit`"):
        eqx.filter_jit(lambda m, x: m(x))(model, jnp.ones(2))
    with raises(rx.TraceLevelError, match=r"`rx\.filter_grad`"):
        eqx.filter_grad(lambda m, x: jnp.sum(m(x)))(model, jnp.ones(2))
    out = rx.filter_jit(lambda m, x: m(x))(model, jnp.ones(2))  # the remedy
    assert jnp.allclose(out, model(jnp.ones(2)))
    rx.filter_grad(lambda m, x: jnp.sum(m(x)))(model, jnp.ones(2))


def test_equinox_transforms_carry_the_derefed_tree():
    model = tie(make_pair())

    @eqx.filter_jit
    def call(opened, x):
        return rx.reref(opened)(x)

    assert jnp.allclose(call(rx.deref(model), jnp.ones(2)), model(jnp.ones(2)))
