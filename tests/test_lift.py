"""`lift`: a transform of somebody else, by reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import refx_eqx as rx


def _make():
    return rx.Ref(jnp.array(2.0), "params"), rx.Ref(jnp.array(0), "counts")


def _f(w, count, x):
    count.value += 1
    return w.value * x


def _twice(fn):
    """A transform of our own: calls the function once, and doubles the result."""

    def wrapped(*args):
        return jax.tree.map(lambda y: y * 1, fn(*args))

    return wrapped


@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint, _twice])
def test_the_function_reads_and_writes(transform):
    w, count = _make()
    lifted = rx.lift(transform)(_f)
    for i in range(1, 4):
        assert lifted(w, count, jnp.array(3.0)) == 6.0
        assert count.value == i
    w.value = jnp.array(5.0)
    assert lifted(w, count, jnp.array(3.0)) == 15.0


def test_it_is_a_decorator_and_takes_options():
    count = rx.Ref(jnp.array(0))

    @functools.partial(rx.lift(jax.jit), inline=True)
    def f(count, x):
        count.value += 1
        return x

    assert f(count, jnp.array(1.0)) == 1.0
    assert count.value == 1
    assert f.__name__ == "f"


def test_a_transform_that_caches_is_not_traced_again(trace_counter):
    f = trace_counter(_f)
    lifted = rx.lift(jax.jit)(f)
    for _ in range(3):
        w, count = _make()
        lifted(w, count, jnp.array(3.0))
        assert count.value == 1
    assert f.counter.count == 1
    ref = rx.Ref(jnp.array(2))
    lifted(ref, ref, jnp.array(3))  # another sharing
    assert f.counter.count == 2 and ref.value == 3


def test_keywords_and_static_values():
    count = rx.Ref(jnp.array(0))

    def f(x, *, count, power):
        count.value += 1
        return x**power

    lifted = rx.lift(jax.jit)(f)
    assert lifted(jnp.array(3.0), count=count, power=2) == 9.0
    assert lifted(jnp.array(3.0), count=count, power=3) == 27.0
    assert count.value == 2


def test_the_gradient_goes_through_a_lifted_checkpoint():
    w, count = _make()

    def loss(w, count):
        body = rx.lift(jax.checkpoint)(lambda w, c: jnp.sin(_f(w, c, jnp.array(1.0))))
        return body(w, count)

    grads = rx.filter_grad(loss)(w, count)
    np.testing.assert_allclose(grads.value, np.cos(2.0), rtol=1e-6)
    assert count.value == 1


def test_what_a_closure_or_a_module_holds_is_carried():
    w, count = _make()
    lifted = rx.lift(jax.jit)(lambda x: _f(w, count, x))
    assert lifted(jnp.array(3.0)) == 6.0
    w.value = jnp.array(4.0)
    assert lifted(jnp.array(3.0)) == 12.0
    assert count.value == 2


def test_in_axes_find_the_arguments():
    w = rx.Ref(jnp.arange(3.0))
    lifted = rx.lift(jax.vmap)(lambda w, x: w.value * x, in_axes=(0, None))
    assert jnp.array_equal(lifted(w, jnp.array(2.0)), jnp.array([0.0, 2.0, 4.0]))


def test_a_mapped_ref_is_written_lane_by_lane():
    w = rx.Ref(jnp.arange(3.0))

    def f(w, x):
        w.value += x

    rx.lift(jax.vmap)(f)(w, jnp.ones(3))
    assert jnp.array_equal(w.value, jnp.arange(3.0) + 1.0)


def test_a_broadcast_ref_that_comes_back_mapped_is_refused():
    count = rx.Ref(jnp.array(0), "counts")

    def f(count, x):
        count.value += 1
        return x

    lifted = rx.lift(jax.vmap)(f, in_axes=(None, 0))
    text = r"`rx.lift\(vmap\)` gave an unnamed ref \(collection 'counts'\) the shape \(3,\)"
    with pytest.raises(rx.StructureError, match=text):
        lifted(count, jnp.ones(3))
    assert count.value == 0
    rx.filter_vmap(f, in_axes=(None, 0))(count, jnp.ones(3))  # the remedy
    assert count.value == 1


def test_a_transform_that_returns_something_else_is_refused():
    w, count = _make()
    with pytest.raises(rx.StructureError, match="must return a function that returns"):
        rx.lift(lambda fn: lambda *args: None)(_f)(w, count, jnp.array(1.0))
    assert count.value == 0


def test_returned_refs_are_the_caller_s_own_and_new_ones_keep_their_sharing():
    w, count = _make()

    @rx.lift(jax.jit)
    def f(w, count):
        new = rx.Ref(w.value + 1.0)
        return w, [new, new]

    out, (a, b) = f(w, count)
    assert out is w and a is b and a.value == 3.0


def test_an_exception_changes_nothing():
    _, count = _make()

    @rx.lift(jax.jit)
    def f(count):
        count.value += 1
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        f(count)
    assert count.value == 0


def test_a_change_of_structure_is_refused():
    @rx.lift(jax.jit)
    def f(refs):
        refs.append(refs[0])

    with pytest.raises(rx.StructureError, match=r"`rx.lift\(jit\)` cannot carry back"):
        f([rx.Ref(jnp.array(0))])


def test_a_global_ref_is_refused():
    global _global_ref
    _global_ref = rx.Ref(jnp.array(0))
    with pytest.raises(rx.TraceLevelError, match=r"the body of `rx.lift\(jit\)`"):
        rx.lift(jax.jit)(lambda: _global_ref.value)()


def test_lifted_transforms_nest():
    w, count = _make()
    lifted = rx.lift(jax.jit)(rx.lift(jax.checkpoint)(_f))
    assert lifted(w, count, jnp.array(3.0)) == 6.0
    assert rx.filter_jit(lifted)(w, count, jnp.array(3.0)) == 6.0
    assert count.value == 2
