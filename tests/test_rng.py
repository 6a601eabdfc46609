"""`Rngs`, and how refs of collection "rng" are split."""

# A static checker objects to what is wrong on purpose here, or made at run time.
# pyright: reportArgumentType=false

import io
import pickle
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from raising import raises

import refx_eqx as rx


def draw(rngs, _=None):
    return jr.uniform(rngs.dropout())


def all_different(values):
    values = jnp.ravel(jnp.asarray(values))
    return len(set(values.tolist())) == values.size


def test_a_stream_gives_fresh_keys_and_counts():
    rngs = rx.Rngs(0, dropout=1)
    assert all_different([draw(rngs) for _ in range(3)])
    assert rngs.dropout.count.value == 3
    assert rngs.default.count.value == 0
    assert jnp.issubdtype(rngs.dropout().dtype, jax.dtypes.prng_key)


def test_the_same_seed_gives_the_same_keys():
    for make in [
        lambda: rx.Rngs(0, dropout=1),
        lambda: rx.Rngs(jr.key(0), dropout=jr.PRNGKey(1)),
        lambda: rx.Rngs(jnp.array(0), dropout=jnp.array(1)),
    ]:
        for name in ["dropout", "other"]:
            a, b = getattr(rx.Rngs(0, dropout=1), name), getattr(make(), name)
            assert a() == b() and a() == b()


def test_other_seeds_and_other_names_give_other_keys():
    rngs = rx.Rngs(0, a=0, b=0, c=1)
    streams = [rngs.default, rngs.a, rngs.b, rngs.c]
    assert all_different([jr.uniform(stream()) for stream in streams])


def test_a_missing_name_draws_from_the_default_stream():
    rngs = rx.Rngs(0, dropout=1)
    assert rngs.params is rngs.noise is rngs.default
    assert rngs.params() != rngs.noise()
    assert rngs.default.count.value == 2


def test_a_missing_name_without_a_default_stream_is_refused():
    rngs = rx.Rngs(dropout=1, params=2)
    with raises(AttributeError, match="no stream 'noise'.*'dropout', 'params'"):
        rngs.noise()
    rx.Rngs(noise=3).noise()  # the remedies
    rx.Rngs(3).noise()
    assert not hasattr(rx.Rngs(0), "_private") and not hasattr(rx.Rngs(0), "__array__")


def test_inference_mode_keeps_the_default_stream():
    rngs = rx.Rngs(0)
    evaluation = eqx.nn.inference_mode({"dropout": eqx.nn.Dropout(), "rngs": rngs})
    assert evaluation["dropout"].inference
    assert evaluation["rngs"].default.key is rngs.default.key


def test_names_that_cannot_be_streams_are_refused():
    for name in ("streams", "inference", "_a", "__len__"):
        with raises(ValueError, match=f"cannot be named '{name}'"):
            rx.Rngs(**{name: 1})
    with raises(TypeError, match="given twice"):
        rx.Rngs(0, default=1)


def test_it_can_be_checkpointed():
    rngs = rx.Rngs(0, dropout=1)
    draw(rngs)
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, rx.deref(rngs))
    file.seek(0)
    like = rx.deref(rx.Rngs(7, dropout=8))
    loaded = rx.reref(eqx.tree_deserialise_leaves(file, like))
    unpickled = pickle.loads(pickle.dumps(rngs))
    cloned = rx.clone(rngs)
    assert draw(loaded) == draw(unpickled) == draw(cloned) == draw(rngs)


def test_a_typed_key_stays_typed_and_takes_a_raw_one_of_a_file():
    typed, raw = rx.Rngs(jr.key(3)), rx.Rngs(3)
    assert typed.default.key.value.shape == () and raw.default.key.value.shape == (2,)
    old = rx.state_dict(raw)
    other = rx.Rngs(jr.key(0))
    rx.load_state_dict(other, old)
    assert jnp.issubdtype(other.default.key.dtype, jax.dtypes.prng_key)
    assert draw(other) == draw(raw) == draw(typed)
    draw(other)
    rx.load_state_dict(raw, rx.state_dict(other))
    assert draw(raw) == draw(other) and raw.default.key.value.shape == (2,)


def test_another_implementation_of_keys():
    rngs = rx.Rngs(jr.key(0, impl="rbg"))
    assert str(jr.key_impl(rngs.x())) == "rbg"
    out = rx.filter_vmap(draw, in_axes=(None, 0))(rngs, jnp.zeros(3))
    assert all_different(out) and rngs.default.count.value == 2


def test_under_jit_it_counts_and_does_not_trace_again(trace_counter: Any):
    drawn = trace_counter(draw)
    jitted, rngs, eager = rx.filter_jit(drawn), rx.Rngs(0), rx.Rngs(0)
    for _ in range(3):
        assert jitted(rngs) == draw(eager)
    assert drawn.counter.count == 1 and rngs.default.count.value == 3


def test_under_grad_it_counts():
    def loss(x, rngs):
        return x * draw(rngs)

    rngs = rx.Rngs(0)
    a, b = (rx.filter_grad(loss)(1.0 + jnp.zeros(()), rngs) for _ in range(2))
    assert a != b and rngs.default.count.value == 2


def vmapped(rngs):
    return rx.filter_vmap(draw, in_axes=(None, 0))(rngs, jnp.zeros(4))


def scanned(rngs):
    return rx.scan(lambda rngs, x: (rngs, draw(rngs)), rngs, jnp.zeros(4))[1]


def mapped(rngs):
    return rx.map(lambda x: draw(rngs), jnp.zeros(4))


def mapped_in_batches(rngs):
    return rx.map(lambda x: draw(rngs), jnp.zeros(5), batch_size=2)


def closed_over(rngs):
    return rx.filter_vmap(lambda x: draw(rngs))(jnp.zeros(4))


def nested(rngs):
    def step(rngs, x):
        return rngs, vmapped(rngs)

    return rx.scan(step, rngs, jnp.zeros(3))[1]


def vmapped_twice(rngs):
    return rx.filter_vmap(lambda x: vmapped(rngs))(jnp.zeros(3))


SPLIT = [
    vmapped,
    scanned,
    mapped,
    mapped_in_batches,
    closed_over,
    nested,
    vmapped_twice,
]


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("f", SPLIT)
def test_lanes_and_steps_and_calls_all_differ(f, jit):
    rngs = rx.Rngs(0)
    g = rx.filter_jit(f) if jit else f
    first, second = g(rngs), g(rngs)
    outside = [draw(rngs) for _ in range(3)]
    every = [*jnp.ravel(first), *jnp.ravel(second), *outside]
    assert all_different(every)
    again = rx.Rngs(0)
    assert (f(again) == first).all() and (f(again) == second).all()


@pytest.mark.parametrize("f", [vmapped, closed_over, vmapped_twice])
def test_all_lanes_together_count_once(f):
    rngs = rx.Rngs(0)
    f(rngs)
    assert rngs.default.count.value == 1 and rngs.default.count.shape == ()


@pytest.mark.parametrize("f", [scanned, mapped])
def test_steps_count_one_by_one(f):
    rngs = rx.Rngs(0)
    key = rngs.default.key.value
    f(rngs)
    assert rngs.default.count.value == 4
    assert (rngs.default.key.value == key).all()


def test_the_same_in_each_lane_if_asked_for():
    rngs = rx.Rngs(0)
    same = rx.axes(rng=None)
    out = rx.filter_vmap(draw, in_axes=(same, 0))(rngs, jnp.zeros(3))
    assert len(set(out.tolist())) == 1
    whole = rx.axes(rng=None, default=0)
    out2 = rx.filter_vmap(lambda x: draw(rngs), in_axes=whole)(jnp.zeros(3))
    assert len(set(out2.tolist())) == 1 and out2[0] != out[0]
    key = rx.Ref(jr.key(0), "rng")

    def step(carry, x):
        return carry, jr.uniform(x["key"].value)

    xs = {"key": key, "x": jnp.zeros(3)}
    split = rx.scan(step, 0, xs, in_axes={"key": None, "x": 0})[1]
    together = rx.scan(step, 0, xs, in_axes={"key": same, "x": 0})[1]
    assert all_different(split) and len(set(together.tolist())) == 1


def test_an_argument_says_it_for_the_function_that_reaches_the_ref_too():
    key = rx.Ref(jr.key(0), "rng")
    f = lambda k, x: x + jr.uniform(k.value) - jr.uniform(key.value)
    out = rx.filter_vmap(f, in_axes=(rx.axes(rng=None), 0))(key, jnp.zeros(3))
    assert out.tolist() == [0.0] * 3
    out = rx.filter_vmap(lambda k, x: x + jr.uniform(key.value), in_axes=(None, 0))(
        key, jnp.zeros(3)
    )
    assert all_different(out)


@pytest.mark.parametrize(
    "axes",
    [
        rx.axes(rng=None),
        rx.axes({rx.collection("rng"): None}),
        rx.axes({rx.Ref: None}),
        rx.axes({rx.path("**"): None}),
        rx.axes({lambda ref: ref.collection == "rng": None}),
    ],
)
@pytest.mark.parametrize("way", ["filter_vmap", "scan", "map", "map in batches"])
def test_the_same_everywhere_by_any_filter(axes, way):
    rngs, xs = rx.Rngs(0), jnp.zeros(5)
    expected = [draw(rx.Rngs(0))] * 5
    in_axes, f = (axes, 0), lambda rngs, x: x + draw(rngs)
    if way == "filter_vmap":
        out = rx.filter_vmap(f, in_axes=in_axes)(rngs, xs)
    elif way == "scan":
        _, out = rx.scan(lambda c, x: (c, f(*x)), 0, (rngs, xs), in_axes=in_axes)
    else:
        size = None if way == "map" else 2
        out = rx.map(lambda x: f(*x), (rngs, xs), in_axes=in_axes, batch_size=size)
    assert out.tolist() == [x.tolist() for x in expected]
    # All of them together count once, so the next call draws others.
    assert rngs.default.count.value == 1


@pytest.mark.parametrize("way", ["filter_vmap", "scan", "map", "map in batches"])
@pytest.mark.parametrize("by", ["path", "ref"])
def test_one_stream_is_the_same_and_another_is_split(by, way):
    rngs, xs = rx.Rngs(same=0, split=1), jnp.zeros(5)
    if by == "path":
        axes = rx.axes({rx.path("**.same.**"): None}, default=None)
    else:
        refs = set(rx.aliases(rngs.same))
        axes = rx.axes({lambda leaf: leaf in refs: None}, default=None)

    def f(rngs, x):
        return jr.uniform(rngs.same()), jr.uniform(rngs.split()) + x

    if way == "filter_vmap":
        same, split = rx.filter_vmap(f, in_axes=(axes, 0))(rngs, xs)
    else:
        size = 2 if way == "map in batches" else None
        kwargs = {"in_axes": (axes, 0)}
        if way == "scan":
            step = lambda c, x: (c, f(*x))
            _, (same, split) = rx.scan(step, 0, (rngs, xs), **kwargs)
        else:
            same, split = rx.map(lambda x: f(*x), (rngs, xs), batch_size=size, **kwargs)
    assert len(set(same.tolist())) == 1 and all_different(split)


@pytest.mark.parametrize("transform", [rx.scan, rx.map])
def test_axes_as_the_whole_of_in_axes_speak_of_the_function(transform):
    rngs, xs = rx.Rngs(0), jnp.zeros(4)
    same = rx.axes(rng=None, default=0)
    if transform is rx.map:
        out = rx.map(lambda x: draw(rngs), xs, in_axes=same)
    else:
        _, out = rx.scan(lambda c, x: (c, draw(rngs)), 0, xs, in_axes=same)
    assert len(set(out.tolist())) == 1 and rngs.default.count.value == 1
    # A ref of the carry is carried: that is what a carry is for.
    _, out = rx.scan(lambda c, x: (c, draw(c)), rngs, xs, in_axes=same)
    assert all_different(out) and rngs.default.count.value == 5


def test_two_arguments_that_disagree_on_the_randomness_are_refused():
    key = rx.Ref(jr.key(0), "rng")
    with raises(
        rx.StructureError,
        match=r"two axes: None in argument 0, None \(the same randomness everywhere\) in "
        r"argument 1",
    ):
        rx.filter_vmap(lambda a, b, x: x, in_axes=(None, rx.axes(rng=None), 0))(
            key, key, jnp.zeros(3)
        )


def test_dropout_in_a_model_that_is_broadcast():
    class Model(rx.Module):
        weight: rx.Param[jax.Array]
        rngs: rx.Rngs

        def __call__(self, x):
            keep = jr.bernoulli(self.rngs.dropout(), 0.5, x.shape)
            return jnp.where(keep, self.weight[...] * x, 0.0)

    model = Model(jnp.ones(64), rx.Rngs(0))
    out = rx.filter_vmap(model)(jnp.ones((2, 64)))
    assert not (out[0] == out[1]).all()
    assert model.rngs.dropout.count.value == 1


def test_a_stack_of_streams_is_mapped():
    rngs = rx.filter_vmap(rx.Rngs)(jr.split(jr.key(0), 3))
    assert rngs.default.count.shape == (3,)
    out = rx.filter_vmap(draw)(rngs)
    assert all_different(out) and rngs.default.count.value.tolist() == [1, 1, 1]
    out2 = rx.scan(lambda c, rngs: (c, draw(rngs)), None, rngs)[1]
    assert all_different([*out, *out2])
    assert rngs.default.count.value.tolist() == [2, 2, 2]


@pytest.mark.parametrize("make", [jr.key, jr.PRNGKey])
def test_a_key_in_a_ref_is_split_and_may_be_written(make):
    ref = rx.Ref(make(0), "rng")

    def f(ref, x):
        ref.value, key = jr.split(ref.value)
        return jr.uniform(key)

    def g(x):
        return f(ref, x)

    outs = []
    for _ in range(2):
        outs += [rx.filter_vmap(f, in_axes=(None, 0))(ref, jnp.zeros(3))]
        outs += [rx.map(g, jnp.zeros(3))]
        outs += [rx.map(g, jnp.zeros(3), batch_size=2)]
    assert all_different(jnp.concatenate(outs))
    assert ref.shape == make(0).shape and ref.dtype == make(0).dtype


def test_the_key_of_a_lane_is_none_that_folding_in_gives():
    ref = rx.Ref(jr.key(0), "rng")
    f = lambda ref, x: jr.uniform(ref.value)
    out = rx.filter_vmap(f, in_axes=(None, 0))(ref, jnp.zeros(3))
    folded = [jr.uniform(jr.fold_in(ref.value, i)) for i in range(3)]
    assert all_different([*out, *folded])


def test_only_keys_of_collection_rng_are_split():
    ref = rx.Ref(jr.key(0), "other")
    f = lambda ref, x: jr.uniform(ref.value)
    out = rx.filter_vmap(f, in_axes=(None, 0))(ref, jnp.zeros(3))
    assert len(set(out.tolist())) == 1


@pytest.mark.parametrize("wrap", [lambda f: f, rx.filter_jit], ids=["eager", "jit"])
def test_keys_are_drawn_where_only_some_elements_of_a_vmap_go(wrap):
    """Experts, of which one has dropout; and a loop with its own length for each element."""
    rngs = rx.Rngs(0)

    def noisy(x):
        return x + jr.normal(rngs.noise(), x.shape)

    def expert(i, x):
        return rx.cond(i, noisy, lambda x: x, x)

    def loop(n, x):
        return rx.while_loop(
            lambda c: c[0] < n, lambda c: (c[0] + 1, noisy(c[1])), (0, x)
        )

    ones = jnp.ones((3, 4))
    out = wrap(rx.filter_vmap(expert))(jnp.array([True, False, True]), ones)
    assert (out[1] == 1.0).all() and not (out[0] == out[2]).any()
    assert rngs.noise.count.value == 1
    again = wrap(rx.filter_vmap(expert))(jnp.array([True, False, True]), ones)
    assert not (again[0] == out[0]).any() and rngs.noise.count.value == 2
    wrap(rx.filter_vmap(loop))(jnp.array([0, 3, 1]), ones)
    assert rngs.noise.count.value == 5  # the largest
    draw = lambda rngs, i: rx.cond(i, lambda: jr.normal(rngs.noise()), lambda: 0.0)
    same = rx.filter_vmap(draw, in_axes=(rx.axes(rng=None), 0))
    with raises(rx.CarryError, match="differs along the mapped axis"):
        same(rngs, jnp.array([True, False]))
