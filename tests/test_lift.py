"""`lift`: a third-party transform, by reference."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float
from raising import raises

import refx_eqx as rx


def _make():
    return rx.Ref(jnp.array(2.0), "params"), rx.Ref(jnp.array(0), "counts")


def _f(w, count, x):
    count.value += 1
    return w.value * x


def _twice(fn):
    """A transform of our own: calls the function once, and doubles the result."""

    def wrapped(*args):
        return jax.tree.map(lambda y: y * 1, fn(*args))

    return wrapped


@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint, _twice])
def test_the_function_reads_and_writes(transform):
    w, count = _make()
    lifted = rx.lift(transform)(_f)
    for i in range(1, 4):
        assert lifted(w, count, jnp.array(3.0)) == 6.0
        assert count.value == i
    w.value = jnp.array(5.0)
    assert lifted(w, count, jnp.array(3.0)) == 15.0


def test_it_is_a_decorator_and_takes_options():
    count = rx.Ref(jnp.array(0))

    @functools.partial(rx.lift(jax.jit), inline=True)
    def f(count, x):
        count.value += 1
        return x

    assert f(count, jnp.array(1.0)) == 1.0
    assert count.value == 1
    assert f.__name__ == "f"


def test_a_transform_that_caches_is_not_traced_again(trace_counter):
    f = trace_counter(_f)
    lifted = rx.lift(jax.jit)(f)
    for _ in range(3):
        w, count = _make()
        lifted(w, count, jnp.array(3.0))
        assert count.value == 1
    assert f.counter.count == 1
    ref = rx.Ref(jnp.array(2))
    lifted(ref, ref, jnp.array(3))  # another sharing
    assert f.counter.count == 2 and ref.value == 3


def test_keywords_and_static_values():
    count = rx.Ref(jnp.array(0))

    def f(x, *, count, power):
        count.value += 1
        return x**power

    lifted = rx.lift(jax.jit)(f)
    assert lifted(jnp.array(3.0), count=count, power=2) == 9.0
    assert lifted(jnp.array(3.0), count=count, power=3) == 27.0
    assert count.value == 2


def test_the_gradient_goes_through_a_lifted_checkpoint():
    w, count = _make()

    def loss(w, count):
        body = rx.lift(jax.checkpoint)(lambda w, c: jnp.sin(_f(w, c, jnp.array(1.0))))
        return body(w, count)

    grads = rx.filter_grad(loss)(w, count)
    np.testing.assert_allclose(grads.value, np.cos(2.0), rtol=1e-6)
    assert count.value == 1


def test_what_a_closure_or_a_module_holds_is_carried():
    w, count = _make()
    lifted = rx.lift(jax.jit)(lambda x: _f(w, count, x))
    assert lifted(jnp.array(3.0)) == 6.0
    w.value = jnp.array(4.0)
    assert lifted(jnp.array(3.0)) == 12.0
    assert count.value == 2


def test_in_axes_find_the_arguments():
    w = rx.Ref(jnp.arange(3.0))
    lifted = rx.lift(jax.vmap)(lambda w, x: w.value * x, in_axes=(0, None))
    assert jnp.array_equal(lifted(w, jnp.array(2.0)), jnp.array([0.0, 2.0, 4.0]))


def test_a_mapped_ref_is_written_lane_by_lane():
    w = rx.Ref(jnp.arange(3.0))

    def f(w, x):
        w.value += x

    rx.lift(jax.vmap)(f)(w, jnp.ones(3))
    assert jnp.array_equal(w.value, jnp.arange(3.0) + 1.0)


def test_a_mapped_ref_may_be_written_with_a_value_of_another_structure():
    def add(ref):
        ref.value = {"sum": ref.value["a"] + ref.value["b"]}

    def stats():
        return rx.Ref({"a": jnp.arange(3.0), "b": jnp.ones(3)}, "stats")

    ref = stats()
    rx.lift(jax.vmap)(add)(ref)
    assert ref.value["sum"].tolist() == [1.0, 2.0, 3.0]
    # Which axis the new one has cannot be told if the old ones do not agree.
    ref = stats()
    node: Any = rx.deref(ref)
    axes = node.with_value({"a": 0, "b": None})
    with raises(rx.StructureError, match="the shapes do not show which one"):
        rx.lift(jax.vmap)(add, in_axes=(axes,))(ref)
    assert ref.value.keys() == {"a", "b"}


def test_a_broadcast_ref_that_comes_back_mapped_is_refused():
    count = rx.Ref(jnp.array(0), "counts")

    def f(count, x):
        count.value += 1
        return x

    lifted = rx.lift(jax.vmap)(f, in_axes=(None, 0))
    text = r"`rx.lift\(vmap\)` gave an unnamed ref \(collection 'counts'\) the shape \(3,\)"
    with raises(rx.StructureError, match=text):
        lifted(count, jnp.ones(3))
    assert count.value == 0
    rx.filter_vmap(f, in_axes=(None, 0))(count, jnp.ones(3))  # the remedy
    assert count.value == 1


def test_a_transform_that_returns_something_else_is_refused():
    w, count = _make()
    with raises(rx.StructureError, match="must return a function with the same"):
        rx.lift(lambda fn: lambda *args: None)(_f)(w, count, jnp.array(1.0))
    assert count.value == 0


def test_returned_refs_are_the_caller_s_own_and_new_ones_keep_their_sharing():
    w, count = _make()

    @rx.lift(jax.jit)
    def f(w, count):
        new = rx.Ref(w.value + 1.0)
        return w, [new, new]

    out, (a, b) = f(w, count)
    assert out is w and a is b and a.value == 3.0


def test_an_exception_changes_nothing():
    _, count = _make()

    @rx.lift(jax.jit)
    def f(count):
        count.value += 1
        raise KeyError("mine")

    with raises(KeyError, match="mine"):
        f(count)
    assert count.value == 0


def test_a_change_of_structure_is_refused():
    @rx.lift(jax.jit)
    def f(refs):
        refs.append(refs[0])

    with raises(rx.StructureError, match=r"`rx.lift\(jit\)` cannot carry back"):
        f([rx.Ref(jnp.array(0))])


def test_a_global_ref_is_refused():
    global _global_ref
    _global_ref = rx.Ref(jnp.array(0))
    with raises(rx.TraceLevelError, match=r"the body of `rx.lift\(jit\)`"):
        rx.lift(jax.jit)(lambda: _global_ref.value)()


def test_lifted_transforms_nest():
    w, count = _make()
    lifted = rx.lift(jax.jit)(rx.lift(jax.checkpoint)(_f))
    assert lifted(w, count, jnp.array(3.0)) == 6.0
    assert rx.filter_jit(lifted)(w, count, jnp.array(3.0)) == 6.0
    assert count.value == 2


# --- Axes, shapes and specs. ---


def _same_as_vmap(in_axes, out_axes, ref_axis):
    """Lifted, and by plain `jax.vmap` on arrays: the value of the ref and the result."""
    w, x = jnp.arange(9.0).reshape(3, 3), 10 * jnp.arange(9.0).reshape(3, 3)
    ref = rx.Ref(w)

    def f(ref, x):
        ref.value = ref.value + x[0]
        return ref.value * x

    def plain(w, x):
        new = w + x[0]
        return new, new * x

    lifted = rx.lift(jax.vmap)(f, in_axes=in_axes, out_axes=out_axes)
    out = lifted(ref, x)
    new, expected = jax.vmap(plain, in_axes, (ref_axis, out_axes))(w, x)
    assert jnp.array_equal(ref.value, new) and jnp.array_equal(out, expected)


@pytest.mark.parametrize("out_axes", [0, 1, -1])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_written_ref_comes_out_on_the_axis_that_it_came_in_on(axis, out_axes):
    _same_as_vmap((axis, 0), out_axes, axis)
    _same_as_vmap((axis, 1), out_axes, axis)


def test_maps_that_are_no_vmap_by_name():
    w = jnp.arange(6.0).reshape(2, 3)
    for transform, options in [
        (lambda fn: jax.vmap(fn, in_axes=(1, 0), out_axes=1), {}),
        (lambda fn: jax.jit(jax.vmap(fn, in_axes=(1, 0))), {}),
        (lambda fn: jax.vmap(jax.jit(fn), in_axes=(1, 0)), {}),
        (eqx.filter_vmap, {"in_axes": (1, 0), "out_axes": eqx.if_array(1)}),
    ]:
        ref = rx.Ref(w)

        def f(ref, x):
            ref.value = ref.value + x
            return x * jnp.ones(2)

        lifted = rx.lift(transform)(f, **options)
        for _ in range(2):
            lifted(ref, jnp.arange(3.0))
        assert jnp.array_equal(ref.value, w + 2 * jnp.arange(3.0)[None])


def test_an_axis_that_cannot_be_told_is_refused_and_the_remedy_runs():
    def f(ref, x):
        ref.value = ref.value + x

    ref = rx.Ref(jnp.zeros((3, 3)), "state")
    lifted = rx.lift(lambda fn: jax.vmap(jax.jit(fn), in_axes=(1, 0)))(f)
    with raises(
        rx.StructureError, match=r"'state'\) an axis, and the shapes.*filter_v"
    ):
        lifted(ref, jnp.arange(3.0))
    assert jnp.array_equal(ref.value, jnp.zeros((3, 3)))
    rx.filter_vmap(f, in_axes=(1, 0))(ref, jnp.arange(3.0))
    assert ref.value[0].tolist() == [0.0, 1.0, 2.0]


def test_a_ref_that_comes_back_without_its_axis_is_refused():
    ref = rx.Ref(jnp.zeros(3), "state")

    def f(ref, x):
        ref.value = jnp.ones(())

    with raises(rx.StructureError, match=r"shape \(\), without the axis"):
        rx.lift(jax.vmap)(f, out_axes=None)(ref, jnp.ones(3))
    assert ref.value.tolist() == [0.0] * 3


def test_shapes_in_turn(trace_counter):
    f = trace_counter(lambda count, x: _f(rx.Ref(2.0), count, x))
    lifted, count = rx.lift(jax.jit)(f), rx.Ref(jnp.zeros(3))
    for i, n in enumerate([3, 5, 3, 5], 1):
        count.value = jnp.full(n, i)
        assert lifted(count, jnp.ones(n)).tolist() == [2.0] * n
        assert count.value.tolist() == [i + 1] * n
    assert f.counter.count == 2


two_devices = pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")


@two_devices
def test_specs_are_prefixes_of_the_derefed_arguments():
    mesh = jax.make_mesh((2,), ("x",))
    by_row = jax.NamedSharding(mesh, jax.P("x"))
    whole = jax.NamedSharding(mesh, jax.P())
    tree = {"w": rx.Ref(jnp.arange(4.0)), "n": jnp.ones(4), "name": "static"}

    def f(tree, x):
        tree["w"].value += x
        return tree["w"].value * tree["n"]

    specs = {"w": by_row, "n": whole, "name": None}
    lifted = rx.lift(jax.jit)(f, in_shardings=(specs, by_row))
    assert lifted(tree, jnp.ones(4)).tolist() == [1.0, 2.0, 3.0, 4.0]
    assert tree["w"].value.tolist() == [1.0, 2.0, 3.0, 4.0]
    full = jax.tree.map(lambda _: by_row, rx.deref({"w": tree["w"]}))
    lifted = rx.lift(jax.jit)(
        f, in_shardings=(full | {"n": whole, "name": None}, by_row)
    )
    assert lifted(tree, jnp.ones(4)).tolist() == [2.0, 3.0, 4.0, 5.0]
    axes = {"w": 0, "n": None, "name": None}
    out = rx.lift(jax.vmap)(f, in_axes=(axes, None))(tree, jnp.ones(()))
    assert out.shape == (4, 4) and tree["w"].value.tolist() == [3.0, 4.0, 5.0, 6.0]


def test_specs_that_do_not_fit_name_the_remedy():
    tree = {"w": rx.Ref(jnp.arange(4.0))}
    f = lambda tree: (tree["w"].value, jnp.ones(2))
    message = (
        r"`rx.lift\(vmap\)`: the options do not fit.*use `rx.filter_vmap`.*JAX says"
    )
    with raises(rx.StructureError, match="(?s)" + message):
        rx.lift(jax.vmap)(f, in_axes=({"other": 0},))(tree)
    with raises(rx.StructureError, match="(?s)" + message):
        rx.lift(jax.vmap)(f, out_axes=(0, None))(tree)
    _, ones = rx.filter_vmap(f, out_axes=(0, None))(tree)
    assert ones.shape == (2,)


@two_devices
def test_shard_map():
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("x",), axis_types=auto)
    tree = {"w": rx.Ref(jnp.arange(4.0), "params")}

    def f(tree, x):
        tree["w"].value = tree["w"].value + x
        return x

    options = {"mesh": mesh, "in_specs": ({"w": jax.P("x")}, jax.P("x"))}
    rx.lift(jax.shard_map)(f, out_specs=jax.P("x"), **options)(tree, jnp.ones(4))
    assert tree["w"].value.tolist() == [1.0, 2.0, 3.0, 4.0]
    # A replicated ref cannot come back by the spec of a result that is not.
    options["in_specs"] = ({"w": jax.P()}, jax.P())
    lifted = rx.lift(jax.shard_map)(f, out_specs=jax.P("x"), check_vma=False, **options)
    with raises(
        rx.StructureError, match=r"'params'\) the shape \(8,\).*`rx.filter_shard_map`"
    ):
        lifted(tree, jnp.ones(4))
    # Nor a part by that of one that is.
    options["in_specs"] = ({"w": jax.P("x")}, jax.P("x"))
    lifted = rx.lift(jax.shard_map)(f, out_specs=jax.P(), check_vma=False, **options)
    with raises(rx.StructureError, match=r"shape \(2,\), where \(4,\) is"):
        lifted(tree, jnp.ones(4))
    assert tree["w"].value.tolist() == [1.0, 2.0, 3.0, 4.0]
    # Nor what differs by that of one that does not.
    lifted = rx.lift(jax.shard_map)(f, out_specs=jax.P(), **options)
    with raises(rx.StructureError, match="use `rx.filter_shard_map`. JAX says"):
        lifted(tree, jnp.ones(4))
    # The remedy.
    rx.filter_shard_map(f, out_specs=jax.P("x"), **options)(tree, jnp.ones(4))
    assert tree["w"].value.tolist() == [2.0, 3.0, 4.0, 5.0]
    # Or by hand.
    args, specs = (tree, jnp.ones(4)), ({"w": jax.P()}, jax.P("x"))
    g = lambda tree, x: f(tree, jax.lax.pmean(x, "x")[:1])
    pure = jax.shard_map(
        rx.functionalize(g),
        mesh=mesh,
        in_specs=specs,
        out_specs=(jax.P(), ({"w": jax.P()}, None)),
    )
    out, updates = pure(*rx.deref(args))
    rx.update_refs(args, updates)
    assert out.tolist() == [1.0] and tree["w"].value.tolist() == [3.0, 4.0, 5.0, 6.0]


@two_devices
def test_shard_map_with_trees_of_specs_on_refs_of_declared_types():
    class Linear(rx.Module):
        weight: rx.Param[Float[Array, "4"]]

    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("x",), axis_types=auto)
    model = Linear(jnp.arange(4.0))
    specs = jax.tree.map(lambda _: jax.P("x"), rx.deref(model))

    def double(model):
        model.weight.value *= 2.0

    options = {"mesh": mesh, "in_specs": (specs,)}
    rx.lift(jax.shard_map)(double, out_specs=jax.P("x"), **options)(model)
    pure = jax.shard_map(
        rx.functionalize(double), out_specs=(jax.P(), (specs,)), **options
    )
    _, updates = pure(rx.deref(model))
    rx.update_refs((model,), updates)
    assert model.weight.value.tolist() == [0.0, 4.0, 8.0, 12.0]


@pytest.mark.parametrize(
    "transform, ours",
    [
        (jax.grad, "filter_grad"),
        (eqx.filter_grad, "filter_grad"),
        (
            functools.partial(eqx.filter_value_and_grad, has_aux=True),
            "filter_value_and",
        ),
        (eqx.filter_hessian, "filter_hessian"),
        (eqx.filter_custom_vjp, "filter_custom_vjp"),
    ],
)
def test_a_transform_that_cannot_be_lifted_names_ours(transform, ours):
    with raises(rx.StructureError, match=f"cannot be lifted. Use `rx.{ours}"):
        rx.lift(transform)


@pytest.mark.parametrize("transform", [eqx.filter_jit, eqx.filter_checkpoint])
def test_a_transform_of_equinox(transform):
    w, count = _make()
    lifted = rx.lift(transform)(_f)
    for i in range(1, 3):
        assert lifted(w, count, jnp.array(3.0)) == 6.0 and count.value == i


def test_what_was_compiled_for_one_ref_is_not_run_for_another(trace_counter):
    a, b = rx.Ref(jnp.array(1.0)), rx.Ref(jnp.array(2.0))
    f = trace_counter(lambda x, y: x.value * (10.0 if x == a else 1.0) + y.value)
    lifted = rx.lift(jax.jit)(f)
    for _ in range(3):
        assert lifted(a, b) == 12.0 and lifted(b, a) == 3.0
    assert f.counter.count == 2


@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint])
def test_arrays_of_one_type_to_jax_are_of_one_type_here(transform):
    lifted = rx.lift(transform)(lambda ref, x: (ref.value, jnp.sum(x)))
    given = [
        jnp.ones(3),
        np.ones(3),
        np.ones(3, np.float32),
        1.0,
        jnp.array(1.0),
        1,
        2,
        True,
    ]
    given += [np.float64(2.0), np.int64(2), jnp.asarray(1.0), np.True_]
    for x in (*given, *reversed(given)):
        assert lifted(rx.Ref(jnp.array(2.0)), x) == (2.0, np.sum(x))
    for x in (1.0, np.float64(1.0), jnp.array(1.0), 1, np.int64(1), jnp.array(1), True):
        assert lifted(rx.Ref(x), 3) == (x, 3)
