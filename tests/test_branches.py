"""`cond` and `switch`."""

import gc
import types
import weakref
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jaxprs import equations
from raising import raises

import refx_eqx as rx


def refs():
    return rx.Ref(jnp.ones(2), "params"), rx.Ref(jnp.zeros(2), "counts")


def writes(value):
    def write(a, b):
        a.value = value

    return write


def leaves(a, b):
    pass


def test_without_refs_they_are_jaxs():
    x = jnp.arange(3.0)
    for pred in [True, False, jnp.array(True), 0, 2.0]:
        ours = rx.cond(pred, jnp.sin, jnp.cos, x)
        assert eqx.tree_equal(ours, jax.lax.cond(pred, jnp.sin, jnp.cos, x))
    branches = [jnp.sin, jnp.cos, jnp.tan]
    for index in [-1, 0, 1, 2, 7, jnp.array(1)]:
        ours = rx.switch(index, branches, x)
        assert eqx.tree_equal(ours, jax.lax.switch(index, branches, x))
    assert rx.cond(True, lambda: 1, lambda: 2) == 1


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("pred", [True, False])
def test_branches_write_different_refs(pred, jit):
    a, b = refs()

    def true_fun(a, b):
        a.value += 1
        return a.value

    def false_fun(a, b):
        b.value -= 1
        return b.value

    def run(pred, a, b):
        return rx.cond(pred, true_fun, false_fun, a, b)

    out = (rx.filter_jit(run) if jit else run)(jnp.array(pred), a, b)
    assert a.value[0] == (2 if pred else 1) and b.value[0] == (0 if pred else -1)
    assert out[0] == (2 if pred else -1)


def test_branches_close_over_refs_and_are_methods():
    a, _ = refs()

    class Model(eqx.Module):
        w: rx.Ref

        def double(self):
            self.w.value *= 2

    def negate():
        a.value *= -1

    # One ref, in the closure of one branch and in the module of the other.
    for index, expected in [(0, 2.0), (1, -2.0), (2, -2.0)]:
        rx.switch(index, [Model(a).double, negate, lambda: None])
        assert a.value[0] == expected


def test_gradients_flow_through_the_chosen_branch():
    def loss(w, pred):
        def double():
            w.value = w.value * 2

        rx.cond(pred, double, lambda: None)
        return jnp.sum(w.value**2)

    for pred, expected in [(True, 8.0), (False, 2.0)]:
        w, _ = refs()
        grads = rx.filter_jit(rx.filter_grad(loss))(w, jnp.array(pred))
        assert grads.value.tolist() == [expected] * 2


def test_under_vmap_each_lane_has_its_branch():
    refs = rx.Ref(jnp.zeros(3), "state")

    def f(ref, pred):
        def write():
            ref.value += 1

        return rx.cond(pred, write, lambda: None)

    rx.filter_vmap(f)(refs, jnp.array([True, False, True]))
    assert refs.value.tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("choose", ["cond", "switch"])
def test_only_what_a_branch_uses_is_an_operand(choose):
    read, written, untouched = (rx.Ref(jnp.ones(n)) for n in (2, 3, 4))
    refs = {"read": read, "written": written, "untouched": untouched}

    def write():
        refs["written"].value += refs["read"].value[0]

    def f(refs, choice):
        if choose == "cond":
            rx.cond(choice == 1, write, lambda: None)
        else:
            rx.switch(choice, [lambda: None, write])

    jaxpr, _, _ = rx.filter_make_jaxpr(f)(refs, jnp.array(1))
    (eqn,) = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "cond"]
    _, *operands = eqn.invars
    assert {x.aval.shape for x in operands} == {(2,), (3,)} and len(operands) == 2
    assert [x.aval.shape for x in eqn.outvars] == [(3,)]


def test_new_refs_of_one_kind_come_out_of_all_branches():
    a, _ = refs()
    make = lambda scale: lambda: {"r": rx.Ref(a.value * scale, "made"), "a": a}
    out = rx.cond(False, make(1), make(2))
    assert out["r"].collection == "made" and out["r"].value[0] == 2.0
    assert out["a"] is a


def test_what_a_branch_writes_weakly_takes_the_type_of_the_other():
    ref = rx.Ref(jnp.ones((), jnp.bfloat16))

    def zero(ref):
        ref.value = 0.0

    rx.cond(True, zero, lambda ref: None, ref)
    assert ref.value.dtype == jnp.bfloat16 and ref.value == 0


@pytest.mark.parametrize("index", [0.0, jnp.array(0.0), True])
def test_an_index_that_is_not_an_integer_is_refused(index):
    message = r"the index must be an integer, but is (0\.0|.*f32\[\]|True), of dtype.*`rx.cond`"
    branches = [lambda: 1, lambda: 2]
    with raises(TypeError, match=message):
        rx.switch(index, branches)
    assert rx.switch(jnp.astype(jnp.asarray(index), int), branches) in (1, 2)
    with raises(TypeError, match=message):
        rx.filter_jit(lambda: rx.switch(index, branches))()


def test_no_second_trace_for_an_equal_structure(trace_counter: Any):
    @trace_counter
    def add(a, b):
        a.value += b.value

    @trace_counter
    def skip(a, b):
        pass

    for pred in [True, False, jnp.array(True)]:
        rx.cond(pred, add, skip, *refs())
    assert (add.counter.count, skip.counter.count) == (1, 1)
    a, _ = refs()
    rx.cond(True, add, skip, a, a)  # another sharing
    assert a.value[0] == 2.0
    assert (add.counter.count, skip.counter.count) == (2, 2)


def test_a_program_dies_with_either_function():
    a, b = refs()
    other = lambda a, b: None
    alive = weakref.ref(other)
    rx.cond(True, leaves, other, a, b)
    del other
    gc.collect()
    jax.clear_caches()
    gc.collect()
    assert alive() is None


def test_a_failed_branch_changes_nothing():
    a, b = refs()

    def fails(a, b):
        a.value += 1
        raise RuntimeError("no")

    with raises(RuntimeError, match="no"):
        rx.cond(True, leaves, fails, a, b)
    assert a.value[0] == 1


def test_results_of_different_structure_are_refused():
    with raises(
        rx.StructureError,
        match=r"`true_fun` returns \*, and `false_fun` returns \(\*, \*\)",
    ):
        rx.cond(True, lambda: 1.0, lambda: (1.0, 2.0))
    with raises(rx.StructureError, match="branch 0 returns.*and branch 2 returns"):
        rx.switch(0, [lambda: 1.0, lambda: 2.0, lambda: None])


def test_results_of_different_shape_are_refused():
    with raises(
        rx.StructureError,
        match=r"`x`: it is f32\[2\] after `true_fun`, and f32\[3\] after `false_fun`",
    ):
        rx.cond(True, lambda: {"x": jnp.ones(2)}, lambda: {"x": jnp.ones(3)})


def test_results_with_different_static_leaves_are_refused():
    with raises(rx.StructureError, match="'a', and `false_fun` returns.*'b'"):
        rx.cond(True, lambda: ("a", 1), lambda: ("b", 1))


def test_a_ref_made_in_one_branch_only_is_refused_and_the_remedies_run():
    a, b = refs()
    message = (
        r"`true_fun` returns a new ref.*'made'.*, and `false_fun` returns an array"
    )
    with raises(rx.StructureError, match=message):
        rx.cond(True, lambda: rx.Ref(a.value, "made"), lambda: a.value)
    made = rx.cond(True, lambda: rx.Ref(a.value, "m"), lambda: rx.Ref(b.value, "m"))
    assert made.value[0] == 1.0
    assert rx.cond(False, lambda: a.value, lambda: b.value)[0] == 0.0


def test_different_refs_of_the_caller_are_refused():
    a, b = refs()
    with raises(rx.StructureError, match="'params'.*and `false_fun`.*'counts'"):
        rx.cond(True, lambda: a, lambda: b)
    with raises(rx.StructureError, match=r"`1`.*'counts'.*'params'"):
        rx.cond(True, lambda: (a, b), lambda: (a, a))


def test_new_refs_of_different_kinds_are_refused():
    message = "a new ref.*'x'.*, and `false_fun` returns a new ref.*'y'"
    with raises(rx.StructureError, match=message):
        rx.cond(
            True, lambda: rx.Ref(jnp.ones(2), "x"), lambda: rx.Ref(jnp.ones(2), "y")
        )


@pytest.mark.parametrize(
    "false_fun, after", [(leaves, r"f32\[2\]"), (writes(jnp.ones(4)), r"f32\[4\]")]
)
def test_a_ref_left_with_different_shapes_is_refused(false_fun, after):
    a, b = refs()
    message = rf"'params'.*f32\[3\] after `true_fun`, and {after} after `false_fun`"
    with raises(rx.StructureError, match=message):
        rx.cond(True, writes(jnp.ones(3)), false_fun, a, b)
    assert a.shape == (2,)


def test_a_ref_left_with_different_structures_is_refused():
    a, b = refs()
    message = "'params'.*after `false_fun` than after `true_fun`"
    with raises(rx.StructureError, match=message):
        rx.cond(True, writes((jnp.ones(2),)), leaves, a, b)
    with raises(rx.StructureError, match="static parts"):
        rx.cond(True, writes("a"), writes("b"), a, b)


def test_a_predicate_that_is_no_scalar_is_refused():
    with raises(TypeError, match=r"predicate must be a scalar.*bool\[2\].*where"):
        rx.cond(jnp.ones(2, bool), lambda: 1, lambda: 2)
    with raises(TypeError, match=r"index must be a scalar.*i32\[2\]"):
        rx.switch(jnp.zeros(2, jnp.int32), [lambda: 1, lambda: 2])


def test_switch_needs_a_branch():
    with raises(ValueError, match="at least one branch"):
        rx.switch(0, [])


A_GLOBAL = rx.Ref(jnp.array(0.0), "globals")


def test_a_global_ref_is_refused():
    with raises(rx.TraceLevelError, match="body of `cond`.*global name"):
        rx.cond(True, lambda: A_GLOBAL.value, lambda: 0.0)


def test_a_result_of_branches_without_a_hash_is_named():
    def branch(x):
        return {"x": x, "names": [types.SimpleNamespace()]}

    with raises(TypeError, match=r"\(the result at `names\.0`\): a SimpleNamespace"):
        rx.cond(True, branch, branch, jnp.array(1.0))
