"""`rx.Optimizer`: Optax on a model of refs, compared with the same by hand."""

# A static checker objects to what is wrong on purpose here, or made at run time.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

import copy
import functools
import pickle
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jaxtyping import Array, Float
from raising import raises

import refx_eqx as rx


@pytest.fixture(autouse=True)
def _settings():
    # Optax relies on standard promotion. And under leak checks JAX keeps no traces, which
    # makes the many small operations of Optax slow.
    with jax.numpy_dtype_promotion("standard"), jax.check_tracer_leaks(False):
        yield


class Tied(rx.Module):
    """One weight at two places, another one, a scalar, and what is not trained."""

    first: rx.Param[Float[Array, "n n"]]
    bias: rx.Param[Float[Array, "n"]]
    again: rx.Param[Float[Array, "n n"]]
    mean: rx.BatchStat[Float[Array, "n"]]
    uses: rx.Ref[Array] = rx.field(collection="counts")
    activation: Any

    def __init__(self, n=3, *, key):
        k1, k2 = jr.split(key)
        self.first = jr.normal(k1, (n, n))
        self.bias = jr.normal(k2, (n,))
        self.again = self.first
        self.mean = jnp.full(n, 0.5)
        self.uses = jnp.array(0)
        self.activation = jnp.tanh

    def __call__(self, x):
        self.uses.value += 1
        x = self.activation(self.first[...] @ (x - self.mean[...]) + self.bias[...])
        return self.again[...] @ x


def by_hand(params, x):
    x = jnp.tanh(params["first"] @ (x - 0.5) + params["bias"])
    return params["first"] @ x


X = jnp.array([0.3, -1.0, 0.7])
Y = jnp.array([1.0, 0.0, -1.0])


def loss(model, x=X):
    return jnp.mean((model(x) - Y) ** 2)


def loss_by_hand(params, x=X):
    return jnp.mean((by_hand(params, x) - Y) ** 2)


def make():
    return Tied(key=jr.key(0))


def params_of(model):
    return rx.state_dict(model, "params")


def close(a, b):
    def same(x, y):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_allclose(x, y, rtol=2e-5)

    jax.tree.map(same, a, b)


def train(tx, n=5, extra=lambda value, grads: {}):
    model = make()
    optimizer = rx.Optimizer(model, tx)

    @rx.filter_jit(donate="refs")
    def step(model, optimizer):
        value, grads = rx.filter_value_and_grad(loss, wrt="params")(model)
        optimizer.update(model, grads, **extra(value, grads))
        return value

    return model, optimizer, [step(model, optimizer) for _ in range(n)]


def train_by_hand(tx, n=5, extra=lambda value, grads: {}):
    params = params_of(make())
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss_by_hand)(params)
        updates, state = tx.update(grads, state, params, **extra(value, grads))
        return optax.apply_updates(params, updates), state, value

    values = []
    for _ in range(n):
        params, state, value = step(params, state)
        values.append(value)
    return params, state, values


def value_of(value, grads):
    return {"value": value}


TRANSFORMATIONS = {
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "clipped by the global norm": optax.chain(
        optax.clip_by_global_norm(0.1), optax.adam(0.1)
    ),
    "a schedule": optax.adam(optax.cosine_decay_schedule(0.1, 5)),
    "several steps": optax.MultiSteps(optax.adam(0.1), 2),
    "a learning rate in the state": optax.inject_hyperparams(optax.adam)(0.1),
    "schedule-free": optax.contrib.schedule_free_adamw(0.1, warmup_steps=2),
    "a flag in the state": optax.optimistic_gradient_descent(0.1),
    "noise": optax.noisy_sgd(0.1, key=jr.key(1), eta=0.1),
    "a rule by label": optax.partition(
        {"a": optax.adam(0.1), "b": optax.sgd(0.01)}, {"first": "a", "bias": "b"}
    ),
    "a mask": optax.adamw(
        0.1, weight_decay=1.0, mask=lambda params: {k: k != "bias" for k in params}
    ),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_steps_equal_those_by_hand(name):
    tx = TRANSFORMATIONS[name]
    model, optimizer, values = train(tx)
    params, state, expected = train_by_hand(tx)
    close(values, expected)
    close(params_of(model), params)
    close(rx.snapshot(optimizer.opt_state), state)
    assert model.again is model.first


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau(patience=1)),
        optax.adam(0.1),  # has no use for it
        optax.MultiSteps(optax.contrib.momo(0.1), 1),
    ],
    ids=["reduce_on_plateau", "adam", "momo in several steps"],
)
def test_the_value_is_handed_to_the_transformation(tx):
    _, optimizer, values = train(tx, n=8, extra=value_of)
    by_hand = optax.with_extra_args_support(tx) if isinstance(tx, tuple) else tx
    _, state, expected = train_by_hand(by_hand, n=8, extra=value_of)
    close(values, expected)
    close(rx.snapshot(optimizer.opt_state), state)


LINE_SEARCHES = {
    "lbfgs": optax.lbfgs(),
    "lbfgs with backtracking": optax.lbfgs(
        linesearch=optax.scale_by_backtracking_linesearch(15, store_grad=True)
    ),
    "polyak": optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=9)
    ),
}


@pytest.mark.parametrize("name", LINE_SEARCHES)
def test_a_line_search_calls_a_function_of_the_model(name):
    tx = LINE_SEARCHES[name]
    model, _, values = train(
        tx, extra=lambda value, grad: {"value": value, "grad": grad, "value_fn": loss}
    )
    params, _, expected = train_by_hand(
        tx,
        extra=lambda value, grad: {
            "value": value,
            "grad": grad,
            "value_fn": loss_by_hand,
        },
    )
    close(values, expected)
    close(params_of(model), params)
    # What the loss writes in the search is dropped: a step is one call of the model.
    assert model.uses.value == 5


def test_a_line_search_takes_what_the_loss_closes_over():
    model = make()
    optimizer = rx.Optimizer(model, optax.lbfgs())

    @rx.filter_jit
    def step(model, optimizer, x):
        at_x = lambda model: loss(model, x)
        value, grad = rx.filter_value_and_grad(at_x, wrt="params")(model)
        optimizer.update(model, grad, value=value, grad=grad, value_fn=at_x)
        return value

    first = step(model, optimizer, X)
    for _ in range(10):
        last = step(model, optimizer, X)
    assert last < 1e-3 < first


def test_gradients_at_other_places_are_asked_of_the_model():
    tx = optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05), opaque_mode=True)
    grad_fn = lambda model, i: rx.filter_grad(loss, wrt="params")(model)
    model, _, values = train(tx, extra=lambda *_: {"grad_fn": grad_fn})
    by_hand_fn = lambda params, i: jax.grad(loss_by_hand)(params)
    params, _, expected = train_by_hand(tx, extra=lambda *_: {"grad_fn": by_hand_fn})
    close(values, expected)
    close(params_of(model), params)


def test_curvature_is_asked_of_the_model():
    tx = optax.contrib.sophia(0.1)
    model, _, values = train(tx, extra=lambda *_: {"obj_fn": loss})
    params, _, expected = train_by_hand(tx, extra=lambda *_: {"obj_fn": loss_by_hand})
    close(values, expected)
    close(params_of(model), params)


# What has a slot


def test_a_tied_weight_has_one_slot_by_its_first_name():
    optimizer = rx.Optimizer(make(), optax.adam(0.1))
    assert list(optimizer.opt_state[0].mu) == ["bias", "first"]
    assert list(rx.state_dict(optimizer)) == [
        "opt_state.0.count",
        "opt_state.0.mu.bias",
        "opt_state.0.mu.first",
        "opt_state.0.nu.bias",
        "opt_state.0.nu.first",
    ]
    slot = optimizer.opt_state[0].mu["first"]
    assert slot.collection == "opt_state"
    assert slot.name == "Optimizer.opt_state[0].mu['first']"


def test_a_tied_weight_counts_once_in_a_global_norm():
    model = make()
    grads = rx.filter_grad(loss, wrt="params")(model)
    updates = rx.Optimizer(model, optax.clip_by_global_norm(1.0)).update(model, grads)
    np.testing.assert_allclose(optax.tree.norm(updates), 1.0, rtol=1e-6)


def test_what_is_not_selected_stays_bitwise_the_same_under_weight_decay():
    model = make()
    mean, uses = model.mean.value, model.uses.value
    optimizer = rx.Optimizer(model, optax.adamw(0.1, weight_decay=0.5))
    grads = rx.filter_grad(lambda model: loss(rx.clone(model)))(model)  # of all floats
    assert grads.mean.value is not None
    optimizer.update(model, grads)
    assert model.mean.value is mean and model.uses.value is uses


def test_one_gradient_serves_two_optimizers():
    model = make()
    first = rx.Optimizer(model, optax.sgd(0.1), wrt=rx.path("first", "again"))
    bias = rx.Optimizer(model, optax.adam(0.1), wrt=rx.path("bias"))
    expected = make()
    both = rx.Optimizer(expected, optax.sgd(0.1))
    grads = rx.filter_grad(loss, wrt="params")(model)
    first.update(model, grads)
    assert (model.bias.value == expected.bias.value).all()
    bias.update(model, grads)
    both.update(expected, grads)
    close(model.first.value, expected.first.value)
    assert not jnp.allclose(model.bias.value, expected.bias.value)


def test_refs_that_hold_trees_numbers_and_what_is_not_trained():
    model = {
        "tree": rx.Ref({"w": jnp.ones(2), "n": jnp.array(3), "name": "relu"}, "params"),
        "number": rx.Ref(2.0, "params"),
        "count": rx.Ref(jnp.array(1), "params"),
    }
    optimizer = rx.Optimizer(model, optax.adam(0.1))
    assert len(jax.tree.leaves(optimizer.opt_state)) == 1 + 2 * 2

    def loss(model):
        tree = model["tree"].value
        return jnp.sum(tree["w"]) * tree["n"] + model["number"].value ** 2

    optimizer.update(model, rx.filter_grad(loss)(model))
    assert model["tree"].value["n"] == 3 and model["tree"].value["name"] == "relu"
    np.testing.assert_allclose(model["tree"].value["w"], [0.9, 0.9], rtol=1e-6)
    np.testing.assert_allclose(model["number"].value, 1.9, rtol=1e-6)
    assert model["count"].value == 1


def test_a_model_can_be_one_ref():
    ref = rx.Ref(jnp.array(1.0), "params")
    rx.Optimizer(ref, optax.sgd(0.5)).update(
        ref, rx.deref(rx.Ref(jnp.array(1.0), "params"))
    )
    assert ref.value == 0.5


def test_a_model_of_shapes_has_slots():
    shapes = rx.filter_eval_shape(make)
    optimizer = rx.Optimizer(shapes, optax.adam(0.1))
    expected = rx.Optimizer(make(), optax.adam(0.1))
    close(rx.state_dict(optimizer), rx.state_dict(expected))


def test_weights_keep_their_dtype():
    model = {"w": rx.Ref(jnp.ones(2, jnp.bfloat16), "params")}
    optimizer = rx.Optimizer(model, optax.adam(optax.constant_schedule(0.1)))
    optimizer.update(model, {"w": jnp.ones(2, jnp.float32)})
    assert model["w"].dtype == jnp.bfloat16


# Masks and labels


def test_a_mask_from_a_filter():
    model = make()
    mask = rx.param_mask(model, ~rx.path("bias"))
    assert mask == {"first": True, "bias": False}
    optimizer = rx.Optimizer(model, optax.masked(optax.sgd(0.1, momentum=0.9), mask))
    assert len(jax.tree.leaves(optimizer.opt_state)) == 1


def test_labels_from_filters():
    model = make()
    model = {"a": model, "b": rx.Ref(jnp.ones(2), "lora")}
    wrt = rx.collection("params", "lora")
    labels = rx.param_labels(
        model,
        {"lora": "lora", "weights": rx.path("a.first", "a.again"), "none": True},
        wrt=wrt,
    )
    assert labels == {"a.first": "weights", "a.bias": "none", "b": "lora"}
    tx = optax.partition(
        {
            "lora": optax.sgd(1.0),
            "weights": optax.sgd(0.1),
            "none": optax.set_to_zero(),
        },
        labels,
    )
    optimizer = rx.Optimizer(model, tx, wrt=wrt)
    before = rx.snapshot(model)
    grads = rx.filter_grad(lambda m: loss(m["a"]) + jnp.sum(m["b"].value), wrt=wrt)(
        model
    )
    optimizer.update(model, grads)
    assert (model["b"].value == 0).all()
    assert (model["a"].bias.value == before["a"].bias).all()
    close(model["a"].first.value, before["a"].first - 0.1 * grads["a"].first.value)


def test_a_ref_without_a_label_is_named():
    model = make()
    with raises(rx.StructureError, match="no filter selects `bias`, `Tied.bias`"):
        rx.param_labels(model, {"a": rx.path("first", "again")})
    rx.param_labels(model, {"a": rx.path("first", "again"), "rest": True})


def test_a_slot_is_selected_by_the_path_of_its_weight():
    model = {"encoder": [make()]}
    optimizer = rx.Optimizer(model, optax.adam(0.1))
    spec = rx.filter_spec(optimizer, rx.path("opt_state.0.*.encoder.**.bias"))
    selected = rx.get_partition(optimizer, rx.path("**.encoder.0.bias"))
    assert len([ref for ref in selected.values() if ref is not rx.NOTHING]) == 2
    assert spec.opt_state[0].mu == {"encoder.0.bias": True, "encoder.0.first": False}


# The state


def test_a_learning_rate_is_read_and_set_without_another_trace(trace_counter):
    model = make()
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    optimizer = rx.Optimizer(model, tx)
    counted = trace_counter(loss)

    @rx.filter_jit(donate="refs")
    def step(model, optimizer):
        optimizer.update(model, rx.filter_grad(counted, wrt="params")(model))

    step(model, optimizer)
    rate = optimizer.opt_state.hyperparams["learning_rate"]
    np.testing.assert_allclose(rate.value, 0.1)
    rate.value = 0.0
    before = model.bias.value + 0
    for _ in range(3):
        step(model, optimizer)
    assert (model.bias.value == before).all()
    assert counted.counter.count == 1
    with raises(rx.RefTypeError, match="hyperparams"):
        rate.value = "fast"


def test_optax_finds_and_maps_its_state():
    model = make()
    optimizer = rx.Optimizer(model, optax.adam(0.1))
    assert optax.tree.get(optimizer.opt_state, "count").value == 0
    zeros: Any = optax.tree_utils.tree_map_params(
        optimizer.tx, lambda ref: jnp.zeros(ref.shape), optimizer.opt_state
    )
    assert (zeros[0].mu["first"] == 0).all()


def test_schedule_free_parameters_to_evaluate_with():
    tx = optax.contrib.schedule_free_sgd(0.1)
    model, optimizer, _ = train(tx)
    averaged = rx.clone(model)
    averaged_params = optax.contrib.schedule_free_eval_params(
        rx.snapshot(optimizer.opt_state), rx.state_dict(model, optimizer.wrt)
    )
    rx.load_state_dict(averaged, averaged_params, optimizer.wrt)
    params, state, _ = train_by_hand(tx)
    close(params_of(averaged), optax.contrib.schedule_free_eval_params(state, params))


def test_pickled_and_copied_it_goes_on_as_it_was():
    model, optimizer, _ = train(optax.inject_hyperparams(optax.adam)(0.1))
    grads = rx.filter_grad(loss, wrt="params")(model)
    others = [
        copy.deepcopy((model, optimizer)),
        rx.clone((model, optimizer)),
    ]
    for other, its_optimizer in others:
        its_optimizer.update(other, grads)
    optimizer.update(model, grads)
    for other, its_optimizer in others:
        assert rx.state_dict(other).keys() == rx.state_dict(model).keys()
        close(rx.state_dict((other, its_optimizer)), rx.state_dict((model, optimizer)))
    slots = pickle.loads(pickle.dumps(optimizer.opt_state))
    close(rx.snapshot(slots), rx.snapshot(optimizer.opt_state))


def test_a_checkpoint_goes_on_bitwise():
    model, optimizer, _ = train(optax.adam(0.1), n=3)
    state = {k: np.asarray(v) for k, v in rx.state_dict((model, optimizer)).items()}
    resumed = make()
    its_optimizer = rx.Optimizer(resumed, optax.adam(0.1))
    rx.load_state_dict((resumed, its_optimizer), state)
    for m, o in ((model, optimizer), (resumed, its_optimizer)):
        o.update(m, rx.filter_grad(loss, wrt="params")(m))
    assert (model.first.value == resumed.first.value).all()


def test_the_state_does_not_depend_on_what_is_not_trained():
    model = make()
    optimizer = rx.Optimizer(model, optax.adam(0.1))
    other = eqx.tree_at(lambda m: (m.mean, m.activation), model, (model.mean, jnp.sin))
    optimizer.update(other, rx.filter_grad(loss, wrt="params")(other))
    assert optimizer.opt_state[0].count.value == 1


# Under the transforms


def test_a_step_traces_once_for_equal_models(trace_counter):
    counted = trace_counter(loss)

    @rx.filter_jit(donate="refs")
    def step(model, optimizer):
        optimizer.update(model, rx.filter_grad(counted, wrt="params")(model))

    tx = optax.adam(0.1)
    for key in (0, 1):
        model = Tied(key=jr.key(key))
        optimizer = rx.Optimizer(model, tx)
        for _ in range(3):
            step(model, optimizer)
    assert counted.counter.count == 1


@pytest.mark.parametrize("start", [0.0, jnp.array(0.0), np.float32(0.0)])
@pytest.mark.parametrize("tx", [optax.adam(0.1), optax.contrib.schedule_free_adamw()])
def test_a_number_to_train_is_traced_once(start, tx, trace_counter):
    model = {"weight": rx.Ref(start, "params"), "other": rx.Ref(jnp.ones(2), "params")}
    optimizer = rx.Optimizer(model, tx)
    counted = trace_counter(lambda m: jnp.sum(m["weight"].value - m["other"][...]) ** 2)

    @rx.filter_jit(donate="refs")
    def step(model, optimizer):
        optimizer.update(model, rx.filter_grad(counted)(model))

    for _ in range(4):
        step(model, optimizer)
    assert counted.counter.count == 1
    assert model["weight"].value != 0


def test_scan_makes_the_same_steps():
    model = make()
    optimizer = rx.Optimizer(model, optax.adam(0.1))

    @rx.filter_jit
    def run(model, optimizer):
        def step(_, __):
            value, grads = rx.filter_value_and_grad(loss, wrt="params")(model)
            optimizer.update(model, grads)
            return None, value

        return rx.scan(step, None, length=5)[1]

    values = run(model, optimizer)
    expected, _, by_steps = train(optax.adam(0.1))
    close(values, jnp.stack(by_steps))
    close(params_of(model), params_of(expected))
    assert optimizer.opt_state[0].count.value == 5


def test_an_ensemble_has_an_optimizer_for_each_model():
    @rx.filter_vmap
    def make_both(key):
        model = Tied(key=key)
        return model, rx.Optimizer(model, optax.adam(0.1))

    @rx.filter_jit
    @rx.filter_vmap
    def step(model, optimizer):
        value, grads = rx.filter_value_and_grad(loss, wrt="params")(model)
        optimizer.update(model, grads)
        return value

    models, optimizers = make_both(jr.split(jr.key(0), 4))
    for _ in range(3):
        values = step(models, optimizers)
    assert optimizers.opt_state[0].mu["first"].shape == (4, 3, 3)
    for i, key in enumerate(jr.split(jr.key(0), 4)):
        model = Tied(key=key)
        optimizer = rx.Optimizer(model, optax.adam(0.1))
        for _ in range(3):
            value, grads = rx.filter_value_and_grad(loss, wrt="params")(model)
            optimizer.update(model, grads)
        close(values[i], value)
        close(models.first.value[i], model.first.value)


def test_a_learning_rate_is_learnt_through_steps():
    def after_two_steps(rate, model):
        model = rx.clone(model)
        optimizer = rx.Optimizer(model, optax.sgd(rate))
        for _ in range(2):
            optimizer.update(model, rx.filter_grad(loss, wrt="params")(model))
        return loss(model)

    def by_hand(rate):
        params = params_of(make())
        for _ in range(2):
            grads = jax.grad(loss_by_hand)(params)
            params = jax.tree.map(lambda p, g: p - rate * g, params, grads)
        return loss_by_hand(params)

    slope = rx.filter_grad(after_two_steps)(jnp.array(0.1), make())
    close(slope, jax.grad(by_hand)(0.1))


def test_by_value_in_a_transform_of_another_library():
    model = make()
    optimizer = rx.Optimizer(model, optax.adam(0.1))

    @eqx.filter_jit
    def step(dag):
        model, optimizer = dag.value
        optimizer.update(model, rx.filter_grad(loss, wrt="params")(model))
        return dag

    both, _ = step(rx.Dag((model, optimizer))).value
    assert optimizer.opt_state[0].count.value == 0
    optimizer.update(model, rx.filter_grad(loss, wrt="params")(model))
    close(both.first.value, model.first.value)


def test_the_step_is_on_the_fast_path():
    from refx_eqx._engine import _plan

    model = make()
    optimizer = rx.Optimizer(model, optax.adam(0.1))

    @rx.filter_jit(donate="refs")
    def step(model, optimizer):
        optimizer.update(model, rx.filter_grad(loss, wrt="params")(model))

    for _ in range(3):
        step(model, optimizer)
    calls = []
    plain = _plan.Plan.call
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_plan.Plan, "call", lambda *args: calls.append(1) or plain(*args))
        step(model, optimizer)
    assert calls == [1]


# What is refused, and changes nothing


def unchanged(model, optimizer, call, error, match):
    before = rx.state_dict((model, optimizer))
    with raises(error, match=match):
        call()
    after = rx.state_dict((model, optimizer))
    assert all(after[name] is before[name] for name in before)


def test_a_missing_gradient_is_named():
    model = make()
    optimizer = rx.Optimizer(model, optax.adam(0.1))
    grads = rx.filter_grad(loss, wrt=rx.path("bias"))(model)
    unchanged(
        model,
        optimizer,
        lambda: optimizer.update(model, grads),
        rx.StructureError,
        r"nothing for `first`, `Tied.first` \(collection 'params'\). Differentiate",
    )
    optimizer.update(model, rx.filter_grad(loss, wrt=optimizer.wrt)(model))


def test_gradients_of_examples_are_to_be_reduced():
    model = make()
    optimizer = rx.Optimizer(model, optax.adam(0.1))
    grads = rx.filter_vmap(rx.filter_grad(loss, wrt="params"), in_axes=(None, 0))(
        model, jnp.stack([X, X])
    )
    unchanged(
        model,
        optimizer,
        lambda: optimizer.update(model, grads),
        rx.StructureError,
        r"`first`, .* has the shape \(3, 3\), but the gradients have \(2, 3, 3\) there",
    )
    optimizer.update(model, jax.tree.map(lambda g: jnp.mean(g, axis=0), grads))


def test_a_tied_weight_has_one_gradient():
    model = make()
    optimizer = rx.Optimizer(model, optax.sgd(0.1))
    plain = eqx.filter_grad(lambda m: jnp.sum(m.first @ m.again @ m.bias))(
        rx.snapshot(model)
    )
    unchanged(
        model,
        optimizer,
        lambda: optimizer.update(model, plain),
        rx.StructureError,
        "one ref at `first` and `again` of the target, but the gradients has a different",
    )


@pytest.mark.parametrize("tx", [optax.adam, None, 1e-3])
def test_what_is_no_transformation_is_refused(tx):
    model = {"w": rx.Ref(jnp.ones(2), "params")}
    with raises(
        TypeError, match=r"`tx` must be an Optax .* such as `optax.adam\(1e-3\)`"
    ):
        rx.Optimizer(model, tx)
    rx.Optimizer(model, optax.adam(1e-3))  # the remedy


def test_another_model_is_refused():
    model, other = make(), {"inner": make()}
    optimizer = rx.Optimizer(model, optax.adam(0.1))
    grads = rx.filter_grad(lambda m: loss(m["inner"]), wrt="params")(other)
    unchanged(
        model,
        optimizer,
        lambda: optimizer.update(other, grads),
        rx.StructureError,
        "it has no ref to train at 'bias'; .* has no slot for 'inner.bias'",
    )


OTHER_SHAPES = {
    "a stack": ((2, 3), (4, 2, 3)),
    "one of a stack": ((4, 2, 3), (2, 3)),
    "a scalar": ((), (2,)),
    "an axis of one": ((1,), (3,)),
    "another rank": ((2,), (3, 2)),
    "what does not broadcast": ((2,), (3,)),
}
WITH_SLOTS = {
    "adam": optax.adam(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "in a chain": optax.chain(optax.clip_by_global_norm(1.0), optax.lion(0.1)),
}


@pytest.mark.parametrize("tx", WITH_SLOTS.values(), ids=WITH_SLOTS)
@pytest.mark.parametrize(("old", "new"), OTHER_SHAPES.values(), ids=OTHER_SHAPES)
def test_a_model_of_other_shapes_than_the_slots_is_refused(tx, old, new):
    model, other = (
        {"v": rx.Ref(jnp.ones(3), "params"), "w": rx.Ref({"a": jnp.ones(s)}, "params")}
        for s in (old, new)
    )
    optimizer = rx.Optimizer(model, tx)
    grads = rx.snapshot(other)
    message = (
        f"made for another: `w`.*has the shape {re.escape(str(new))}, but `opt_state"
        rf".*\['w'\]\['a'\]` has {re.escape(str(old))}. Pass.*for this one: `rx.Optimizer"
    )
    for step in optimizer.update, rx.filter_jit(optimizer.update):
        unchanged(
            other, optimizer, lambda: step(other, grads), rx.MismatchError, message
        )
    rx.Optimizer(other, tx).update(other, grads)
    optimizer.update(model, rx.snapshot(model))


def test_a_name_in_a_value_is_not_taken_for_a_name_in_the_model():
    shapes = {"a": (2,), "b": (2, 2)}
    model = {
        "a": rx.Ref(jnp.ones(5), "params"),
        "w": rx.Ref(
            {name: jnp.ones(shape) for name, shape in shapes.items()}, "params"
        ),
    }
    rx.Optimizer(model, optax.adam(0.1)).update(model, rx.snapshot(model))
    assert model["a"].value[0] < 1 and model["w"].value["a"][0] < 1


def test_a_state_of_other_shapes_is_refused():
    model = make()
    grow = optax.GradientTransformation(
        lambda _: jnp.zeros(2), lambda g, s, p: (g, jnp.append(s, 0.0))
    )
    optimizer = rx.Optimizer(model, grow)
    grads = rx.filter_grad(loss, wrt="params")(model)
    unchanged(
        model,
        optimizer,
        lambda: optimizer.update(model, grads),
        rx.MismatchError,
        r"of its state is f32\[2\], but the transformation returned f32\[3\].*of `init`",
    )


def test_a_stack_has_slots_of_its_own_that_are_mapped_with_it():
    models = [rx.Ref(jnp.ones((4, 3)), "params")]
    tx = optax.sgd(0.1, momentum=0.9)
    optimizer = rx.Optimizer(models, tx)
    step = rx.filter_vmap(lambda m, o, g: o.update(m, g), in_axes=(0, 0, 0))
    step(models, optimizer, [jnp.ones((4, 3))])
    np.testing.assert_allclose(models[0].value, 0.9 * jnp.ones((4, 3)))


def test_nothing_to_train():
    for wrt, match in (
        ("parms", "selects nothing in"),
        ("counts", "selects no ref of"),
    ):
        with raises(rx.StructureError, match=match):
            rx.Optimizer(make(), optax.adam(0.1), wrt=wrt)


def test_an_array_in_no_ref_is_not_left_out_silently():
    model = {"w": rx.Ref(jnp.ones(2)), "scale": jnp.ones(2)}
    with raises(rx.StructureError, match=r"f32\[2\] at `scale`, which is not in a ref"):
        rx.Optimizer(model, optax.adam(0.1), wrt=True)
    rx.Optimizer(model, optax.adam(0.1), wrt=rx.Ref)
    rx.Optimizer(rx.as_refs(model), optax.adam(0.1), wrt=True)


def test_an_array_in_a_function_is_not_left_out_silently():
    call = lambda scale, x: scale[...] * x
    model = {"w": rx.Ref(jnp.ones(2)), "f": functools.partial(call, jnp.ones(2))}
    message = r"f32\[2\] at `f.args.0`, which.*Let a function hold.*`wrt=rx.Ref` does"
    with raises(rx.StructureError, match=message):
        rx.Optimizer(model, optax.adam(0.1), wrt=True)
    rx.Optimizer(model, optax.adam(0.1), wrt=rx.Ref)
    model["f"] = functools.partial(call, rx.Ref(jnp.ones(2), "params"))
    assert len(rx.param_mask(model, True, wrt=True)) == 2


def test_a_derefed_model_is_refused():
    with raises(rx.StructureError, match="is derefed: it has a Value at `first`"):
        rx.Optimizer(rx.deref(make()), optax.adam(0.1))


def test_a_broken_type_is_noticed_before_anything_is_written():
    model = make()
    optimizer = rx.Optimizer(model, optax.adam(0.1))
    grads = rx.filter_grad(loss, wrt="params")(model)

    def widen(updates, state, params):
        return {**updates, "bias": updates["first"]}, state

    wrong = rx.Optimizer(model, optax.GradientTransformation(lambda _: (), widen))
    unchanged(
        model,
        optimizer,
        lambda: wrong.update(model, grads),
        rx.StructureError,
        "Cannot update `Tied.bias` .* at `bias`: it holds f32.3., but the update is f32.3,3.",
    )


def test_a_changed_state_is_refused():
    model = make()

    def update(updates, state, params):
        return updates, (*state, jnp.array(0))

    grads = rx.filter_grad(loss, wrt="params")(model)
    optimizer = rx.Optimizer(model, optax.GradientTransformation(lambda _: (), update))
    unchanged(
        model,
        optimizer,
        lambda: optimizer.update(model, grads),
        rx.StructureError,
        "returned a state of another structure",
    )
    optimizer = rx.Optimizer(
        model,
        optax.GradientTransformation(lambda _: "a", lambda g, s, p: (g, s + "a")),
    )
    unchanged(
        model,
        optimizer,
        lambda: optimizer.update(model, grads),
        rx.StructureError,
        "is 'a', which is not an array, but the transformation returned 'aa'",
    )


def test_updates_of_another_structure_are_refused():
    model = make()
    tx = optax.GradientTransformation(lambda _: (), lambda g, s, p: ({}, s))
    optimizer = rx.Optimizer(model, tx)
    grads = rx.filter_grad(loss, wrt="params")(model)
    unchanged(
        model,
        optimizer,
        lambda: optimizer.update(model, grads),
        rx.StructureError,
        "returned updates with the structure",
    )


def test_a_forbidden_write_changes_nothing():
    model = make()
    optimizer = rx.Optimizer(model, optax.adam(0.1))
    grads = rx.filter_grad(loss, wrt="params")(model)

    def call():
        with rx.mutable("params"):  # not the state
            optimizer.update(model, grads)

    unchanged(model, optimizer, call, rx.ImmutableError, "opt_state")


def test_a_failed_step_changes_nothing():
    model = make()
    optimizer = rx.Optimizer(model, optax.adam(0.1))

    @rx.filter_jit
    def step(model, optimizer, x):
        grads = rx.filter_grad(loss, wrt="params")(model)
        optimizer.update(model, grads)
        return eqx.error_if(x, x > 0, "too much")

    unchanged(
        model, optimizer, lambda: step(model, optimizer, X), RuntimeError, "too much"
    )


def test_a_step_leaks_no_tracer():
    with jax.check_tracer_leaks(True):
        train(optax.adam(0.1), n=1)


# Bare Optax


def test_updates_of_bare_optax_are_applied():
    model, expected = make(), make()
    tx = optax.adam(0.1)
    params = eqx.filter(rx.deref(model), rx.filter_spec(model, "params"))
    grads = rx.filter_grad(loss, wrt="params")(model)
    updates, _ = tx.update(grads, tx.init(params), params)
    mean = model.mean.value
    rx.apply_updates(model, updates)
    rx.Optimizer(expected, tx).update(expected, grads)
    close(params_of(model), params_of(expected))
    assert model.mean.value is mean


def test_applied_updates_fit_and_go_to_refs():
    model = {"w": rx.Ref(jnp.ones(2), "params"), "scale": jnp.ones(2)}
    with raises(rx.StructureError, match=r"f32\[2\] at `scale`, which is not in a"):
        rx.apply_updates(model, {"w": jnp.ones(2), "scale": jnp.ones(2)})
    in_function = {
        "f": functools.partial(lambda w, scale: w[...] * scale[...], *model.values())
    }
    updates = eqx.filter(rx.deref(in_function), eqx.is_array)
    match = r"f32\[2\] at `f.args.1`, which is not in a ref.*Let a function hold a ref"
    with raises(rx.StructureError, match=match):
        rx.apply_updates(in_function, updates)
    assert in_function["f"]()[0] == 1
    rx.apply_updates(rx.as_refs(model, "params"), rx.snapshot(model))
    assert (model["w"].value == 2).all()
    model["w"].value /= 2
    with raises(rx.StructureError, match="at `w`: it holds f32.2., but the"):
        rx.apply_updates(model, {"w": jnp.ones((3, 2)), "scale": None})
    assert (model["w"].value == 1).all()
    rx.apply_updates(model, {"w": jnp.ones(2), "scale": None})
    assert (model["w"].value == 2).all()


def test_importing_the_package_does_not_import_optax():
    import subprocess
    import sys

    code = "import sys, refx_eqx; assert 'optax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_number_in_the_place_of_a_slot_is_named():
    model = make()
    optimizer = rx.Optimizer(model, optax.inject_hyperparams(optax.sgd)(0.1))
    rate = optimizer.opt_state.hyperparams["learning_rate"]
    optimizer.opt_state.hyperparams["learning_rate"] = 0.05
    grads = rx.filter_grad(loss, wrt="params")(model)
    with raises(
        rx.StructureError,
        match=r"`opt_state.hyperparams\['learning_rate'\]` was a ref, but is 0.05 now.*"
        r"`optimizer.opt_state.hyperparams\['learning_rate'\].value = ...`",
    ):
        optimizer.update(model, grads)
    optimizer.opt_state.hyperparams["learning_rate"] = rate  # the remedy
    optimizer.opt_state.hyperparams["learning_rate"].value = 0.05
    optimizer.update(model, grads)


def test_an_update_that_would_broadcast_what_it_is_added_to_is_refused():
    model = {"a": rx.Ref(jnp.ones(1), "params")}
    with raises(
        rx.MismatchError, match=r"at `a`: .*\(1,\) and \(2,\) are not the same"
    ):
        rx.apply_updates(model, {"a": jnp.ones(2)})
    assert model["a"].shape == (1,)
    rx.apply_updates(model, {"a": jnp.ones(1)})
    assert model["a"].value.tolist() == [2.0]


def test_what_is_no_array_in_the_state_may_be_another_object_that_is_equal():
    def update(grads, state, params):
        _, count = state
        return grads, ("".join(["ad", "am"]), count + 1)

    model = {"w": rx.Ref(jnp.array(1.0), "params")}
    tx = optax.GradientTransformation(lambda _: ("adam", jnp.array(0)), update)
    optimizer = rx.Optimizer(model, tx)
    for _ in range(2):
        optimizer.update(model, rx.deref(model))
    assert rx.snapshot(optimizer.opt_state) == ("adam", 2)
