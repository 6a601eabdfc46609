"""A tree that was taken apart can be put together again, and in no other way."""

from collections import OrderedDict

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from raising import raises

import refx_eqx as rx


def make():
    w, n = rx.Ref(1.0, "params"), rx.Ref(0, "counts")
    return {"a": [w, w, n], "b": n, "c": None, "d": "relu"}


N = rx.NOTHING


def test_a_leaf_goes_to_the_first_filter_that_selects_it():
    tree = make()
    w, n = tree["a"][0], tree["b"]
    params, refs, rest = rx.partition(tree, "params", rx.Ref)
    assert params == {"a": [w, w, N], "b": N, "c": None, "d": N}
    assert refs == {"a": [N, N, n], "b": n, "c": None, "d": N}
    assert rest == {"a": [N, N, N], "b": N, "c": None, "d": "relu"}


def test_without_a_filter_all_is_the_rest():
    tree = make()
    assert rx.partition(tree) == (tree,)


def test_combine_is_the_opposite():
    tree = make()
    parts = rx.partition(tree, "params", "counts")
    again = rx.combine(*parts)
    assert again == tree
    assert again["a"][0] is again["a"][1] is tree["a"][0]
    assert rx.combine(*reversed(parts)) == tree


def test_a_derefed_tree_is_taken_apart_too():
    opened = rx.deref(make())
    params, rest = rx.partition(opened, "params")
    assert params["a"] == [rx.Value(1.0, 0, "params"), rx.Index(0, "params"), N]
    assert rx.combine(params, rest) == opened
    assert rx.reref(params)["a"][1].value == 1.0  # a tie is whole within its part


def test_modules_are_taken_apart():
    linear = rx.as_refs(eqx.nn.Linear(2, 2, key=jax.random.key(0)), "params")
    params, rest = rx.partition(linear, rx.path("weight"))
    assert params.weight is linear.weight and params.bias is N
    assert rest.bias is linear.bias and rest.weight is N
    assert rx.combine(params, rest).weight is linear.weight


def test_parts_go_through_jax_when_derefed():
    params, rest = rx.partition(rx.deref(make()), "params")
    params = jax.tree.map(lambda x: x + 1, params)
    assert rx.reref(rx.combine(params, rest))["a"][1].value == 2.0


def test_parts_made_by_equinox_of_a_tree_of_refs_combine():
    tree = make()
    assert rx.combine(*eqx.partition(tree, rx.collection("params"))) == tree


def test_a_tie_is_not_torn_by_a_path():
    tree = make()
    with raises(
        rx.StructureError,
        match=r"is one ref at `a.2` and `b`, and .* would tear it apart",
    ):
        rx.partition(tree, rx.path("a.**"))
    for take_apart in (rx.tree_partition, rx.get_partition):
        with raises(rx.StructureError, match="would tear it apart"):
            take_apart(rx.deref(tree), rx.path("b"))


def test_combine_of_overlapping_parts_is_refused():
    tree = make()
    params, rest = rx.partition(tree, "params")
    with raises(
        rx.StructureError,
        match=r"Cannot combine: parts 0 and 2 both have a leaf at `a.0`. Combine parts",
    ):
        rx.combine(params, rest, params)


def test_combine_of_incomplete_parts_is_refused():
    params, counts, rest = rx.partition(make(), "params", "counts")
    with raises(
        rx.StructureError,
        match=(
            r"no part has a leaf at `a.2`. Pass all the parts that `rx.partition` "
            r"returned, including the last."
        ),
    ):
        rx.combine(params, rest)
    rx.combine(params, counts, rest)  # the remedy


def test_combine_of_different_structures_is_refused():
    with raises(
        rx.StructureError, match=r"part 1 does not have the structure of part 0: .*and"
    ):
        rx.combine([N, 1], [2])
    with raises(rx.StructureError, match=r"`rx.combine` needs a part"):
        rx.combine()


def test_combine_that_would_tear_a_tie_is_refused():
    ref = rx.Ref(1.0, "params")
    with raises(
        rx.StructureError,
        match=r"one ref is in part 0 at `0` and in part 1 at `1`. A tie cannot be torn",
    ):
        rx.combine([ref, N], [N, ref])
    value, index = rx.deref((ref, ref))
    with raises(rx.StructureError, match=r"A tie cannot be torn"):
        rx.combine([value, N], [N, index])


def test_path_keyed_partitions():
    tree = make()
    w, n = tree["a"][0], tree["b"]
    (params, rest), treedef = rx.tree_partition(tree, "params")
    assert params == {
        ("a", "0"): w,
        ("a", "1"): w,
        ("a", "2"): N,
        ("b",): N,
        ("d",): N,
    }
    assert rest["a", "2"] is n
    assert rx.merge_partitions((params, rest), treedef) == tree
    assert rx.merge_partitions((rest, params), treedef) == tree
    assert rx.get_partition(tree, "params") == params


def test_a_partition_is_an_immutable_mapping():
    part = rx.get_partition(make(), "params")
    with raises(TypeError, match="does not support item assignment"):
        part["b",] = 1  # type: ignore[index]
    assert len(part) == 5
    assert ("b",) in part
    assert part.get(("z",)) is None
    assert repr(rx.FlatPartition({("a",): 1})) == "FlatPartition({('a',): 1})"


def test_a_partition_does_not_follow_the_dict_it_was_made_of():
    leaves = {("a",): 1}
    part = rx.FlatPartition(leaves)
    leaves["a",] = 2
    assert part["a",] == 1


def test_a_partition_is_a_pytree():
    tree = make()
    part = rx.get_partition(tree, "params")
    assert jax.tree.leaves(part) == [tree["a"][0], tree["a"][0]]
    opened = rx.deref(part)
    assert isinstance(opened["a", "1"], rx.Index)
    doubled = jax.jit(lambda p: jax.tree.map(lambda x: x * 2, p))(opened)
    assert rx.reref(doubled)["a", "1"].value == 2.0
    (path, _), *_ = jax.tree_util.tree_flatten_with_path(opened)[0]
    assert jax.tree_util.keystr(path) == "[('a', '0')].value"


def test_merge_of_what_does_not_fit_is_refused():
    (params, rest), treedef = rx.tree_partition(make(), "params")
    with raises(rx.StructureError, match=r"`a.0` has 2 leaves, but must have one"):
        rx.merge_partitions((params, rest, params), treedef)
    with raises(rx.StructureError, match=r"`a.2` has no leaf, but must have one"):
        rx.merge_partitions((params,), treedef)
    with raises(rx.StructureError, match=r"with different paths"):
        rx.merge_partitions((params, rx.get_partition([1], True)), treedef)
    with raises(rx.StructureError, match=r"Cannot merge no partitions"):
        rx.merge_partitions((), treedef)
    other = jax.tree.structure([1])
    with raises(rx.StructureError, match=r"5 leaves for a tree of 1"):
        rx.merge_partitions((params, rest), other)


def test_two_leaves_with_one_path_are_refused():
    # They would be one key of the mapping, and one of them lost.
    tree = OrderedDict([(1, rx.Ref(1.0)), ("1", rx.Ref(2.0))])
    with raises(
        rx.StructureError,
        match=r"two leaves have the path `1` .*Use `rx.partition`, which keeps the shape",
    ):
        rx.tree_partition(tree, rx.Ref)
    part, rest = rx.partition(tree, rx.Ref)  # the remedy
    assert rx.combine(part, rest) == tree


@pytest.mark.parametrize("tree", [None, {}, (), [None]])
def test_empty_trees(tree):
    parts = rx.partition(tree, "params")
    assert parts == (tree, tree)
    assert rx.combine(*parts) == tree
    partitions, treedef = rx.tree_partition(tree, "params")
    assert partitions == ({}, {})
    assert rx.merge_partitions(partitions, treedef) == tree


def test_a_single_ref():
    ref = rx.Ref(jnp.ones(2), "params")
    assert rx.partition(ref, "params") == (ref, N)
    (part, rest), treedef = rx.tree_partition(ref, "params")
    assert part == {(): ref} and rest == {(): N}
    assert rx.merge_partitions((part, rest), treedef) is ref
