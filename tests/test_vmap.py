"""`filter_vmap` and `axes`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from raising import message_of, raises

import refx_eqx as rx


class Linear(rx.Module):
    weight: rx.Param[jax.Array]
    bias: rx.Param[jax.Array] | None
    uses: rx.Ref[jax.Array] = rx.field(collection="counts")

    def __init__(self, key):
        self.weight = jr.normal(key, (2, 3))
        self.bias = None
        self.uses = jnp.zeros((), jnp.int32)

    def __call__(self, x):
        self.uses.value += 1
        return self.weight[...] @ x


class Norm(rx.Module):
    """Batch normalization without variance, over one or several mapped axes."""

    mean: rx.BatchStat[jax.Array]
    axis: object = eqx.field(static=True)

    def __init__(self, axis):
        self.mean = jnp.zeros(2)
        self.axis = axis

    def __call__(self, x):
        mean = jax.lax.pmean(x, self.axis)
        self.mean.value = 0.5 * self.mean.value + 0.5 * mean
        return x - mean


def test_without_refs_it_is_equinoxs():
    def f(x, tree):
        return x * tree["a"], tree["b"], "static"

    args = jnp.arange(3.0), {"a": jnp.ones(3), "b": jnp.zeros((3, 2))}
    assert eqx.tree_equal(rx.filter_vmap(f)(*args), eqx.filter_vmap(f)(*args))


def test_a_mapped_ref_is_written_lane_by_lane():
    ref = rx.Ref(jnp.arange(3.0), "state")

    @rx.filter_vmap
    def f(ref, x):
        assert ref.shape == ()
        ref.value += x
        return ref.value

    assert f(ref, jnp.ones(3)).tolist() == ref.value.tolist() == [1.0, 2.0, 3.0]


def test_a_broadcast_ref_may_be_written_with_one_value_for_all_lanes():
    ref = rx.Ref(jnp.zeros(2), "state")

    def f(ref, x):
        ref.value = ref.value + 1.0
        return x + ref.value[0]

    out = rx.filter_vmap(f, in_axes=(None, 0))(ref, jnp.zeros(3))
    assert ref.value.tolist() == [1.0, 1.0] and out.tolist() == [1.0] * 3
    # Also in what the function closes over, and in a module whose method it is.
    rx.filter_vmap(lambda x: f(ref, x))(jnp.zeros(3))
    assert ref.value.tolist() == [2.0, 2.0]
    linear = Linear(jr.key(0))
    rx.filter_vmap(linear)(jnp.ones((4, 3)))
    assert linear.uses.value == 1


def test_a_broadcast_ref_written_by_lane_is_refused_and_both_remedies_run():
    linear, xs = Linear(jr.key(0)), jnp.arange(4.0)

    def f(linear, x):
        linear.weight.value = linear.weight.value * x
        return x

    with pytest.raises(rx.StructureError) as info:
        rx.filter_vmap(f, in_axes=(None, 0))(linear, xs)
    message = message_of(info.value)
    assert message.startswith("`Linear.weight` (collection 'params') is broadcast")
    assert "`rx.axes(params=0, default=None)`" in message and "pmean" in message
    assert linear.weight.shape == (2, 3)

    stacked = Linear(jr.key(0))
    stacked.weight.value = jnp.ones((4, 2, 3))
    axes = rx.axes(params=0, default=None)
    rx.filter_vmap(f, in_axes=(axes, 0))(stacked, xs)
    assert stacked.weight.value[:, 0, 0].tolist() == [0.0, 1.0, 2.0, 3.0]

    def mean(linear, x):
        linear.weight.value = jax.lax.pmean(linear.weight.value * x, "lanes")
        return x

    linear.weight.value = jnp.ones((2, 3))
    rx.filter_vmap(mean, in_axes=(None, 0), axis_name="lanes")(linear, xs)
    assert linear.weight.value[0, 0] == 1.5


@pytest.mark.parametrize(
    "collection, text", [(None, "{None: 0}"), ("a b", "{'a b': 0}"), (3, "{3: 0}")]
)
def test_the_remedy_fits_any_collection(collection, text):
    ref = rx.Ref(jnp.zeros(()), collection)

    def f(ref, x):
        ref.value = x

    with pytest.raises(rx.StructureError) as info:
        rx.filter_vmap(f, in_axes=(None, 0))(ref, jnp.ones(2))
    assert f"`rx.axes({text}, default=None)`" in message_of(info.value)
    ref.value = jnp.zeros(2)
    rx.filter_vmap(f, in_axes=(rx.axes({collection: 0}, default=None), 0))(
        ref, jnp.ones(2)
    )
    assert ref.value.tolist() == [1.0, 1.0]


def test_an_ensemble_is_made_and_used_as_in_equinox():
    ensemble = rx.filter_vmap(Linear)(jr.split(jr.key(0), 4))
    assert ensemble.weight.shape == (4, 2, 3) and ensemble.bias is None
    assert ensemble.weight.collection == "params"
    out = rx.filter_vmap(lambda m, x: m(x), in_axes=(0, None))(ensemble, jnp.ones(3))
    assert out.shape == (4, 2) and ensemble.uses.value.tolist() == [1, 1, 1, 1]

    # An ensemble of stacks, and back.
    keys = jr.split(jr.key(0), (5, 4))
    grid = rx.filter_vmap(rx.filter_vmap(Linear))(keys)
    assert grid.weight.shape == (5, 4, 2, 3)
    call = rx.filter_vmap(lambda m, x: m(x), in_axes=(0, None))
    out = rx.filter_vmap(call, in_axes=(0, None))(grid, jnp.ones(3))
    assert out.shape == (5, 4, 2) and (grid.uses.value == 1).all()


def test_new_refs_are_stacked_and_keep_their_sharing():
    own = rx.Ref(jnp.array(1.0), "own")

    def f(x):
        new = rx.Ref(x, "new")
        return {"a": new, "b": new, "own": own}

    out = rx.filter_vmap(f)(jnp.arange(3.0))
    assert out["a"] is out["b"] and out["a"].value.tolist() == [0.0, 1.0, 2.0]
    assert out["own"] is own and own.shape == ()


def test_a_ref_shared_between_arguments_is_one_ref():
    ref = rx.Ref(jnp.zeros(3))

    def f(a, b):
        a.value += 1
        return b.value

    assert rx.filter_vmap(f)(ref, ref).tolist() == [1.0, 1.0, 1.0]


def test_out_axes():
    xs = jnp.arange(6.0).reshape(2, 3)
    f = lambda x: (x, rx.Ref(x, "new"))
    for axis in [1, -1]:
        out, ref = rx.filter_vmap(f, out_axes=(0, axis))(xs)
        assert out.shape == (2, 3) and ref.shape == (3, 2)
    one = rx.filter_vmap(lambda x: (x, jnp.ones(2)), out_axes=(0, None))(xs)
    assert one[1].shape == (2,)
    with raises(ValueError, match=r"out_axes=.*batched.*Give it an axis"):
        rx.filter_vmap(f, out_axes=None)(xs)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_ref_comes_out_on_the_axis_that_it_came_in_on(axis):
    shape = [2, 2]
    shape[axis] = 3
    ref = rx.Ref(jnp.zeros(shape))

    def f(ref, x):
        ref.value = ref.value + x

    rx.filter_vmap(f, in_axes=(axis, 0))(ref, jnp.arange(3.0))
    expected = jnp.moveaxis(jnp.broadcast_to(jnp.arange(3.0)[:, None], (3, 2)), 0, axis)
    assert (ref.value == expected).all()


def test_all_forms_of_in_axes():
    def model():
        return {
            "w": rx.Ref(jnp.ones(2), "params"),
            "n": rx.Ref(jnp.zeros((3,)), "counts"),
            "none": None,
        }

    def f(model, x):
        assert model["w"].shape == (2,) and model["n"].shape == ()
        model["n"].value += x
        return x

    xs = jnp.arange(3.0)
    by_size = lambda x: 0 if x.shape[:1] == (3,) else None
    for in_axes in [
        ({"w": None, "n": 0, "none": None}, 0),
        (rx.axes(params=None, counts=0), 0),
        (rx.axes({"params": None}, default=0), 0),
        (rx.axes({rx.path("w"): None}, default=0), 0),
        (rx.axes({rx.collection("params"): None}, default=0), 0),
        rx.axes(params=None, default=0),
        rx.axes({rx.path("0.w"): None}, default=0),
        (by_size, 0),
        by_size,
        {"model": rx.axes(params=None, counts=0)},
        {"model": by_size, "x": 0},
    ]:
        m = model()
        rx.filter_vmap(f, in_axes=in_axes)(m, xs)
        assert m["n"].value.tolist() == [0.0, 1.0, 2.0]


def test_in_axes_by_a_name_that_is_no_argument_is_refused():
    with raises(ValueError, match="not belong to any argument: 'y'"):
        rx.filter_vmap(lambda x: x, in_axes={"x": 0, "y": 0})(jnp.ones(2))


def test_in_axes_of_another_structure_are_refused():
    with raises(rx.StructureError, match="prefix of the tree"):
        rx.filter_vmap(lambda x: x, in_axes=({"a": 0},))({"b": jnp.ones(2)})
    with raises(ValueError, match="must consist of None, ints.*'no'"):
        rx.filter_vmap(lambda x: x, in_axes=("no",))(jnp.ones(2))


def test_axes_that_do_not_name_a_collection_are_refused_and_the_remedy_runs():
    ref, f = rx.Ref(jnp.ones(3), "state"), lambda ref: ref.value
    message = r"rx.axes\(params=0\) does not give.*'state'"
    with raises(rx.StructureError, match=message):
        rx.filter_vmap(f, in_axes=rx.axes(params=0))(ref)
    assert rx.filter_vmap(f, in_axes=rx.axes(params=0, default=0))(ref).shape == (3,)
    with raises(rx.StructureError, match=r"the array f32\[3\]"):
        rx.filter_vmap(lambda x: x, in_axes=rx.axes(params=0))(jnp.ones(3))


def test_sizes_that_differ_are_refused():
    ref = rx.Ref(jnp.ones(3), "state")
    with raises(
        rx.StructureError, match=r"different sizes: 3 of.*'state'.*, and 2 of an array"
    ):
        rx.filter_vmap(lambda ref, x: x)(ref, jnp.ones(2))
    with raises(rx.StructureError, match=r"cannot map.*'state'.*axis 1: its shape"):
        rx.filter_vmap(lambda ref: ref.value, in_axes=1)(ref)


@pytest.mark.parametrize("lib", [eqx, rx])
def test_a_function_just_runs_if_nothing_is_mapped(lib):
    same = lib.filter_vmap(lambda x: x)
    assert same(1) == 1 and same(None) is None
    assert lib.filter_vmap(lambda: "text")() == "text"
    plain = lib.filter_vmap(lambda x: 2 * x, in_axes=None, out_axes=None)
    assert plain(jnp.ones(3)).tolist() == [2.0, 2.0, 2.0]
    assert jax.vmap(plain)(jnp.ones(3)).tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(ValueError, match="`axis_size`"):
        lib.filter_vmap(lambda: jnp.ones(3))()


def test_a_ref_is_written_if_nothing_is_mapped():
    ref = rx.Ref(jnp.array(1.0), "state")

    def add(ref, x):
        ref.value += x

    plain = rx.filter_vmap(add, in_axes=None)
    plain(ref, jnp.array(2.0))
    assert ref.value == 3.0
    # It differs along the axis of the outer transform, which maps it.
    refs, xs = rx.Ref(jnp.zeros(3), "state"), jnp.arange(3.0)
    rx.filter_vmap(plain)(refs, xs)
    assert refs.value.tolist() == [0.0, 1.0, 2.0]
    with raises(
        ValueError, match="nothing is mapped.*Pass an array that `in_axes` maps"
    ):
        rx.filter_vmap(lambda ref: ref.value, in_axes=None)(ref)
    assert rx.filter_vmap(lambda ref, x: ref.value, in_axes=(None, 0))(
        ref, xs
    ).shape == (3,)
    with raises(ValueError, match="nothing is mapped"):
        rx.filter_vmap(lambda ref: plain(ref, 1.0) or ref.value, in_axes=None)(ref)
    assert ref.value == 3.0


def test_one_ref_with_two_axes_is_refused():
    ref = rx.Ref(jnp.ones((3, 3)), "state")
    message = r"'state'.*two axes: 0 in argument 0, 1 in argument 1.*same `in_axes`"
    with raises(rx.StructureError, match=message):
        rx.filter_vmap(lambda a, b: a.value, in_axes=(0, 1))(ref, ref)
    # Counted from the front or from the back, it is one axis.
    rx.filter_vmap(lambda a, b: a.value + b.value, in_axes=(1, -1))(ref, ref)


def test_keywords_are_refused_as_in_equinox():
    with raises(TypeError, match="Pass 'x' by position"):
        rx.filter_vmap(lambda x: x)(x=jnp.ones(2))


def test_nothing_mapped_needs_a_size():
    ref = rx.Ref(jnp.zeros(()), "state")
    assert rx.filter_vmap(lambda: ref.value, axis_size=3)().shape == (3,)
    key = rx.Ref(jr.key(0), "rng")
    draw = lambda: jr.normal(key.value)
    assert rx.filter_vmap(draw, axis_size=3)().shape == (3,)
    with raises(ValueError, match="or give `axis_size`"):
        rx.filter_vmap(draw)()


def test_batch_norm_over_one_mapped_axis():
    norm, xs = Norm("batch"), jnp.arange(6.0).reshape(3, 2)
    out = rx.filter_vmap(norm, axis_name="batch")(xs)
    assert jnp.allclose(out.mean(0), 0.0)
    assert norm.mean.value.tolist() == [1.0, 1.5]


@pytest.mark.parametrize("axis", [("outer", "inner"), "inner"])
def test_batch_norm_over_two_mapped_axes(axis):
    norm, xs = Norm(axis), jnp.arange(12.0).reshape(2, 3, 2)
    inner = rx.filter_vmap(norm, axis_name="inner")
    outer = rx.filter_vmap(inner, axis_name="outer")
    if axis == "inner":
        # The mean over the inner axis differs from one outer lane to the next.
        with raises(rx.StructureError, match="`Norm.mean` .*'batch_stats'"):
            outer(xs)
        assert norm.mean.value.tolist() == [0.0, 0.0]
        return
    out = outer(xs)
    assert jnp.allclose(out.mean((0, 1)), 0.0)
    assert norm.mean.value.tolist() == [2.5, 3.0]
    # One function for two axes of one name works as well.
    both = rx.filter_vmap(rx.filter_vmap(norm, axis_name="inner"), axis_name="outer")
    rx.filter_jit(both)(xs)
    assert norm.mean.value.tolist() == [3.75, 4.5]


def test_nested_with_different_axes_for_one_ref():
    ref = rx.Ref(jnp.zeros((2, 3)), "state")

    def f(ref, x):
        ref.value += x

    # The inner one maps axis 0 of what the outer one has left.
    inner = rx.filter_vmap(f, in_axes=(0, 0))
    rx.filter_vmap(inner, in_axes=(1, 1))(ref, jnp.arange(6.0).reshape(2, 3))
    assert ref.value.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def test_gradients_in_lanes_and_of_lanes():
    linear, xs = Linear(jr.key(0)), jnp.ones((4, 3))

    def loss(linear, xs):
        return jnp.sum(rx.filter_vmap(linear)(xs))

    grads = rx.filter_grad(loss)(linear, xs)
    assert grads.weight.value.tolist() == [[4.0] * 3] * 2 and linear.uses.value == 1

    per_lane = rx.filter_grad(lambda linear, x: jnp.sum(linear(x)), wrt="params")
    grads = rx.filter_vmap(per_lane, in_axes=(None, 0))(linear, xs)
    assert grads.weight.value.shape == (4, 2, 3) and linear.uses.value == 2


def test_a_ref_holding_a_tree_is_mapped_leaf_by_leaf():
    ref = rx.Ref({"a": jnp.zeros(3), "b": jnp.ones((3, 2)), "name": "static"})

    def f(ref, x):
        ref.value = {**ref.value, "a": ref.value["a"] + x}
        return ref.value["b"]

    assert rx.filter_vmap(f)(ref, jnp.arange(3.0)).shape == (3, 2)
    assert ref.value["a"].tolist() == [0.0, 1.0, 2.0]
    assert ref.value["b"].shape == (3, 2) and ref.value["name"] == "static"


def test_an_argument_with_a_function_that_closes_over_refs():
    ref = rx.Ref(jnp.array(2.0))

    def f(tree):
        return tree["f"](tree["x"])

    tree = {"f": lambda x: x * ref.value, "x": jnp.arange(3.0)}
    assert rx.filter_vmap(f)(tree).tolist() == [0.0, 2.0, 4.0]


def test_it_is_a_decorator_and_a_method():
    class Model(eqx.Module):
        w: jax.Array

        @rx.filter_vmap(in_axes=(None, 0))
        def f(self, x):
            return self.w * x

    assert Model(jnp.array(2.0)).f(jnp.arange(3.0)).tolist() == [0.0, 2.0, 4.0]


def test_a_failed_lane_changes_nothing():
    ref = rx.Ref(jnp.zeros(2))

    def f(ref):
        ref.value += 1
        raise RuntimeError("no")

    with raises(RuntimeError, match="no"):
        rx.filter_vmap(f)(ref)
    assert ref.value.tolist() == [0.0, 0.0]


def test_a_ref_that_is_mapped_and_reached_at_several_places():
    ref = rx.Ref(jnp.arange(3.0))
    held = [ref, ref]
    out = rx.filter_vmap(lambda x: x.value + len(held))(ref)
    assert out.tolist() == [2.0, 3.0, 4.0]
    for i in range(2):
        with raises(rx.TraceLevelError, match=r"a slice of it, in argument 0\."):
            rx.filter_vmap(lambda x: x.value + held[i].value.sum())(ref)
