"""What is not a tree: objects that hold themselves, and refs where no tree has leaves."""

import collections
import copy
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from raising import raises

import refx_eqx as rx


class Holder(eqx.Module):
    items: list


def cycle():
    items = []
    items.append(items)
    return items


def in_module():
    items = []
    items.append(Holder(items))
    return items[0]


DOORS = {
    "Ref": rx.Ref,
    "write": lambda tree: setattr(rx.Ref(1.0), "value", tree),
    "deref": rx.deref,
    "reref": rx.reref,
    "clone": rx.clone,
    "snapshot": rx.snapshot,
    "as_refs": rx.as_refs,
    "aliases": rx.aliases,
    "values": rx.values,
    "count": rx.count,
    "check": rx.check,
    "tabulate": rx.tabulate,
    "mermaid": rx.mermaid,
    "state_dict": rx.state_dict,
    "load_state_dict": lambda tree: rx.load_state_dict(tree, {}),
    "update_refs": lambda tree: rx.update_refs(tree, tree),
    "filter_spec": lambda tree: rx.filter_spec(tree, True),
    "partition": lambda tree: rx.partition(tree, True),
    "combine": rx.combine,
    "another part": lambda tree: rx.combine({"a": rx.Ref(1.0)}, tree),
    "refs_in": rx.refs_in,
    "a filter": lambda tree: rx.values({"a": rx.Ref(1.0)}, tree),
    "filters": lambda tree: rx.filter_spec({"a": rx.Ref(1.0)}, ["params", tree]),
    "get_partition": lambda tree: rx.get_partition(tree, True),
    "axis_rules": lambda tree: rx.axis_rules().specs(tree),
    "Optimizer": lambda tree: rx.Optimizer(tree, optax.sgd(0.1)),
    "EMA": lambda tree: rx.nn.EMA(tree, 0.9),
    "merge_lora": rx.nn.merge_lora,
    "update_refs from it": lambda tree: rx.update_refs({"a": rx.Ref(1.0)}, {"a": tree}),
    "tree_equal": lambda tree: rx.tree_equal(tree, tree),
    "block_until_ready": rx.block_until_ready,
    "Dag": lambda tree: jax.tree.leaves(rx.Dag(tree)),
    "filter_jit": lambda tree: rx.filter_jit(lambda x: 1)(tree),
    "a result": lambda tree: rx.filter_jit(lambda: tree)(),
    "filter_grad": lambda tree: rx.filter_grad(lambda x, t: x)(1.0, tree),
    "filter_vmap": lambda tree: rx.filter_vmap(lambda x, t: x)(jnp.ones(2), tree),
    "scan": lambda tree: rx.scan(lambda c, x: (c, x), tree, jnp.ones(2)),
    "cond": lambda tree: rx.cond(True, lambda t: 1, lambda t: 1, tree),
}


def in_ordered_dict():
    by_name = collections.OrderedDict()
    by_name["a"] = [by_name]
    return by_name


@jax.tree_util.register_pytree_node_class
class Linked:
    """A node of a user, which can be changed."""

    def __init__(self, other=None):
        self.other = other

    def tree_flatten(self):
        return (self.other,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def in_own_node():
    linked = Linked()
    linked.other = Linked(linked)
    return linked


@pytest.mark.parametrize("make", [cycle, in_module, in_ordered_dict, in_own_node])
@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_what_holds_itself_is_refused(door, make):
    with raises(rx.StructureError, match="holds itself.*Remove the cycle"):
        door(make())


READING = {
    "value": lambda ref: ref.value,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "save": lambda ref: rx.save("unused.safetensors", ref),
    "filter_shard": lambda ref: rx.filter_shard(ref, jax.devices()[0]),
    "add_axis": lambda ref: rx.add_axis(ref, 2),
    "filter_jit of a module": lambda ref: rx.filter_jit(lambda x: 1)(Holder([ref])),
}
READING |= {name: DOORS[name] for name in ("deref", "clone", "snapshot", "values")}
READING |= {name: DOORS[name] for name in ("count", "tabulate", "state_dict")}
READING |= {name: DOORS[name] for name in ("filter_jit", "filter_vmap", "scan", "cond")}


@pytest.mark.parametrize("door", READING.values(), ids=READING)
def test_a_ref_whose_value_came_to_hold_itself_is_named_where_it_is_read(door):
    ref: rx.Ref[list] = rx.Ref([jnp.ones(2)], "log")
    appended(ref.value)
    with raises(rx.StructureError, match=r"collection 'log'\) holds itself.*Remove"):
        door(ref)
    # The remedy.
    items: list = ref._value
    items.pop()
    assert len(ref.value) == 1
    items.append(items)
    ref.value = [1.0]
    assert ref.value == [1.0]


def appended(x):
    x.append(x)


def put_into(x):
    x["a"] = x


def appended_after_it_was_written(ref):
    items: list = [1.0]
    ref.value = items
    items.append(items)


def appended_after_it_was_returned(ref):
    items: list = [1.0]
    new = rx.Ref(items)
    items.append(items)
    return new


BODIES = {
    "a list of a ref": (lambda ref: appended(ref.value), lambda: rx.Ref([1.0])),
    "a dict of a ref": (lambda ref: put_into(ref.value), lambda: rx.Ref({"b": 1.0})),
    "a list": (appended, lambda: [1.0]),
    "a returned list": (lambda x: (appended(x), x)[1], lambda: [1.0]),
    "a dict": (put_into, lambda: {"b": 1.0}),
    "an OrderedDict": (put_into, lambda: collections.OrderedDict(b=1.0)),
    "a list with a ref": (appended, lambda: [rx.Ref(1.0)]),
    "a written list": (appended_after_it_was_written, lambda: rx.Ref([1.0])),
    "a new ref": (appended_after_it_was_returned, lambda: rx.Ref([1.0])),
}
RUN = {
    "filter_jit": lambda f, x: rx.filter_jit(f)(x),
    "filter_grad": lambda f, x: rx.filter_grad(lambda w, x: (w, f(x)), has_aux=True)(
        jnp.array(1.0), x
    ),
    "filter_vmap": lambda f, x: rx.filter_vmap(lambda x, _: f(x), in_axes=(None, 0))(
        x, jnp.ones(2)
    ),
    "cond": lambda f, x: rx.cond(True, f, lambda _: None, x),
    "filter_checkpoint": lambda f, x: rx.filter_checkpoint(f)(x),
    "filter_eval_shape": rx.filter_eval_shape,
    "lift": lambda f, x: rx.lift(eqx.filter_jit)(f)(x),
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("run", RUN.values(), ids=RUN)
def test_what_comes_to_hold_itself_in_a_body_is_refused(run, body):
    fn, make = body
    with raises(rx.CarryError, match="holds itself.*Remove the cycle"):
        run(fn, make())


def test_a_plan_is_not_used_for_a_value_that_came_to_hold_itself():
    step = rx.filter_jit(lambda ref: 1)
    ref = rx.Ref([1.0])
    for _ in range(4):
        step(ref)
    items: list = ref.value
    items.append(items)
    with raises(rx.CarryError, match="holds itself"):
        step(ref)
    hash(rx.Ref(1.0))  # from here on, each plan looks at its refs again
    with raises(rx.CarryError, match="holds itself"):
        step(ref)
    items.pop()
    assert step(ref) == 1


def test_a_value_that_came_to_hold_itself_where_it_may_not_be_written_is_restored():
    ref = rx.Ref([1.0], "log")
    with raises(rx.ImmutableError, match="changed in place, and has been restored"):
        with rx.mutable(False):
            appended(ref.value)
    assert ref.value == [1.0]


def test_a_residual_or_a_gradient_that_holds_itself_is_refused():
    def run(residuals, grad):
        @rx.filter_custom_vjp
        def f(x):
            return x

        f.def_fwd(lambda _, x: (x, residuals))
        f.def_bwd(lambda *_: grad)
        rx.filter_grad(f)(jnp.array(1.0))

    for both in ((cycle(), jnp.array(1.0)), (None, cycle())):
        with raises(rx.CarryError, match="holds itself"):
            run(*both)


def test_a_callback_whose_result_holds_itself_is_refused():
    for result, types in ((cycle(), jnp.ones(2)), (jnp.ones(2), cycle())):
        with raises(rx.CarryError, match="holds itself"):
            rx.filter_pure_callback(lambda: result, result_shape_dtypes=types)


def test_what_holds_itself_leaves_the_interpreter_whole():
    """JAX's own `RecursionError` lets nothing run after it, up to the exit."""
    code = """
    import refx_eqx as rx

    def itself():
        items = []
        items.append(items)
        return items

    def in_ref():
        items = []
        ref = rx.Ref(items)
        items.append(items)
        return ref

    def append(items):
        items.append(items)

    for door in (rx.snapshot, rx.state_dict, rx.deref, rx.as_refs):
        for make in (itself, in_ref):
            try:
                door(make())
            except rx.StructureError:
                pass

    for _ in range(3):
        for body, make in (
            (append, lambda: [1.0]),
            (lambda ref: append(ref.value), lambda: rx.Ref([1.0])),
            (lambda _: in_ref(), lambda: None),
        ):
            try:
                rx.filter_jit(body)(make())
            except rx.CarryError:
                pass
            else:
                raise AssertionError
        assert rx.filter_jit(lambda x: x + 1)(1.0) == 2.0

    def deep(n):
        return n and deep(n - 1)

    deep(800)
    print("whole")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == "whole\n" and not done.stderr


class Scale(rx.Module):
    w: rx.Param

    def __call__(self, x):
        return x * self.w[...]


class Frozen(eqx.Module):
    refs: frozenset


REF, OTHER = rx.Ref(jnp.ones(2), "params"), rx.Ref(jnp.ones(2), "params")
LOOKUPS = {
    "set": {REF},
    "frozenset": frozenset({REF}),
    "dict": {REF: 1},
    "tuple in a set": {("w", REF)},
    "tuple as a key": {(0, (REF, 1)): 1},
    "module in a set": set(map(Scale, [REF])),
    "module as a key": dict.fromkeys([Scale(REF)], 1),
    "set in a set": {frozenset({REF})},
    "set in a module in a set": set(map(Frozen, [frozenset({REF})])),
    "function in a set": {lambda ref=REF: ref},
    "bound method as a key": {Scale(REF).__call__: 1},
}


@pytest.mark.parametrize("lookup", LOOKUPS.values(), ids=LOOKUPS)
def test_no_copy_leaves_refs_behind_in_what_they_are_looked_up_in(lookup):
    for verb, door in (
        ("deref", rx.deref),
        ("deref", rx.clone),
        ("snapshot", rx.snapshot),
    ):
        with raises(
            rx.StructureError, match=rf"Cannot {verb} a .* of refs.*'params'\) at `a`"
        ):
            door({"a": lookup, "w": REF})


@pytest.mark.parametrize("lookup", LOOKUPS.values(), ids=LOOKUPS)
def test_no_checkpoint_leaves_out_what_is_in_a_set_alone(lookup, tmp_path):
    path = tmp_path / "model.safetensors"
    for door in (rx.state_dict, lambda tree: rx.save(path, tree)):
        with raises(rx.StructureError, match=r"'params'\) is in a .* at `a`.*too"):
            door({"a": lookup})
    # The remedy; and what is looked up stays what it is.
    tree = {"a": lookup, "w": REF}
    assert list(rx.state_dict(tree)) == ["w"] and rx.aliases(tree) == {REF: ("w",)}
    grads = rx.filter_grad(lambda t: jnp.sum(t["w"].value), wrt="params")(tree)
    assert grads["w"].value[0] == 1.0
    found = rx.filter_jit(
        lambda tree: (tree["w"] == REF, rx.state_dict(tree, "params"))
    )
    assert found(tree)[0] and rx.filter_spec(tree, rx.refs_in(lookup))["w"]


@pytest.mark.parametrize("lookup", LOOKUPS.values(), ids=LOOKUPS)
def test_no_door_overlooks_a_ref_that_is_in_a_set_alone(lookup):
    doors: list[Callable[[Any], Any]] = [
        rx.aliases,
        rx.values,
        rx.count,
        rx.check,
        rx.as_refs,
        lambda tree: rx.filter_spec(tree, True),
        lambda tree: rx.partition(tree, True),
        lambda tree: rx.tree_partition(tree, True),
        lambda tree: rx.update_refs(tree, tree),
        lambda tree: rx.apply_updates(tree, dict.fromkeys(tree)),
    ]
    for door in doors:
        with raises(rx.StructureError, match=r"'params'\) is in a .* at `a`.*too"):
            door({"a": lookup})
        door({"a": lookup, "w": REF})  # the remedy


@pytest.mark.parametrize("key", [lambda ref: ref, lambda ref: (ref, 1)])
def test_no_door_shows_what_jax_says_of_keys_that_it_cannot_sort(key):
    tree = {"a": {key(REF): 1.0, key(OTHER): 2.0}, "b": [REF, OTHER]}
    takes = [
        rx.aliases,
        rx.values,
        rx.count,
        rx.check,
        rx.as_refs,
        rx.state_dict,
        rx.tabulate,
        lambda tree: rx.filter_spec(tree, True),
        lambda tree: rx.combine(*rx.partition(tree, "params")),
        lambda tree: rx.tree_partition(tree, "params"),
        lambda tree: rx.update_refs(tree, tree),
        lambda tree: rx.load_state_dict(tree, rx.state_dict(tree)),
    ]
    for door in takes:
        door(tree)
    refuses: list[Callable[[Any], Any]] = [
        rx.deref,
        rx.clone,
        rx.snapshot,
        lambda tree: jax.tree.leaves(rx.Dag(tree)),
        rx.block_until_ready,
        lambda tree: rx.tree_equal(tree, tree),
        lambda tree: rx.nn.EMA(tree, 0.9),
        lambda tree: rx.add_axis(tree, 2),
        rx.filter_jit(lambda tree: None),
        lambda tree: rx.filter_jit(lambda: tree["b"][0][...])(),
        lambda tree: rx.cond(True, lambda tree: 1, lambda tree: 2, tree),
        lambda tree: rx.scan(lambda c, _: (c, None), tree, length=2),
        lambda tree: rx.scan(lambda c, _: (tree["b"][0][...], None), 1.0, length=2),
    ]
    for door in refuses:
        with raises(rx.StructureError, match=r"a dict of refs, such as.*`(tree\.)?a`"):
            door(tree)
    with raises(rx.StructureError, match="Cannot apply the updates: there is one for"):
        rx.apply_updates(tree, tree)


def test_a_collection_of_new_refs_is_a_name():
    with raises(TypeError, match=r"`rx.as_refs` was given collection=\['a'\]"):
        rx.as_refs(jnp.ones(1), ["a"])  # pyright: ignore[reportArgumentType]
    (ref,) = rx.aliases(rx.as_refs(jnp.ones(1), ("a",)))
    assert ref.collection == ("a",)


OF_REFS = {
    "aliases": rx.aliases,
    "snapshot": rx.snapshot,
    "as_refs": lambda tree: rx.as_refs(tree, "params"),
    "mutable": lambda tree: rx.mutable("params", tree).__enter__(),
    "EMA": lambda tree: rx.nn.EMA(tree, 0.9),
    "add_axis": lambda tree: rx.add_axis(tree, 2),
}
OF_REFS |= {name: DOORS[name] for name in ("values", "count", "tabulate", "state_dict")}
MAKE_DEREFED = {
    "derefed": rx.deref,
    "gradients": rx.filter_grad(lambda tree: tree["w"].value.sum()),
    "a Dag": rx.Dag,
}


@pytest.mark.parametrize("derefed", MAKE_DEREFED.values(), ids=MAKE_DEREFED)
@pytest.mark.parametrize("door", OF_REFS.values(), ids=OF_REFS)
def test_a_derefed_tree_is_not_taken_for_a_tree_without_refs(door, derefed):
    tree = derefed({"w": rx.Ref(jnp.ones(2), "params")})
    with raises(
        rx.StructureError,
        match=r": the tree is derefed: it has a Value at `.*w`\. Pass the tree of refs "
        r"itself, or make one of it: `rx\.reref\(tree\)`",
    ):
        door(tree)
    if not isinstance(tree, rx.Dag):  # the remedy
        door(rx.reref(tree))
