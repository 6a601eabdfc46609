"""`while_loop` and `fori_loop`."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from raising import raises

import refx_eqx as rx


def ref_of(value, collection=None):
    return rx.Ref(jnp.asarray(value, type(value)), collection)


def test_while_loop_without_refs_is_jaxs():
    cond, body = lambda c: c[0] < 5, lambda c: (c[0] + 1, c[1] * 2.0)
    for init in [(0, 1.0), (jnp.array(7), jnp.array(1.0))]:
        ours = rx.while_loop(cond, body, init)
        assert eqx.tree_equal(ours, jax.lax.while_loop(cond, body, init))


@pytest.mark.parametrize("jit", [False, True])
def test_a_ref_is_read_in_the_condition_and_written_in_the_body(jit):
    steps, limit = ref_of(0), ref_of(5)

    def body(x):
        steps.value += 1
        return x * 2

    def run(x):
        # The two functions close over one ref: it is one ref.
        return rx.while_loop(lambda x: steps.value < limit.value, body, x)

    assert (rx.filter_jit(run) if jit else run)(1.0) == 32.0
    assert steps.value == 5 and limit.value == 5
    limit.value += 2
    assert (rx.filter_jit(run) if jit else run)(1.0) == 4.0
    assert steps.value == 7


def test_while_loop_carries_refs_in_the_carry_and_in_methods():
    class Counter(rx.Module):
        n: rx.Ref[jax.Array]

        def goes_on(self, carry):
            return self.n.value < 3

        def step(self, carry):
            self.n.value += 1
            carry["r"].value += 2.0
            return carry

    counter, carry = Counter(jnp.array(0)), {"r": rx.Ref(jnp.array(0.0)), "s": "static"}
    out = rx.while_loop(counter.goes_on, counter.step, carry)
    assert out["r"] is carry["r"] and out["s"] == "static"
    assert counter.n.value == 3 and carry["r"].value == 6.0


def test_while_loop_of_no_steps_changes_nothing():
    ref = ref_of(1)

    def body(x):
        ref.value += 1
        return x

    assert rx.while_loop(lambda x: False, body, 3.0) == 3.0
    assert ref.value == 1


def test_while_loop_under_vmap_and_jvp():
    def f(x):
        ref = rx.Ref(x)

        def body(_):
            ref.value = ref.value * 2

        rx.while_loop(lambda _: ref.value < 8.0, body, None)
        return ref.value

    assert rx.filter_vmap(f)(jnp.array([1.0, 3.0, 9.0])).tolist() == [8.0, 12.0, 9.0]
    assert jax.jvp(f, (1.0,), (1.0,))[1] == 8.0


def test_while_loop_does_not_trace_again(trace_counter: Any):
    steps = ref_of(0)

    @trace_counter
    def body(x):
        steps.value += 1
        return x

    @trace_counter
    def cond(x):
        return steps.value % 5 != 4

    for n in [4, 9]:
        steps.value += n - 4
        rx.while_loop(cond, body, jnp.zeros(2))
        assert steps.value == n
    assert (cond.counter.count, body.counter.count) == (1, 1)
    rx.while_loop(lambda x: False, body, jnp.zeros(2))  # another function
    assert body.counter.count == 2


def test_a_write_in_the_condition_is_refused():
    ref = ref_of(0, "counts")

    def cond(x):
        ref.value += 1
        return x < 3

    with raises(rx.StructureError, match="`cond_fun` writes.*'counts'.*only read"):
        rx.while_loop(cond, lambda x: x + 1, 0)
    assert ref.value == 0


@pytest.mark.parametrize("result", [jnp.zeros(2), "no"])
def test_a_condition_that_is_no_scalar_is_refused(result):
    with raises(TypeError, match="must return a boolean scalar"):
        rx.while_loop(lambda x: result, lambda x: x, 0)


def test_a_ref_that_changes_dtype_is_refused():
    ref = ref_of(0, "counts")

    def body(*args):
        ref.value = ref.value + jnp.ones(2, jnp.int32)
        return args[-1]

    with raises(rx.StructureError, match="'counts'.*step.*i32.*before.*i32.2. after"):
        rx.while_loop(lambda x: True, body, 0)
    for upper in [3, jnp.array(3)]:
        with raises(rx.StructureError, match="`fori_loop` carries.*'counts'"):
            rx.fori_loop(0, upper, body, 0)
    assert ref.value == 0


def test_another_ref_in_the_carry_is_refused():
    a, b = ref_of(0, "a"), ref_of(1, "b")
    with raises(rx.StructureError, match=r"`while_loop`.*`0`.*'a'.*'b'"):
        rx.while_loop(lambda c: True, lambda c: (c[1], c[0]), (a, b))
    with raises(rx.StructureError, match=r"`fori_loop`.*`0`.*'a'.*'b'"):
        rx.fori_loop(0, 2, lambda i, c: (c[1], c[0]), (a, b))


def test_fori_loop_without_refs_is_jaxs():
    body = lambda i, c: (c[0] + i, c[1] * 2.0)
    for lower, upper in [(0, 5), (2, 5), (5, 2), (jnp.int8(1), jnp.int8(3))]:
        init = jnp.zeros((), jnp.result_type(lower, upper)), 1.0
        ours = rx.fori_loop(lower, upper, body, init)
        assert eqx.tree_equal(ours, jax.lax.fori_loop(lower, upper, body, init))
        traced = jax.jit(lambda a, b: rx.fori_loop(a, b, body, init))(lower, upper)
        assert eqx.tree_equal(ours, traced)
    assert rx.fori_loop(0, 5, body, (0, 1.0), unroll=2)[1] == 32.0


def test_a_while_loop_keeps_a_weakly_typed_carry_as_jax_does():
    # With a weak `x` the product stays a `bfloat16`; with a `float32` it would not.
    body = lambda val: (val[0] + 1, val[1] + jnp.float32(1), val[1] * jnp.bfloat16(3))
    init = 0, 0.1, jnp.bfloat16(0)
    ours = rx.while_loop(lambda val: val[0] < 3, body, init)
    theirs = jax.lax.while_loop(lambda val: val[0] < 3, body, init)
    assert eqx.tree_equal(ours, theirs)


@pytest.mark.parametrize("before", [jnp.float32(1.0), jnp.array(2), jnp.array(0.5)])
@pytest.mark.parametrize("number", [0.5, jnp.array(0.5), jnp.float32(0.5)])
def test_what_a_loop_leaves_is_as_weakly_typed_as_in_jax(before, number):
    of_jax = jax.lax.scan(lambda c, _: (number, None), before, None, length=2)[0]

    def scan(ref):
        rx.scan(lambda ref, _: (write(ref), None), ref, None, length=2)

    def write(ref):
        ref.value = number
        return ref

    fori = lambda ref: rx.fori_loop(0, 2, lambda i, ref: write(ref), ref)
    in_carry = lambda ref: rx.scan(lambda c, _: (number, None), ref.value, length=2)[0]
    for loop in (scan, fori, rx.filter_jit(scan)):
        ref = rx.Ref(before)
        loop(ref)
        assert jax.typeof(ref.value) == jax.typeof(of_jax), loop
    assert jax.typeof(in_carry(rx.Ref(before))) == jax.typeof(of_jax)


def test_the_counter_of_a_fori_loop_is_weakly_typed_as_in_jax():
    half = jnp.array(0.5, jnp.bfloat16)
    assert rx.fori_loop(0, 3, lambda i, x: x + i, half) == 3.5


@pytest.mark.parametrize("known", [True, False])
def test_fori_loop_carries_refs(known):
    total, calls = rx.Ref(jnp.zeros(())), ref_of(0)

    def body(i, carry):
        total.value += carry["w"].value
        calls.value += 1
        carry["last"].value = jnp.asarray(i)
        return carry

    carry = {"w": rx.Ref(jnp.float32(2.0)), "last": ref_of(0)}

    def run(upper, carry):
        return rx.fori_loop(1, upper, body, carry)

    upper = 4 if known else jnp.array(4)
    out = rx.filter_jit(run)(upper, carry)
    assert out["last"] is carry["last"]
    assert (total.value, calls.value, carry["last"].value) == (6.0, 3, 3)


def test_a_fori_loop_with_known_bounds_is_differentiable():
    def f(w):
        out = rx.Ref(jnp.float32(1.0))

        def body(i, _):
            out.value *= w.value

        rx.fori_loop(0, 3, body, None)
        return out.value

    assert rx.filter_grad(f)(rx.Ref(jnp.float32(2.0))).value == 12.0


def test_fori_loop_does_not_trace_again(trace_counter: Any):
    @trace_counter
    def body(i, ref):
        ref.value += i
        return ref

    for _ in range(2):
        ref = ref_of(0)
        rx.fori_loop(0, 4, body, ref)
        assert ref.value == 6
    assert body.counter.count == 1


def test_unroll_needs_known_bounds():
    f = jax.jit(lambda n: rx.fori_loop(0, n, lambda i, x: x + i, 0, unroll=2))
    with raises(ValueError, match="`unroll` needs.*Leave out `unroll`"):
        f(3)
