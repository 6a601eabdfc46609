"""`rx.nn.Average` and `rx.nn.Accuracy`."""

# A static checker objects to what is wrong on purpose here, or made at run time.
# pyright: reportCallIssue=false

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from flax import nnx
from raising import raises

import refx_eqx as rx


@pytest.fixture(autouse=True)
def _settings():
    with jax.check_tracer_leaks(False):
        yield


def test_the_average_is_that_of_flax():
    ours, theirs = rx.nn.Average(), nnx.metrics.Average()
    update = rx.filter_jit(lambda metric, values: metric.update(values))
    assert np.isnan(ours.compute())
    for i, shape in enumerate([(3,), (2, 2), (), (5,)]):
        values = 1.0 + jr.normal(jr.key(i), shape)
        update(ours, values)
        with jax.numpy_dtype_promotion("standard"):
            theirs.update(values=values)
            want = theirs.compute()
        np.testing.assert_allclose(ours.compute(), want, rtol=1e-6)
    assert ours.count.value == 13
    ours.reset()
    ours.update(3)
    assert ours.compute() == 3 and ours.mean.collection == "metrics"


@pytest.mark.parametrize("threshold", [None, 0.2])
def test_the_accuracy_is_that_of_flax(threshold):
    ours, theirs = rx.nn.Accuracy(threshold), nnx.metrics.Accuracy(threshold)
    for i in range(3):
        k1, k2 = jr.split(jr.key(i))
        logits = jr.normal(k1, (7,) if threshold else (7, 4))
        labels = jr.randint(k2, (7,), 0, 2 if threshold else 4)
        ours.update(logits=logits, labels=labels)
        with jax.numpy_dtype_promotion("standard"):
            theirs.update(logits=logits, labels=labels)
            want = theirs.compute()
        np.testing.assert_allclose(ours.compute(), want, rtol=1e-6)


def test_what_is_masked_does_not_count():
    metric = rx.nn.Average()
    metric.update(jnp.array([1.0, jnp.nan, 3.0]), mask=jnp.array([True, False, True]))
    metric.update(jnp.array([jnp.inf]), mask=jnp.array([False]))
    assert metric.compute() == 2 and metric.count.value == 2
    accuracy = rx.nn.Accuracy()
    logits, labels = jnp.eye(3), jnp.array([0, 1, 0])
    accuracy.update(logits, labels, mask=jnp.array([True, True, False]))
    assert accuracy.compute() == 1


def test_many_values_lose_no_digits():
    metric = rx.nn.Average()
    ones = jnp.ones(1 << 20)
    update = rx.filter_jit(lambda metric, values: metric.update(values))
    for _ in range(20):
        update(metric, ones)
    for _ in range(20):
        update(metric, 0 * ones)
    np.testing.assert_allclose(metric.compute(), 0.5, rtol=1e-6)
    assert metric.count.value == 40 << 20


def test_a_metric_under_scan_and_inside_of_a_loss():
    metric = rx.nn.Average()
    rx.scan(lambda m, x: (m, m.update(x)), metric, jnp.arange(4.0))
    assert metric.compute() == 1.5

    def loss(w, metric):
        metric.update(w**2)
        return w**2

    assert rx.filter_grad(loss)(jnp.array(3.0), metric) == 6
    np.testing.assert_allclose(metric.compute(), 3.0, rtol=1e-6)


def test_shapes_that_differ_are_errors():
    with raises(ValueError, match=r"mask has shape \(2,\), but the values .* \(3,\)"):
        rx.nn.Average().update(jnp.ones(3), mask=jnp.ones(2, bool))
    accuracy = rx.nn.Accuracy()
    with raises(ValueError, match=r"labels have shape \(2,\), .* shape \(3,\)"):
        accuracy.update(jnp.ones((3, 2)), jnp.zeros(2, int))
    assert accuracy.count.value == 0
