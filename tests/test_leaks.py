"""Fresh functions, call after call, leave nothing behind."""

import gc
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import refx_eqx as rx


XS = jnp.ones(3)


def fresh(ref):
    return lambda x: ref.value * x


def loop(ref):
    f = fresh(ref)
    return lambda c: (f(c[0]), c[1] + 1)


def scanned(ref):
    f = fresh(ref)
    return lambda c, x: (f(c), x)


def combined(ref):
    f = fresh(ref)
    return lambda a, b: f(a) + b


def with_rule(ref):
    f = rx.filter_custom_jvp(fresh(ref))
    f.def_jvp(lambda primals, tangents: (f(*primals), tangents[0]))
    return f


class Holder(eqx.Module):
    fn: object
    ref: rx.Ref


taken = rx.filter_jit(lambda fn, ref: fn(ref.value))
held = rx.filter_jit(lambda holder: holder.fn(holder.ref.value))

CALLS = {
    "filter_jit": lambda ref: rx.filter_jit(fresh(ref))(XS),
    "filter_grad": lambda ref: rx.filter_grad(fresh(ref))(XS[0]),
    "filter_vmap": lambda ref: rx.filter_vmap(fresh(ref))(XS),
    "filter_checkpoint": lambda ref: rx.filter_checkpoint(fresh(ref))(XS),
    "filter_eval_shape": lambda ref: rx.filter_eval_shape(fresh(ref), XS),
    "filter_custom_jvp": lambda ref: with_rule(ref)(XS),
    "lift": lambda ref: rx.lift(jax.jit)(fresh(ref))(XS),
    "scan": lambda ref: rx.scan(scanned(ref), XS, XS),
    "map": lambda ref: rx.map(fresh(ref), XS),
    "associative_scan": lambda ref: rx.associative_scan(combined(ref), XS),
    "cond": lambda ref: rx.cond(XS[0] > 0, fresh(ref), fresh(ref), XS),
    "switch": lambda ref: rx.switch(1, [fresh(ref), fresh(ref)], XS),
    "while_loop": lambda ref: rx.while_loop(lambda c: c[1] < 2, loop(ref), (XS, 0)),
    "fori_loop": lambda ref: rx.fori_loop(0, 2, lambda i, x: ref.value * x, XS),
    "a function as an argument": lambda ref: taken(lambda x: 2 * x, ref),
    "a function in a module": lambda ref: held(Holder(lambda x: 2 * x, ref)),
}


@pytest.mark.parametrize("name", CALLS)
@jax.check_tracer_leaks(False)  # looks at all objects
def test_fresh_functions_leave_nothing_behind(name):
    call, ref = CALLS[name], rx.Ref(jnp.array(1.0))

    def objects(calls):
        for _ in range(calls):
            call(ref)
        gc.collect()
        return len(gc.get_objects())

    objects(3)
    before = objects(1)
    assert objects(6) - before < 6


# The rule refers to its function, and `jax.lax.associative_scan` has a function that calls
# itself (JAX 0.10 to 0.12).
CYCLES = {"filter_custom_jvp", "associative_scan"}


@pytest.mark.parametrize("name", sorted(CALLS.keys() - CYCLES))
@jax.check_tracer_leaks(False)
def test_fresh_functions_are_freed_before_python_looks_for_cycles(name):
    """A program waits for nobody: a cycle would keep it for hundreds of calls."""
    call, ref = CALLS[name], rx.Ref(jnp.array(1.0))

    def cycles():
        gc.collect()
        for _ in range(3):
            call(ref)
        return gc.collect()

    call(ref)
    gc.disable()
    try:
        # The least of three, because what JAX did before may end only now.
        assert min(cycles() for _ in range(3)) < 3
    finally:
        gc.enable()


def test_a_function_that_is_gone_takes_its_program_with_it():
    """Not only when Python looks for cycles."""
    alive = []

    @rx.filter_jit
    def outer(x):
        y = jnp.cos(x)
        fn = lambda a, b: a + b + jnp.mean(y)
        alive.append(weakref.ref(fn))
        return rx.associative_scan(fn, jnp.stack([x, x]))

    gc.collect()
    gc.disable()
    try:
        with jax.check_tracer_leaks(True):
            outer(XS)
        assert alive[0]() is None
    finally:
        gc.enable()
