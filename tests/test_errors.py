"""Which error it is that a caller can catch."""

import jax
import jax.numpy as jnp
import pytest

import refx_eqx as rx


def appended(seen):
    seen.append(rx.Ref(1.0))


def ref(value=0.0, collection=None):
    return rx.Ref(jnp.asarray(value), collection)


def given_a_collection(x):
    class Holder(rx.Module):
        weight: rx.Param[jax.Array]

    Holder(x)


def cond(w):
    w[0].value += 1.0
    return w[0].value < 3.0


def counting():
    closed_over = ref()

    def count():
        closed_over.value += 1.0

    return count


def cyclic():
    tree: list = []
    tree.append(tree)
    return tree


CANNOT_BE_CARRIED = {
    "a list is appended to": lambda: rx.filter_jit(appended)([]),
    "a collection is given": lambda: rx.filter_jit(given_a_collection)(ref()),
    "a condition writes": lambda: rx.while_loop(cond, lambda w: w, [ref()]),
    "a tree holds itself": lambda: rx.filter_jit(lambda x: None)(cyclic()),
    "a write is no update": lambda: rx.functionalize(counting())(),
}

DOES_NOT_FIT = {
    "axes": lambda: rx.filter_vmap(lambda x, y: None)(jnp.ones(2), jnp.ones(3)),
    "branches": lambda: rx.cond(True, lambda: 1.0, lambda: (1.0,)),
    "a carry": lambda: rx.scan(lambda c, x: ((c, c), x), 0.0, jnp.ones(3)),
    "a state": lambda: rx.load_state_dict([ref()], {"1": jnp.ones(())}),
    "parts": lambda: rx.combine([1], [1, 2]),
    "tangents": lambda: rx.filter_jvp(lambda x: x, (1.0,), (1.0, 2.0)),
    "updates": lambda: rx.update_refs([ref()], {"a": 1.0}),
}


@pytest.mark.parametrize("what", CANNOT_BE_CARRIED)
def test_what_cannot_be_carried_is_a_carry_error(what):
    with pytest.raises(rx.CarryError):
        CANNOT_BE_CARRIED[what]()


@pytest.mark.parametrize("what", DOES_NOT_FIT)
def test_what_does_not_fit_is_a_mismatch_error(what):
    with pytest.raises(rx.MismatchError):
        DOES_NOT_FIT[what]()


def test_both_are_structure_errors():
    for kind in (rx.CarryError, rx.MismatchError):
        assert issubclass(kind, rx.StructureError) and kind.__module__ == "refx_eqx"
    assert not issubclass(rx.CarryError, rx.MismatchError)
