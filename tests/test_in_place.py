"""Lists, dicts, NumPy arrays and sets in the values of refs, changed unseen."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from raising import raises

import refx_eqx as rx


def add_one(ref, *others):
    ref.value["n"] = ref.value["n"] + 1.0


def nested(ref, *others):
    rx.filter_jit(add_one)(ref)


def scanned(ref, *others):
    def step(carry, x):
        add_one(ref)
        return carry, None

    rx.scan(step, 0.0, jnp.ones(2))


@pytest.mark.parametrize("change", [add_one, nested, scanned])
def test_one_dict_in_two_refs_is_not_changed_in_place(change):
    shared = {"n": jnp.array(1.0)}
    a, b = rx.Ref(shared, "a"), rx.Ref(shared, "b")
    step = rx.filter_jit(change)
    text = r"changed a dict in its value in place, and an unnamed ref \(collection 'b'\) holds"
    for _ in range(2):
        with raises(rx.StructureError, match=text):
            step(a, b)
        assert a.value is b.value is shared and shared["n"] == 1.0
    # The remedies.
    a, b = rx.Ref(dict(shared), "a"), rx.Ref(dict(shared), "b")
    step(a, b)
    assert a.value["n"] > 1.0 and b.value["n"] == 1.0
    a, b = rx.Ref(shared, "a"), rx.Ref(shared, "b")

    @rx.filter_jit
    def write(a, b):
        a.value = {**a.value, "n": a.value["n"] + 1.0}

    write(a, b)
    assert a.value["n"] == 2.0 and b.value is shared


def test_a_program_that_was_right_for_others_is_not_used_for_a_shared_dict():
    step = rx.filter_jit(add_one)
    for _ in range(3):
        step(rx.Ref({"n": jnp.array(1.0)}), rx.Ref({"n": jnp.array(1.0)}))
    shared = {"n": jnp.array(1.0)}
    with raises(rx.StructureError, match="holds the same one"):
        step(rx.Ref(shared), rx.Ref(shared))


def test_reading_a_dict_that_two_refs_hold_is_fine():
    shared = {"n": jnp.array(1.0)}
    refs = rx.Ref(shared), rx.Ref(shared)
    assert rx.filter_jit(lambda a, b: a.value["n"] + b.value["n"])(*refs) == 2.0


@pytest.mark.parametrize(
    "copied", [rx.clone, rx.snapshot, copy.copy, lambda ref: rx.reref(rx.deref(ref))]
)
def test_a_copy_has_containers_of_its_own(copied):
    ref = rx.Ref({"b": [jnp.array(1.0)], "a": np.zeros(2)})
    other = copied(ref)
    value = other.value if rx.is_ref(other) else other
    assert list(value) == ["b", "a"]
    value["b"].append(2.0)
    value["a"][0] = 5.0
    value["c"] = 3.0
    assert list(ref.value) == ["b", "a"]
    assert len(ref.value["b"]) == 1 and ref.value["a"][0] == 0.0


def change_dict(value):
    value["k"] = 2


def change_list(value):
    value["l"].append(1)


def change_array(value):
    value["x"][0] = 7.0


@pytest.mark.parametrize("change", [change_dict, change_list, change_array])
@pytest.mark.parametrize("filter", [False, "counts"])
def test_a_change_in_place_is_a_write(change, filter):
    value = {"k": 1, "l": [], "x": np.zeros(2)}
    ref = rx.Ref(value, "params")
    with raises(
        rx.ImmutableError, match=r"\(collection 'params'\): a list, a dict or a NumPy"
    ):
        with rx.mutable(filter):
            change(ref.value)
    assert ref.value["k"] == 1 and ref.value["l"] == [] and ref.value["x"][0] == 0.0
    with rx.mutable("params"):  # the remedy: widen the filter
        change(ref.value)
    with rx.mutable(False):
        assert ref.value["k"] in (1, 2)


def test_an_error_in_the_block_is_not_masked_and_the_change_is_undone():
    ref = rx.Ref({"k": 1})
    with raises(KeyError, match="missing"):
        with rx.mutable(False):
            ref.value["k"] = 2
            ref.value["missing"]
    assert ref.value == {"k": 1}


def test_a_change_in_place_inside_a_transform_under_mutable():
    ref = rx.Ref({"n": jnp.array(1.0)}, "params")
    with pytest.raises(rx.ImmutableError):
        with rx.mutable(False):
            rx.filter_jit(add_one)(ref)
    assert ref.value["n"] == 1.0
    with rx.mutable(False):
        assert jax.jit(lambda x: x + 1)(ref.value["n"]) == 2.0


@pytest.mark.parametrize(
    "holder",
    [
        lambda r: {r},
        lambda r: frozenset([r]),
        lambda r: {r: 1},
        lambda r: {r: 1, rx.Ref(2): 3},
    ],
    ids=["set", "frozenset", "dict", "dict of two"],
)
def test_refs_in_a_set_or_as_keys_are_refused(holder):
    ref = rx.Ref(1.0, "params")
    text = (
        r"cannot hold a ref: an unnamed ref \(no collection\) was given one that holds"
    )
    with raises(rx.StructureError, match=text):
        rx.Ref([holder(ref)])
    outer = rx.Ref(0)
    with raises(rx.StructureError, match=text):
        outer.value = {"a": holder(ref)}  # type: ignore[assignment]
    assert outer.value == 0
    kind = type(holder(ref)).__name__
    for door in (rx.deref, rx.clone, lambda t: jax.tree.leaves(rx.Dag(t))):
        with raises(rx.StructureError, match=rf"a {kind} of refs.*'params'\) at `s`"):
            door({"r": ref, "s": holder(ref)})
    copy = rx.clone({"r": ref, "s": [ref]})  # the remedy
    assert copy["s"][0] is copy["r"] and copy["r"] in set(copy["s"])


class Tagged(rx.Ref):
    unit = "m"


class Slotted(rx.Ref):
    __slots__ = ("tag",)


@pytest.mark.parametrize("cls", [Tagged, Slotted])
def test_an_attribute_of_a_ref_is_never_dropped(cls):
    ref = cls(jnp.array(1.0), "params")
    assert type(rx.clone(ref)) is cls
    ref.tag = "x"
    doors = (
        rx.clone,
        copy.copy,
        copy.deepcopy,
        pickle.dumps,
        rx.filter_jit(lambda r: r[...]),
    )
    for door in doors:
        with raises(
            rx.StructureError,
            match=rf"the attribute `tag` of a {cls.__name__}, an unnamed",
        ):
            door(ref)
    assert ref.tag == "x" and ref[...] == 1.0
    # The remedies: in the class, or next to it in a tree.
    assert rx.clone(Tagged(1.0)).unit == "m"
    assert rx.clone({"ref": cls(1.0), "tag": "x"})["tag"] == "x"
