"""Which errors a caller can catch, and how their messages are shown."""

import pickle
import traceback

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


# How a message is shown.


def shown(error):
    return "".join(traceback.format_exception_only(error)).splitlines()


def test_a_message_is_wrapped_where_python_prints_it():
    weight = ref(collection="params")
    with pytest.raises(rx.TraceLevelError) as info:
        jax.jit(lambda x: x * weight.value)(1.0)
    first, *others = shown(info.value)[: len(str(info.value).splitlines())]
    assert first.startswith("refx_eqx.TraceLevelError: Cannot read ref from different")
    assert 70 < len(first) <= 88 and len(others) > 3
    assert all(x.startswith("    ") and 60 < len(x) <= 88 for x in others[:-1])
    assert " ".join(str(info.value).split()) == info.value.args[0]


def test_code_in_a_message_is_not_broken():
    code = "`rx.update_refs(target, source)`"
    for n in range(1, 40):
        error = rx.MismatchError(f"{'x ' * n} {code} and {'y ' * 40}")
        assert code in str(error)
        assert max(map(len, shown(error))) <= 88


def test_code_that_fits_in_no_line_has_its_own():
    code = f"`rx.path({', '.join(['encoder'] * 20)})`"
    assert str(rx.StructureError(f"use {code} instead.")).splitlines() == [
        "use",
        f"    {code}",
        "    instead.",
    ]


def test_a_tree_in_a_message_keeps_its_lines():
    tree = "Scale(\n  by=Ref(f32[], 'params'),\n      deeper=None\n)"
    assert str(rx.MismatchError(tree)) == tree


def test_the_name_of_a_subclass_counts():
    class ErrorOfACompanyWithALongName(rx.StructureError):
        pass

    ErrorOfACompanyWithALongName.__qualname__ = "ErrorOfACompanyWithALongName"
    error = ErrorOfACompanyWithALongName("word " * 40)
    lines = shown(error)
    assert len(lines) > 2 and 80 < len(lines[0]) <= 88


@pytest.mark.parametrize("error", [rx.RefError(), rx.RefError("a", 1), rx.RefError(3)])
def test_an_error_with_another_number_of_arguments_can_be_shown(error):
    assert str(error) == str(Exception(*error.args))


def test_an_error_survives_pickle():
    error = rx.StructureError("word " * 40)
    other = pickle.loads(pickle.dumps(error))
    assert type(other) is rx.StructureError
    assert other.args == error.args and str(other) == str(error)
