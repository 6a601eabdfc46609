"""Outside `jit`, a lifted transform gives the same bits as JAX's: it compiles as a whole
what JAX compiles, and no more."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import refx_eqx as rx


KEYS = jr.split(jr.key(0), 3)
W, B = jr.normal(KEYS[0], (16, 16)), jr.normal(KEYS[1], (16,))
XS = jr.normal(KEYS[2], (5, 16))


def plain(w, b, x):
    """Compiled as a whole, this has other last bits than operation by operation."""
    return (w @ x * 1.3 + b) * x + b * x


def lifted(w, b, x):
    return plain(w[...], b[...], x)


def refs():
    return rx.Ref(W, "params"), rx.Ref(B, "params")


def combine(a, b):
    return a[0] * b[0], a[1] * b[0] + b[1]


def test_a_program_compiled_as_a_whole_has_other_bits():
    assert (jax.jit(plain)(W, B, XS[0]) != plain(W, B, XS[0])).any()


def test_a_checkpoint_has_the_bits_of_jax():
    w, b = refs()
    out = rx.filter_checkpoint(lifted)(w, b, XS[0])
    np.testing.assert_array_equal(out, jax.checkpoint(plain)(W, B, XS[0]))

    grads = rx.filter_grad(
        lambda w, b, x: jnp.sum(rx.filter_checkpoint(lifted)(w, b, x))
    )(w, b, XS[0])
    of_plain = jax.grad(lambda w, b, x: jnp.sum(jax.checkpoint(plain)(w, b, x)))
    np.testing.assert_array_equal(grads.value, of_plain(W, B, XS[0]))


def test_an_associative_scan_has_the_bits_of_jax():
    elems = XS[:3], jnp.flip(XS[:3])
    out = rx.associative_scan(combine, elems)
    for ours, theirs in zip(out, jax.lax.associative_scan(combine, elems)):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_map_has_the_bits_of_jax(batch_size):
    w, b = refs()
    out = rx.map(lambda x: lifted(w, b, x), XS, batch_size=batch_size)
    expected = jax.lax.map(lambda x: plain(W, B, x), XS, batch_size=batch_size)
    np.testing.assert_array_equal(out, expected)


def test_a_checkpoint_that_is_not_compiled_as_a_whole_is_traced_once():
    w, _ = refs()
    traces = []

    @rx.filter_checkpoint
    def layer(w, x):
        traces.append("traced")
        w.value = w.value * 0.5
        return x + w[0], jnp.array(2.0)

    layer(w, XS[0])
    layer(w, XS[0])
    _, constant = layer(w, XS[0])
    assert traces == ["traced"] and (w.value == W / 8).all()
    assert isinstance(constant, jax.Array) and constant == 2.0


def test_numbers_given_to_a_checkpoint_are_arrays():
    count, n = rx.Ref(2, "counts"), rx.Ref(np.float32(0.5), "counts")

    @rx.filter_checkpoint
    def same(count, n):
        count.value = count.value
        return n.value

    assert isinstance(same(count, n), jax.Array)
    assert isinstance(count.value, jax.Array) and count.value.weak_type


def test_what_is_not_compiled_as_a_whole_may_close_over_a_tracer():
    def total(x):
        combined = rx.associative_scan(lambda a, b: a + b * x, XS)
        mapped = rx.map(lambda row: row * x, XS, batch_size=2)
        return jnp.sum(rx.filter_checkpoint(lambda y: y * x)(combined + mapped))

    def plainly(x):
        combined = jax.lax.associative_scan(lambda a, b: a + b * x, XS)
        return jnp.sum((combined + XS * x) * x)

    for transform in (
        jax.jit,
        jax.grad,
        lambda f: jax.vmap(f, axis_size=2, in_axes=None),
    ):
        ours, theirs = transform(total)(2.0), transform(plainly)(2.0)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
