"""`capture` gives the outputs of the layers of a model, and their gradients."""

# A static checker objects to what is wrong on purpose here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportFunctionMemberAccess=false

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from raising import raises

import refx_eqx as rx


class Linear(rx.Module):
    weight: rx.Param[jax.Array]
    uses: rx.Ref[jax.Array] = rx.field(collection="counts")

    def __init__(self, key):
        self.weight = jr.normal(key, (3, 3))
        self.uses = jnp.array(0)

    def __call__(self, x):
        self.uses.value += 1
        return self.weight[...] @ x


class Model(rx.Module):
    first: Linear
    layers: list[eqx.Module]

    def __init__(self, key):
        a, b = jr.split(key)
        self.first = Linear(a)
        tied = Linear(b)
        tied = eqx.tree_at(lambda x: x.weight, tied, self.first.weight)
        self.layers = [eqx.nn.Linear(3, 3, key=b), tied]

    def __call__(self, x):
        x = jnp.tanh(self.first(x))
        x = jnp.tanh(self.layers[0](x))
        return self.layers[1](self.first(x))


X = jnp.arange(3.0)


def by_hand(model, x):
    w, e = model.first.weight.value, model.layers[0]
    first = w @ x
    middle = e.weight @ jnp.tanh(first) + e.bias
    second = w @ jnp.tanh(middle)
    return {"first": (first, second), "layers.0": (middle,), "layers.1": (w @ second,)}


def loss(model, x):
    return jnp.sum(model(x) ** 2)


def close(a, b):
    return bool(eqx.tree_equal(a, b, rtol=1e-5, atol=1e-5))


@pytest.mark.parametrize("wrap", [lambda f: f, rx.filter_jit], ids=["eager", "jit"])
def test_each_call_of_each_submodule_is_there_by_its_path(wrap):
    model = Model(jr.key(0))
    out, seen = wrap(rx.capture(lambda model, x: model(x)))(model, X)
    assert close(seen, by_hand(model, X))
    assert close(out, seen["layers.1"][0])
    assert model.first.uses.value == 2 and model.layers[1].uses.value == 1


def test_a_model_can_be_given_itself():
    model = Model(jr.key(0))
    out, seen = rx.capture(model)(X)
    assert close(seen, by_hand(model, X)) and close(out, seen["layers.1"][0])
    assert type(model.first) is Linear  # the model is as it was


def test_layers_of_equinox_with_refs():
    plain = eqx.nn.MLP(3, 2, 8, 1, key=jr.key(0))
    model = rx.as_refs(plain, "params")
    run = lambda model, x: jax.vmap(model)(x)
    out, seen = rx.filter_jit(rx.capture(run))(model, X[None])
    assert close((out, seen), rx.capture(run)(plain, X[None]))
    assert seen.keys() == {"layers.0", "layers.1"}
    _, of_snapshot = rx.capture(lambda m, x: rx.snapshot(m)(x))(model, X)
    assert close(of_snapshot["layers.1"][0], seen["layers.1"][0][0])
    where = lambda module: isinstance(module, rx.nn.Linear)
    assert rx.capture(model, where=where)(X)[1].keys() == seen.keys()


def test_layers_that_keep_a_state():
    keys = jr.split(jr.key(0))
    layers = [
        rx.nn.Linear(3, 4, key=keys[0]),
        rx.nn.BatchNorm(4, axis_name="batch"),
        rx.nn.Dropout(0.5, rngs=rx.Rngs(0)),
        rx.nn.GRUCell(4, 2, key=keys[1]),
    ]
    model = rx.nn.Sequential(layers)
    axes = rx.axes(cache=0, default=None)
    run = rx.filter_vmap(lambda m, x: m(x), in_axes=(axes, 0), axis_name="batch")
    batched = rx.add_axis(model, 5, "cache")
    out, seen = rx.capture(run)(batched, jr.normal(keys[0], (5, 3)))
    assert close(out, seen["layers.3"][0]) and seen["layers.1"][0].shape == (5, 4)
    assert batched[1].count.value == 1 and close(batched[3].hidden.value, out)


def test_only_what_is_asked_for():
    def is_ours(module):
        return isinstance(module, Linear)

    _, seen = rx.capture(Model(jr.key(0)), where=is_ours)(X)
    assert set(seen) == {"first", "layers.1"}


@pytest.mark.parametrize("wrap", [lambda f: f, rx.filter_jit], ids=["eager", "jit"])
def test_the_gradient_of_each_output(wrap):
    model = Model(jr.key(0))
    _, seen = rx.capture(loss)(model, X)
    zeros = jax.tree.map(jnp.zeros_like, seen)

    @wrap
    def gradients(zeros, model, x):
        return rx.filter_grad(lambda z, m, x: rx.capture(loss, add=z)(m, x)[0])(
            zeros, model, x
        )

    grads = gradients(zeros, model, X)
    w, e = model.first.weight.value, model.layers[0].weight
    last = 2 * seen["layers.1"][0]
    second = w.T @ last
    middle = (w.T @ second) * (1 - jnp.tanh(seen["layers.0"][0]) ** 2)
    first = (e.T @ middle) * (1 - jnp.tanh(seen["first"][0]) ** 2)
    expected = {"first": (first, second), "layers.0": (middle,), "layers.1": (last,)}
    assert eqx.tree_equal(grads, expected, rtol=1e-4, atol=1e-3)


def test_the_gradient_of_the_model_is_as_before():
    model = Model(jr.key(0))

    def captured(model, x):
        return rx.capture(loss)(model, x)

    _, seen = captured(model, X)
    grads, seen_in_grad = rx.filter_grad(captured, wrt="params", has_aux=True)(model, X)
    assert close(grads, rx.filter_grad(loss, wrt="params")(model, X))
    assert close(seen, seen_in_grad)


@pytest.mark.parametrize("vmap", [jax.vmap, rx.filter_vmap, eqx.filter_vmap])
def test_a_layer_under_any_vmap_has_outputs_with_the_mapped_axis(vmap):
    layer = eqx.nn.Linear(3, 2, key=jr.key(0))
    xs = jnp.ones((4, 3))
    out, seen = rx.capture(lambda layers, xs: vmap(layers[0])(xs))([layer], xs)
    assert close(seen, {"0": (out,)}) and out.shape == (4, 2)


@pytest.mark.parametrize("bias", [False, True])
def test_the_mapped_axis_is_in_front_whatever_the_layer_computes(bias):
    layer = eqx.nn.Linear(3, 3, use_bias=bias, key=jr.key(0))
    xs = jr.normal(jr.key(1), (3, 3))
    both = lambda layers, xs: jax.vmap(jax.vmap(layers[0]))(xs)
    out, seen = rx.capture(both)([layer], jr.normal(jr.key(2), (4, 5, 3)))
    assert close(seen, {"0": (out,)}) and out.shape == (4, 5, 3)

    def loss(layers, xs):
        return jnp.sum(jax.vmap(layers[0])(xs) ** 2)

    _, seen = rx.capture(loss)([layer], xs)
    assert close(seen, {"0": (jax.vmap(layer)(xs),)})
    zeros = jax.tree.map(jnp.zeros_like, seen)
    grads = jax.grad(lambda zeros: rx.capture(loss, add=zeros)([layer], xs)[0])(zeros)
    assert close(grads, {"0": (2 * jax.vmap(layer)(xs),)})
    first = {"0": (zeros["0"][0].at[0].set(1.0),)}
    out, _ = rx.capture(lambda m, xs: jax.vmap(m[0])(xs), add=first)([layer], xs)
    assert close(out[0], layer(xs[0]) + 1.0) and close(out[1], layer(xs[1]))
    refs = rx.as_refs([layer])
    jitted = rx.filter_jit(rx.capture(lambda m, xs: rx.filter_vmap(m[0])(xs)))
    assert close(jitted(refs, xs)[1], {"0": (jax.vmap(layer)(xs),)})


@pytest.mark.parametrize(
    "wrap",
    [jax.jit, eqx.filter_jit, rx.filter_jit, jax.checkpoint, rx.filter_checkpoint],
)
def test_a_layer_inside_of_another_transform(wrap):
    layer = eqx.nn.Linear(3, 2, key=jr.key(0))
    # JAX keeps what an inner `jit` closes over for as long as it keeps its jaxpr.
    with jax.check_tracer_leaks(False):
        out, seen = rx.capture(lambda layers, x: wrap(layers[0].__call__)(x))(
            [layer], X
        )
    assert close(seen, {"0": (layer(X),)}) and close(out, layer(X))


def test_an_output_that_is_a_pytree():
    class Two(eqx.Module):
        def __call__(self, x):
            return {"x": x, "y": (2 * x, "text")}

    out, seen = rx.capture(lambda m, x: m[0](x)["y"])([Two()], X)
    assert out[1] == "text"
    assert close(seen, {"0": ({"x": X, "y": (2 * X, None)},)})


def test_a_submodule_is_of_its_class_still():
    def fn(model, x):
        assert isinstance(model.first, Linear)
        assert type(model.first).__name__ == "Linear"
        return model(x)

    rx.capture(fn)(Model(jr.key(0)), X)


def test_equal_calls_are_not_traced_again_under_jit(trace_counter):
    counted = trace_counter(loss)
    step = rx.filter_jit(rx.capture(counted))
    step(Model(jr.key(0)), X)
    step(Model(jr.key(1)), X)
    assert counted.counter.count == 1


def test_what_a_scan_calls_has_an_axis_of_the_steps_in_front():
    blocks = rx.filter_vmap(Linear)(jr.split(jr.key(0), 4))
    weights = blocks.weight.value

    def forward(blocks, x):
        step = lambda x, block: (jnp.tanh(block(x)), x[0])
        return rx.scan(step, x, blocks, reverse=True)

    run = lambda model, x: forward(model["blocks"], x)
    (out, _), seen = rx.filter_jit(rx.capture(run))({"blocks": blocks}, X)
    x, outs = X, []
    for i in reversed(range(4)):
        outs.append(weights[i] @ x)
        x = jnp.tanh(outs[-1])
    assert close(out, x)
    assert close(seen, {"blocks": (jnp.stack(outs[::-1]),)})
    assert (blocks.uses.value == 1).all()


def test_the_gradient_of_what_a_scan_calls():
    layers = {"layer": Linear(jr.key(0))}

    def loss(layers, xs):
        return jnp.sum(rx.map(layers["layer"], xs) ** 2)

    xs = jr.normal(jr.key(1), (5, 3))
    _, seen = rx.capture(loss)(layers, xs)
    zeros = jax.tree.map(jnp.zeros_like, seen)
    perturbed = lambda zeros: rx.capture(loss, add=zeros)(layers, xs)[0]
    grads = rx.filter_grad(perturbed)(zeros)
    assert close(grads, {"layer": (2 * seen["layer"][0],)})
    assert layers["layer"].uses.value == 10


def test_a_scan_in_any_scan():
    layer = eqx.nn.Linear(3, 3, key=jr.key(0))

    def fn(layers, xs):
        one = lambda x, y: (layers[0](x), y)
        row = lambda x, y: jax.lax.scan(one, x, y)
        return jax.lax.scan(row, X, xs)

    xs = jnp.ones((2, 4))
    (x, ys), seen = rx.capture(fn)([layer], xs)
    assert close((x, ys), fn([layer], xs))
    assert seen["0"][0].shape == (2, 4, 3) and close(seen["0"][0][-1, -1], x)


@pytest.mark.parametrize("kind", ["while", "cond", "custom_jvp_call"])
def test_where_an_output_cannot_be_brought_out_the_place_is_named(kind):
    layer = eqx.nn.Linear(3, 3, key=jr.key(0))

    def fn(layers, x):
        layer = layers[0]
        if kind == "while":
            return jax.lax.while_loop(lambda c: c[0] < 0, lambda c: layer(c), x)
        if kind == "cond":
            return jax.lax.cond(x[0] > 0, lambda x: layer(x), lambda x: x, x)
        called = jax.custom_jvp(layer.__call__)
        called.defjvp(lambda primals, tangents: (primals[0], tangents[0]))
        return called(x)

    text = f"`rx.capture`: `0` is called inside `{kind}`, which cannot return its output. Leave it out: `rx.capture(fn, where=lambda module: ...)`."
    with raises(rx.StructureError, match=re.escape(text)):
        rx.capture(fn)([layer], X)
    out, seen = rx.capture(fn, where=lambda module: False)([layer], X)  # the remedy
    assert seen == {} and close(out, fn([layer], X))


def test_more_to_add_than_there_are_calls_is_refused():
    layer = eqx.nn.Linear(3, 3, key=jr.key(0))
    text = "`add` has more than there are calls for `0`. Pass a dict like the one"
    for add in ({"0": (X, X)},):
        with raises(rx.StructureError, match=re.escape(text)):
            rx.capture(lambda m, x: m[0](x), add=add)([layer], X)
    with raises(rx.StructureError, match="calls for `typo`"):
        rx.capture(lambda m, x: m[0](x), add={"typo": (X,)})([layer], X)


def test_a_failure_writes_nothing():
    model = Model(jr.key(0))

    def fn(model, x):
        model(x)
        raise RuntimeError("no")

    with raises(RuntimeError, match="no"):
        rx.capture(fn)(model, X)
    assert model.first.uses.value == 0


def test_a_call_without_a_model_is_refused():
    with raises(TypeError, match="Pass the model as the first positional"):
        rx.capture(loss)(model=Model(jr.key(0)), x=X)
