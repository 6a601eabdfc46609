"""`rx.check` names the arrays that are in no ref."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from raising import raises

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
