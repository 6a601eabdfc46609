"""What is not a tree: objects that hold themselves, and refs where no tree has leaves."""

import subprocess
import sys
import textwrap

import equinox as eqx
import jax
import jax.numpy as jnp
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


@pytest.mark.parametrize("make", [cycle, in_module])
@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_what_holds_itself_is_refused(door, make):
    with raises(rx.StructureError, match="holds itself.*Remove the cycle"):
        door(make())


def test_what_holds_itself_leaves_the_interpreter_whole():
    """JAX's own `RecursionError` lets nothing run after it, up to the exit."""
    code = """
    import refx_eqx as rx

    items = []
    items.append(items)
    for door in (rx.snapshot, rx.state_dict, rx.Ref, rx.as_refs):
        try:
            door(items)
        except rx.StructureError:
            pass

    def deep(n):
        return n and deep(n - 1)

    deep(800)
    print("whole")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == "whole\n" and not done.stderr


REF = rx.Ref(jnp.ones(2), "params")
LOOKUPS = {"set": {REF}, "frozenset": frozenset({REF}), "dict": {REF: 1}}


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
        lambda tree: (tree["w"] in lookup, rx.state_dict(tree, "params"))
    )
    assert found(tree)[0]


def test_a_collection_of_new_refs_is_a_name():
    with raises(TypeError, match=r"`rx.as_refs` was given collection=\['a'\]"):
        rx.as_refs(jnp.ones(1), ["a"])  # pyright: ignore[reportArgumentType]
    (ref,) = rx.aliases(rx.as_refs(jnp.ones(1), ("a",)))
    assert ref.collection == ("a",)
