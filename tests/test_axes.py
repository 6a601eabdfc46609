"""Axes of refs, and refs that a mapped argument and the function both reach."""

# A static checker objects to what is wrong on purpose here, or made at run time.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import functools
import pickle
import re
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from jaxtyping import Array, Float
from raising import message_of, raises

import refx_eqx as rx


class Layer(rx.Module):
    weight: rx.Param[jax.Array]
    calls: rx.Ref[jax.Array] = rx.field(collection="cache")

    def __init__(self, key):
        self.weight = jr.normal(key, (3, 3))
        self.calls = jnp.zeros(())

    def __call__(self, x):
        self.calls.value += jnp.sum(x)
        return jnp.tanh(self.weight[...] @ x)


class Deep(rx.Module):
    """Uses its own layers, in each of the ways of doing so, and its own scale too."""

    layers: Layer
    scale: rx.Param[jax.Array]
    way: str = eqx.field(static=True)

    def __init__(self, key, way="scan"):
        self.layers = rx.filter_vmap(Layer)(jr.split(key, 4))
        self.scale = jnp.array(0.5)
        self.way = way

    def step(self, x, layer):
        return layer(x) * self.scale[...], None

    def one(self, layer):
        return layer(jnp.ones(3)) * self.scale[...]

    def __call__(self, x):
        if self.way == "scan":
            return rx.scan(
                lambda x, layer: (layer(x) * self.scale[...], None), x, self.layers
            )[0]
        if self.way == "scan of a method":
            return rx.scan(self.step, x, self.layers)[0]
        if self.way == "filter_vmap":
            return rx.filter_vmap(lambda layer: layer(x) * self.scale[...])(self.layers)
        if self.way == "filter_vmap of a method":
            return rx.filter_vmap(self.one)(self.layers) + x[None]
        batch_size = {"map": None, "map in batches": 3}[self.way]
        return rx.map(self.one, self.layers, batch_size=batch_size) + x[None]


WAYS = [
    "scan",
    "scan of a method",
    "filter_vmap",
    "filter_vmap of a method",
    "map",
    "map in batches",
]


def by_hand(weights, scale, x, way):
    """The same in a Python loop over plain arrays: the result, and what each layer adds to
    its cache."""
    added, outs = [], []
    for weight in weights:
        into = x if way == "filter_vmap" or "scan" in way else jnp.ones(3)
        added.append(jnp.sum(into))
        out = jnp.tanh(weight @ into) * scale
        if "scan" in way:
            x = out
        outs.append(out)
    if "scan" in way:
        return x, jnp.stack(added)
    out = jnp.stack(outs)
    return (out if way == "filter_vmap" else out + x[None]), jnp.stack(added)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_method_maps_its_own_layers(way, jit):
    model, x = Deep(jr.key(0), way), jnp.arange(3.0)
    call = rx.filter_jit(lambda model, x: model(x)) if jit else lambda m, x: m(x)
    weights, scale = model.layers.weight.value, model.scale.value
    expected, added = by_hand(weights, scale, x, way)
    for i in range(1, 3):
        np.testing.assert_allclose(call(model, x), expected, rtol=1e-5)
        np.testing.assert_allclose(model.layers.calls.value, i * added, rtol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_of_a_method_that_maps_its_own_layers(way):
    model, x = Deep(jr.key(0), way), jnp.arange(3.0)
    grads = rx.filter_grad(lambda model: jnp.sum(model(x)), wrt="params")(model)

    def loss(weights, scale):
        return jnp.sum(by_hand(weights, scale, x, way)[0])

    of_weights, of_scale = jax.grad(loss, (0, 1))(
        model.layers.weight.value, model.scale.value
    )
    np.testing.assert_allclose(grads.layers.weight.value, of_weights, rtol=1e-4)
    np.testing.assert_allclose(grads.scale.value, of_scale, rtol=1e-4)


class Blocks(rx.Module):
    """Blocks, each of which scans its own layers. All of it is reached in each step."""

    blocks: Deep
    scale: rx.Param[jax.Array]

    def __init__(self, key):
        self.blocks = rx.filter_vmap(Deep)(jr.split(key, 2))
        self.scale = jnp.array(2.0)

    def __call__(self, x):
        def step(x, block):
            inner = lambda x, layer: (layer(x) * self.scale[...], None)
            return rx.scan(inner, block(x), block.layers)[0], None

        return rx.scan(step, x, self.blocks)[0]


@pytest.mark.parametrize("jit", [False, True])
def test_nested(jit):
    model, x = Blocks(jr.key(0)), jnp.arange(3.0)
    expected, added = x, []
    for weights, scale in zip(model.blocks.layers.weight[...], model.blocks.scale[...]):
        expected, first = by_hand(weights, scale, expected, "scan")
        expected, second = by_hand(weights, model.scale[...], expected, "scan")
        added.append(first + second)
    call = rx.filter_jit(lambda model, x: model(x)) if jit else lambda m, x: m(x)
    np.testing.assert_allclose(call(model, x), expected, rtol=1e-5)
    np.testing.assert_allclose(model.blocks.layers.calls[...], jnp.stack(added), 1e-4)
    grads = rx.filter_grad(lambda model: jnp.sum(model(x)), wrt="params")(model)
    assert grads.blocks.layers.weight.value.shape == (2, 4, 3, 3)


def test_a_second_call_does_not_trace_again(trace_counter):
    counted = trace_counter(Deep.step)
    model = Deep(jr.key(0))
    for _ in range(3):
        rx.scan(functools.partial(counted, model), jnp.ones(3), model.layers)
        model.layers.weight.value = 2 * model.layers.weight.value
    rx.scan(functools.partial(counted, Deep(jr.key(1))), jnp.ones(3), model.layers)
    assert counted.counter.count == 2  # and again for another sharing


@pytest.mark.parametrize("touch", ["read", "write", "shape", "nested"])
def test_the_whole_of_what_is_mapped_is_withheld_and_the_remedies_run(touch):
    model, x = Deep(jr.key(0)), jnp.ones(3)
    before = rx.snapshot(model)

    def step(x, layer):
        weight = model.layers.weight
        if touch == "read":
            return weight[...][0] @ x, None
        if touch == "write":
            weight.value = jnp.zeros((4, 3, 3))
        if touch == "shape":
            assert weight.shape
        # What is reached only is carried further, and is withheld there too.
        return rx.cond(x[0] > 0, lambda: weight[...][0] @ x, lambda: x), None

    message = r"`Layer.weight` \(collection 'params'\): `scan` maps it along axis 0, and passes the function a slice of it, in `xs` at `weight`.*Use the slice.*read that before"
    with raises(rx.TraceLevelError, match=message):
        rx.scan(step, x, model.layers)
    assert eqx.tree_equal(rx.snapshot(model), before)

    whole = model.layers.weight.value
    out, _ = rx.scan(lambda x, layer: (whole[0] @ layer(x), None), x, model.layers)
    assert out.shape == (3,)


def test_what_is_only_reachable_goes_through_every_inner_transform():
    model, x = Deep(jr.key(0)), jnp.ones(3)
    weights, scale = model.layers.weight.value, model.scale.value

    def step(x, layer):
        # Each closes over the model, and so over all of its layers.
        loss = lambda layer, x: jnp.sum(layer(x) * model.scale[...])
        grads = rx.filter_grad(loss, wrt="params")(layer, x)
        inner = rx.filter_jit(lambda x: x * model.scale[...])
        kept = rx.filter_checkpoint(lambda x: inner(x) + model.scale[...])
        batch = rx.filter_vmap(lambda x: x * model.scale[...])(kept(x))
        x = rx.cond(x[0] > 0, lambda: batch, lambda: -batch)
        model.scale.value = model.scale[...] + 1.0
        return x, (grads.weight.value, repr(model.layers.weight))

    x, (grads, text) = rx.scan(step, x, model.layers)
    assert text == 'Ref(withheld, "params")' and model.scale.value == scale + 4.0
    y = jnp.ones(3)
    for weight, grad in zip(weights, grads):
        expected = jax.grad(lambda w, y: jnp.sum(jnp.tanh(w @ y) * scale))(weight, y)
        np.testing.assert_allclose(grad, expected, rtol=1e-5)
        y = (y * scale + scale) * scale
        y = jnp.where(y[0] > 0, y, -y)
        scale += 1.0
    np.testing.assert_allclose(x, y, rtol=1e-5)


def test_a_module_may_be_made_of_what_is_withheld():
    class Typed(rx.Module):
        weight: rx.Param[Float[Array, "out in"]]

    model = Deep(jr.key(0))

    def step(x, layer):
        made = Typed(model.layers.weight)  # not checked: it has another rank
        assert repr(made.weight) == 'Ref(withheld, "params")'
        with raises(rx.TraceLevelError, match="maps it along axis 0"):
            made.weight.value  # noqa: B018
        return layer(x), None

    rx.scan(step, jnp.ones(3), model.layers)


def test_what_is_only_reachable_may_be_returned_and_is_the_caller_s():
    model = Deep(jr.key(0))
    _, out = rx.filter_vmap(lambda layer: (layer.weight[...], model))(model.layers)
    assert out.layers.weight is model.layers.weight


def remedy_of(run, kind=rx.axes):
    """The option that the message for a ref with two axes, or two specs, suggests."""
    with pytest.raises(rx.MismatchError, match="met .* with two") as caught:
        run()
    assert "if_array" not in message_of(caught.value)
    (code,) = re.findall(
        r"(?:may be|same `in_\w+`,) `(.*)`\.$", message_of(caught.value)
    )
    return eval(code, {"rx": rx, "P": jax.P})


@pytest.mark.parametrize("key", ["layers", "a.b", "[*]"])
def test_an_argument_that_gives_the_ref_another_axis_is_still_refused(key):
    model = Deep(jr.key(0))
    tree = {key: model.layers, "scale": model.scale}
    x = jnp.ones(3)

    def run(axes, of_layers=eqx.if_array(0)):
        f = lambda tree, x, layer: layer(x) * tree["scale"].value
        return rx.filter_vmap(f, in_axes=(axes, None, of_layers))(tree, x, model.layers)

    message = r"two axes: None in argument 0 at .*weight.*, 0 in argument 2 at `weight`"
    with raises(rx.MismatchError, match=message):
        run(None)
    expected = rx.filter_vmap(lambda layer: layer(x) * model.scale[...])(model.layers)
    for axes in (None, rx.axes(params=None, cache=0)):
        out = run(remedy_of(lambda axes=axes: run(axes)))
        np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_two_arguments_with_one_ref_are_told_to_agree():
    ref, key = rx.Ref(jnp.ones((3, 3)), "state"), rx.Ref(jr.key(0), "rng")
    run = lambda axes: rx.filter_vmap(lambda a, b: a.value.sum(), in_axes=axes)(
        ref, ref
    )
    assert run((0, remedy_of(lambda: run((0, 1))))).tolist() == [3.0, 3.0, 3.0]
    draw = lambda axes: rx.filter_vmap(
        lambda a, b, x: jr.normal(a.value), in_axes=(axes, rx.axes(rng=None), 0)
    )(key, key, jnp.ones(3))
    assert len(set(draw(remedy_of(lambda: draw(None))).tolist())) == 1

    def of_one_tree(axes):
        f = lambda two: two[0].value.sum()
        return rx.map(f, (ref, ref), in_axes=axes)

    with raises(rx.MismatchError, match="give `1` in `xs` the same `in_axes`, `0`"):
        of_one_tree((0, None))
    assert of_one_tree((0, 0)).tolist() == [3.0, 3.0, 3.0]
    value = rx.Ref({"a": jnp.ones((3, 2)), "b": jnp.ones((2, 3))})
    by_size = lambda x: x.shape.index(3) if hasattr(x, "shape") else None
    with raises(rx.MismatchError, match="two axes: one for each array in argument 0"):
        rx.filter_vmap(lambda a, b: 0, in_axes=(by_size, None))(value, value)


def test_a_function_with_a_ref_of_another_axis_is_named():
    model, x = Deep(jr.key(0)), jnp.ones(3)
    weight = model.layers.weight
    functions = {"f": lambda: weight}

    def run(axes):
        f = lambda functions, layer: functions["f"]()[...] @ x
        return rx.filter_vmap(f, in_axes=(axes, 0))(functions, model.layers)

    axes = rx.axes(params=1, default=None)
    with raises(rx.MismatchError, match="1 in argument 0 at `f`, 0 in argument 1"):
        run(axes)
    assert run(remedy_of(lambda: run(axes))).shape == (4, 3)


def test_a_ref_that_is_sliced_is_not_carried_but_may_be_closed_over():
    model, x = Deep(jr.key(0)), jnp.ones(3)

    def step(carry, layer):
        model, x = carry
        return (model, layer(x) * model.scale[...]), None

    message = (
        "None in the carry at `0.layers.weight`, 0 in `xs` at `weight`.*close over"
    )
    with raises(rx.MismatchError, match=message):
        rx.scan(step, (model, x), model.layers)
    out, _ = rx.scan(
        lambda x, layer: (step((model, x), layer)[0][1], None), x, model.layers
    )
    assert out.shape == (3,)


# --- Axes within one value, of functions, of results. ---


def test_arrays_of_one_value_on_different_axes_come_out_on_theirs():
    value = {"a": jnp.arange(6.0).reshape(3, 2), "b": jnp.arange(6.0).reshape(2, 3)}
    by_size = lambda x: None if not hasattr(x, "shape") else x.shape.index(3)
    xs = jnp.arange(3.0)

    def f(value, x):
        return {"a": value["a"] + x, "b": value["b"] * x}

    axes = {"a": 0, "b": 1}
    expected = jax.vmap(f, in_axes=(axes, 0), out_axes=axes)(value, xs)

    def g(ref, x):
        ref.value = f(ref.value, x)

    for run in [
        lambda ref: rx.filter_vmap(g, in_axes=(by_size, 0))(ref, xs),
        lambda ref: rx.scan(
            lambda c, x: (c, g(*x)), None, (ref, xs), in_axes=(by_size, 0)
        ),
        lambda ref: rx.map(lambda x: g(*x), (ref, xs), in_axes=(by_size, 0)),
        lambda ref: rx.map(
            lambda x: g(*x), (ref, xs), in_axes=(by_size, 0), batch_size=2
        ),
    ]:
        ref = rx.Ref(value)
        run(ref)
        assert eqx.tree_equal(ref.value, expected)


def test_a_value_of_which_a_part_is_mapped():
    by_size = lambda x: 0 if jnp.shape(x) == (3,) else None
    ref = rx.Ref({"a": jnp.zeros(3), "b": jnp.ones(2)}, "state")

    def f(ref, x):
        ref.value = {"a": ref.value["a"] + x, "b": ref.value["b"]}

    rx.filter_vmap(f, in_axes=(by_size, 0))(ref, jnp.arange(3.0))
    assert ref.value["a"].tolist() == [0.0, 1.0, 2.0]
    assert ref.value["b"].tolist() == [1.0, 1.0]
    message = r"'state'.*holds arrays that `scan` slices, and others that it does not"
    with raises(rx.StructureError, match=message + ".*into a separate ref"):
        rx.scan(lambda c, x: (c, f(*x)), None, (ref, jnp.ones(3)), in_axes=(by_size, 0))
    a, b = rx.Ref(ref.value["a"]), rx.Ref(ref.value["b"])  # the remedy

    def g(c, x):
        a.value, b.value = a.value + x[1], b.value + x[1]
        return c, None

    rx.scan(lambda c, x: (c, x[0].value), None, (a, jnp.ones(3)))
    rx.scan(g, None, (b, jnp.ones(3)), in_axes=(None, 0))
    assert b.value.tolist() == [4.0, 4.0]


def test_a_write_of_another_structure_where_there_are_several_axes_is_refused():
    by_size = lambda x: x.shape.index(3)
    ref = rx.Ref({"a": jnp.zeros((3, 2)), "b": jnp.zeros((2, 3))}, "state")

    def f(ref, x):
        ref.value = x

    with raises(rx.StructureError, match=r"'state'.*the axes \[0, 1\].*Keep"):
        rx.filter_vmap(f, in_axes=(by_size, 0))(ref, jnp.ones(3))
    ref.value = {"a": jnp.zeros((3, 2))}  # one axis
    rx.filter_vmap(f, in_axes=(by_size, 0))(ref, jnp.ones(3))
    assert ref.value.tolist() == [1.0] * 3


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_slice_of_another_rank(axis):
    ref, xs = rx.Ref(jnp.zeros((3, 3)), "state"), jnp.arange(3.0)

    def f(ref, x):
        ref.value = x

    for run in [
        lambda: rx.filter_vmap(f, in_axes=(axis, 0))(ref, xs),
        lambda: rx.scan(lambda c, x: (c, f(*x)), None, (ref, xs), in_axes=(axis, 0)),
        lambda: rx.map(lambda x: f(*x), (ref, xs), in_axes=(axis, 0), batch_size=2),
    ]:
        ref.value = jnp.zeros((3, 3))
        if axis != 1:
            run()
            assert ref.value.tolist() == [0.0, 1.0, 2.0]
            continue
        message = (
            "'state'.*along axis 1, but was written with a value of rank 0.*axis 0"
        )
        with raises(rx.StructureError, match=message):
            run()
        assert ref.shape == (3, 3)


def test_a_ref_that_holds_nothing_is_mapped():
    xs = jnp.arange(3.0)

    def f(ref, x):
        ref.value = x + jnp.zeros(2)

    for axis, shape in [(0, (3, 2)), (1, (2, 3)), (eqx.if_array(0), (3, 2))]:
        ref = rx.Ref(None)
        rx.filter_vmap(f, in_axes=(axis, 0))(ref, xs)
        assert ref.shape == shape
        ref = rx.Ref(None)
        rx.scan(lambda c, x: (c, f(*x)), None, (ref, xs), in_axes=(axis, 0))
        assert ref.shape == shape


def test_in_axes_of_a_function_are_those_of_what_it_closes_over():
    ref, xs = rx.Ref(jnp.arange(6.0).reshape(2, 3), "state"), jnp.ones(3)
    bias = jnp.arange(3.0)

    def add(x):
        ref.value = ref.value + x
        return x

    call = lambda f, x: f(x)
    for axes in [1, rx.axes(state=1), rx.axes(default=1)]:
        ref.value = jnp.arange(6.0).reshape(2, 3)
        rx.filter_vmap(call, in_axes=(axes, 0))(add, jnp.arange(3.0))
        assert ref.value.tolist() == [[0.0, 2.0, 4.0], [3.0, 5.0, 7.0]]
    # A function is no array: by default what it closes over is broadcast.
    ref.value = jnp.zeros(2)
    for axes in [eqx.if_array(0), None, rx.axes(other=0, default=None)]:
        rx.filter_vmap(call, in_axes=(axes, None), axis_size=3)(add, jnp.array(1.0))
    assert ref.value.tolist() == [3.0, 3.0]
    partial = functools.partial(lambda ref, b, x: ref.value + b + x, ref, bias)
    out = rx.filter_vmap(call, in_axes=(rx.axes(state=None, default=0), 0))(partial, xs)
    assert out.tolist() == [[4.0, 4.0], [5.0, 5.0], [6.0, 6.0]]


def test_out_axes_of_functions():
    xs = jnp.arange(6.0).reshape(3, 2)

    def make(x):
        new = rx.Ref(x, "new")
        return x, functools.partial(lambda a, b: a + b, x), lambda: new

    for axes, shape in [(1, (2, 3)), (0, (3, 2)), (eqx.if_array(1), (2, 3))]:
        _, partial, closure = rx.filter_vmap(make, out_axes=(0, axes, axes))(xs)
        assert partial.args[0].shape == shape and closure().shape == shape
    out, *_ = rx.filter_vmap(make, out_axes=(1, 0, 0))(xs)
    assert out.shape == (2, 3)
    _, _, closure = rx.filter_vmap(make, out_axes=(0, 0, rx.axes(new=1)))(xs)
    assert closure().shape == (2, 3)


def test_an_out_axis_that_the_result_does_not_have_is_refused_by_name():
    xs = jnp.ones((3, 2))
    make = lambda x: {"new": rx.Ref(x.sum(), "new"), "x": x}
    message = (
        r"(\(collection 'new'\)), in the result at `new`, the axis 1, but .* is \(\)"
    )
    with raises(rx.MismatchError, match=message + ".*from -1 to 0"):
        rx.filter_vmap(make, out_axes=1)(xs)
    out = rx.filter_vmap(make, out_axes=rx.axes(new=0, default=1))(xs)
    assert out["new"].shape == (3,) and out["x"].shape == (2, 3)
    assert rx.filter_vmap(make, out_axes=-1)(xs)["x"].shape == (2, 3)
    with raises(
        rx.MismatchError, match="gives an array, in the result at `x`, the axis -3"
    ):
        rx.filter_vmap(make, out_axes={"new": 0, "x": -3})(xs)
    with raises(rx.MismatchError, match="gives an array, in the result at its root"):
        rx.filter_vmap(lambda x: x.sum(), out_axes=1)(xs)


def test_two_out_axes_for_one_new_ref_are_refused():
    xs = jnp.arange(6.0).reshape(3, 2)

    def make(x):
        new = rx.Ref(x, "new")
        return new, new

    message = r"gives an unnamed ref \(collection 'new'\) two axes, 0 and 1.*the same"
    with raises(rx.StructureError, match=message):
        rx.filter_vmap(make, out_axes=(0, 1))(xs)
    a, b = rx.filter_vmap(make, out_axes=1)(xs)
    assert a is b and a.shape == (2, 3)


def test_a_function_from_leaf_to_axis_may_tell_refs():
    refs = {"w": rx.Ref(jnp.ones(3), "params"), "n": rx.Ref(jnp.zeros(3), "counts")}

    def f(refs, x):
        assert refs["w"].shape == (3,) and refs["n"].shape == ()
        refs["n"].value += x

    def axis(leaf):
        if isinstance(leaf, rx.Ref) and leaf.collection == "params":
            return None
        return 0

    for by in [
        axis,
        lambda leaf: 0 if getattr(leaf, "collection", "counts") == "counts" else None,
        lambda leaf: {"params": None, "counts": 0}[leaf.collection],
        lambda leaf: 0 if leaf is refs["n"] else None,
    ]:
        refs["n"].value = jnp.zeros(3)
        rx.filter_vmap(f, in_axes=(by, 0))(refs, jnp.arange(3.0))
        assert refs["n"].value.tolist() == [0.0, 1.0, 2.0]
    # One that knows of arrays only is asked for the arrays in a ref.
    for by in [lambda x: 0 if eqx.is_array(x) else None, lambda x: 0, eqx.if_array(0)]:
        ref = rx.Ref({"a": jnp.zeros(3), "name": "a"})
        out = rx.filter_vmap(lambda ref: ref.value["a"], in_axes=by)(ref)
        assert out.shape == (3,)


class Frozen(rx.Ref):
    """For functions that look at the type of a ref."""


def by_collection(leaf):
    if rx.is_ref(leaf):
        return None if leaf.collection == "params" else 0
    return 0 if eqx.is_array(leaf) else None


def arrays_first(leaf):
    if eqx.is_array(leaf) or (rx.is_ref(leaf) and leaf.collection == "counts"):
        return 0
    return None


@functools.singledispatch
def by_type(leaf):
    return 0 if eqx.is_array(leaf) else None


@by_type.register
def _(leaf: rx.Ref):
    return 0 if leaf.collection == "counts" else None


FROZEN = Frozen(jnp.array([1.0, 2.0, 3.0]), "params")

# Of these only "params" is in the tree below: nothing answers other than `None` for a ref.
LOOK_AT_REFS = {
    "collection": by_collection,
    "arrays first": arrays_first,
    "no ref": lambda x: None if rx.is_ref(x) else 0 if eqx.is_array(x) else None,
    "ref type": lambda x: None if isinstance(x, Frozen) else eqx.if_array(0)(x),
    "dispatch": by_type,
    "class": lambda x: None if x.__class__ is Frozen else eqx.if_array(0)(x),
    "attribute": lambda x: {"params": None}.get(
        getattr(x, "collection", ""), eqx.if_array(0)(x)
    ),
    "filter": lambda x: None if rx.collection("params")(x) else eqx.if_array(0)(x),
    "set": lambda x: None if rx.is_ref(x) and x in {FROZEN} else eqx.if_array(0)(x),
    "equality": lambda x: None if rx.is_ref(x) and x == FROZEN else eqx.if_array(0)(x),
}


@pytest.mark.parametrize("axis", LOOK_AT_REFS.values(), ids=LOOK_AT_REFS)
def test_none_about_a_ref_is_obeyed_if_the_function_looks_at_refs(axis):
    xs = jnp.arange(3.0)
    total = lambda m, x: m["p"].value.sum() + x
    for tree in [{"p": FROZEN}, {"p": FROZEN, "n": rx.Ref(jnp.zeros(3), "counts")}]:
        for given in (axis, rx.axes(default=axis)):
            out = rx.filter_vmap(total, in_axes=(given, 0))(tree, xs)
            assert out.tolist() == [6.0, 7.0, 8.0]
            given = (given, 0)
            step = lambda c, x: (c, total(*x))
            _, out = rx.scan(step, None, (tree, xs), in_axes=given)
            assert out.tolist() == [6.0, 7.0, 8.0]
            out = rx.map(lambda x: total(*x), (tree, xs), in_axes=given)
            assert out.tolist() == [6.0, 7.0, 8.0]
    new = rx.filter_vmap(lambda x: Frozen(jnp.ones(3), "params"), out_axes=axis)(xs)
    assert new.shape == (3,)


@pytest.mark.parametrize(
    "axis",
    [
        eqx.if_array(0),
        lambda x: 0 if eqx.is_array(x) else None,
        lambda x: 0 if isinstance(x, jax.Array | np.ndarray) else None,
        lambda x: 0 if eqx.is_inexact_array(x) else None,
        lambda x: 0 if eqx.is_inexact_array_like(x) else None,
        lambda x: 0 if hasattr(x, "shape") and len(x.shape) == 1 else None,
        lambda x: 0 if x.ndim == 1 else None,
        lambda x: 0,
    ],
)
def test_a_function_that_knows_only_arrays_is_called_with_those_in_a_ref(axis):
    for value in [jnp.arange(3.0), [jnp.arange(3.0)]]:
        ref = rx.Ref(value, "params")
        for given in (axis, rx.axes(default=axis)):
            f = lambda ref: jnp.shape(jtu.tree_leaves(ref.value)[0])
            assert rx.filter_vmap(f, in_axes=given, out_axes=None)(ref) == ()


def test_the_error_of_a_function_that_looks_at_refs_is_its_own():
    axis = lambda leaf: {"params": None}[leaf.collection]
    with pytest.raises(KeyError, match="counts"):
        rx.filter_vmap(lambda ref: 0, in_axes=axis)(rx.Ref(jnp.ones(3), "counts"))


def test_a_function_from_leaf_to_axis_is_asked_about_the_refs_of_a_closure():
    weight, count = rx.Ref(jnp.ones(3), "params"), rx.Ref(jnp.zeros(3), "counts")
    xs = jnp.arange(3.0)

    def add(x):
        count.value += x
        return weight.value.sum()

    for axis in (by_collection, rx.axes(default=by_collection)):
        count.value = jnp.zeros(3)
        out = rx.filter_vmap(lambda f, x: f(x), in_axes=(axis, 0))(add, xs)
        assert out.tolist() == [3.0, 3.0, 3.0]
        assert count.value.tolist() == [0.0, 1.0, 2.0]


# --- State along the mapped axis. ---


class Cell(rx.Module):
    weight: rx.Param[Float[Array, "n n"]]
    h: rx.Ref[Float[Array, " n"]] = rx.field(collection="state")

    def __call__(self, x):
        self.h.value = jnp.tanh(self.weight[...] @ self.h[...] + x)
        return self.h[...]


def test_a_cell_keeps_a_state_for_each_element_of_a_batch():
    cell, xs = Cell(0.1 * jnp.ones((3, 3)), jnp.zeros(3)), jnp.ones((5, 8, 3))

    # Each message leads to the next, and the last to code that runs.
    with raises(rx.StructureError, match=r"map it.*rx.add_axis\(module, size, 'st"):
        rx.filter_vmap(cell)(xs[0])
    by_state = rx.axes(state=0, default=None)
    step = rx.filter_vmap(Cell.__call__, in_axes=(by_state, 0))
    with raises(rx.StructureError, match=r"different sizes.*`rx.add_axis"):
        step(cell, xs[0])
    with raises(rx.RefTypeError, match=r"To map over the ref.*rx.add_axis\(module"):
        cell.h.value = jnp.zeros((8, 3))

    cells = rx.add_axis(cell, 8, "state")
    assert cells.weight is cell.weight and cells.h is not cell.h

    def loss(cells, xs):
        _, hs = rx.scan(lambda cells, x: (cells, step(cells, x)), cells, xs)
        return jnp.sum(hs)

    value, grads = rx.filter_value_and_grad(loss, wrt="params")(cells, xs)

    def plain(weight, h):
        total = 0.0
        for x in xs:
            h = jnp.tanh(h @ weight.T + x)
            total += jnp.sum(h)
        return total, h

    weight = cell.weight.value
    (expected, h), grad = jax.value_and_grad(plain, has_aux=True)(
        weight, jnp.zeros((8, 3))
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(cells.h.value, h, rtol=1e-5)
    np.testing.assert_allclose(grads.weight.value, grad, rtol=1e-4)
    assert cell.h.value.tolist() == [0.0] * 3

    # It is as typed as before: by the type, and the axis on top of it.
    cells.h.value = jnp.zeros((8, 3))
    with raises(rx.RefTypeError, match="the sizes of the stack"):
        cells.h.value = jnp.zeros((7, 3))
    assert isinstance(rx.add_axis(cell, 2), rx.Batched[Cell, "b"])


def test_add_axis_keeps_sharing_and_splits_keys():
    shared = rx.Ref({"a": jnp.ones(2), "b": 1.0, "name": "x"}, "state")
    rngs = rx.Rngs(0)
    tree = rx.add_axis({"a": shared, "b": [shared], "rngs": rngs}, 4, axis=0)
    assert tree["a"] is tree["b"][0] and tree["a"].collection == "state"
    assert tree["a"].value["a"].shape == (4, 2) and tree["a"].value["b"].shape == (4,)
    assert tree["a"].value["name"] == "x"
    keys = rx.filter_vmap(lambda rngs: jr.uniform(rngs()))(tree["rngs"].default)
    assert len(set(keys.tolist())) == 4
    assert rx.add_axis(rx.Ref(jnp.ones(2)), 3, axis=-1).shape == (2, 3)


@pytest.mark.parametrize(
    "holder",
    [
        lambda call, ref: functools.partial(call, ref),
        lambda call, ref: lambda x: call(ref, x),
        lambda call, ref: types.MethodType(call, ref),
    ],
    ids=["partial", "closure", "bound_method"],
)
def test_add_axis_keeps_sharing_with_functions(holder):
    call = lambda ref, x: ref[...] * x
    ref, other = rx.Ref(jnp.ones(2), "state"), rx.Ref(jnp.ones(2), "params")
    tree = {"ref": ref, "f": holder(call, ref), "g": holder(call, other)}
    new = rx.add_axis(tree, 3, "state")
    assert list(rx.aliases(new).values()) == list(rx.aliases(tree).values())
    assert new["f"](1.0).shape == new["ref"].shape == (3, 2)
    new["ref"].value *= 5
    assert new["f"](1.0)[0, 0] == 5 and tree["f"](1.0)[0] == 1
    assert other in rx.aliases(new)  # it is not selected
    only = rx.add_axis(tree["f"], 3, "state")
    assert only(1.0).shape == (3, 2) and tree["f"](1.0).shape == (2,)


def test_add_axis_refuses_what_it_cannot_do():
    with raises(rx.StructureError, match=r"'state'\) an axis 2: its shape is \(\)"):
        rx.add_axis(rx.Ref(1.0, "state"), 3, axis=2)
    with raises(rx.StructureError, match="selects"):
        rx.add_axis({"x": jnp.ones(2)}, 3)
    with pytest.raises(TypeError):
        rx.add_axis(rx.Ref(1.0), 2.5)


def test_a_factory_under_plain_equinox_names_the_lifted_one():
    def factory(key):
        return rx.Ref(jr.normal(key, (2,)), "params")

    keys = jr.split(jr.key(0), 3)
    with jax.check_tracer_leaks(False):
        dead = eqx.filter_vmap(factory)(keys)
    with raises(rx.TraceLevelError, match=r"use the lifted.*`rx.filter_vmap`"):
        _ = dead.value
    assert rx.filter_vmap(factory)(keys).shape == (3, 2)


# --- What `rx.axes` takes. ---


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: rx.axes(params="0"), r"rx.axes\({'params': '0'}\).*an int, or `None`"),
        (lambda: rx.axes(params=0.0), "an axis must be an int"),
        (lambda: rx.axes(default=1.5), r"rx.axes\(default=1.5\)"),
        (lambda: rx.axes(by_collection=0), "give a mapping"),
        (lambda: rx.axes("params"), "give a mapping"),
    ],
)
def test_axes_that_are_none_are_refused(make, text):
    with raises(TypeError, match=text):
        make()


def test_axes_pickle():
    for axes in [rx.axes(params=0), rx.axes({rx.path("a"): 1}, default=None)]:
        again = pickle.loads(pickle.dumps(axes))
        assert again == axes and hash(again) == hash(axes) and repr(again) == repr(axes)
    with raises(rx.StructureError, match="does not give"):
        again = pickle.loads(pickle.dumps(rx.axes(params=0)))
        rx.filter_vmap(lambda x: x, in_axes=(again,))(jnp.ones(2))


def test_a_key_that_matches_nothing():
    model = {"w": rx.Ref(jnp.ones(3), "params")}
    total = lambda model: model["w"].value
    both = rx.axes(params=0, batch_stats=None)
    assert rx.filter_vmap(total, in_axes=(both,))(model).shape == (3,)
    with raises(rx.StructureError, match=r"rx\.axes\(parms=0\) does not give"):
        rx.filter_vmap(total, in_axes=(rx.axes(parms=0),))(model)


def test_what_is_no_array_needs_no_axis():
    model = (rx.Ref(jnp.arange(3.0), "params"), "a text")
    f = rx.filter_vmap(lambda m: m[0].value * len(m[1]), in_axes=(rx.axes(params=0),))
    assert f(model).tolist() == [0.0, 6.0, 12.0]


def test_a_stack_keeps_its_size_and_may_hold_another_number_of_arrays():
    class Sums(rx.Module):
        sums: rx.Ref[tuple[Float[Array, ""], ...]]

    stack = rx.filter_vmap(lambda x: Sums((x,)))(jnp.arange(4.0))
    for n in (3, 1, 2):
        stack.sums.value = (jnp.ones(4),) * n
    stack.sums.value = ()
    stack.sums.value = (jnp.ones(4), jnp.ones(4))
    with raises(rx.RefTypeError, match=r"stack are \(4,\) and \(5,\) instead"):
        stack.sums.value = (jnp.ones(4), jnp.ones(5))
    assert len(stack.sums.value) == 2
