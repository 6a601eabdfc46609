"""Which changes of what a function closes over make another program."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import refx_eqx as rx


class Scale(rx.Module):
    scale: rx.Ref

    def __call__(self, x):
        return x * self.scale[...]


GONE = {
    "function": lambda: lambda x: x * 3.0,
    "partial": lambda: functools.partial(lambda x: x * 3.0),
    "module": lambda: eqx.nn.Lambda(lambda x: x * 3.0),
    "module of refs": lambda: Scale(3.0),
    "jitted": lambda: jax.jit(lambda x: x * 3.0),
    "lifted": lambda: rx.filter_jit(lambda x: x * 3.0),
}


@pytest.mark.parametrize("make", GONE.values(), ids=GONE)
def test_a_closure_variable_that_becomes_none_is_noticed(make):
    ref, act = rx.Ref(jnp.array(2.0)), make()

    @rx.filter_jit
    def f(x):
        return (x if act is None else act(x)) * ref.value

    assert [f(1.0), f(1.0), f(1.0)] == [6.0] * 3
    act = None
    assert [f(1.0), f(1.0)] == [2.0] * 2
    act = make()
    assert f(1.0) == 6.0


class Holder(eqx.Module):
    fn: Any

    def __call__(self, x):
        return self.fn(x)


# How a function gets into another one: as a variable of it.
HELD = {
    "itself": lambda h: h,
    "partial": functools.partial,
    "in a list": lambda h: [h],
    "in a dict": lambda h: {"h": h},
    "module": Holder,
    "bound method": lambda h: Holder(h).__call__,
    "equinox partial": eqx.Partial,
    "default": lambda h: lambda x, h=h: h(x),
    "keyword default": lambda h: lambda x, *, h=h: h(x),
    "in another closure": lambda h: lambda x: h(x),
    "lifted": rx.filter_checkpoint,
    "lifted gradient": lambda h: lambda x, g=rx.filter_value_and_grad(h): g(x)[0],
}


def called(held, x):
    held = held[0] if isinstance(held, list) else held
    return (held["h"] if isinstance(held, dict) else held)(x)


@pytest.mark.parametrize("carries", [False, True], ids=["no refs", "a ref"])
@pytest.mark.parametrize("hold", HELD.values(), ids=HELD)
def test_what_a_function_inside_a_closure_closes_over_is_noticed(hold, carries):
    ref, scale = rx.Ref(jnp.array(1.0)), 2.0

    def h(x):
        return x * scale

    held = hold(h)
    step = rx.filter_jit(
        (lambda x: called(held, x) * ref.value)
        if carries
        else (lambda x: called(held, x))
    )
    one = jnp.array(1.0)
    assert [step(one), step(one)] == [2.0] * 2
    scale = 3.0
    assert [step(one), step(one)] == [3.0] * 2
    body = lambda c, _: (called(held, c) * ref.value, None)
    results = []
    for new in (4.0, 5.0):
        scale = new
        results.append(float(rx.scan(body, one, None, length=1)[0]))
    assert results == [4.0, 5.0]


def test_a_count_that_a_function_inside_a_closure_keeps_is_no_input(trace_counter):
    ref, calls = rx.Ref(jnp.array(1.0)), 0

    def h(x):
        nonlocal calls
        calls += 1
        return x * 2.0

    held = functools.partial(h)
    which = trace_counter(lambda x: held(x) * ref.value)
    step = rx.filter_jit(lambda x: which(x))
    for i in range(4):
        assert step(jnp.array(1.0)) == 2.0
        calls += i  # as in JAX, a side effect happens once per trace
    assert which.counter.count == 1


def test_what_the_filter_of_a_lifted_function_closes_over_is_noticed(trace_counter):
    a, b = rx.Ref(jnp.array(2.0)), rx.Ref(jnp.array(3.0))
    frozen = {a}
    loss = trace_counter(lambda refs: refs[0].value * refs[1].value)
    grad = rx.filter_grad(loss, wrt=lambda ref: ref not in frozen)
    step = rx.filter_jit(grad)
    selected = lambda: [x.value is not None for x in step([a, b])]
    assert [selected(), selected()] == [[False, True]] * 2
    frozen.clear()
    assert [selected(), selected()] == [[True, True]] * 2
    frozen.add(b)
    assert [selected(), selected()] == [[True, False]] * 2
    assert loss.counter.count == 3


def test_an_attribute_of_a_function_is_noticed():
    ref = rx.Ref(jnp.array(1.0))

    def f(x):
        return x * ref.value * f_of.scale

    f_of: Any = f
    f_of.scale = 1.0
    step = rx.filter_jit(f)
    for scale in (1.0, 1.0, 5.0, 5.0, 7.0):
        f_of.scale = scale
        assert step(jnp.array(1.0)) == scale
