"""`rx.nn.GRUCell` and `rx.nn.LSTMCell`: Equinox's cells, and their state."""

# A static checker objects to what is wrong on purpose here, or made at run time.
# pyright: reportPossiblyUnboundVariable=false

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from raising import raises

import refx_eqx as rx


KEY = jr.key(0)
XS = jr.normal(jr.key(1), (6, 3))
ZEROS = jnp.zeros(4)
CELLS = {"GRUCell": ZEROS, "LSTMCell": (ZEROS, ZEROS)}


@pytest.fixture(autouse=True)
def _settings():
    with jax.check_tracer_leaks(False):
        yield


def close(a, b):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), a, b
    )


def run_equinox(cell, xs, hidden):
    hiddens = []
    for x in xs:
        hidden = cell(x, hidden)
        hiddens.append(hidden[0] if isinstance(hidden, tuple) else hidden)
    return jnp.stack(hiddens), hidden


@rx.filter_jit
def run(cell, xs):
    return rx.scan(lambda cell, x: (cell, cell(x)), cell, xs)[1]


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("use_bias", [True, False])
def test_a_sequence_is_that_of_equinox(name, use_bias):
    ours = getattr(rx.nn, name)(3, 4, use_bias, key=KEY)
    theirs = getattr(eqx.nn, name)(3, 4, use_bias, key=KEY)
    want, hidden = run_equinox(theirs, XS, CELLS[name])
    close(jnp.stack([ours(x) for x in XS[:2]]), want[:2])
    close(run(ours, XS[2:]), want[2:])  # goes on where the calls have ended
    close(ours.hidden.value, hidden)
    ours.reset()
    close(ours.hidden.value, CELLS[name])
    close(run(ours, XS), want)
    assert ours.hidden.collection == "cache"
    assert isinstance(ours.cell, getattr(eqx.nn, name))


@pytest.mark.parametrize("name", CELLS)
def test_gradients_through_time_are_those_of_equinox(name):
    ours = getattr(rx.nn, name)(3, 4, key=KEY)
    theirs = getattr(eqx.nn, name)(3, 4, key=KEY)
    loss = lambda cell: jnp.sum(run(cell, XS) ** 2)
    got = rx.filter_grad(loss, wrt="params")(ours)
    want = eqx.filter_grad(
        lambda cell: jnp.sum(run_equinox(cell, XS, CELLS[name])[0] ** 2)
    )(theirs)
    for weight in "weight_ih", "weight_hh", "bias":
        np.testing.assert_allclose(
            getattr(got.cell, weight).value, getattr(want, weight), rtol=1e-4, atol=1e-5
        )
    close(ours.hidden.value, run_equinox(theirs, XS, CELLS[name])[1])


@pytest.mark.parametrize("name", CELLS)
def test_a_batch_has_a_state_for_each(name):
    cell = getattr(rx.nn, name)(3, 4, key=KEY)
    cells = rx.add_axis(cell, 2, "cache")
    axes = (rx.axes(cache=0, default=None), 0)
    batched = rx.filter_jit(rx.filter_vmap(run, in_axes=axes))
    xs = jnp.stack([XS, XS[::-1]])
    for _ in range(2):
        outs = batched(cells, xs)
    for i in range(2):
        cell.reset()
        run(cell, xs[i])
        close(outs[i], run(cell, xs[i]))
        close(jax.tree.map(lambda x: x[i], cells.hidden.value), cell.hidden.value)
    cells.reset()
    assert all((x == 0).all() for x in jax.tree.leaves(cells.hidden.value))
    assert jax.tree.leaves(cells.hidden.value)[0].shape == (2, 4)


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_has_its_dtype_and_a_state_of_its_shape(name):
    cell = getattr(rx.nn, name)(3, 4, dtype=jnp.bfloat16, key=KEY)
    assert cell(XS[0].astype(jnp.bfloat16)).dtype == jnp.bfloat16
    with raises(rx.RefTypeError, match=f"{name}.hidden"):
        cell.hidden.value = jax.tree.map(lambda x: x[:2], cell.hidden.value)
