"""`rx.nn.BatchNorm` computes what Equinox's and flax's do."""

# A static checker objects to what is wrong on purpose here, or made at run time.
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from flax import nnx
from raising import raises

import refx_eqx as rx


KEY = jr.key(0)
MODES = ["batch", "ema"]


@pytest.fixture(autouse=True)
def _settings():
    with jax.check_tracer_leaks(False):
        yield


def close(a, b, rtol=2e-5, atol=2e-6):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def of_equinox(mode, **kwargs):
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
        3, "batch", mode=mode, **kwargs
    )
    if mode == "batch":
        # Its correction is that of a variance that starts at zero.
        state = state.set(norm.batch_state_index, (jnp.zeros(3), jnp.zeros(3)))
    return norm, state


def apply_equinox(norm, state, xs):
    return jax.vmap(norm, in_axes=(0, None), out_axes=(0, None), axis_name="batch")(
        xs, state
    )


@rx.filter_jit
def apply_named(norm, xs):
    return rx.filter_vmap(
        lambda norm, x: norm(x), in_axes=(None, 0), axis_name="batch"
    )(norm, xs)


def batches(n, shape=(8, 3, 2)):
    for i in range(n):
        yield 3.0 + (i + 1) * jr.normal(jr.fold_in(KEY, i), shape)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("momentum", [0.99, 0.5, 0.0])
def test_it_computes_what_equinox_does(mode, momentum):
    theirs, state = of_equinox(mode, momentum=momentum)
    ours = rx.nn.BatchNorm(3, "batch", mode=mode, momentum=momentum)
    batched = rx.nn.BatchNorm(3, mode=mode, momentum=momentum)
    for norm in ours, batched:
        norm.weight.value, norm.bias.value = jnp.array([1.0, 2, 3]), jnp.ones(3)
    theirs = eqx.tree_at(
        lambda n: (n.weight, n.bias), theirs, (jnp.array([1.0, 2, 3]), jnp.ones(3))
    )
    for xs in batches(5):
        out, state = apply_equinox(theirs, state, xs)
        close(apply_named(ours, xs), out)
        close(batched(xs), out)
        evaluated, _ = apply_equinox(eqx.nn.inference_mode(theirs), state, xs)
        # Their `1 - momentum**count` has fewer digits.
        close(apply_named(eqx.nn.inference_mode(ours), xs), evaluated, 1e-4, 1e-4)
        close(batched(xs, inference=True), evaluated, 1e-4, 1e-4)
    assert ours.count.value == batched.count.value == 5
    if mode == "batch":
        mean, var = state.get(theirs.batch_state_index)
        scale = 1 - momentum**5
        close(batched.mean.value, mean / scale)
        close(batched.var.value, var / scale, rtol=1e-4)


def test_it_normalizes_in_training_as_flax_does():
    theirs = nnx.BatchNorm(3, rngs=nnx.Rngs(0), axis=1)
    ours = rx.nn.BatchNorm(3)
    for xs in batches(3):
        close(ours(xs), theirs(xs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.9, 0.9999, 0.0])
def test_the_statistics_are_the_weighted_means_of_all_batches(momentum):
    norm = rx.nn.BatchNorm(3, momentum=momentum)
    xs = [np.asarray(x, np.float64) for x in batches(4)]
    for n, x in enumerate(xs):
        norm(jnp.asarray(x, jnp.float32))
        weights = np.array([momentum ** (n - i) for i in range(n + 1)])
        weights /= weights.sum()
        close(norm.mean.value, sum(w * x.mean((0, 2)) for w, x in zip(weights, xs)))
        close(norm.var.value, sum(w * x.var((0, 2)) for w, x in zip(weights, xs)))


@pytest.mark.parametrize("mode", MODES)
def test_a_small_variance_is_that_of_the_first_batch(mode):
    # Nothing of the one that the variance starts with is left, not even by rounding.
    norm = rx.nn.BatchNorm(1, mode=mode)
    norm(1e-6 * jnp.array([[-1.0], [1.0]]))
    close(norm.var.value, [1e-12], atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_equinox(mode):
    theirs, state = of_equinox(mode)
    ours = rx.nn.BatchNorm(3, mode=mode)
    for xs in batches(2):

        def loss_of_theirs(both, state=state):
            norm, xs = both
            out, state = apply_equinox(norm, state, xs)
            return jnp.sum(jnp.sin(out)), state

        def loss(both):
            norm, xs = both
            return jnp.sum(jnp.sin(norm(xs)))

        want, state = eqx.filter_grad(loss_of_theirs, has_aux=True)((theirs, xs))
        got = rx.filter_grad(loss)((ours, xs))
        close(got[0].weight.value, want[0].weight, atol=2e-5)
        close(got[0].bias.value, want[0].bias, atol=2e-5)
        close(got[1], want[1], atol=2e-5)
    assert ours.count.value == 2


def test_several_steps_of_a_scan_are_as_many_calls():
    xs = jnp.stack(list(batches(4)))
    by_hand, scanned = rx.nn.BatchNorm(3), rx.nn.BatchNorm(3)
    outs = jnp.stack([by_hand(x) for x in xs])

    @rx.filter_jit
    def run(norm, xs):
        return rx.scan(lambda norm, x: (norm, norm(x)), norm, xs)[1]

    close(run(scanned, xs), outs)
    close(scanned.mean.value, by_hand.mean.value)
    close(scanned.var.value, by_hand.var.value)
    assert scanned.count.value == 4


def test_an_ensemble_has_statistics_for_each():
    norms = rx.filter_vmap(lambda key: rx.nn.BatchNorm(3))(jr.split(KEY, 2))
    assert norms.mean.shape == (2, 3)
    xs = jnp.stack(list(batches(2)))
    outs = rx.filter_vmap(lambda norm, x: norm(x))(norms, xs)
    for i in range(2):
        alone = rx.nn.BatchNorm(3)
        close(outs[i], alone(xs[i]))
        close(norms.var.value[i], alone.var.value)


def test_several_names_are_one_batch():
    xs = next(batches(1, (4, 2, 3)))
    norm = rx.nn.BatchNorm(3, ("a", "b"))
    inner = rx.filter_vmap(lambda n, x: n(x), in_axes=(None, 0), axis_name="b")
    out = rx.filter_vmap(inner, in_axes=(None, 0), axis_name="a")(norm, xs)
    batched = rx.nn.BatchNorm(3)
    close(out.reshape(8, 3), batched(xs.reshape(8, 3)))
    close(norm.var.value, batched.var.value)


def test_without_affine_there_are_no_parameters():
    norm = rx.nn.BatchNorm(3, channelwise_affine=False)
    assert norm.weight is None and norm.bias is None
    assert norm(jnp.ones((2, 3))).shape == (2, 3)


def test_it_computes_in_its_dtype():
    norm = rx.nn.BatchNorm(3, dtype=jnp.bfloat16)
    assert norm(jnp.ones((2, 3), jnp.bfloat16)).dtype == jnp.bfloat16
    assert norm.mean.dtype == norm.var.dtype == norm.weight.dtype == jnp.bfloat16


def test_a_map_without_the_name_is_an_error_that_says_so():
    norm = rx.nn.BatchNorm(3, axis_name="batch")
    with raises(NameError, match="no mapped axis named 'batch'.*on a batch"):
        norm(jnp.ones(3))
    assert norm.count.value == 0
    rx.nn.BatchNorm(3)(jnp.ones((2, 3)))  # the remedy


@pytest.mark.parametrize(
    "axis_name, shape, message",
    [
        (None, (3,), r"`axis_name` is not set .* \(batch, input_size, ...\)"),
        (None, (3, 2), "input_size=3"),
        ("batch", (2, 3), r"`axis_name` is set .* \(input_size, ...\)"),
    ],
)
def test_another_shape_is_an_error(axis_name, shape, message):
    with raises(ValueError, match=message):
        rx.nn.BatchNorm(3, axis_name)(jnp.ones(shape))


def test_wrong_arguments_are_errors():
    with raises(ValueError, match="`mode` must be 'batch' or 'ema', but was 'legacy'"):
        rx.nn.BatchNorm(3, mode="legacy")
    with raises(ValueError, match="`momentum` is the fraction .* but was 1"):
        rx.nn.BatchNorm(3, momentum=1)
