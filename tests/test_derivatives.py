"""jvp, vjp, linearize, Jacobians and Hessians, by reference."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from raising import raises

import refx_eqx as rx


def make_model():
    shared = rx.Ref(jnp.array([0.3, -0.7]), "params")
    return {
        "count": rx.Ref(jnp.array(0), "counts"),
        "decoder": shared,
        "encoder": shared,
        "mean": rx.Ref(jnp.zeros(2), "batch_stats"),
        "rate": rx.Ref(0.5),
    }


def f(model, x):
    model["count"].value += 1
    model["mean"].value = model["mean"].value + model["encoder"].value * x
    return jnp.sin(model["encoder"].value * x) * model["decoder"].value


def pure(w, mean, x):
    return jnp.sin(w * x) * w


w0, mean0, x0 = jnp.array([0.3, -0.7]), jnp.zeros(2), jnp.array([1.0, 2.0])


def check_state(model, calls=1):
    assert model["count"].value == calls
    assert jnp.allclose(model["mean"].value, calls * w0 * x0)
    assert model["decoder"] is model["encoder"]
    assert type(model["mean"].value) is type(x0)  # the value, and no tracer


@pytest.fixture(params=["eager", "jit"])
def wrap(request):
    return rx.filter_jit if request.param == "jit" else lambda fn: fn


def tangents_of_model(t):
    return {"count": None, "decoder": t, "encoder": None, "mean": None, "rate": None}


def test_jvp(wrap):
    model, t, tx = make_model(), jnp.array([1.0, 0.5]), jnp.array([0.1, 0.2])

    def run(model, x):
        return rx.filter_jvp(f, (model, x), (tangents_of_model(t), tx))

    out, t_out = wrap(run)(model, x0)
    expected = jax.jvp(lambda w, x: pure(w, mean0, x), (w0, x0), (t, tx))
    assert jnp.allclose(out, expected[0]) and jnp.allclose(t_out, expected[1])
    check_state(model)


def test_jvp_takes_gradients_as_tangents():
    model = make_model()
    grads = rx.filter_grad(lambda m: jnp.sum(m["encoder"].value ** 2))(model)
    _, t_out = rx.filter_jvp(lambda m: m["decoder"].value * 3.0, (model,), (grads,))
    assert jnp.allclose(t_out, 6 * w0)


def test_jvp_none_for_what_does_not_depend_on_an_input_with_a_tangent():
    w = rx.Ref(jnp.array(2.0), "params")

    def g(w, x, n):
        made = rx.Ref(x * 2)
        w.value = w.value * x
        return {"w": w, "made": made, "x": x, "big": w.value > 1, "n": n, "text": "a"}

    primals = (w, jnp.array(3.0), jnp.array(4))
    out, t_out = rx.filter_jvp(g, primals, (jnp.array(1.0), None, None))
    assert out["w"] is w and w.value == 6.0
    # For a ref of the caller: the tangent of the value that it ends with.
    assert t_out["w"].value == 3.0 and t_out["made"].value is None
    assert [t_out[key] for key in ("x", "big", "n", "text")] == [None] * 4


def test_jvp_of_numbers_of_python():
    rate = rx.Ref(0.5)

    def g(rate, x, *, scale):
        return rate.value * x * scale

    out, t_out = rx.filter_jvp(g, (rate, 2.0), (1.0, None), scale=3)
    assert out == 3.0 and t_out == 6.0 and rate.value == 0.5
    _, t_out = rx.filter_jvp(g, (rate, 2.0), (None, 1.0), scale=3)
    assert t_out == 1.5


def test_jvp_refuses_what_does_not_fit():
    w, n = rx.Ref(jnp.array(2.0), "params"), rx.Ref(jnp.array(2), "counts")
    one = jnp.array(1.0)
    with raises(rx.StructureError, match="one tangent for each primal.*1 .*2"):
        rx.filter_jvp(lambda w: w.value, (w,), (one, one))
    with raises(rx.StructureError, match="tangents must have the derefed structure"):
        rx.filter_jvp(lambda t: t["w"].value, ({"w": w},), ({"v": one},))
    with raises(TypeError, match=r"must have `None`.*an unnamed ref .*'counts'"):
        rx.filter_jvp(lambda n: n.value, (n,), (one,))
    with raises(rx.StructureError, match="one value for .*'params'.*one ref"):
        rx.filter_jvp(lambda t: t[0].value, ([w, w],), ([one, jnp.array(2.0)],))
    with raises(TypeError, match="`None` where there is nothing"):
        rx.filter_jvp(lambda t: t[0].value, ([w, "text"],), ([one, one],))


def test_vjp_writes_once_and_its_function_may_be_called_often(wrap):
    model = make_model()
    ct = jnp.array([1.0, -2.0])

    def run(model, x):
        out, vjp_fn = rx.filter_vjp(f, model, x)
        first, second = vjp_fn(ct), vjp_fn(2 * ct)
        return out, first, second

    out, (of_model, of_x), (twice, _) = wrap(run)(model, x0)
    expected, jax_vjp = jax.vjp(lambda w, x: pure(w, mean0, x), w0, x0)
    of_w, expected_of_x = jax_vjp(ct)
    assert jnp.allclose(out, expected)
    assert jnp.allclose(of_model["decoder"].value, of_w)
    assert jnp.allclose(twice["decoder"].value, 2 * of_w)
    assert jnp.allclose(of_x, expected_of_x)
    # A shared ref has one cotangent; what is not differentiated has none.
    assert isinstance(of_model["encoder"], rx.Index)
    assert of_model["count"].value is None
    # A Python number in a ref is an array to every transform.
    assert of_model["rate"].value == 0.0
    check_state(model)


def test_the_function_of_vjp_is_a_pytree():
    model = make_model()
    _, vjp_fn = rx.filter_vjp(f, model, x0)
    ct = jnp.array([1.0, -2.0])
    (of_model, _), (jitted, _) = vjp_fn(ct), jax.jit(lambda v, ct: v(ct))(vjp_fn, ct)
    assert eqx.tree_equal(of_model, jitted, rtol=1e-6)
    # It holds the residuals: a write after the call does not change it.
    model["encoder"].value = jnp.zeros(2)
    assert eqx.tree_equal(vjp_fn(ct)[0], of_model)


def test_vjp_aux_wrt_and_results_of_any_type():
    model = make_model()

    def g(model, x):
        out = {"y": model["encoder"].value * x, "made": rx.Ref(x * 2), "text": "a"}
        return out, (model["count"].value, "aux")

    out, vjp_fn, aux = rx.filter_vjp(g, model, x0, has_aux=True, wrt="params")
    assert aux[1] == "aux" and out["text"] == "a"
    ct = {"y": jnp.ones(2), "made": None, "text": None}
    of_model, of_x = vjp_fn(ct)
    assert jnp.allclose(of_model["decoder"].value, x0) and of_x is None
    with raises(rx.StructureError, match="cotangents must have the derefed structure"):
        vjp_fn(jnp.ones(2))
    with raises(TypeError, match="`None` where there is nothing"):
        vjp_fn({**ct, "text": jnp.ones(2)})


def test_vjp_cotangents_of_refs_in_the_result():
    w = rx.Ref(jnp.array(2.0), "params")

    def g(w):
        w.value = w.value**2
        return w, rx.Ref(w.value * 3)

    (same, made), vjp_fn = rx.filter_vjp(g, w)
    assert same is w and w.value == 4.0 and made.value == 12.0
    ((of_w),) = vjp_fn((jnp.array(1.0), None))
    assert of_w.value == 4.0
    (of_w,) = vjp_fn(
        rx.deref((rx.Ref(jnp.array(1.0), "params"), rx.Ref(jnp.array(1.0))))
    )
    assert of_w.value == 16.0


def test_linearize(wrap):
    model, t, tx = make_model(), jnp.array([1.0, 0.5]), jnp.array([0.1, 0.2])

    def run(model, x):
        out, f_jvp = rx.filter_linearize(f, model, x)
        return out, f_jvp(tangents_of_model(t), None), f_jvp(None, tx)

    out, of_w, of_x = wrap(run)(model, x0)
    assert jnp.allclose(out, pure(w0, mean0, x0))
    assert jnp.allclose(of_w, jax.jvp(lambda w: pure(w, mean0, x0), (w0,), (t,))[1])
    assert jnp.allclose(of_x, jax.jvp(lambda x: pure(w0, mean0, x), (x0,), (tx,))[1])
    check_state(model)


def test_a_tangent_of_a_ref_has_the_structure_of_its_value():
    ref = rx.Ref({"a": jnp.array(2.0), "b": jnp.array(3.0)}, "params")

    def product(ref):
        return ref.value["a"] * ref.value["b"]

    with raises(rx.MismatchError, match="the value of an unnamed ref.*'params'"):
        rx.filter_jvp(product, (ref,), ([jnp.array(1.0)],))
    tangent = {"a": jnp.array(1.0), "b": None}
    assert rx.filter_jvp(product, (ref,), (tangent,)) == (6.0, 3.0)


def test_a_number_in_a_primal_is_differentiated_where_it_has_a_tangent():
    def product(pair):
        return pair[0] * pair[1]

    assert rx.filter_jvp(product, ((2.0, 3.0),), ((1.0, None),)) == (6.0, 3.0)
    with raises(rx.MismatchError, match="structure"):
        rx.filter_jvp(product, ((2.0, 3.0),), ((1.0,),))


def test_linearize_aux_and_its_errors():
    w, n = rx.Ref(jnp.array(2.0), "params"), rx.Ref(jnp.array(2), "counts")
    out, f_jvp, aux = rx.filter_linearize(
        lambda w, n: (w.value**2, n), w, n, has_aux=True
    )
    assert out == 4.0 and aux is n and f_jvp(jnp.array(1.0), None) == 4.0
    with raises(rx.StructureError, match="takes 2 tangents.*was given 1"):
        f_jvp(jnp.array(1.0))
    with raises(TypeError, match="`None` where there is nothing"):
        f_jvp(None, jnp.array(1.0))


@pytest.mark.parametrize(
    "transform, reference",
    [
        (rx.filter_jacfwd, jax.jacfwd),
        (rx.filter_jacrev, jax.jacrev),
        (rx.filter_hessian, jax.hessian),
    ],
    ids=["jacfwd", "jacrev", "hessian"],
)
def test_matrices(wrap, transform, reference):
    model = make_model()
    found = wrap(transform(f, wrt=rx.collection("params", "batch_stats")))(model, x0)
    expected = reference(lambda w: pure(w, mean0, x0))(w0)
    of_w = found["decoder"].value
    if transform is rx.filter_hessian:
        assert jnp.all(of_w["mean"].value == 0)
        of_w = of_w["decoder"].value
    assert jnp.allclose(of_w, expected, atol=1e-6)
    assert isinstance(found["encoder"], rx.Index)
    assert found["count"].value is None and found["rate"].value is None
    check_state(model)  # one call is one call, whatever the number of directions


@pytest.mark.parametrize(
    "transform", [rx.filter_jacfwd, rx.filter_jacrev, rx.filter_hessian]
)
def test_matrices_of_any_result_with_aux(transform):
    w = rx.Ref(jnp.array([1.0, 2.0]), "params")

    def g(w, *, scale):
        return {"y": jnp.sum(w.value**2) * scale, "n": jnp.array(3), "t": "a"}, w

    found, aux = transform(g, has_aux=True)(w, scale=2)
    assert aux is w and found["n"] is None and found["t"] is None
    value = found["y"].value
    value = value.value if transform is rx.filter_hessian else value
    second = transform is rx.filter_hessian
    assert jnp.array_equal(value, 4 * jnp.eye(2) if second else 4 * w.value)


@pytest.mark.parametrize("transform", [rx.filter_jacfwd, rx.filter_jacrev])
def test_matrices_of_complex_arrays(transform):
    w = rx.Ref(jnp.array([1.0 + 1.0j, 2.0]))
    found = transform(lambda w: w.value**2, holomorphic=True)(w)
    assert jnp.allclose(found.value, jnp.diag(2 * w.value))


@pytest.mark.parametrize(
    "transform",
    [rx.filter_grad, rx.filter_jacfwd, rx.filter_jacrev, rx.filter_hessian],
)
def test_nothing_to_differentiate(transform):
    name = transform.__name__
    with raises(rx.StructureError, match=f"`{name}` found nothing.*first arg"):
        transform(lambda n, x: x)(rx.Ref(jnp.array(0)), jnp.array(1.0))
    w = rx.Ref(jnp.array(0.0), "params")
    with raises(rx.StructureError, match="'lora'.* selects nothing"):
        transform(lambda w: w.value, wrt="lora")(w)
    none = rx.collection("lora") | False
    with raises(rx.StructureError, match=r"for wrt=\(rx\.collection\('lora'\) \|"):
        transform(lambda w: w.value, wrt=none)(w)
    with raises(TypeError, match=f"`{name}` differentiates the first argument"):
        transform(lambda w: w.value)(w=w)


@pytest.mark.parametrize(
    "transform",
    [rx.filter_jacfwd, rx.filter_jacrev, rx.filter_hessian, rx.filter_checkpoint],
)
def test_bound_methods_and_closures(transform):
    class Model(rx.Module):
        w: rx.Param[jax.Array]
        uses: rx.Ref[jax.Array] = rx.field(collection="counts")

        def __call__(self, x):
            self.uses.value += 1
            return self.w.value * x**2

    model = Model(jnp.array(3.0), jnp.array(0))
    by_method = transform(model.__call__)(jnp.array(2.0))
    by_closure = transform(lambda x: model(x))(jnp.array(2.0))
    expected = {rx.filter_hessian: 6.0}.get(transform, 12.0)
    assert by_method == by_closure == expected
    assert model.uses.value == 2


def test_the_function_runs_once(trace_counter):
    for transform in (rx.filter_jacfwd, rx.filter_jacrev, rx.filter_hessian):
        counted = trace_counter(f)
        transform(counted, wrt="params")(make_model(), x0)
        assert counted.counter.count == 1
    for transform in (rx.filter_vjp, rx.filter_linearize):
        counted = trace_counter(f)
        transform(counted, make_model(), x0)
        assert counted.counter.count == 1


def test_a_function_that_closes_over_refs_in_the_first_argument():
    # What it holds in refs is differentiated, as in `rx.deref(first)`.
    hidden, scale = rx.Ref(jnp.array(5.0)), jnp.array(7.0)

    def fn():
        hidden.value += 1.0
        return hidden.value * scale

    first = {"fn": fn, "w": jnp.array(2.0)}
    grads = rx.filter_grad(lambda d: d["w"] ** 2 * d["fn"]())(first)
    assert jax.tree.leaves(grads["fn"]) == [4 * 7.0] and grads["w"] == 4 * 42.0
    assert hidden.value == 6.0


def test_nesting():
    """These transforms around and inside each other, each once on either side."""

    def swapped(g):
        return lambda x, m: g(m, x)

    transforms = {
        "jit": (rx.filter_jit, lambda g: g),
        "checkpoint": (rx.filter_checkpoint, lambda g: g),
        "grad": (
            lambda g: lambda m, x: rx.filter_grad(swapped(g))(x, m),
            jax.grad,
        ),
        "jvp": (
            lambda g: lambda m, x: rx.filter_jvp(g, (m, x), (None, jnp.array(1.0)))[1],
            lambda g: lambda x: jax.jvp(g, (x,), (jnp.array(1.0),))[1],
        ),
        "vjp": (
            lambda g: lambda m, x: rx.filter_vjp(g, m, x)[1](jnp.array(1.0))[1],
            lambda g: lambda x: jax.vjp(g, x)[1](jnp.array(1.0))[0],
        ),
        "hessian": (
            lambda g: lambda m, x: rx.filter_hessian(lambda x: g(m, x))(x),
            jax.hessian,
        ),
    }

    def base(m, x):
        m["count"].value += 1
        m["last"].value = jax.lax.stop_gradient(x)
        return jnp.sin(m["w"].value * x)

    every = list(transforms.values())
    for i, (outer, outer_jax) in enumerate(every):
        inner, inner_jax = every[(i + 2) % len(every)]
        model = {
            "w": rx.Ref(jnp.array(1.5)),
            "count": rx.Ref(jnp.array(0)),
            "last": rx.Ref(jnp.array(0.0)),
        }
        found = outer(inner(base))(model, jnp.array(0.4))
        expected = outer_jax(inner_jax(lambda x: jnp.sin(1.5 * x)))(jnp.array(0.4))
        assert jnp.allclose(found, expected, rtol=1e-4)
        assert model["count"].value == 1 and model["last"].value == 0.4


def test_a_failure_writes_nothing():
    model = make_model()

    def fails(model, x):
        model["count"].value += 1
        raise RuntimeError("no")

    for call in (
        lambda: rx.filter_vjp(fails, model, x0),
        lambda: rx.filter_linearize(fails, model, x0),
        lambda: rx.filter_jvp(fails, (model, x0), (None, x0)),
        lambda: rx.filter_hessian(fails)(model, x0),
    ):
        with raises(RuntimeError, match="no"):
            call()
    assert model["count"].value == 0


FLOAT0 = np.zeros((), jax.dtypes.float0)


@pytest.mark.parametrize("n, tangent", [(3, FLOAT0), (jnp.array(3), FLOAT0), (3, None)])
def test_where_there_is_nothing_to_differentiate_jax_has_float0(n, tangent):
    out = rx.filter_jvp(
        lambda x, n: x * n, (jnp.array(2.0), n), (jnp.array(1.0), tangent)
    )
    assert out == (6.0, 3.0)


def test_the_tangent_of_a_value_may_have_its_statics():
    ref = rx.Ref({"x": jnp.array(2.0), "kind": "scale"})
    tangent = {**ref.value, "x": jnp.array(1.0)}
    _, out = rx.filter_jvp(lambda ref: ref.value["x"] ** 2, (ref,), (tangent,))
    assert out == 4.0


@pytest.mark.parametrize(
    "primal, tangent, text",
    [
        (jnp.array(3), jnp.array(1), r"`None` where .*weak_i32\[\] for `0`"),
        ("a", "a", r"`None` where .*'a' for `0`"),
        (jnp.array(3.0), jnp.array(1), r"a floating-point .*weak_i32\[\] for `0`"),
        (jnp.array(3.0), "a", r"a floating-point .*'a' for `0`"),
    ],
)
def test_what_is_no_tangent_is_refused(primal, tangent, text):
    with raises(TypeError, match=f"tangents must have {text}"):
        rx.filter_jvp(lambda x: x, ([primal],), ([tangent],))
    ref = rx.Ref(primal, "stats")
    if tangent == "a":
        return  # what is static stands for itself there
    text = text.replace("`0`", "an unnamed ref .*'stats'")
    with raises(TypeError, match=f"tangents must have {text}"):
        rx.filter_jvp(lambda ref: ref.value, (ref,), (tangent,))


def test_a_backward_rule_returns_no_integers():
    f = rx.filter_custom_vjp(lambda x: x["w"].value)
    f.def_fwd(lambda perturbed, x: (x["w"].value, None))
    f.def_bwd(lambda residuals, grad, perturbed, x: {"w": jnp.array(1)})
    ref = rx.Ref(jnp.array(2.0), "params")
    with raises(TypeError, match=r"gradient .*has weak_i32\[\] for .*'params'"):
        rx.filter_grad(f)({"w": ref})


def test_the_rule_of_a_custom_jvp_is_given_arrays_by_an_eager_jvp_too():
    f = rx.filter_custom_jvp(lambda x: 2 * x)
    f.def_jvp(lambda primals, tangents: (2 * primals[0], tangents[0] ** 2))
    assert jax.jvp(f, (2.0,), (3.0,)) == (4.0, 9.0)
