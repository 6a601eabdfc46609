"""A ref with a declared type, through every transform: written in the forward pass, and by a
backward rule, whose refs travel with a channel."""

# A static checker objects to what is wrong on purpose here, or made at run time.
# pyright: reportArgumentType=false

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array, Float
from raising import raises

import refx_eqx as rx


class Watch(rx.Module):
    """What a backward rule writes, and what it does not, of one collection."""

    largest: rx.Ref[Float[Array, ""]] = rx.field(collection="watched")
    calls: rx.Ref[Float[Array, ""]] = rx.field(collection="watched")

    def __init__(self):
        self.largest = jnp.array(0.0)
        self.calls = jnp.array(0.0)


@rx.filter_custom_vjp
def watched(x, watch):
    return x


@watched.def_fwd
def _forward(perturbed, x, watch):
    return x, None


@watched.def_bwd
def _backward(residuals, grad, perturbed, x, watch):
    check_refs(watch)
    watch.largest.value = jnp.maximum(watch.largest.value, jnp.max(jnp.abs(grad)))
    return grad


def check_refs(watch):
    for ref in (watch.largest, watch.calls):
        assert isinstance(ref, rx.Ref[Float[Array, ""]])
        assert not isinstance(ref, rx.Ref[Float[Array, "2"]])
        assert type(ref) is rx.Ref and type(rx.clone(ref)) is rx.Ref
        assert rx.clone(ref).shape == ()


def body(watch, x):
    """Writes both refs in the forward pass; the backward rule writes one of them."""
    check_refs(watch)
    watch.calls.value = watch.calls.value + 1.0
    watch.largest.value = watch.largest.value * 1.0
    with raises(rx.RefTypeError, match=r"`Watch.calls`.* is declared"):
        watch.calls.value = jnp.zeros(2)
    y = watched(jnp.sin(x), watch)
    check_refs(watch)
    return y


def scanned(watch, x):
    def step(carry, _):
        watch, y = carry
        return (watch, body(watch, y)), None

    (_, y), _ = rx.scan(step, (watch, x), None, length=1)
    return y


def vmapped(watch, x):
    watch = rx.add_axis(watch, 1, "watched")
    axes = (rx.axes(watched=0), 0)
    return rx.filter_vmap(forward, in_axes=axes)(watch, x[None])


def custom_jvp(watch, x):
    inner = rx.filter_custom_jvp(lambda x, watch: jnp.cos(x))

    @inner.def_jvp
    def rule(primals, tangents):
        (x, watch), (t, _) = primals, tangents
        check_refs(watch)
        return jnp.cos(x), None if t is None else -jnp.sin(x) * t

    del rule
    return body(watch, inner(x, watch))


FORWARD = {
    "none": body,
    "filter_jit": rx.filter_jit(body),
    "filter_checkpoint": rx.filter_checkpoint(body),
    "filter_closure_convert": lambda w, x: rx.filter_closure_convert(body, w, x)(w, x),
    "lift": rx.lift(jax.jit)(body),
    "scan": scanned,
    "filter_vmap, broadcast": lambda w, x: rx.filter_vmap(
        body, in_axes=(None, None), axis_size=2, out_axes=None
    )(w, x),
    "cond": lambda w, x: rx.cond(True, body, body, w, x),
    "switch": lambda w, x: rx.switch(0, [body, body], w, x),
    "fori_loop": lambda w, x: rx.fori_loop(0, 1, lambda i, c: (c[0], body(*c)), (w, x))[
        1
    ],
    "filter_custom_jvp": custom_jvp,
    "filter_jit of scan of cond": rx.filter_jit(
        lambda w, x: rx.scan(
            lambda c, _: ((c[0], rx.cond(True, body, body, *c)), None),
            (w, x),
            None,
            length=1,
        )[0][1]
    ),
}


def jitted(loss):
    return rx.filter_jit(rx.filter_value_and_grad(loss))


@pytest.mark.parametrize("derivative", [rx.filter_grad, jitted])
@pytest.mark.parametrize("name", FORWARD)
def test_a_typed_ref_is_written_forward_and_backward(name, derivative):
    run, watch = FORWARD[name], Watch()

    def loss(x, watch):
        check_refs(watch)
        return jnp.sum(3.0 * run(watch, x))

    x = jnp.array([0.5, 1.0])
    derivative(loss)(x, watch)
    assert watch.calls.value == 1.0
    assert watch.largest.value == 3.0
    check_refs(watch)


# Those in which no backward rule can write, or that take no derivative: forward only.
ALONE = {
    "filter_vjp": lambda w, x: rx.filter_vjp(lambda x: forward(w, x), x),
    "filter_jvp": lambda w, x: rx.filter_jvp(lambda x: forward(w, x), (x,), (x,)),
    "filter_linearize": lambda w, x: rx.filter_linearize(lambda x: forward(w, x), x),
    "filter_jacfwd": lambda w, x: rx.filter_jacfwd(lambda x: forward(w, x))(x),
    "filter_jacrev": lambda w, x: rx.filter_jacrev(lambda x: forward(w, x))(x),
    "filter_hessian": lambda w, x: rx.filter_hessian(lambda x: jnp.sum(forward(w, x)))(
        x
    ),
    "filter_vmap, mapped": vmapped,
    "map": lambda w, x: rx.map(lambda y: forward(w, y), x[None]),
    "while_loop": lambda w, x: rx.while_loop(
        lambda c: c[0].calls.value < 1.0, lambda c: (c[0], forward(*c)), (w, x)
    ),
    "filter_eval_shape": lambda w, x: rx.filter_eval_shape(forward, w, x),
    "filter_make_jaxpr": lambda w, x: rx.filter_make_jaxpr(forward)(w, x),
    "functionalize": lambda w, x: rx.functionalize(forward)(*rx.deref((w, x))),
    "filter_jit, lowered": lambda w, x: rx.filter_jit(forward).lower(w, x),
}
PURE = {
    "filter_vmap, mapped",  # of a copy, with an axis
    "filter_eval_shape",
    "filter_make_jaxpr",
    "functionalize",
    "filter_jit, lowered",
}


def forward(watch, x):
    check_refs(watch)
    watch.calls.value = watch.calls.value + 1.0
    watch.largest.value = watch.largest.value + 2.0
    with raises(rx.RefTypeError, match=r"`Watch.calls`.* is declared"):
        watch.calls.value = jnp.zeros(2)
    return jnp.sin(x)


@pytest.mark.parametrize("name", ALONE)
def test_a_typed_ref_is_written_in_the_other_transforms(name):
    watch = Watch()
    ALONE[name](watch, jnp.array([0.5, 1.0]))
    written = (0.0, 0.0) if name in PURE else (1.0, 2.0)
    assert (watch.calls.value, watch.largest.value) == written
    check_refs(watch)


def test_the_type_of_what_a_backward_rule_writes_is_checked():
    rule = rx.filter_custom_vjp(lambda x, watch: x)
    rule.def_fwd(lambda perturbed, x, watch: (x, None))

    @rule.def_bwd
    def backward(residuals, grad, perturbed, x, watch):
        watch.largest.value = jnp.zeros(2)
        return grad

    del backward
    watch = Watch()
    with raises(rx.RefTypeError, match=r"`Watch.largest`.* is declared"):
        rx.filter_grad(lambda x, watch: jnp.sum(rule(x, watch)))(jnp.ones(2), watch)
    assert watch.largest.value == 0.0


def test_a_scalar_that_is_stacked_twice_knows_its_stack():
    class Scale(rx.Module):
        x: rx.Param[Float[Array, ""]]

    scales = rx.filter_vmap(rx.filter_vmap(Scale))(jnp.ones((2, 3)))
    with raises(rx.RefTypeError, match=r"the sizes \(2, 3\) come on top"):
        scales.x.value = jnp.zeros((2, 3, 4))
    scales.x.value = jnp.zeros((2, 3))
