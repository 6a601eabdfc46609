"""The behavior of refx, the ancestor of this library, under this library's names.

First what its guide and its README show, then one test for each thing it got wrong.
"""

import threading
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from raising import raises

import refx_eqx as rx


def shared_dicts():
    shared = {"a": rx.Ref(1), "b": rx.Ref(2)}
    return {"x": shared, "y": shared}


def three_places():
    r1, r2 = rx.Ref(1), rx.Ref(2)
    return {"x": [r1, r1, r2], "y": r2, "z": 10}


def two_collections():
    r1, r2 = rx.Ref(1, collection="params"), rx.Ref(2, collection="batch_stats")
    return {"a": [r1, r1, r2], "b": r2}


def test_guide_plain_jit_loses_references():
    # The problem: what JAX does to shared mutable containers.
    shared = {"a": 1, "b": 2}
    tree = {"x": shared, "y": shared}
    tree["x"]["a"] = 100
    assert tree["y"]["a"] == 100

    @jax.jit
    def f(tree):
        tree["x"]["b"] = 200
        return tree

    assert f(tree)["y"]["b"] == 2


def test_guide_refs_share_in_plain_python():
    tree = shared_dicts()
    tree["x"]["a"].value = 100
    assert tree["y"]["a"].value == 100


def test_guide_a_write_in_jit_does_not_leak_a_tracer():
    ref: rx.Ref[Any] = rx.Ref(1)

    @jax.jit
    def f():
        ref.value = jnp.empty(1)

    with raises(ValueError, match=r"^Cannot mutate ref from different trace level"):
        f()
    assert ref.value == 1


def test_guide_refs_do_not_go_through_jit_as_they_are():
    with raises(rx.TraceLevelError, match=r"Cannot use ref as an array.*rx\.deref"):
        jax.jit(lambda tree: tree)(shared_dicts())


def test_guide_deref_gives_values_and_indices():
    opened = rx.deref(three_places())
    assert opened == {
        "x": [rx.Value(1, 0), rx.Index(0), rx.Value(2, 1)],
        "y": rx.Index(1),
        "z": 10,
    }


def test_guide_a_derefed_tree_goes_through_jit():
    out = jax.jit(lambda tree: tree)(rx.deref(three_places()))
    assert out["x"][0].value == 1
    assert out["x"][1] == rx.Index(0)
    assert isinstance(out["x"][2].value, jax.Array)
    assert out["z"] == 10


def test_guide_an_index_has_no_value():
    @jax.jit
    def f(tree):
        _ = tree["x"][1].value

    with raises(ValueError, match=r"^Cannot get value of Index"):
        f(rx.deref(three_places()))


def test_guide_reref_inside_and_outside_of_jit():
    @jax.jit
    def f(tree):
        tree = rx.reref(tree)
        tree["x"][1].value = 100
        return rx.deref(tree)

    tree = rx.reref(f(rx.deref(three_places())))
    assert tree["x"][0].value == 100


def test_readme_getting_started():
    tree = two_collections()
    tree["a"][0].value = 10
    assert tree["a"][1].value == 10

    @jax.jit
    def f(tree):
        tree = rx.reref(tree)
        tree["a"][2].value = 50
        return rx.deref(tree)

    tree = rx.reref(f(rx.deref(tree)))
    assert tree["b"].value == 50


def test_readme_trace_level_awareness():
    ref: rx.Ref[Any] = rx.Ref(1)

    @jax.jit
    def f():
        ref.value = jnp.array(1.0)  # a constant, no tracer

    with raises(ValueError, match=r"Cannot mutate ref from different trace level"):
        f()


def is_param(x):
    return isinstance(x, rx.Ref) and x.collection == "params"


def test_readme_tree_partition():
    tree = two_collections()
    r1, r2 = tree["a"][0], tree["b"]
    (params, rest), treedef = rx.tree_partition(tree, is_param)
    assert params == {
        ("a", "0"): r1,
        ("a", "1"): r1,
        ("a", "2"): rx.NOTHING,
        ("b",): rx.NOTHING,
    }
    assert rest == {
        ("a", "0"): rx.NOTHING,
        ("a", "1"): rx.NOTHING,
        ("a", "2"): r2,
        ("b",): r2,
    }
    assert rx.merge_partitions((params, rest), treedef) == tree
    assert rx.get_partition(tree, is_param) == params


def test_readme_one_more_partition_than_filters():
    partitions, _ = rx.tree_partition(two_collections(), is_param, "batch_stats")
    assert len(partitions) == 3
    assert all(leaf is rx.NOTHING for leaf in partitions[2].values())


def test_readme_gradient_descent():
    r1 = rx.Ref(jnp.array(1.0), collection="params")
    r2 = rx.Ref(jnp.array(3.0), collection="batch_stats")
    tree: Any = {"a": [r1, r1, r2], "b": r2}

    # The predicate asks for a `Ref`, and the tree is derefed: a filter sees the ref.
    (params, rest), treedef = rx.tree_partition(rx.deref(tree), is_param)
    assert jax.tree.leaves(params) == [1.0]

    def loss(params):
        tree = rx.reref(rx.merge_partitions((params, rest), treedef))
        return tree["a"][0].value * tree["a"][1].value * tree["b"].value

    grads = jax.grad(loss)(params)
    params = jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)
    rx.update_refs(rx.get_partition(tree, is_param), params)
    assert jnp.allclose(r1.value, 1.0 - 0.1 * 6.0)
    assert tree["a"][0] is tree["a"][1] is r1
    assert r2.value == 3.0


#
# What the ancestor got wrong
#


def test_a_field_of_refs_can_be_declared():
    # Its `RefField` cannot be built on Python 3.10 and later.
    class Linear(eqx.Module):
        weight: rx.Ref[jax.Array] = rx.field(collection="params")

    assert Linear(jnp.ones(2)).weight.collection == "params"  # type: ignore[arg-type]


def test_dag_with_more_than_one_leaf():
    dag = rx.Dag(three_places())
    out = jax.jit(lambda dag: dag)(dag)
    assert out.value["x"][0] is out.value["x"][1]
    assert out.value["y"].value == 2


def test_a_lifted_transform_does_not_leave_the_refs_of_the_caller_stale():
    # `reref` makes new refs; those of the caller kept the old value.
    tree = three_places()

    @rx.filter_jit
    def f(tree):
        tree["x"][1].value = jnp.array(100)

    f(tree)
    assert tree["x"][0].value == 100


@pytest.mark.parametrize(
    "transform",
    [jax.grad, lambda f: lambda x: jax.vmap(f)(x[None])],
    ids=["grad", "vmap"],
)
def test_a_constant_written_under_grad_or_vmap_is_refused(transform):
    ref = rx.Ref(0.0)

    def f(x):
        ref.value = 1.0
        return x

    with raises(rx.TraceLevelError, match=r"Cannot mutate ref"):
        transform(f)(jnp.array(1.0))
    assert ref.value == 0.0


def test_update_refs_takes_no_wrong_shape_and_no_wrong_collection():
    ref = rx.Ref(jnp.ones(2), "params")
    with raises(rx.StructureError, match=r"holds f32\[2\], and the source has f32"):
        rx.update_refs([ref], [rx.Ref(jnp.ones(3), "params")])
    with raises(rx.CollectionError, match=r"the source has collection 'counts'"):
        rx.update_refs([ref], [rx.Ref(jnp.ones(2), "counts")])


def test_mutable_does_not_leak_to_another_thread():
    ref = rx.Ref(0)

    def write():
        ref.value += 1

    with rx.mutable(False):
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
    assert ref.value == 1


def test_a_partition_does_not_part_an_index_from_its_value():
    tree = two_collections()
    with raises(rx.StructureError, match=r"would tear it apart"):
        rx.tree_partition(rx.deref(tree), rx.path("a.0"))
    (params, _), _ = rx.tree_partition(rx.deref(tree), is_param)
    closed = rx.reref(params)
    assert closed["a", "0"] is closed["a", "1"]


@pytest.mark.parametrize("tree", [None, {}, (), [[]]])
def test_an_empty_tree_does_not_crash(tree):
    assert rx.reref(rx.deref(tree)) == tree
    partitions, treedef = rx.tree_partition(tree, is_param)
    assert rx.merge_partitions(partitions, treedef) == tree
    rx.update_refs(tree, tree)


def test_errors_have_a_text():
    ref = rx.Ref(1)
    opened = rx.deref((ref, ref))
    for wrong in (
        lambda: rx.deref(opened),
        lambda: rx.reref((opened, ref)),
        lambda: rx.reref(opened[1]),
        lambda: rx.update_refs([ref], []),
        lambda: rx.merge_partitions((), None),
        lambda: rx.combine(),
        lambda: rx.Ref(ref),
    ):
        with raises(rx.StructureError, match=r"\w+ \w+ .*\."):
            wrong()
