"""`deref` and `reref`: nothing in a tree of refs is lost at a boundary."""

# A static checker objects to what is wrong on purpose here, or made at run time.
# pyright: reportAttributeAccessIssue=false

import inspect
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from raising import raises

import refx_eqx as rx


class Frozen(rx.Ref):
    pass


class Linear(rx.Module):
    weight: rx.Param[jax.Array]
    bias: rx.Param[jax.Array] | None
    act: str = eqx.field(static=True, default="relu")


def structure(tree):
    return jax.tree.structure(rx.deref(tree))


def test_the_first_place_is_a_value_and_later_ones_an_index():
    r1, r2 = rx.Ref(1), rx.Ref(2)
    tree = {"x": [r1, r1, r2], "y": r2, "z": 10}
    opened = rx.deref(tree)
    assert opened == {
        "x": [rx.Value(1, 0), rx.Index(0), rx.Value(2, 1)],
        "y": rx.Index(1),
        "z": 10,
    }


def test_first_is_in_the_flattening_order_of_jax():
    ref = rx.Ref(1)
    opened = rx.deref({"b": ref, "a": ref})  # JAX sorts the keys of a dict
    assert isinstance(opened["a"], rx.Value)
    assert isinstance(opened["b"], rx.Index)


def test_nodes_say_collection_and_type():
    ref = Frozen(1, "params")
    nodes: Any = rx.deref((ref, ref))
    for node in nodes:
        assert (node.index, node.collection, node.ref_type) == (0, "params", Frozen)


def test_index_has_no_value():
    ref = rx.Ref(1, "params")
    _, index = rx.deref((ref, ref))
    with raises(
        ValueError,
        match=(
            r"Cannot get value of Index 0 \(an unnamed ref \(collection 'params'\)\): a "
            "shared ref keeps its value at its first place in the tree. Call `rx.reref` "
            "on the whole tree."
        ),
    ):
        _ = index.value


def test_an_opened_tree_is_a_pure_pytree():
    ref = rx.Ref({"a": jnp.ones(2)}, "params")
    opened = rx.deref((ref, ref))
    (leaf,) = jax.tree.leaves(opened)
    assert leaf is ref.value["a"]
    ((path, _),), _ = jax.tree_util.tree_flatten_with_path(opened)
    assert jax.tree_util.keystr(path) == "[0].value['a']"


def test_reref_makes_new_refs_with_the_old_sharing():
    r1, r2 = rx.Ref(1, "params"), Frozen(2)
    tree = {"a": [r1, r2], "b": (r1,), "c": None, "d": "x"}
    closed = rx.reref(rx.deref(tree))
    assert closed["a"][0] is closed["b"][0]
    assert closed["a"][0] is not r1
    assert type(closed["a"][1]) is Frozen
    assert closed["a"][0].collection == "params"
    assert (closed["c"], closed["d"]) == (None, "x")
    closed["b"][0].value = 5
    assert closed["a"][0].value == 5 and r1.value == 1


@pytest.mark.parametrize("tree", [None, (), {}, [], [None, ()]])
def test_an_empty_tree_is_a_tree(tree):
    assert rx.deref(tree) == tree
    assert rx.reref(tree) == tree
    assert rx.clone(tree) == tree
    assert rx.snapshot(tree) == tree
    assert jax.jit(lambda dag: dag)(rx.Dag(tree)).value == tree


def test_a_single_ref_is_a_tree():
    ref = rx.Ref(1, "params")
    assert rx.deref(ref) == rx.Value(1, 0, "params")
    assert rx.reref(rx.deref(ref)).value == 1


def test_modules_go_through_a_boundary():
    linear = Linear(jnp.ones(2), None)
    closed = rx.reref(rx.deref((linear, linear.weight)))
    assert isinstance(closed[0], Linear)
    assert closed[0].weight is closed[1]
    assert closed[0].bias is None and closed[0].act == "relu"
    assert closed[0].weight.name == "Linear.weight"


def test_shared_values_of_different_refs_stay_different_refs():
    x = jnp.ones(2)
    a, b = rx.clone((rx.Ref(x), rx.Ref(x)))
    assert a is not b


def test_treedefs_are_equal_for_equal_structure():
    def make(value, shared):
        a = rx.Ref(value, "params")
        return (a, a if shared else rx.Ref(value, "params"))

    assert structure(make(1, True)) == structure(make(2, True))
    assert hash(structure(make(1, True))) == hash(structure(make(2, True)))
    assert structure(make(1, True)) != structure(make(1, False))


def test_treedefs_differ_by_collection_and_by_type():
    assert structure(rx.Ref(1, "params")) != structure(rx.Ref(1, "counts"))
    assert structure(rx.Ref(1)) != structure(Frozen(1))
    shared = rx.Ref(1, "a")
    other = rx.Ref(1, "b")
    assert structure((shared, shared)) != structure((other, other))


def test_treedefs_do_not_depend_on_names():
    class A(rx.Module):
        w: rx.Param[jax.Array]

    class B(rx.Module):
        v: rx.Param[jax.Array]

    assert structure([A(jnp.ones(2)).w]) == structure([B(jnp.ones(2)).v])


def test_deref_inside_jit_is_cached_by_structure(trace_counter):
    def body(tree):
        tree = rx.reref(tree)
        tree["a"].value += 1
        return rx.deref(tree)

    counted = trace_counter(body)
    f = jax.jit(counted)
    for value in (1.0, 2.0):
        ref = rx.Ref(jnp.array(value))
        out = rx.reref(f(rx.deref({"a": ref, "b": ref})))
        assert out["b"].value == value + 1
    assert counted.counter.count == 1
    f(rx.deref({"a": rx.Ref(jnp.array(1.0)), "b": rx.Ref(jnp.array(1.0))}))
    assert counted.counter.count == 2  # another sharing is another program


def test_deref_of_a_derefed_tree_is_refused():
    opened = rx.deref({"a": [rx.Ref(1)]})
    with raises(
        rx.StructureError,
        match=r"already derefed: Value found at `a\.0`. Call `rx.reref` on it first",
    ):
        rx.deref(opened)
    assert rx.deref(rx.reref(opened)) == opened  # the remedy


def test_reref_of_a_tree_with_refs_is_refused():
    with raises(
        rx.StructureError,
        match=(
            r"Cannot reref a tree that already holds refs: an unnamed ref \(collection "
            r"'params'\) found at `b`. Call `rx.deref` on the whole tree first."
        ),
    ):
        rx.reref({"a": rx.deref(rx.Ref(1)), "b": rx.Ref(2, "params")})


def test_an_index_without_its_value_is_refused():
    ref = rx.Ref(1, "params")
    opened = rx.deref({"a": ref, "b": ref})
    with raises(
        rx.StructureError,
        match=(
            r"Cannot reref: Index 0 \(an unnamed ref \(collection 'params'\)\) at `b` "
            "has no Value in this tree. This is part of a derefed tree"
        ),
    ):
        rx.reref({"b": opened["b"]})
    assert rx.reref(opened)["b"].value == 1  # the remedy


def test_trees_derefed_one_by_one_do_not_mix():
    one, two = rx.deref(rx.Ref(1)), rx.deref(rx.Ref(2))
    with raises(
        rx.StructureError,
        match=r"two values for ref 0.*rx.deref\(\(tree1, tree2\)\)",
    ):
        rx.reref((one, two))
    a, b = rx.reref(rx.deref((rx.Ref(1), rx.Ref(2))))  # the remedy
    assert (a.value, b.value) == (1, 2)


def test_an_index_of_another_ref_is_refused():
    one = rx.deref(rx.Ref(1, "params"))
    other = rx.Ref(2, "counts")
    _, index = rx.deref((other, other))
    with raises(
        rx.StructureError,
        match=(
            r"Cannot reref: Index 0 is of Ref an unnamed ref \(collection 'counts'\), but "
            r"its Value is of Ref an unnamed ref \(collection 'params'\)"
        ),
    ):
        rx.reref((one, index))


def test_the_error_names_the_field():
    linear = Linear(jnp.ones(2), None)
    _, again = rx.deref((linear, linear))
    with raises(
        rx.StructureError,
        match=r"Index 0 \(`Linear.weight` \(collection 'params'\)\) at `weight` has no",
    ):
        rx.reref(again)


def test_opened_nodes_compare_by_value_and_structure():
    a, b = rx.deref(rx.Ref(jnp.ones(2), "params")), rx.deref(rx.Ref(jnp.ones(2), "x"))
    assert a != b
    assert a == rx.Value(jnp.ones(2), 0, "params")
    assert a != rx.Value(jnp.zeros(2), 0, "params")
    assert rx.Index(0) == rx.Index(0)
    assert rx.Index(0) != rx.Index(1)
    assert len({rx.Index(0), rx.Index(0), rx.Index(1)}) == 2
    assert repr(rx.Value(1, 0, "params")) == (
        "Value(1, index=0, collection='params', ref_type=Ref)"
    )
    assert repr(rx.Index(2)) == "Index(index=2, collection=None, ref_type=Ref)"
    assert "Label(None)" in str(jax.tree.structure(rx.Value(1, 0)))


def test_dag_carries_refs_through_plain_jit():
    ref = rx.Ref(jnp.array(1.0))

    @jax.jit
    def double(dag):
        assert dag.value["a"] is dag.value["b"]
        dag.value["a"].value *= 2
        return dag

    out = double(rx.Dag({"a": ref, "b": ref}))
    assert isinstance(out, rx.Dag)
    assert out.value["a"] is out.value["b"]
    assert out.value["b"].value == 2.0
    assert ref.value == 1.0


def test_dag_carries_refs_through_plain_grad():
    ref = rx.Ref(jnp.array(3.0))
    grads = jax.grad(lambda dag: dag.value[0].value * dag.value[1].value)(
        rx.Dag((ref, ref))
    )
    assert grads.value[0] is grads.value[1]
    assert grads.value[0].value == 6.0


def test_dag_carries_refs_through_plain_scan_and_vmap_and_eqx():
    def step(dag, _):
        dag.value.value += 1
        return dag, None

    dag, _ = jax.lax.scan(step, rx.Dag(rx.Ref(jnp.array(0))), None, length=3)
    assert dag.value.value == 3

    stacked = rx.Dag(rx.Ref(jnp.arange(3.0)))
    out = jax.vmap(lambda dag: step(dag, None)[0])(stacked)
    assert out.value.value.tolist() == [1.0, 2.0, 3.0]

    out = eqx.filter_jit(lambda dag: step(dag, None)[0])(dag)
    assert out.value.value == 4


def test_dag_with_several_leaves_and_static_parts():
    r1, r2 = rx.Ref(jnp.array(1.0)), rx.Ref("static", "config")
    dag = rx.Dag([r1, r2, r1, jnp.ones(2)])
    out = eqx.filter_jit(lambda dag: dag)(dag)
    a, b, c, x = out.value
    assert a is c and b.value == "static" and x.shape == (2,)
    assert repr(rx.Dag([rx.Ref(1)])) == "Dag([Ref(1)])"


def test_clone_parts_from_the_original():
    ref = rx.Ref(jnp.ones(2), "params")
    tree = {"a": ref, "b": ref}
    cloned = rx.clone(tree)
    assert cloned["a"] is cloned["b"]
    assert cloned["a"] is not ref
    assert cloned["a"].value is ref.value
    cloned["a"].value = jnp.zeros(2)
    assert ref.value.tolist() == [1.0, 1.0]


def test_snapshot_is_a_plain_tree():
    linear = Linear(jnp.ones(2), rx.Ref(jnp.zeros(2)))
    plain = rx.snapshot(linear)
    assert isinstance(plain, Linear)
    assert plain.weight is linear.weight.value
    out = jax.jit(lambda m: m.weight + m.bias)(plain)
    assert out.tolist() == [1.0, 1.0]


def test_snapshot_keeps_values_that_are_trees():
    assert rx.snapshot([rx.Ref({"a": 1}), rx.Ref(None), 2]) == [{"a": 1}, None, 2]


def test_as_refs_is_the_other_way():
    linear = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    model = rx.as_refs(linear, "params")
    assert isinstance(model.weight, rx.Ref) and isinstance(model.bias, rx.Ref)
    assert model.weight.collection == "params"
    assert model.weight.name == "weight"
    assert eqx.tree_equal(rx.snapshot(model), linear)


def test_as_refs_ties_an_array_that_is_met_twice():
    x = jnp.ones(2)
    a, b, c = rx.as_refs((x, x, jnp.ones(2)))
    assert a is b and a is not c


def test_as_refs_selects_with_where_and_leaves_refs_alone():
    ref = rx.Ref(0, "counts")
    tree = {"r": ref, "i": np.arange(2), "f": jnp.ones(2), "s": "x", "n": 3}
    out = rx.as_refs(tree, "params", where=eqx.is_inexact_array)
    assert out["r"] is ref
    assert out["i"] is tree["i"] and out["s"] == "x" and out["n"] == 3
    assert out["f"].collection == "params"


def test_as_refs_does_not_tie_equal_scalars():
    a, b = rx.as_refs((1, 1), where=lambda x: isinstance(x, int))
    assert a is not b


def test_nothing_is_a_pytree_without_leaves():
    import copy
    import pickle

    assert jax.tree.leaves([rx.NOTHING, 1]) == [1]
    assert jax.tree.map(lambda x: x, rx.NOTHING) is rx.NOTHING
    assert repr(rx.NOTHING) == "NOTHING"
    assert copy.copy(rx.NOTHING) is rx.NOTHING
    assert copy.deepcopy([rx.NOTHING])[0] is rx.NOTHING
    assert pickle.loads(pickle.dumps(rx.NOTHING)) is rx.NOTHING


def test_reref_takes_no_value_that_holds_a_ref():
    ref, inner = rx.Ref(jnp.array(1.0), "params"), rx.Ref(2.0)
    tree = {"a": rx.deref(ref)}
    for held in (inner, [inner], rx.deref(inner)):
        tree["a"].value = held
        text = r"that of an unnamed ref \(collection 'params'\) at `a` holds .*side by side"
        with raises(rx.StructureError, match=text):
            rx.reref(tree)
    a, b = rx.reref(rx.deref((ref, inner)))  # the remedy
    assert (a.value, b.value) == (1.0, 2.0)


def test_reref_takes_no_tracer_that_has_ended():
    kept = []
    with jax.check_tracer_leaks(False):
        jax.jit(lambda dag: kept.append(rx.deref(dag.value)))(
            rx.Dag(rx.Ref(jnp.array(1.0)))
        )
    with raises(
        rx.TraceLevelError, match="Cannot reref in a different trace level.*tracer"
    ):
        rx.reref(kept.pop())


def test_reref_takes_no_other_type_for_a_ref():
    for wrong in (None, int, "Ref"):
        with raises(
            rx.StructureError, match=r"at `0` has ref_type=.*not a subclass of `rx.Ref`"
        ):
            rx.reref([rx.Value(1.0, 0, None, wrong)])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("node", [rx.Value, rx.Index])
def test_the_nodes_take_nothing_private(node):
    names = set(inspect.signature(node).parameters) - {"value"}
    assert names == {"index", "collection", "ref_type"}
