"""What a repeated call keeps from the last one: its arguments, and the values that it left
in the refs."""

import gc
import weakref
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import refx_eqx as rx
from refx_eqx._engine import _donation


filter_jit: Any = rx.filter_jit
X = jnp.array(1.0)


class Model(rx.Module):
    a: rx.Param[jax.Array]
    b: rx.Param[jax.Array]


def make():
    return Model(X + 1.0, X + 2.0)


def add(model, x):
    model.a.value = model.a.value + x


def look(model, x):
    return model.a.value + model.b.value * x


@pytest.fixture
def called():
    """A function that was called with a model until it has a plan, without garbage."""

    def make_called(fn, model, **options):
        step = filter_jit(fn, **options)
        with jax.check_tracer_leaks(False):
            for _ in range(4):
                step(model, X)
        assert step._plans._last is not None
        return step

    gc.collect()
    gc.disable()
    yield make_called
    gc.enable()


@pytest.mark.parametrize("fn", [add, look])
def test_a_value_that_is_overwritten_is_freed(fn, called):
    model = make()
    step = called(fn, model)
    values = [weakref.ref(model.a.value), weakref.ref(model.b.value)]
    model.a.value = X
    model.b.value = X
    assert [value() for value in values] == [None, None]
    assert step(model, X) == look(model, X) or fn is add


@pytest.mark.parametrize("fn", [add, look])
@pytest.mark.parametrize("what", ["model", "function"])
def test_the_values_go_with_the_model_and_with_the_function(fn, what, called):
    model = make()
    a = model.a
    step = called(fn, model)
    value = weakref.ref(model.b.value)
    if what == "model":
        del model
        assert value() is None
    else:
        plan = weakref.ref(step._plans._last)
        del step
        assert plan() is None and value() is not None
    assert a.value is not None


def test_the_values_go_when_another_function_is_called(called):
    model, other = make(), make()
    step, another = called(add, model), called(look, other)
    for i in range(3):
        step(model, X)
        assert another._plans._last.settled[1] is None
        another(other, X)
        assert step._plans._last.settled[1] is None
        assert model.a.value == 2.0 + 4.0 + i + 1.0


def test_nothing_is_copied_to_be_donated_that_only_a_plan_keeps(called, monkeypatch):
    model = make()
    copied = []
    monkeypatch.setattr(_donation, "_copy", lambda x: copied.append(x) or x + 0.0)
    evaluate = called(look, model)
    train = called(add, model, donate="refs")
    for _ in range(3):
        evaluate(model, X)
        train(model, X)
    compiled = filter_jit(add, donate="refs").lower(model, X).compile()
    evaluate(model, X)
    compiled(model, X)
    assert not copied
    old = model.a.value
    train(model, X)
    assert len(copied) == 1 and not old.is_deleted()


def test_a_write_between_two_calls_is_seen(called):
    model = make()
    for step in (called(look, model), called(look, model, donate="refs")):
        for i in range(5):
            model.b.value = X * i
            assert step(model, X) == model.a.value + i
            assert step(model, X) == model.a.value + i


def test_a_call_with_none_instead_of_a_model_that_is_gone(called):
    model = make()
    step = called(lambda model, x: x if model is None else look(model, x), model)
    plan = step._plans._last
    del model
    assert plan.form[0]() is None and step._plans._last is None
    # As if another thread had just looked which one is the last.
    step._plans._last = plan
    with jax.check_tracer_leaks(False):
        assert step(None, X) == 1.0


def test_refs_that_are_passed_alone_in_another_order():
    step = filter_jit(lambda a, x, b: a.value * 10.0 + b.value + x)
    one, two = rx.Ref(X), rx.Ref(X + 1.0)
    with jax.check_tracer_leaks(False):
        for _ in range(4):
            assert step(one, X, two) == 13.0
            assert step(two, X, one) == 22.0
            assert step(one, X, one) == 12.0


@pytest.mark.parametrize("other", [1.5, True, "text", None, jnp.sin, jnp.float32, X])
def test_an_argument_that_is_no_tree_is_another(other, trace_counter):
    f = trace_counter(lambda ref, other: (ref.value, jax.tree.leaves(other)))
    step, ref = filter_jit(f), rx.Ref(X)
    with jax.check_tracer_leaks(False):
        for _ in range(4):
            step(ref, other)
        assert f.counter.count == 1
        for another in (2.5, False, "texts", jnp.cos, jnp.int32, 2.0 * X):
            found = step(ref, another)[1]
            assert found == jax.tree.leaves(another)
            step(ref, other)


class WithNumber:
    """No ref, but what it is told by has the name that the number of a ref has."""

    def __init__(self, x):
        self._number = -1
        self.x = x


def test_what_only_looks_like_a_ref_among_refs_is_static():
    step = filter_jit(
        lambda items: sum(x.value for x in items if rx.is_ref(x)) + items[-1].x
    )
    refs = [rx.Ref(X) for _ in range(9)]
    with jax.check_tracer_leaks(False):
        for item in (WithNumber(1), WithNumber(2)):
            for _ in range(4):
                assert step([*refs, item]) == 9.0 + item.x


def test_a_second_module_around_the_same_refs_is_read_again():
    class Held(eqx.Module):
        array: jax.Array
        ref: rx.Ref

    @rx.filter_jit
    def add(held, x):
        held.ref.value += x
        return held.array * held.ref.value

    ref = rx.Ref(jnp.array(0.0))
    for number in range(3):
        held = Held(jnp.array(float(number)), ref)
        for _ in range(3):
            before = ref.value
            assert add(held, X) == number * (before + 1)
            assert ref.value == before + 1
