"""`rx.nn.MultiheadAttention`: Equinox's, and decoding with a cache."""

# A static checker objects to what is wrong on purpose here, or made at run time.
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from raising import raises

import refx_eqx as rx


KEY, KEY2 = jr.key(0), jr.key(1)
XS = jr.normal(KEY2, (12, 8))
SIZES = {
    "key_size": 5,
    "value_size": 6,
    "output_size": 7,
    "qk_size": 3,
    "vo_size": 4,
    "use_query_bias": True,
    "use_key_bias": True,
    "use_value_bias": True,
    "use_output_bias": True,
}


@pytest.fixture(autouse=True)
def _settings():
    with jax.check_tracer_leaks(False):
        yield


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


@rx.filter_jit
def extend(attention, xs):
    return attention(xs, xs, xs, cache=True)


def window(n, size=None):
    """Which positions each sees: those before it, and of these the last."""
    age = np.arange(n)[:, None] - np.arange(n)[None, :]
    return jnp.asarray((age >= 0) & (age < (size or n)))


def test_the_compiled_layer_has_the_numbers_of_equinox_to_the_last_bit():
    ours = rx.nn.MultiheadAttention(2, 8, key=KEY)
    theirs = eqx.nn.MultiheadAttention(2, 8, key=KEY)
    batch = jr.normal(KEY, (3, 12, 8))

    def both(layer):
        def loss(layer):
            out = jax.vmap(lambda xs: layer(xs, xs, xs, window(12)))(batch)
            return jnp.sum(out**2), out

        return eqx.filter_value_and_grad(loss, has_aux=True)(layer)

    (_, out), grads = eqx.filter_jit(both)(theirs)
    (_, found), found_grads = rx.filter_jit(lambda layer: both(rx.snapshot(layer)))(
        ours
    )
    np.testing.assert_array_equal(found, out)
    for name in ("query_proj", "key_proj", "value_proj", "output_proj"):
        np.testing.assert_array_equal(
            getattr(found_grads, name).weight, getattr(grads, name).weight
        )


@pytest.mark.parametrize("sizes", [{}, SIZES])
@pytest.mark.parametrize("mask", [None, "shared", "of heads"])
def test_without_a_cache_it_is_that_of_equinox(sizes, mask):
    ours = rx.nn.MultiheadAttention(2, 8, **sizes, cache_size=4, key=KEY)
    theirs = eqx.nn.MultiheadAttention(2, 8, **sizes, key=KEY)
    query = XS[:4]
    key_ = jr.normal(KEY, (5, sizes.get("key_size", 8)))
    value = jr.normal(KEY, (5, sizes.get("value_size", 8)))
    if mask is not None:
        shape = (4, 5) if mask == "shared" else (2, 4, 5)
        mask = jr.bernoulli(KEY2, 0.7, shape)
    swap = lambda q, k, v: (2 * q, k + 1, jnp.sin(v))
    for process_heads in None, swap:
        kwargs = {"mask": mask, "process_heads": process_heads}
        close(ours(query, key_, value, **kwargs), theirs(query, key_, value, **kwargs))
    loss = lambda layer: jnp.sum(jnp.sin(layer(query, key_, value, mask)))
    got, want = rx.filter_grad(loss, wrt="params")(ours), eqx.filter_grad(loss)(theirs)
    for name in "query_proj", "key_proj", "value_proj", "output_proj":
        np.testing.assert_allclose(
            getattr(got, name).weight.value,
            getattr(want, name).weight,
            rtol=1e-4,
            atol=1e-5,
        )
    assert ours.cache_length.value == 0


def test_dropout_is_that_of_equinox_with_a_key_and_else_of_the_stream():
    ours = rx.nn.MultiheadAttention(2, 8, dropout_p=0.5, rngs=rx.Rngs(0), key=KEY)
    theirs = eqx.nn.MultiheadAttention(2, 8, dropout_p=0.5, key=KEY)
    close(ours(XS, XS, XS, key=KEY2), theirs(XS, XS, XS, key=KEY2))
    key = rx.Rngs(0).dropout()
    close(ours(XS, XS, XS), theirs(XS, XS, XS, key=key))
    assert (ours(XS, XS, XS) != ours(XS, XS, XS)).any()
    evaluated = eqx.nn.inference_mode(ours)
    close(evaluated(XS, XS, XS), eqx.nn.inference_mode(theirs)(XS, XS, XS))
    close(ours(XS, XS, XS, inference=True), evaluated(XS, XS, XS))
    assert ours.dropout.stream.count.value == 3


@pytest.mark.parametrize(
    "size, rolling, chunks",
    [
        (12, False, [12]),
        (12, False, [7, 1, 1, 1, 1, 1]),
        (15, False, [3, 4, 5]),
        (15, True, [3, 4, 5]),
        (5, True, [12]),
        (5, True, [7, 1, 1, 1, 1, 1]),
        (4, True, [1, 10, 1]),
        (4, True, [6, 6]),
        (1, True, [1] * 12),
    ],
)
def test_prefill_and_decode_are_the_whole(size, rolling, chunks):
    attention = rx.nn.MultiheadAttention(
        2,
        8,
        **{**SIZES, "key_size": 8, "value_size": 8},
        cache_size=size,
        rolling=rolling,
        key=KEY,
    )
    whole = attention(XS, XS, XS, window(12, size))
    start, outs = 0, []
    for n in chunks:
        outs.append(extend(attention, XS[start : start + n]))
        start += n
    close(jnp.concatenate(outs), whole)
    assert attention.cache_length.value == 12

    # Another sequence: of the one before nothing is left.
    attention.reset_cache()
    ys = XS[::-1]
    close(extend(attention, ys[:1]), attention(ys, ys, ys, window(12, size))[:1])


def test_decoding_under_scan():
    attention = rx.nn.MultiheadAttention(2, 8, cache_size=12, key=KEY)
    whole = attention(XS, XS, XS, window(12))

    @rx.filter_jit(donate="refs")
    def decode(attention, xs):
        step = lambda layer, x: (layer, extend(layer, x[None])[0])
        return rx.scan(step, attention, xs)[1]

    prompt = extend(attention, XS[:4])
    close(jnp.concatenate([prompt, decode(attention, XS[4:])]), whole)


def test_decoding_compiles_one_step(trace_counter):
    @trace_counter
    def step(attention, x):
        return attention(x, x, x, cache=True)

    attention = rx.nn.MultiheadAttention(2, 8, cache_size=12, rolling=True, key=KEY)
    jitted = rx.filter_jit(step, donate="refs")
    for x in XS:
        jitted(attention, x[None])
    assert step.counter.count == 1


def test_a_batch_has_a_cache_for_each_and_lengths_of_its_own():
    attention = rx.nn.MultiheadAttention(2, 8, cache_size=12, key=KEY)
    many = rx.add_axis(attention, 2, "cache")
    assert many.query_proj.weight is attention.query_proj.weight
    batched = rx.filter_jit(
        rx.filter_vmap(
            lambda layer, xs: layer(xs, xs, xs, cache=True),
            in_axes=(rx.axes(cache=0, default=None), 0),
        )
    )
    sequences = jnp.stack([XS, XS[::-1]])
    lengths = [5, 3]
    prompts = jnp.stack([sequences[0, :5], sequences[1, :5]])  # the second is filled up
    batched(many, prompts)
    many.cache_length.value = jnp.array(lengths)
    for i in range(3):
        xs = jnp.stack([sequences[k, n + i] for k, n in enumerate(lengths)])[:, None]
        outs = batched(many, xs)
        for k, n in enumerate(lengths):
            ys = sequences[k, : n + i + 1]
            close(outs[k, 0], attention(ys, ys, ys, window(len(ys)))[-1])
    many.reset_cache()
    assert many.cache_length.value.tolist() == [0, 0]


def test_positions_are_counted_from_the_length_of_the_cache():
    attention = rx.nn.MultiheadAttention(2, 8, cache_size=12, key=KEY)

    def rotate(start):
        def one(x):  # (seq, heads, size)
            at = (start + jnp.arange(x.shape[0])).astype(x.dtype)[:, None]
            a, b = jnp.split(x, 2, axis=-1)
            sin, cos = jnp.sin(at)[:, None], jnp.cos(at)[:, None]
            return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

        return lambda q, k, v: (one(q), one(k), v)

    whole = attention(XS, XS, XS, window(12), process_heads=rotate(0))
    for start, end in (0, 7), (7, 8), (8, 12):
        xs = XS[start:end]
        rotated = rotate(attention.cache_length[...])
        out = attention(xs, xs, xs, cache=True, process_heads=rotated)
        close(out, whole[start:end])


def test_a_full_cache_is_an_error_and_nothing_has_changed():
    attention = rx.nn.MultiheadAttention(2, 8, cache_size=4, key=KEY)
    extend(attention, XS[:3])
    before = rx.snapshot(attention)
    with raises(Exception, match="the cache is full.*reset_cache.*rolling=True"):
        extend(attention, XS[:2]).block_until_ready()
    assert eqx.tree_equal(rx.snapshot(attention), before)
    with raises(ValueError, match=r"is full.*It has 4 slots, and 5 are needed"):
        extend(attention, XS[:5])
    assert eqx.tree_equal(rx.snapshot(attention), before)
    extend(attention, XS[:1])
    attention.reset_cache()  # the remedy
    extend(attention, XS[:4])


def test_projections_may_be_other_layers():
    attention = rx.nn.MultiheadAttention(2, 8, cache_size=4, key=KEY)
    plain = attention(XS, XS, XS)
    lora = rx.nn.LoRA(attention.query_proj, rank=2, key=KEY2)
    adapted = eqx.tree_at(lambda a: a.query_proj, attention, lora)
    close(adapted(XS, XS, XS), plain)
    lora.b.value += 1.0
    assert (adapted(XS, XS, XS) != plain).any()
    close(rx.nn.merge_lora(adapted)(XS, XS, XS), adapted(XS, XS, XS))

    normed = eqx.tree_at(
        lambda a: a.output_proj,
        attention,
        rx.nn.SpectralNorm(attention.output_proj, key=KEY2),
    )
    before = normed.output_proj.u.value
    attention.output_proj.weight.value += 1.0
    normed(XS, XS, XS)
    assert (normed.output_proj.u.value != before).any()


@pytest.mark.parametrize("rolling", [False, True])
def test_no_positions_change_nothing(rolling):
    attention = rx.nn.MultiheadAttention(2, 8, cache_size=12, rolling=rolling, key=KEY)
    none = XS[:0]
    assert attention(none, none, none).shape == (0, 8)
    assert (attention(XS, none, none) == 0).all()
    extend(attention, XS[:3])
    before = rx.clone(attention)
    assert extend(attention, none).shape == (0, 8)
    assert rx.tree_equal(attention, before)


def test_what_does_not_fit_is_an_error():
    attention = rx.nn.MultiheadAttention(2, 8, cache_size=12, key=KEY)
    with raises(ValueError, match="has no cache. Make it with `cache_size=`"):
        extend(rx.nn.MultiheadAttention(2, 8, key=KEY), XS)
    with raises(ValueError, match="there is no `mask`"):
        attention(XS, XS, XS, window(12), cache=True)
    with raises(ValueError, match="as many queries as keys .there are 2 and 12."):
        attention(XS[:2], XS, XS, cache=True)
    with raises(ValueError, match="12 keys and 3 values"):
        attention(XS, XS, XS[:3])
    for mask in window(3), window(3)[None], window(12)[None, None], window(12)[0]:
        text = f"the mask has shape {mask.shape}, but must have shape (12, 12)"
        with raises(ValueError, match=re.escape(text)):
            attention(XS, XS, XS, mask)
    with raises(ValueError, match="three arrays of the shapes it is given"):
        attention(XS, XS, XS, process_heads=lambda q, k, v: (q, k[:2], v))
    assert attention.cache_length.value == 0
