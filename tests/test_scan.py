"""`scan`, `map` and `associative_scan`."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from jaxprs import equations
from raising import message_of, raises

import refx_eqx as rx


def count_up(ref, x):
    """A step that counts in a ref."""
    ref.value += 1
    return ref, x


class Layer(rx.Module):
    own: rx.Param[jax.Array]
    shared: rx.Param[jax.Array]
    uses: rx.Ref[jax.Array] = rx.field(collection="counts")

    def __init__(self, key, shared):
        self.own = jr.normal(key, (3, 3))
        self.shared = shared
        self.uses = jnp.array(0, jnp.int32)

    def __call__(self, x):
        self.uses.value += 1
        return x + jnp.tanh(self.own[...] @ x) * self.shared[...]


def make_layers(n=4):
    shared = rx.Ref(jnp.ones(3), "params")
    make = rx.filter_vmap(Layer, in_axes=(0, None))
    return make(jr.split(jr.key(0), n), shared)


STACKED = rx.axes({rx.path("shared"): None}, default=0)


def run_layers(layers, x):
    def step(x, layer):
        return layer(x), None

    return rx.scan(step, x, layers, in_axes=STACKED)[0]


def run_layers_in_python(layers, x):
    for i in range(layers.own.shape[0]):
        x = x + jnp.tanh(layers.own[i] @ x) * layers.shared[...]
    return x


def test_without_refs_it_is_jax_lax_scan():
    def step(carry, x):
        return {"a": carry["a"] + x, "b": carry["b"] * 2}, (carry["a"], 1.0)

    init, xs = {"a": 0.0, "b": jnp.ones(2)}, jnp.arange(3.0)
    for options in [{}, {"reverse": True}, {"unroll": 2}, {"unroll": True}]:
        ours = rx.scan(step, init, xs, **options)
        theirs = jax.lax.scan(step, init, xs, **options)
        assert eqx.tree_equal(ours, theirs)
    assert eqx.tree_equal(
        rx.scan(lambda c, _: (c + 1, None), 0, length=3),
        jax.lax.scan(lambda c, _: (c + 1, None), 0, length=3),
    )


def test_a_weakly_typed_carry_becomes_what_a_step_makes_of_it():
    xs = jnp.arange(3, dtype=jnp.bfloat16)
    carry, _ = rx.scan(lambda c, x: (c + x, None), 0.0, xs)
    assert carry.dtype == jnp.bfloat16 and carry == 3
    ref: rx.Ref[Any] = rx.Ref(0.0)

    def step(ref, x):
        ref.value += x
        return ref, None

    rx.scan(step, ref, xs)
    assert ref.value.dtype == jnp.bfloat16 and ref.value == 3


def test_a_weakly_typed_carry_of_the_dtype_of_a_step_stays_so_in_it_as_in_jax():
    xs = jnp.arange(3, dtype=jnp.bfloat16) + 1
    traces = []

    def step(c, x):
        traces.append("traced")
        return c + jnp.float32(0.1), c * x  # of a weak `c`, a `bfloat16`

    ours, theirs = rx.scan(step, 0.1, xs), jax.lax.scan(step, 0.1, xs)
    assert eqx.tree_equal(ours, theirs) and ours[1].dtype == jnp.bfloat16
    assert len(traces) == 2  # once each

    ref: rx.Ref[Any] = rx.Ref(jnp.array(0.1))  # JAX makes a weakly typed one

    def write(ref, x):
        ref.value, y = step(ref.value, x)
        return ref, y

    _, ys = rx.scan(write, ref, xs)
    assert eqx.tree_equal((ref.value, ys), theirs)


def test_scans_in_each_other_trace_their_step_once():
    traces = []

    def nested(depth):
        if depth == 0:
            return lambda c, x: (traces.append("traced"), (c + x, None))[1]
        inner = nested(depth - 1)
        return lambda c, _: (rx.scan(inner, c, jnp.ones(2))[0], None)

    assert rx.scan(nested(3), 0.0, jnp.ones(2))[0] == 16
    assert traces == ["traced"]


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("place", ["carry", "closure", "method", "xs"])
def test_a_ref_that_is_not_sliced_is_carried_from_step_to_step(place, jit):
    ref = rx.Ref(jnp.array(0), "counts")

    class Counter(eqx.Module):
        ref: rx.Ref

        def step(self, carry, x):
            self.ref.value += 1
            return carry, self.ref.value

    def closure(carry, x):
        ref.value += 1
        return carry, ref.value

    def carried(ref, x):
        ref.value += 1
        return ref, ref.value

    def in_xs(carry, x):
        x["ref"].value += 1
        return carry, x["ref"].value

    calls = {
        "carry": lambda ref: rx.scan(carried, ref, length=5),
        "closure": lambda _: rx.scan(closure, None, length=5),
        "method": lambda ref: rx.scan(Counter(ref).step, None, length=5),
        "xs": lambda ref: rx.scan(
            in_xs, None, {"ref": ref, "x": jnp.zeros(5)}, in_axes={"ref": None, "x": 0}
        ),
    }
    call = calls[place]
    if place == "closure":
        # The closure of `calls` has a function which has the ref in its own.
        call = rx.filter_jit(call) if jit else call
        _, counts = call(None)
    else:
        _, counts = (rx.filter_jit(call) if jit else call)(ref)
    assert ref.value == 5
    assert counts.tolist() == [1, 2, 3, 4, 5]


def test_under_grad_a_counter_counts_and_gradients_flow_through_refs():
    def loss(w, xs):
        total = rx.Ref(jnp.array(0.0))

        def step(carry, x):
            total.value += w["w"].value * x
            w["n"].value += 1
            return carry * w["w"].value, None

        carry, _ = rx.scan(step, jnp.array(1.0), xs)
        return carry + total.value

    w = {"w": rx.Ref(jnp.array(2.0), "params"), "n": rx.Ref(jnp.array(0))}
    for grad in [rx.filter_grad(loss), rx.filter_jit(rx.filter_grad(loss))]:
        grads = grad(w, jnp.arange(3.0))
        assert grads["w"].value == 3 * 2.0**2 + 3.0
    assert w["n"].value == 6


def test_gradients_of_what_the_step_closes_over_flow_under_plain_jax():
    def f(w):
        return rx.scan(lambda c, x: (c * w, None), 1.0, jnp.zeros(3))[0]

    assert jax.grad(f)(2.0) == 12.0
    assert jax.jit(jax.grad(f))(2.0) == 12.0


def test_sliced_refs_are_written_back_stacked():
    ref = rx.Ref(jnp.arange(3.0), "state")

    def step(carry, ref):
        ref.value = ref.value * 10
        return carry + ref.value, ref.value

    carry, ys = rx.scan(step, jnp.array(0.0), ref)
    assert carry == 30.0
    assert ref.value.tolist() == ys.tolist() == [0.0, 10.0, 20.0]


def test_slices_along_another_axis_go_back_along_it():
    ref = rx.Ref(jnp.arange(6.0).reshape(2, 3))

    def step(carry, ref):
        assert ref.shape == (2,)
        ref.value += 1
        return carry, ref.value

    for axis in [1, -1]:
        before = ref.value
        _, ys = rx.scan(step, None, ref, in_axes=axis)
        assert (ref.value == before + 1).all()
        assert (ys == ref.value.T).all()


def test_a_callable_in_axes_chooses_the_axis_of_each_array():
    xs = {"a": jnp.zeros((3, 2)), "b": jnp.ones(2), "r": rx.Ref(jnp.ones((2, 3)))}
    axis = lambda x: {(3, 2): 0, (2,): None, (2, 3): 1}[x.shape]

    def step(carry, x):
        assert x["a"].shape == x["b"].shape == x["r"].shape == (2,)
        return carry, x["b"]

    _, ys = rx.scan(step, None, xs, in_axes=axis)
    assert ys.shape == (3, 2)


def test_a_ref_that_is_only_read_is_a_constant_of_the_loop():
    ref = rx.Ref(jnp.ones(7), "params")

    def f(ref):
        return rx.scan(lambda c, _: (c + ref.value[0], None), jnp.array(0.0), length=3)

    assert f(ref)[0] == 3.0
    value = ref.value
    jaxpr = jax.make_jaxpr(lambda x: f(rx.Ref(x))[0])(value)
    (eqn,) = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "scan"]
    assert len(eqn.outvars) == 1  # the carry
    assert ref.value is value


def test_a_stack_of_layers_that_share_one_ref_trains():
    layers, x = make_layers(), jnp.arange(3.0) / 3
    assert layers.own.shape == (4, 3, 3) and layers.shared.shape == (3,)
    expected = run_layers_in_python(layers, x)
    out = run_layers(layers, x)
    assert jnp.allclose(out, expected, rtol=1e-6)
    assert layers.uses.value.tolist() == [1, 1, 1, 1]

    def loss(layers, run):
        return jnp.sum((run(layers, x) - 1.0) ** 2)

    grad = rx.filter_jit(rx.filter_value_and_grad(loss, wrt="params"))
    _, expected_grads = rx.filter_value_and_grad(loss, wrt="params")(
        layers, run_layers_in_python
    )
    losses = []
    for step in range(5):
        value, grads = grad(layers, run_layers)
        if step == 0:
            # The gradient of the shared part is the sum over the layers.
            for ours, theirs in [
                (grads.own, expected_grads.own),
                (grads.shared, expected_grads.shared),
            ]:
                assert jnp.allclose(ours.value, theirs.value, rtol=1e-5)
        losses.append(value)
        layers.own.value -= 0.01 * grads.own.value
        layers.shared.value -= 0.01 * grads.shared.value
    assert sorted(losses, reverse=True) == losses
    assert layers.uses.value.tolist() == [6, 6, 6, 6]


def test_refs_made_in_a_step_come_out_stacked_and_the_callers_own_unstacked():
    ref = rx.Ref(jnp.array(1.0), "params")

    def step(carry, x):
        new = rx.Ref(x * 2, "made")
        return carry, {"new": new, "again": new, "own": ref}

    _, ys = rx.scan(step, None, jnp.arange(3.0))
    assert ys["own"] is ref and ref.value == 1.0
    assert ys["new"] is ys["again"] and ys["new"].collection == "made"
    assert ys["new"].value.tolist() == [0.0, 2.0, 4.0]


def test_the_carry_comes_back_with_the_callers_own_refs():
    a, b = rx.Ref(jnp.array(0.0)), rx.Ref(jnp.array(0.0))

    def step(carry, x):
        carry["a"].value += x
        return carry, None

    carry, _ = rx.scan(step, {"a": a, "b": [b, a]}, jnp.ones(3))
    assert carry["a"] is a and carry["b"][0] is b and carry["b"][1] is a
    assert a.value == 3.0 and b.value == 0.0


def test_static_leaves_and_numbers_in_modules_are_static_in_the_carry():
    class State(eqx.Module):
        x: jax.Array
        scale: float
        act: object

    def step(state, _):
        assert isinstance(state.scale, float)
        x = state.act(state.x) * (2 if state.scale > 1 else 1)
        return State(x, state.scale, state.act), None

    state, _ = rx.scan(step, State(jnp.array(1.0), 3.0, jnp.abs), length=3)
    assert state.x == 8.0 and state.scale == 3.0 and state.act is jnp.abs


def test_a_ref_may_hold_a_pytree_with_static_parts():
    ref = rx.Ref({"x": jnp.array(0.0), "name": "a"})

    def step(ref, x):
        ref.value = {**ref.value, "x": ref.value["x"] + x}
        return ref, None

    rx.scan(step, ref, jnp.ones(4))
    assert ref.value["x"] == 4.0 and ref.value["name"] == "a"


def test_no_second_trace_for_an_equal_structure(trace_counter: Any):
    @trace_counter
    def step(carry, layer):
        return layer(carry), None

    def run(layers):
        return rx.scan(step, jnp.ones(3), layers, in_axes=STACKED)

    layers = make_layers()
    run(layers)
    assert step.counter.count == 1
    run(layers)
    run(make_layers())  # a new model of equal shapes
    assert step.counter.count == 1
    run(make_layers(5))
    assert step.counter.count == 2


def test_another_sharing_is_another_program(trace_counter: Any):
    @trace_counter
    def step(carry, refs):
        a, b = refs
        a.value += 1
        return carry, b.value

    a, b = rx.Ref(jnp.zeros(2)), rx.Ref(jnp.zeros(2))
    assert rx.scan(step, None, (a, b))[1].tolist() == [0.0, 0.0]
    assert rx.scan(step, None, (a, a))[1].tolist() == [2.0, 2.0]
    assert step.counter.count == 2


def test_no_second_trace_under_an_eager_grad(trace_counter: Any):
    @trace_counter
    def step(carry, x):
        return carry * x, None

    grad = rx.filter_grad(lambda x: rx.scan(step, jnp.ones(()), x)[0])
    for _ in range(3):
        assert grad(jnp.array([2.0, 3.0])).tolist() == [3.0, 2.0]
    assert step.counter.count == 1


def test_a_partial_is_opened(trace_counter: Any):
    @trace_counter
    def step(w, carry, x):
        return carry * w, None

    for w in [2.0, 3.0]:
        f = functools.partial(step, jnp.array(w))
        assert rx.scan(f, jnp.array(1.0), length=2)[0] == w**2
    assert step.counter.count == 1


def test_nested_in_itself_and_in_every_transform():
    ref = rx.Ref(jnp.array(0), "counts")

    def inner(carry, x):
        ref.value += 1
        return carry * 2.0, None

    def outer(carry, x):
        return rx.scan(inner, carry, length=3)[0], None

    def f(x):
        return rx.scan(outer, x, length=2)[0]

    assert rx.filter_jit(f)(jnp.array(1.0)) == 64.0
    assert ref.value == 6
    assert rx.filter_grad(f)(jnp.array(1.0)) == 64.0
    assert ref.value == 12
    assert rx.filter_vmap(f)(jnp.ones(2)).tolist() == [64.0, 64.0]
    assert ref.value == 18


def test_a_collective_inside_of_a_step_under_vmap():
    def f(x):
        zero = jnp.zeros(())
        return rx.scan(lambda c, _: (c + jax.lax.psum(x, "i"), None), zero, length=2)[0]

    out = rx.filter_vmap(f, axis_name="i")(jnp.array([1.0, 2.0]))
    assert out.tolist() == [6.0, 6.0]


@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs 4 devices")
def test_inside_of_shard_map_slices_vary_over_the_mesh():
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("d",), axis_types=auto)
    spec = jax.sharding.PartitionSpec("d")

    def sums(xs):
        return rx.scan(lambda c, x: (c + x, c + x), jnp.zeros_like(xs[0]), xs)[1]

    sharded = jax.shard_map(sums, mesh=mesh, in_specs=spec, out_specs=spec)
    assert sharded(jnp.arange(8.0)).tolist() == [0.0, 1, 2, 5, 4, 9, 6, 13]


def test_a_failed_step_changes_nothing():
    ref = rx.Ref(jnp.array(0))

    def step(ref, x):
        ref.value += 1
        raise RuntimeError("no")

    with raises(RuntimeError, match="no"):
        rx.scan(step, ref, length=2)
    assert ref.value == 0


def test_a_failed_check_in_a_step_changes_nothing():
    with jax.check_tracer_leaks(False):
        ref = rx.Ref(jnp.array(0))

        def step(ref, x):
            ref.value += 1
            return ref, eqx.error_if(x, x > 1, "too large")

        with raises(eqx.EquinoxRuntimeError, match="too large"):
            rx.scan(step, ref, jnp.arange(3))
        assert ref.value == 0
        rx.scan(step, ref, jnp.arange(2))
        assert ref.value == 2


def test_zero_steps():
    ref = rx.Ref(jnp.array(1))
    out, ys = rx.scan(count_up, ref, jnp.zeros((0, 2)))
    assert out is ref and ref.value == 1 and ys.shape == (0, 2)


def test_with_jit_disabled_it_gives_the_same():
    ref = rx.Ref(jnp.array(0))
    with jax.disable_jit():
        _, ys = rx.scan(count_up, ref, jnp.arange(3.0))
    assert ref.value == 3 and ys.tolist() == [0.0, 1.0, 2.0]


def test_a_ref_that_changes_shape_is_refused():
    ref = rx.Ref(jnp.zeros(2), "state")

    def step(ref, n):
        ref.value = jnp.concatenate([ref.value, jnp.zeros(1)])
        return ref, None

    with raises(rx.StructureError, match="collection 'state'") as info:
        rx.scan(step, ref, length=3)
    assert "f32[2] before the step, and f32[3] after it" in message_of(info.value)
    assert ref.shape == (2,)


def test_a_ref_that_changes_dtype_is_refused_and_the_remedies_run():
    ref = rx.Ref(jnp.array(0, jnp.int32), "counts")

    def step(ref, x):
        ref.value = ref.value.astype(jnp.float32) + x
        return ref, None

    with raises(rx.StructureError, match=r"i32\[\] before the step, and f32\[\]"):
        rx.scan(step, ref, jnp.ones(3))

    def fixed(ref, x):
        ref.value += x.astype(ref.dtype)
        return ref, None

    rx.scan(fixed, ref, jnp.ones(3))
    assert ref.value == 3
    ref.value = ref.value.astype(jnp.float32)
    rx.scan(step, ref, jnp.ones(3))
    assert ref.value == 6.0


def test_a_ref_whose_static_part_changes_is_refused():
    ref = rx.Ref({"x": jnp.array(0.0), "name": "a"}, "state")

    def step(ref, _):
        ref.value = {**ref.value, "name": ref.value["name"] + "b"}
        return ref, None

    with raises(rx.StructureError, match="'state'.*structure of its value"):
        rx.scan(step, ref, length=2)


def test_an_array_of_the_carry_that_changes_shape_is_refused():
    def step(carry, _):
        return {"a": carry["a"], "b": jnp.ones(3)}, None

    with raises(rx.StructureError, match=r"carry at `b`.*f32\[2\] before"):
        rx.scan(step, {"a": 1.0, "b": jnp.ones(2)}, length=2)


@pytest.mark.parametrize(
    "init, new, message",
    [
        (1.0, (1.0, 2.0), r"was given weak_f32\[\] and returned \(.*\)"),
        ({"a": "x"}, {"a": "y"}, r"`a`.*'x'.*'y'.*asarray"),
        (("x",), (1.0,), "the static value 'x', but returned an array"),
    ],
)
def test_a_carry_of_another_structure_is_refused(init, new, message):
    with raises(rx.StructureError, match=message):
        rx.scan(lambda carry, _: (new, None), init, length=2)


def test_another_ref_in_the_carry_is_refused():
    a, b = rx.Ref(jnp.array(0.0), "a"), rx.Ref(jnp.array(1.0), "b")
    with raises(rx.StructureError, match=r"`x`.*'a'.*'b'.*from `y`"):
        rx.scan(
            lambda c, _: ({"x": c["y"], "y": c["x"]}, None), {"x": a, "y": b}, length=2
        )
    with raises(rx.StructureError, match="own refs, each at its place"):
        rx.scan(lambda c, _: (rx.Ref(c.value, "a"), None), a, length=2)


def test_a_step_may_return_its_pair_as_a_list():
    step: Any = lambda carry, x: [carry + x, x]
    total, xs = rx.scan(step, 0.0, jnp.arange(3.0))
    assert total == 3.0 and xs.tolist() == [0.0, 1.0, 2.0]


def test_a_step_that_does_not_return_a_pair_is_refused():
    with raises(TypeError, match=r"must return a pair `\(carry, y\)`"):
        step: Any = lambda carry, x: carry
        rx.scan(step, jnp.zeros(2), length=2)


def test_one_ref_both_sliced_and_carried_is_refused():
    ref = rx.Ref(jnp.zeros(3), "state")
    with raises(rx.StructureError, match="'state'.*two axes"):
        rx.scan(lambda c, x: (c, None), ref, ref)
    with raises(rx.StructureError, match="None in the carry.* in `xs`"):
        rx.scan(lambda c, x: (c, None), {"a": ref}, ref)


def test_the_number_of_steps_must_be_known_and_agree():
    with raises(ValueError, match="or give `length`"):
        rx.scan(lambda c, x: (c, None), 0.0)
    with raises(ValueError, match=r"length=4.*size 3.*Leave out `length`"):
        rx.scan(lambda c, x: (c, None), 0.0, jnp.zeros(3), length=4)
    with raises(rx.StructureError, match="different sizes: 3 of an array, and 2"):
        rx.scan(lambda c, x: (c, None), 0.0, (jnp.zeros(3), jnp.zeros(2)))


A_GLOBAL = rx.Ref(jnp.array(0.0), "globals")


def test_a_global_ref_is_refused():
    with raises(rx.TraceLevelError, match="body of `scan`.*global name"):
        rx.scan(lambda c, x: (c + A_GLOBAL.value, None), 0.0, length=2)


def test_a_function_in_the_carry_keeps_its_refs():
    ref = rx.Ref(jnp.zeros(()), "state")

    def add(x):
        ref.value += x
        return ref.value

    carry, ys = rx.scan(lambda c, x: (c, c["f"](x)), {"f": add}, jnp.ones(3))
    assert ys.tolist() == [1.0, 2.0, 3.0]
    carry["f"](1.0)  # it closes over the caller's own ref again
    assert ref.value == 4.0


# map


def test_map_without_refs_is_jax_lax_map():
    xs = {"a": jnp.arange(5.0), "b": jnp.ones((5, 2))}
    f = lambda x: (x["a"] * x["b"], 1)
    for batch_size in [None, 1, 2, 5, 9]:
        ours = rx.map(f, xs, batch_size=batch_size)
        assert eqx.tree_equal(ours, jax.lax.map(f, xs))


@pytest.mark.parametrize("batch_size", [None, 2, 5, 9])
def test_map_slices_refs_and_returns_new_ones(batch_size):
    counts = rx.Ref(jnp.zeros((2, 5)), "counts")

    def f(x):
        counts, x = x
        counts.value += x
        return rx.Ref(2 * x, "made")

    out = rx.map(f, (counts, jnp.arange(5.0)), batch_size=batch_size, in_axes=(1, 0))
    assert out.collection == "made" and out.value.tolist() == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert counts.value.tolist() == [[0.0, 1.0, 2.0, 3.0, 4.0]] * 2


def test_map_carries_what_it_does_not_slice():
    ref = rx.Ref(jnp.array(0.0))

    def f(x):
        ref.value += x
        return ref.value

    assert rx.map(f, jnp.ones(3)).tolist() == [1.0, 2.0, 3.0]
    assert ref.value == 3.0


def test_map_in_batches_counts_batches_and_refuses_a_write_by_element(
    trace_counter: Any,
):
    ref = rx.Ref(jnp.array(0), "counts")

    @trace_counter
    def f(x):
        ref.value += 1
        return x

    rx.map(f, jnp.arange(5), batch_size=2)
    assert ref.value == 3  # two batches, and the rest
    n = f.counter.count
    rx.map(f, jnp.arange(5), batch_size=2)
    assert f.counter.count == n

    def by_element(x):
        ref.value += x
        return x

    with raises(rx.StructureError, match="'counts'.*broadcast by `map`"):
        rx.map(by_element, jnp.arange(4), batch_size=2)


def test_map_does_not_trace_again(trace_counter: Any):
    @trace_counter
    def f(x):
        return x.value

    for _ in range(2):
        rx.map(f, rx.Ref(jnp.arange(3.0)))
    assert f.counter.count == 1


# associative_scan


def test_associative_scan_without_refs_is_jaxs():
    elems = jnp.arange(6.0).reshape(3, 2), jnp.ones((3, 2))
    f = lambda a, b: (a[0] + b[0], a[1] * b[1])
    for options in [{}, {"reverse": True}, {"axis": 1}, {"axis": -1}]:
        ours = rx.associative_scan(f, elems, **options)
        assert eqx.tree_equal(ours, jax.lax.associative_scan(f, elems, **options))
    # JAX itself takes the second of these only.
    ours = rx.associative_scan(f, elems, reverse=True, axis=-1)
    theirs = jax.lax.associative_scan(f, elems, reverse=True, axis=1)
    assert eqx.tree_equal(ours, theirs)
    one = jax.tree.map(lambda x: x[:1], elems)
    assert eqx.tree_equal(rx.associative_scan(f, one), one)


def test_associative_scan_reads_refs_and_gradients_flow_to_them():
    def f(w, x):
        return rx.associative_scan(lambda a, b: a + b + 0 * w.value, x)[-1] * w.value

    w = rx.Ref(jnp.array(2.0), "params")
    assert rx.filter_grad(f)(w, jnp.ones(3)).value == 3.0


def test_associative_scan_refuses_writes_and_refs_as_elements():
    ref = rx.Ref(jnp.ones(3), "state")

    def f(a, b):
        ref.value = ref.value * 2
        return a + b

    with raises(rx.StructureError, match="writes.*'state'.*unspecified"):
        rx.associative_scan(f, jnp.ones(3))
    elems = {"x": ref}
    with raises(rx.StructureError, match=r"'state'.*`x`.*snapshot"):
        rx.associative_scan(lambda a, b: a, elems)
    add = lambda a, b: {"x": a["x"] + b["x"]}
    assert rx.associative_scan(add, rx.snapshot(elems))["x"].tolist() == [1.0, 2.0, 3.0]


def test_associative_scan_does_not_trace_again(trace_counter: Any):
    @trace_counter
    def f(a, b):
        return a + b

    rx.associative_scan(f, jnp.ones(4))
    n = f.counter.count
    rx.associative_scan(f, jnp.zeros(4))
    assert f.counter.count == n


def test_a_static_leaf_of_the_carry_may_be_another_object_that_is_equal():
    def step(carry, x):
        name = "".join(["re", "lu"])  # a new text at each step
        assert name is not carry["name"]
        return {"name": name, "sum": carry["sum"] + x}, None

    carry, _ = rx.scan(step, {"name": "relu", "sum": jnp.array(0.0)}, jnp.ones(3))
    assert carry["name"] == "relu" and carry["sum"] == 3.0
