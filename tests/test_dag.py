"""A `Dag` carries refs, by value, through every transform that has never heard of them."""

import copy
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from raising import raises

import refx_eqx as rx


class Tied(rx.Module):
    """`weight` is used twice; `uses` counts the calls."""

    weight: rx.Param[jax.Array]
    again: rx.Param[jax.Array]
    scale: jax.Array
    uses: rx.Ref[jax.Array] = rx.field(collection="counts")

    def __init__(self):
        self.weight = jnp.array([[1.0, 2.0], [3.0, 4.0]]) / 10
        self.again = self.weight
        self.scale = jnp.array(2.0)
        self.uses = jnp.array(0)

    def __call__(self, x):
        self.uses.value += 1
        return self.scale * (self.again[...] @ jnp.tanh(self.weight[...] @ x))


X = jnp.array([1.0, -2.0])


def loss(model, x=X):
    return jnp.sum(model(x) ** 2)


def by_dag(dag, x=X):
    return loss(dag.value, x)


def grads_by_reference():
    return rx.filter_grad(loss)(Tied())


def assert_same_gradients(dag):
    """`dag` is the gradient of a `Dag`: the same arrays as of a lifted transform."""
    expected = grads_by_reference()
    found = jax.tree.leaves(eqx.filter(dag, eqx.is_inexact_array))
    for ours, theirs in zip(jax.tree.leaves(expected), found, strict=True):
        assert jnp.allclose(ours, theirs, rtol=1e-6)
    grads = dag.value
    assert grads.weight is grads.again
    assert jnp.allclose(grads.weight[...], expected.weight.value, rtol=1e-6)


GRADIENTS = {
    "eqx.filter_grad": lambda dag: eqx.filter_grad(by_dag)(dag),
    "eqx.filter_value_and_grad": lambda dag: eqx.filter_value_and_grad(by_dag)(dag)[1],
    "eqx.filter_jit of it": lambda dag: eqx.filter_jit(eqx.filter_grad(by_dag))(dag),
    "has_aux": lambda dag: eqx.filter_grad(
        lambda dag: (by_dag(dag), dag), has_aux=True
    )(dag)[0],
    "eqx.filter_vjp": lambda dag: eqx.filter_vjp(by_dag, dag)[1](jnp.array(1.0))[0],
    "eqx.filter_checkpoint": lambda dag: eqx.filter_grad(eqx.filter_checkpoint(by_dag))(
        dag
    ),
    "jax.grad": lambda dag: jax.grad(by_dag, allow_int=True)(dag),
    "jax.value_and_grad": lambda dag: jax.jit(
        jax.value_and_grad(by_dag, allow_int=True)
    )(dag)[1],
    "jax.vjp": lambda dag: jax.vjp(by_dag, dag)[1](jnp.array(1.0))[0],
    "jax.jacrev": lambda dag: jax.jacrev(by_dag, allow_int=True)(dag),
    "a split by hand": lambda dag: jax.grad(
        lambda params, rest: by_dag(eqx.combine(params, rest))
    )(*eqx.partition(dag, eqx.is_inexact_array)),
    "rx.filter_grad": lambda dag: rx.filter_grad(by_dag)(dag),
}


@pytest.mark.parametrize("transform", GRADIENTS)
def test_gradients_of_a_dag(transform):
    model = Tied()
    assert_same_gradients(GRADIENTS[transform](rx.Dag(model)))
    assert model.uses.value == 0


def test_a_step_of_gradient_descent_by_value():
    model, dag = Tied(), rx.Dag(Tied())
    for _ in range(3):
        grads = eqx.filter_jit(eqx.filter_grad(by_dag))(dag)
        dag = eqx.apply_updates(dag, jax.tree.map(lambda g: -0.1 * g, grads))
        ours = rx.filter_jit(rx.filter_grad(loss, wrt="params"))(model)
        model.weight.value -= 0.1 * ours.weight.value
        dag = eqx.tree_at(lambda dag: dag.value.scale, dag, model.scale)
    assert jnp.allclose(dag.value.weight[...], model.weight[...], rtol=1e-6)


def test_the_filter_transforms_of_equinox():
    dag = rx.Dag(Tied())
    expected = Tied()(X)
    call = lambda dag, x: dag.value(x)
    xs = jnp.stack([X, X])
    for transform in (eqx.filter_jit, jax.jit, eqx.filter_checkpoint, jax.checkpoint):
        assert jnp.allclose(transform(call)(dag, X), expected)
    for vmap in (
        eqx.filter_vmap(call, in_axes=(None, 0)),
        jax.vmap(call, in_axes=(None, 0)),
    ):
        assert jnp.allclose(vmap(dag, xs), jnp.stack([expected] * 2))
    closed = eqx.filter_closure_convert(call, dag, X)
    assert jnp.allclose(closed(dag, X), expected)
    assert eqx.filter_eval_shape(call, dag, X).shape == (2,)

    tangents = jax.tree.map(
        lambda x: jnp.ones_like(x) if eqx.is_inexact_array(x) else None, dag
    )
    out, tangent = eqx.filter_jvp(by_dag, (dag,), (tangents,))
    both = rx.filter_jvp(loss, (Tied(),), (rx.deref(tangents.value),))
    assert (out, tangent) == both


def test_a_stack_of_dags_is_mapped():
    dag = rx.Dag(Tied())
    stack = jax.tree.map(lambda *x: jnp.stack(x), dag, dag)
    out = eqx.filter_vmap(lambda dag: dag.value(X))(stack)
    assert jnp.allclose(out, jnp.stack([Tied()(X)] * 2))
    made = eqx.filter_vmap(lambda _: rx.Dag(Tied()))(jnp.arange(3)).value
    assert made.weight is made.again and made.weight.shape == (3, 2, 2)


def test_what_is_written_is_flattened():
    dag = rx.Dag(Tied())

    @eqx.filter_jit
    def step(dag):
        dag.value(X)
        dag.value(X)
        return dag

    for k in (2, 4):
        dag = step(dag)
        assert dag.value.uses.value == k
    dag.value.uses.value = jnp.array(10)
    assert step(dag).value.uses.value == 12
    dag, _ = jax.lax.scan(lambda dag, _: (step(dag), None), dag, None, length=3)
    assert dag.value.uses.value == 16
    dag = jax.lax.cond(True, step, lambda dag: dag, dag)
    assert dag.value.uses.value == 18


def test_it_stays_derefed_until_it_is_asked():
    dag = rx.Dag(Tied())
    nothing = jax.tree.map(lambda _: None, dag)
    assert jax.tree.leaves(nothing) == []
    params, rest = eqx.partition(dag, eqx.is_inexact_array)
    whole = eqx.combine(params, rest)
    assert repr(whole).startswith("Dag(Tied(")
    assert jax.tree.structure(whole) == jax.tree.structure(dag)
    tree = whole.value
    assert whole.value is tree and tree.weight is tree.again
    for copied in (copy.deepcopy(params), pickle.loads(pickle.dumps(dag))):
        assert jax.tree.structure(copied.value.weight) == jax.tree.structure(0)


def apply(model, x):
    """As a call of `Tied`, without the count."""
    return model.scale * (model.again[...] @ jnp.tanh(model.weight[...] @ x))


def test_a_body_inside_reads_it():
    @eqx.filter_jit
    def run(dag, xs):
        def step(carry, x):
            model = dag.value
            assert dag.value.weight is model.weight
            return carry + apply(model, x), None

        return jax.lax.scan(step, jnp.zeros(2), xs)[0]

    xs = jnp.stack([X, X])
    assert jnp.allclose(run(rx.Dag(Tied()), xs), 2 * Tied()(X))

    def total(dag, xs):
        return jnp.sum(run(dag, xs))

    grads = eqx.filter_grad(total)(rx.Dag(Tied()), xs).value
    expected = rx.filter_grad(lambda model: jnp.sum(model(X) + model(X)))(Tied())
    assert jnp.allclose(grads.weight[...], expected.weight.value)


def test_a_body_inside_writes_what_ends_with_it():
    dag = rx.Dag(Tied())

    def by_another_argument(x, dag):
        model = dag.value
        out = jnp.sum(model(x))
        assert dag.value.uses is model.uses
        return out * dag.value.uses[...]

    expected = rx.filter_grad(lambda x, model: jnp.sum(model(x)))(X, Tied())
    for grad in (jax.grad(by_another_argument), eqx.filter_grad(by_another_argument)):
        out = eqx.filter_jit(grad)(X, dag)
        assert jnp.allclose(out, expected, rtol=1e-6)

    def by_carry(dag, xs):
        def step(carry, x):
            dag, total = carry
            return (dag, total + dag.value(x)), None

        return jax.lax.scan(step, (dag, jnp.zeros(2)), xs)[0]

    dag, total = eqx.filter_jit(by_carry)(dag, jnp.stack([X, X]))
    assert dag.value.uses.value == 2 and jnp.allclose(total, 2 * Tied()(X))


def test_what_a_body_wrote_is_not_forgotten_in_silence():
    def twice(x, dag):
        dag.value(x)
        return jnp.sum(dag.value(x))

    def once(x, dag):  # the remedy
        model = dag.value
        model(x)
        return jnp.sum(model(x)) * model.uses[...]

    dag = rx.Dag(Tied())
    with raises(
        rx.TraceLevelError, match="Cannot open a Dag twice.*`model = dag.value`"
    ):
        eqx.filter_jit(jax.grad(twice))(X, dag)
    assert eqx.filter_jit(jax.grad(once))(X, dag).shape == (2,)


def test_two_trace_levels_do_not_disagree():
    dag = jax.tree.map(lambda x: x, rx.Dag(Tied()))
    inside = jax.jit(lambda x: apply(dag.value, x))
    inside(X)
    text = r"Cannot open a Dag in two trace levels.*`jax.tree.map\(lambda x: x, dag\)`"
    with raises(rx.TraceLevelError, match=text):
        dag.value  # noqa: B018
    other = jax.tree.map(lambda x: x, dag)  # the remedy
    other.value.weight.value = jnp.zeros((2, 2))
    assert jnp.allclose(inside(X), Tied()(X))
    assert jnp.array_equal(other.value(X), jnp.zeros(2))

    opened = jax.tree.map(lambda x: x, rx.Dag(Tied()))
    opened.value(X)
    with raises(rx.TraceLevelError, match="did not go through this transform"):
        jax.jit(lambda x: opened.value(x))(X)


def test_solvers_take_it_as_an_argument():
    diffrax = pytest.importorskip("diffrax")
    lineax = pytest.importorskip("lineax")
    optimistix = pytest.importorskip("optimistix")
    dag, plain = rx.Dag(Tied()), rx.snapshot(Tied())

    def field(t, y, args):
        return apply(args.value, y) if isinstance(args, rx.Dag) else _plain(args, y)

    def solve(args):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Tsit5(),
            t0=0.0,
            t1=1.0,
            dt0=0.25,
            y0=X,
            args=args,
        )
        return jnp.sum(solution.ys)

    def root(args):
        solver = optimistix.Newton(rtol=1e-6, atol=1e-6)
        return jnp.sum(optimistix.root_find(_residual, solver, X, args).value)

    def linear(args):
        operator = lineax.FunctionLinearOperator(
            lambda y: _weight(args) @ y,
            jax.eval_shape(lambda: X),
        )
        return jnp.sum(lineax.linear_solve(operator, X).value)

    # Diffrax fails under the leak checks of JAX, with plain arguments too.
    with jax.check_tracer_leaks(False):
        for run in (solve, root, linear):
            ours, theirs = eqx.filter_grad(run)(dag), eqx.filter_grad(run)(plain)
            tied = theirs.weight + theirs.again
            assert jnp.allclose(ours.value.weight[...], tied, rtol=1e-4)


def _plain(model, x):
    return model.scale * (model.again @ jnp.tanh(model.weight @ x))


def _weight(args):
    return args.value.weight[...] if isinstance(args, rx.Dag) else args.weight


def _residual(y, args):
    model = args.value if isinstance(args, rx.Dag) else None
    return (_plain(args, y) if model is None else apply(model, y)) - y - 1.0


@pytest.mark.parametrize("grad", [jax.grad, eqx.filter_grad])
def test_a_dag_that_is_not_differentiated_is_handed_over_as_it_is(grad):
    dag = rx.Dag({"w": rx.Ref(jnp.array(2.0), "params")})
    loss = grad(lambda x, dag: x * dag.value["w"].value)
    x = jnp.array(1.0)
    with raises(rx.TraceLevelError, match="did not go through this transform"):
        loss(x, dag)
    with raises(rx.TraceLevelError, match="did not go through this transform"):
        grad(lambda x: x * dag.value["w"].value)(x)
    # The remedy of the message, and what needs none.
    assert loss(x, jax.tree.map(lambda x: x, dag)) == 2.0
    assert jax.jit(lambda x, dag: loss(x, dag))(x, dag) == 2.0
    assert jax.vmap(lambda x: x * dag.value["w"].value)(jnp.ones(2)).tolist() == [2, 2]
    assert dag.value["w"].value == 2.0
