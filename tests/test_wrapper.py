"""A lifted transform returns a callable that can go wherever a function can."""

import pickle

import jax
import jax.numpy as jnp
import pytest

import refx_eqx as rx


class Scale(rx.Module):
    by: rx.Param[jax.Array]

    def __call__(self, x):
        return jnp.sum(self.by[...] * x)


@rx.filter_jit
def decorated(x):
    return 2 * x


@pytest.mark.parametrize(
    "lift",
    [
        rx.filter_vmap,
        rx.filter_jit,
        rx.filter_grad,
        rx.filter_value_and_grad,
        rx.filter_checkpoint,
        rx.filter_hessian,
        rx.filter_jacfwd,
        rx.filter_vmap(in_axes=(rx.axes(params=None, default=0),)),
        lambda scale: rx.filter_vmap(rx.filter_jit(scale)),
        lambda scale: rx.lift(jax.vmap)(scale),
    ],
)
def test_it_pickles_when_what_it_wraps_does(lift):
    lifted = lift(Scale(jnp.arange(3.0)))
    again = pickle.loads(pickle.dumps(lifted))
    x = jnp.arange(6.0).reshape(2, 3)
    args = (
        (x[0],) if "vmap" not in repr(lifted) and "lift" not in repr(lifted) else (x,)
    )
    assert type(again) is type(lifted)
    a, b = jax.tree.leaves(lifted(*args)), jax.tree.leaves(again(*args))
    assert all(jnp.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_decorated_function_pickles_by_its_name():
    assert pickle.loads(pickle.dumps(decorated)) is decorated
