"""`filter_shard_map`: each device runs the function on its parts, in refs and outside them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from beartype import beartype
from jax import P
from jax.sharding import AxisType, NamedSharding
from jaxtyping import Array, Float, jaxtyped
from raising import raises

import refx_eqx as rx


if len(jax.devices()) < 4:
    pytest.skip("needs 4 devices", allow_module_level=True)


def mesh_of(*sizes, kind=AxisType.Auto):
    names = ("data", "tensor")[: len(sizes)]
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(sizes))


MESH = mesh_of(4)


class Linear(rx.Module):
    weight: rx.Param[Float[Array, "out in"]]
    bias: rx.Param[Float[Array, "out"]]

    def __init__(self, n_in, n_out, key):
        self.weight = jr.normal(key, (n_out, n_in))
        self.bias = jnp.zeros(n_out)

    def __call__(self, x):
        return self.weight[...] @ x + self.bias[...]


def double(model):
    model["w"].value = model["w"].value * 2.0


def run(
    fn: Any,
    *args: Any,
    in_specs: Any,
    out_specs: Any = P(),
    mesh: Any = MESH,
    **options: Any,
) -> Any:
    sharded = rx.filter_shard_map(
        fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **options
    )
    return sharded(*args)


@pytest.mark.parametrize("jit", [False, True])
def test_a_ref_goes_out_by_the_spec_that_it_came_in_by(jit):
    model = {
        "w": rx.Ref(jnp.arange(8.0), "params"),
        "n": rx.Ref(jnp.array(0), "counts"),
    }
    seen = []

    def step(model, x):
        seen.append((model["w"].shape, x.shape))
        model["w"].value = model["w"].value + x
        model["n"].value += 1
        return x * 2.0

    sharded = rx.filter_shard_map(
        step,
        mesh=MESH,
        in_specs=(rx.specs(params=P("data"), counts=P()), P("data")),
        out_specs=P("data"),
    )
    sharded = rx.filter_jit(sharded) if jit else sharded
    out = sharded(model, jnp.ones(8))
    assert set(seen) == {((2,), (2,))}
    assert out.tolist() == [2.0] * 8
    assert model["w"].value.tolist() == [x + 1.0 for x in range(8)]
    assert model["w"].value.sharding == NamedSharding(MESH, P("data"))
    assert model["n"].value == 1


@pytest.mark.parametrize(
    "spec",
    [
        P("data"),
        NamedSharding(MESH, P("data")),
        {"w": P("data")},
        rx.specs(params=P("data")),
        rx.specs(default=P("data")),
        rx.specs({rx.path("w"): P("data")}),
        "derefed",
        "derefed shardings",
    ],
    ids=str,
)
def test_specs_may_be_given_in_any_of_these_forms(spec):
    model = {"w": rx.Ref(jnp.arange(8.0), "params")}
    if isinstance(spec, str):
        one = P("data") if spec == "derefed" else NamedSharding(MESH, P("data"))
        spec = jax.tree.map(lambda _: one, rx.deref(model))
    shapes = []

    def step(model):
        shapes.append(model["w"].shape)
        double(model)

    run(step, model, in_specs=(spec,))
    assert shapes == [(2,)] and model["w"].value[7] == 14.0


def test_a_tree_of_the_derefed_form_says_each_spec_of_a_ref_once():
    shared = rx.Ref(jnp.arange(8.0), "params")
    pair = rx.Ref({"a": jnp.arange(4.0), "b": jnp.ones(3)}, "params")
    model = {"first": shared, "second": shared, "pair": pair}
    specs = jax.tree.map(
        lambda x: P("data") if x.shape[0] > 3 else P(), rx.deref(model)
    )
    shapes = []

    def step(model):
        shapes.append((model["second"].shape, model["pair"].value["a"].shape))
        model["pair"].value = {**model["pair"].value, "a": -model["pair"].value["a"]}

    run(step, model, in_specs=(specs,))
    assert shapes == [((2,), (1,))]
    assert pair.value["a"].tolist() == [0.0, -1.0, -2.0, -3.0]


def test_two_arguments_that_share_a_ref_may_each_have_a_tree_of_specs():
    model = Linear(3, 8, jr.key(0))
    optimizer = rx.Optimizer(model, optax.sgd(0.1, momentum=0.9))
    rules = rx.axis_rules(out="data")
    args = (model, {"same": model.bias, "optimizer": optimizer})
    shapes = []

    def step(model, rest):
        slots = filter(rx.is_ref, jax.tree.leaves(rest["optimizer"]))
        shapes.append((rest["same"].shape, sorted(ref.shape for ref in slots)))
        rest["same"].value += 1.0

    run(step, *args, in_specs=tuple(map(rules.specs, args)))
    run(step, *args, in_specs=rules.specs(args))
    assert (
        shapes == [((2,), [(2,), (2, 3)])] * 2
        and model.bias.value.tolist() == [2.0] * 8
    )


def test_the_rules_for_axis_names_give_specs_too():
    model = Linear(3, 8, jr.key(0))
    shapes = []

    def step(model):
        shapes.append((model.weight.shape, model.bias.shape))
        model.bias.value += 1.0

    run(step, model, in_specs=(rx.axis_rules(out="data"),))
    assert shapes == [((2, 3), (2,))] and model.bias.value.tolist() == [1.0] * 8


def test_rules_in_out_specs_are_refused_with_those_of_a_tree_as_the_remedy():
    rules = rx.axis_rules(out="data")

    def make(key):
        return Linear(3, 2, jr.fold_in(key, jax.lax.axis_index("data")))

    with raises(ValueError, match=r"`out_specs` has .*rules.specs\(model\)"):
        run(make, jr.key(0), in_specs=P(), out_specs=rules)
    of_whole = rules.specs(rx.filter_eval_shape(Linear, 3, 8, jr.key(0)))
    model = run(make, jr.key(0), in_specs=P(), out_specs=of_whole)
    assert model.weight.shape == (8, 3)
    assert model.weight.value.sharding.spec == P("data")


def test_gradients_go_out_by_the_specs_of_their_model():
    rules, model = rx.axis_rules(out="data"), Linear(3, 8, jr.key(0))
    grad = rx.filter_grad(lambda model: jnp.sum(model.bias.value**2), wrt="params")
    grads = run(grad, model, in_specs=rules, out_specs=rules.specs(model))
    assert grads.bias.value.tolist() == (2 * model.bias.value).tolist()


def test_what_functions_close_over_is_replicated_unless_an_argument_or_specs_say_more():
    ref = rx.Ref(jnp.arange(8.0), "params")
    shapes = []

    def step(*_):
        shapes.append(ref.shape)

    run(step, in_specs=())
    run(step, ref, in_specs=(P("data"),))
    run(step, in_specs=rx.specs(params=P("data")))
    assert shapes == [(8,), (2,), (2,)]


def test_statistics_are_averaged_into_a_replicated_ref():
    mean = rx.Ref(jnp.array(0.0), "batch_stats")

    def normalize(mean, x):
        mean.value = jax.lax.pmean(jnp.mean(x), "data")
        return x - mean.value

    out = run(
        normalize, mean, jnp.arange(8.0), in_specs=(P(), P("data")), out_specs=P("data")
    )
    assert mean.value == 3.5 and out[0] == -3.5


def test_a_replicated_ref_that_differs_between_shards_is_refused_with_both_remedies():
    mean = rx.Ref(jnp.array(0.0), "batch_stats")

    def write(mean, x):
        mean.value = jnp.mean(x)

    options = {"in_specs": (P(), P("data"))}
    message = (
        r"\(collection 'batch_stats'\) is replicated in `filter_shard_map`.*differs along "
        r"the mesh axis 'data'.*jax.lax.pmean\(value, 'data'\).*"
        r"rx.specs\(batch_stats=P\('data'\), default=P\(\)\)"
    )
    for fn in (write, rx.filter_jit(write)):
        with raises(rx.CarryError, match=message):
            run(fn, mean, jnp.arange(8.0), **options)
    assert mean.value == 0.0

    def average(mean, x):
        mean.value = jax.lax.pmean(jnp.mean(x), "data")

    run(average, mean, jnp.arange(8.0), **options)
    assert mean.value == 3.5
    each = rx.Ref(jnp.zeros(4), "batch_stats")
    by_collection = rx.specs(batch_stats=P("data"), default=P())

    def write_each(mean, x):
        mean.value = jnp.mean(x, keepdims=True)

    run(write_each, each, jnp.arange(8.0), in_specs=(by_collection, P("data")))
    assert each.value.tolist() == [0.5, 2.5, 4.5, 6.5]


def test_without_check_vma_it_is_a_promise_of_the_caller():
    ref = rx.Ref(jnp.array(0.0))

    def write(ref, x):
        ref.value = x[0]

    run(write, ref, jnp.arange(4.0), in_specs=(P(), P("data")), check_vma=False)
    assert ref.value == 0.0


def test_a_result_that_differs_names_its_remedy():
    for out_specs, error in [(P(), "pmean"), (P(None, "data"), "too many entries")]:
        with raises(rx.MismatchError, match=rf"(?s)float32\[1\].*{error}"):
            run(lambda x: x, jnp.ones(4), in_specs=P("data"), out_specs=out_specs)
    mean = lambda x: jax.lax.pmean(x, "data")
    assert run(mean, jnp.arange(4.0), in_specs=P("data")).tolist() == [1.5]


def test_a_part_of_a_declared_type_is_read_and_written():
    model = Linear(3, 8, jr.key(0))
    shapes = []

    def step(model, x):
        shapes.append(model.weight.shape)
        model.weight.value -= 0.5
        model.bias.value = model.bias.value + model(x)

    specs = rx.specs(params=P("data"))
    whole = model.weight.value
    run(step, model, jnp.ones(3), in_specs=(specs, P()))
    assert shapes == [(2, 3)]
    np.testing.assert_allclose(model.weight.value, whole - 0.5)
    np.testing.assert_allclose(model.bias.value, model.weight.value.sum(1), rtol=1e-5)

    def widen(model):
        model.weight.value = jnp.concatenate([model.weight.value] * 2)

    with raises(rx.RefTypeError, match="must keep its shape"):
        run(widen, model, in_specs=(specs,))


class Scaled(rx.Module):
    by: rx.Param[Float[Array, "n"]]

    @jaxtyped(typechecker=beartype)
    def __call__(self, x: Float[Array, "n"]) -> Float[Array, "n"]:
        return self.by.value * x


def test_the_names_of_a_part_are_free_in_the_methods_of_its_module():
    model = Scaled(jnp.arange(8.0))
    out = run(
        lambda model, x: model(x),
        *(model, jnp.ones(8)),
        in_specs=P("data"),
        out_specs=P("data"),
    )
    assert out.tolist() == model.by.value.tolist()
    with pytest.raises(TypeError):
        model(jnp.ones(2))


def test_refs_that_are_made_inside_go_out_by_the_specs_of_the_result():
    def make(x):
        return {"w": rx.Ref(x * 2.0, "params"), "n": rx.Ref(jnp.array(1), "counts")}

    made = run(
        make,
        jnp.arange(8.0),
        in_specs=P("data"),
        out_specs=rx.specs(params=P("data"), counts=P()),
    )
    assert made["w"].value.tolist() == [2.0 * x for x in range(8)]
    assert made["w"].collection == "params" and made["n"].value == 1


def test_a_module_that_is_made_inside_has_the_sizes_of_the_whole():
    def make(key):
        return Linear(3, 2, jr.fold_in(key, jax.lax.axis_index("data")))

    model = run(make, jr.key(0), in_specs=P(), out_specs=P("data"))
    assert model.weight.shape == (8, 3)
    assert model(jnp.ones(3)).shape == (8,)
    model.bias.value = jnp.arange(8.0)
    rx.update_refs(model, rx.deref(model))
    with raises(rx.RefTypeError, match="out=8"):
        model.bias.value = jnp.ones(2)


def test_a_stack_that_is_made_inside_has_the_sizes_of_the_whole():
    def make(keys):
        return rx.filter_vmap(lambda key: Linear(3, 2, key))(keys)

    keys, spec = jr.split(jr.key(0), 5), P(None, "data")
    stack = run(make, keys, in_specs=P(), out_specs=spec)
    assert stack.weight.shape == (5, 8, 3) and stack.bias.shape == (5, 8)
    batched: Any = rx.Batched[Linear, "5"]
    assert isinstance(stack, batched)
    stack.bias.value = jnp.ones((5, 8))
    with raises(
        rx.RefTypeError, match=r"`Linear.bias`.*the sizes of the stack are \(4,\)"
    ):
        stack.bias.value = jnp.ones((4, 8))


def test_a_ref_of_the_caller_that_is_returned_is_the_callers_own():
    ref = rx.Ref(jnp.arange(4.0), "params")
    assert run(lambda r: r, ref, in_specs=P("data"), out_specs=P("data")) is ref


def masks(rngs, x):
    return jr.bernoulli(rngs.dropout(), 0.5, x.shape)


@pytest.mark.parametrize("jit", [False, True])
def test_randomness_is_split_by_shard_unless_it_is_named(jit):
    def draw(in_specs, rngs):
        fn = rx.filter_shard_map(
            masks, mesh=MESH, in_specs=in_specs, out_specs=P("data")
        )
        fn = rx.filter_jit(fn) if jit else fn
        return np.split(np.asarray(fn(rngs, jnp.ones(4 * 32))), 4)

    rngs = rx.Rngs(0)
    first = draw((P(), P("data")), rngs)
    assert len({x.tobytes() for x in first}) == 4
    assert rngs.dropout.count.value == 1
    again = draw((P(), P("data")), rngs)
    assert len({x.tobytes() for x in [*first, *again]}) == 8
    np.testing.assert_array_equal(first, draw((P(), P("data")), rx.Rngs(0)))
    for same in (rx.specs(rng=P()), rx.specs(rng=None)):
        one = draw((same, P("data")), rx.Rngs(0))
        assert len({x.tobytes() for x in one}) == 1


def test_randomness_may_differ_along_one_mesh_axis_alone():
    mesh = mesh_of(2, 2)
    for key in (0, jr.key(0)):
        out = run(
            masks,
            rx.Rngs(dropout=key),
            jnp.ones((2, 64)),
            in_specs=(rx.specs(rng=P("data")), P("data")),
            out_specs=P("data"),
            mesh=mesh,
        )
        assert out[0].tolist() != out[1].tolist()


def test_a_stack_of_keys_is_split_as_any_array():
    keys = rx.Ref(jr.split(jr.key(0), 4), "rng")
    out = run(
        lambda keys: jr.key_data(keys.value),
        keys,
        in_specs=P("data"),
        out_specs=P("data"),
    )
    np.testing.assert_array_equal(out, jr.key_data(keys.value))


@pytest.mark.parametrize(
    "key", [jr.key(0), jr.key_data(jr.key(0))], ids=["typed", "raw"]
)
def test_a_key_that_is_written_is_that_of_the_first_shard(key):
    ref = rx.Ref(key, "rng")
    seen = []

    def advance(ref):
        key = ref.value
        is_raw = not jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        new = jr.split(jr.wrap_key_data(key) if is_raw else key)[0]
        ref.value = jr.key_data(new) if is_raw else new
        data = jr.key_data(new)
        return data[None]

    seen = run(advance, ref, in_specs=P(), out_specs=P("data"))
    data = ref.value if ref.value.dtype == jnp.uint32 else jr.key_data(ref.value)
    np.testing.assert_array_equal(data, seen[0])


def test_a_python_number_in_a_ref_is_carried():
    ref = rx.Ref(1, "counts")

    def count(ref):
        ref.value += 1

    run(count, ref, in_specs=P())
    assert ref.value == 2


def loss(model, x):
    return jnp.mean(jax.vmap(model)(x) ** 2)


def test_a_gradient_inside_is_that_of_the_whole_batch():
    model, x = Linear(3, 2, jr.key(0)), jr.normal(jr.key(1), (8, 3))
    expected = rx.filter_grad(loss)(model, x)

    @rx.filter_jit
    @functools.partial(
        rx.filter_shard_map, mesh=MESH, in_specs=(P(), P("data")), out_specs=P()
    )
    def step(model, x):
        mean = lambda model, x: jax.lax.pmean(loss(model, x), "data")
        grads = rx.filter_grad(mean)(model, x)
        rx.apply_updates(model, jax.tree.map(lambda g: -g, grads))
        return grads.weight.value

    before = model.weight.value
    grad = step(model, x)
    np.testing.assert_allclose(grad, expected.weight.value, rtol=1e-5)
    np.testing.assert_allclose(model.weight.value, before - grad, rtol=1e-5)


def test_a_gradient_outside_is_that_of_the_whole_batch():
    model, x = Linear(3, 2, jr.key(0)), jr.normal(jr.key(1), (8, 3))
    counts = rx.Ref(jnp.array(0.0), "counts")

    def of_part(model, counts, x):
        counts.value += jax.lax.psum(1.0, "data")
        return jax.lax.pmean(loss(model, x), "data")

    sharded = rx.filter_shard_map(
        of_part, mesh=MESH, in_specs=(P(), P(), P("data")), out_specs=P()
    )
    # JAX (0.10 to 0.12) takes its own tracers for leaked ones in `jit(grad(shard_map(f)))`.
    with jax.check_tracer_leaks(False):
        grads = rx.filter_jit(rx.filter_grad(sharded))(model, counts, x)
    expected = rx.filter_grad(loss)(model, x)
    np.testing.assert_allclose(grads.weight.value, expected.weight.value, rtol=1e-5)
    assert counts.value == 4.0


@rx.filter_custom_vjp
def noting(x, seen):
    return x


noting.def_fwd(lambda perturbed, x, seen: (x, None))


@noting.def_bwd
def _(residuals, grad, perturbed, x, seen):
    seen.value = jnp.maximum(seen.value, jnp.abs(grad))
    return grad


@pytest.mark.parametrize("is_split", [True, False])
def test_a_backward_rule_writes_a_ref_that_is_split(is_split):
    seen = rx.Ref(jnp.zeros(4), "amax")
    weights = jnp.array([1.0, -2.0, 3.0, -4.0])

    def of_part(x, seen, weights):
        return jax.lax.psum(jnp.sum(noting(x, seen) * weights), "data")

    spec = P("data")
    sharded = rx.filter_shard_map(
        of_part, mesh=MESH, in_specs=(spec, spec, spec), out_specs=P()
    )
    if is_split:
        grad = rx.filter_grad(sharded)(jnp.ones(4), seen, weights)
        assert grad.tolist() == weights.tolist()
        assert seen.value.tolist() == [1.0, 2.0, 3.0, 4.0]
        return
    whole = rx.Ref(jnp.zeros(1), "amax")
    sharded = rx.filter_shard_map(
        of_part, mesh=MESH, in_specs=(spec, P(), spec), out_specs=P()
    )
    with raises(rx.CarryError, match=r"'amax'\) out of a backward rule"):
        rx.filter_grad(sharded)(jnp.ones(4), whole, weights)
    assert whole.value == 0.0


def test_a_scan_inside_carries_what_differs_between_shards():
    total = rx.Ref(jnp.zeros(4), "sums")
    one = rx.Ref(jnp.array(0.0), "sums")

    def step(total, one, xs):
        def add(carry, x):
            total.value += x
            one.value += jnp.sum(x)  # from here on it differs between shards
            return carry + jnp.sum(x), None

        carry, _ = rx.scan(add, jnp.array(0.0), xs)
        one.value = jax.lax.psum(one.value, "data")
        return carry[None]

    xs = jnp.arange(12.0).reshape(3, 4)
    fn = rx.filter_jit(
        rx.filter_shard_map(
            step,
            mesh=MESH,
            in_specs=(P("data"), P(), P(None, "data")),
            out_specs=P("data"),
        )
    )
    assert fn(total, one, xs).tolist() == xs.sum(0).tolist()
    assert total.value.tolist() == xs.sum(0).tolist() and one.value == xs.sum()


def test_a_branch_inside_may_write_what_differs_between_shards():
    each = rx.Ref(jnp.arange(4.0), "params")
    one = rx.Ref(jnp.array(0.0), "sums")

    def step(each, one):
        def write(each):
            each.value = each.value * 2.0
            one.value = jnp.sum(each.value)

        rx.cond(jnp.sum(each.value) > 1.0, write, lambda each: None, each)
        one.value = jax.lax.psum(one.value, "data")

    run(step, each, one, in_specs=(P("data"), P()))
    assert each.value.tolist() == [0.0, 1.0, 4.0, 6.0] and one.value == 10.0


def test_a_function_is_compiled_once_for_what_it_wraps(trace_counter):
    ref = rx.Ref(jnp.arange(4.0), "params")
    counted = trace_counter(lambda ref: double({"w": ref}))
    sharded = rx.filter_jit(
        rx.filter_shard_map(counted, mesh=MESH, in_specs=P("data"), out_specs=P())
    )
    ref.value = jax.device_put(ref.value, NamedSharding(MESH, P("data")))
    sharded(ref)
    sharded(ref)
    assert counted.counter.count == 1 and ref.value.tolist() == [0.0, 4.0, 8.0, 12.0]
    sharded(rx.Ref(jnp.arange(8.0), "params"))
    assert counted.counter.count == 2


def test_the_mesh_may_be_that_of_the_context():
    ref = rx.Ref(jnp.arange(4.0), "params")
    sharded = rx.filter_shard_map(
        lambda ref: double({"w": ref}), in_specs=P("data"), out_specs=P()
    )
    with raises(ValueError, match=r"no mesh.*jax.set_mesh"):
        sharded(ref)
    with jax.set_mesh(MESH):
        sharded(ref)
    assert ref.value.tolist() == [0.0, 2.0, 4.0, 6.0]


def test_over_some_axes_the_compiler_still_decides():
    mesh = mesh_of(2, 2)
    ref = rx.Ref(jnp.arange(8.0).reshape(4, 2), "params")
    rx_specs = NamedSharding(mesh, P("data", "tensor"))
    ref.value = jax.device_put(ref.value, rx_specs)
    shapes = []

    def step(ref):
        shapes.append(ref.shape)
        double({"w": ref})

    @rx.filter_jit
    def outer(ref):
        run(step, ref, in_specs=rx_specs, mesh=mesh, axis_names={"data"})

    outer(ref)
    assert shapes == [(2, 2)] and ref.value[3, 1] == 14.0


def test_two_maps_may_be_nested_over_the_axes_of_one_mesh():
    mesh = mesh_of(2, 2)
    ref = rx.Ref(jnp.arange(8.0).reshape(4, 2), "params")

    def inner(ref):
        assert ref.shape == (2, 1)
        double({"w": ref})

    def outer(ref):
        rx.filter_shard_map(
            inner, in_specs=P(None, "tensor"), out_specs=P(), axis_names={"tensor"}
        )(ref)

    fn = rx.filter_jit(
        rx.filter_shard_map(
            outer, mesh=mesh, in_specs=P("data"), out_specs=P(), axis_names={"data"}
        )
    )
    with jax.set_mesh(mesh):
        fn(ref)
    assert ref.value.tolist() == (2.0 * jnp.arange(8.0).reshape(4, 2)).tolist()


@pytest.mark.parametrize(
    "in_specs, error, message",
    [
        (("data",), TypeError, "must consist of `jax.P`"),
        ((P("data"), P("data")), rx.MismatchError, "must be a prefix"),
        ((P(None, "data"),), rx.MismatchError, r"is for 2 axes"),
        ((P("other"),), rx.MismatchError, "names the mesh axis 'other'"),
        ((rx.specs(other=P()),), rx.StructureError, "does not give the spec of"),
    ],
)
def test_specs_that_do_not_fit_are_told_by_the_ref(in_specs, error, message):
    ref = rx.Ref(jnp.arange(8.0), "params")
    error = ValueError if error is TypeError else error
    with raises(error, match=message):
        run(lambda ref: None, ref, in_specs=in_specs)


def test_a_size_that_does_not_divide_is_told_by_the_ref():
    ref = rx.Ref(jnp.arange(6.0), "params")
    with raises(rx.MismatchError, match=r"'params'\) in `filter_shard_map`.*size 6"):
        run(lambda ref: None, ref, in_specs=P("data"))


def test_one_ref_with_two_specs_is_refused():
    ref = rx.Ref(jnp.arange(8.0), "params")
    message = (
        r"two specs: P\('data'\) in argument 0, P\(\) in argument 1.*"
        r"give argument 1 the same `in_specs`, `P\('data'\)`"
    )
    with raises(rx.MismatchError, match=message):
        run(lambda a, b: None, ref, ref, in_specs=(P("data"), P()))


def test_specs_that_are_none_are_refused_where_they_are_given():
    with raises(TypeError, match=r"a spec must be a `jax.P`.*'data'"):
        rx.specs(params="data")
    with raises(TypeError, match=r"as in `rx.specs\(\{'params': P\('data'\)\}\)`"):
        rx.specs(P("data"))  # pyright: ignore[reportArgumentType]
    with raises(TypeError, match=r"default='data'"):
        rx.specs(default="data")
    assert rx.specs(params=P()) == rx.specs(params=None) != rx.specs(params=P("data"))


def test_without_in_specs_the_axes_must_be_explicit():
    with raises(TypeError, match="no `in_specs`.*not explicit"):
        rx.filter_shard_map(lambda ref: None, mesh=MESH, out_specs=P())(rx.Ref(1.0))


def test_keywords_are_refused_as_in_jax():
    fn = rx.filter_shard_map(lambda ref: None, mesh=MESH, in_specs=P(), out_specs=P())
    with raises(TypeError, match="positional arguments only"):
        fn(ref=rx.Ref(1.0))


def test_axis_names_must_be_those_of_the_mesh():
    with raises(ValueError, match="has 'other', but the mesh has 'data'"):
        run(lambda x: x, jnp.ones(4), in_specs=P(), axis_names={"other"})


def test_options_alone_give_a_decorator():
    @rx.filter_shard_map(mesh=MESH, in_specs=P("data"), out_specs=P("data"))
    def halve(x):
        return x / 2

    assert halve(jnp.ones(4)).tolist() == [0.5] * 4


def test_a_part_that_is_written_keeps_its_rank():
    ref = rx.Ref(jnp.arange(4.0), "params")

    def total(ref):
        ref.value = jnp.sum(ref.value)

    with raises(rx.CarryError, match="'params'.* rank 0. Keep the rank"):
        run(total, ref, in_specs=P("data"))
    assert ref.value.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_value_of_another_structure_goes_out_by_the_one_spec_of_the_old():
    def swap(ref):
        ref.value = {"sum": ref.value["a"] + ref.value["b"]}

    def stats(specs):
        a, b = jnp.arange(4.0), jnp.ones(4)
        ref = rx.Ref({"a": a, "b": b}, "stats")
        node: Any = rx.deref(ref)
        return ref, (node.with_value(specs),)

    ref, specs = stats({"a": P("data"), "b": P("data")})
    run(swap, ref, in_specs=specs)
    assert ref.value["sum"].tolist() == [1.0, 2.0, 3.0, 4.0]
    ref, specs = stats({"a": P("data"), "b": P()})
    with raises(rx.CarryError, match="another structure.*Keep the structure, or"):
        run(lambda ref: setattr(ref, "value", ref.value["b"]), ref, in_specs=specs)
    assert ref.value["b"].shape == (4,)


def test_a_failed_call_changes_nothing():
    ref = rx.Ref(jnp.arange(4.0), "params")

    def fail(ref):
        ref.value = ref.value * 2.0
        raise KeyError("no")

    with pytest.raises(KeyError):
        run(fail, ref, in_specs=P("data"))
    assert ref.value.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_result_cannot_be_put_together_over_an_axis_that_there_is_not():
    with raises(rx.MismatchError, match="names the mesh axis 'other'"):
        run(lambda x: x, jnp.ones(4), in_specs=P("data"), out_specs=P("other"))


class Pair(rx.Module):
    both: rx.Param[Float[Array, "2"]]


def test_a_whole_that_breaks_the_declared_type_of_what_was_made_inside_is_refused():
    with raises(rx.RefTypeError, match=r"`Pair.both`.*cannot hold f32\[8\]"):
        run(Pair, jnp.arange(8.0), in_specs=P("data"), out_specs=P("data"))
    assert run(Pair, jnp.arange(2.0), in_specs=P(), out_specs=P()).both.shape == (2,)


def test_rules_by_collection_may_be_the_specs_of_a_result():
    specs = rx.specs(state=P(), default=P("data"))
    made = lambda x: (rx.Ref(jnp.zeros(()), "state"), x)
    ref, out = run(made, jnp.arange(4.0), in_specs=P("data"), out_specs=specs)
    assert ref.shape == () and out.tolist() == [0.0, 1.0, 2.0, 3.0]
    wrong = rx.specs(default=P("other"))
    with raises(rx.MismatchError, match="names the mesh axis 'other'"):
        run(lambda x: x, jnp.arange(4.0), in_specs=P("data"), out_specs=wrong)
