"""`rx.check` names the arrays that are in no ref."""

import functools
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from raising import message_of, raises

import refx_eqx as rx


class Layer(rx.Module):
    weight: rx.Param[jax.Array]
    offset: jax.Array


class Net(rx.Module):
    layers: list[Layer]
    table: np.ndarray


def net():
    layers = [Layer(jnp.ones(2), jnp.zeros(n)) for n in (2, 3)]
    return Net(layers, np.zeros((2, 2), np.float32))


def test_arrays_in_no_ref_are_named():
    model = net()
    text = (
        r"3 of the arrays are not in refs: `layers\.0\.offset`, float32\[2\]; "
        r"`layers\.1\.offset`, float32\[3\]; `table`, float32\[2, 2\]\. .*rx\.as_refs"
    )
    for tree in (model, rx.deref(model)):
        with raises(rx.StructureError, match=text):
            rx.check(tree)
    # The remedies.
    rx.check(model, constants=rx.path("layers.*.offset", "table"))
    rx.check(
        rx.as_refs(model, "params", where=eqx.is_array), constants=rx.path("table")
    )
    rx.check({"weight": rx.Ref(jnp.zeros(2))})


def scaled(ref, array, x):
    return ref[...] * array[...] * x


def in_closure(ref, array):
    return lambda x: scaled(ref, array, x)


def in_default(ref, array):
    return lambda x, array=array: scaled(ref, array, x)


HOLDERS = {
    "partial": lambda ref, array: functools.partial(scaled, ref, array),
    "closure": in_closure,
    "default": in_default,
    "method": lambda ref, array: types.MethodType(
        lambda both, x: scaled(both[0], both[1], x), (ref, array)
    ),
    "nested": lambda ref, array: functools.partial(in_closure(ref, array)),
}


@pytest.mark.parametrize("holder", HOLDERS.values(), ids=HOLDERS)
@pytest.mark.parametrize("ref", [rx.Ref(jnp.ones(3)), jax.ShapeDtypeStruct((), int)])
def test_an_array_that_a_function_holds_is_named(holder, ref):
    array = np.ones(3, np.float32)
    tree = {"r": rx.Ref(jnp.ones(3), "params"), "f": holder(ref, array)}
    constants = False if isinstance(ref, rx.Ref) else lambda x: x is ref
    text = (
        r"1 of the arrays are not in refs: `f\.[^`]*`, float32\[3\]\. They.*state dict\. "
        r"Let a function hold a ref, `rx.Ref\(array, \"params\"\)`, and read `ref"
    )
    with raises(rx.StructureError, match=text) as e:
        rx.check(tree, constants)
    # The remedies.
    place = message_of(e.value).split("`")[3]
    rx.check(tree, constants=rx.path(place, "f.**"))
    tree["f"] = holder(ref, rx.Ref(array, "params"))
    rx.check(tree, constants)


def test_both_remedies_are_named():
    layer = Layer(jnp.ones(2), jnp.zeros(2))
    tree = {"layer": layer, "f": functools.partial(jnp.add, jnp.ones(2))}
    text = r"`f\.args\.0`.*`layer\.offset`.*Let a function.*Declare a field.*constants"
    with raises(rx.StructureError, match=text):
        rx.check(tree)
    with raises(
        rx.StructureError, match=r"1 of the arrays.*`f\.args\.0`.*Let a function"
    ):
        rx.check(rx.as_refs(tree, "params"))


def test_a_layer_in_a_bound_method_is_seen():
    layer = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    bound = types.MethodType(eqx.nn.Linear.__call__, layer)
    with raises(rx.StructureError, match=r"2 of the.*`__self__\.weight`"):
        rx.check(bound)
    rx.check(types.MethodType(eqx.nn.Linear.__call__, rx.as_refs(layer, "params")))


def test_a_function_that_holds_no_array_is_fine():
    def recursive(n):
        return n and recursive(n - 1)

    keys_of_two_types = {1: jnp.ones(2), "a": jnp.ones(2)}  # JAX cannot flatten it
    rx.check([recursive, lambda: keys_of_two_types, functools.partial(min, 3), min])


def test_only_the_first_are_named():
    with raises(rx.StructureError, match=r"`7`, float32\[0\]; 3 more\. They"):
        rx.check([jnp.zeros(0) for _ in range(11)])


def test_constants_that_there_are_not():
    with raises(rx.StructureError, match=r"rx\.path\('ofset'\) selects nothing"):
        rx.check(net(), constants=rx.path("ofset"))


def test_a_field_that_lost_its_ref():
    layer = eqx.tree_at(
        lambda m: m.weight, Layer(jnp.ones(2), jnp.ones(2)), jnp.ones(2)
    )
    with raises(rx.RefTypeError, match=r"`rx\.check`: `Layer\.weight` at `weight`"):
        rx.check(layer)


def test_in_a_transform_and_in_a_function():
    ref = rx.Ref(jnp.ones(2))
    rx.check({"f": lambda x: ref[...] * x, "n": 3, "act": jax.nn.relu})

    def build(x):
        rx.check(rx.Ref(x))
        with raises(rx.StructureError, match="1 of the arrays"):
            rx.check([x])
        return x

    assert jax.jit(build)(jnp.ones(2))[0] == 1.0
