"""A custom rule may lack the derivative with respect to some of its arguments: that is an
error, never a zero."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from raising import raises

import refx_eqx as rx


def value(w):
    return w.value if isinstance(w, rx.Ref) else w


def product(library):
    """The product of the first argument with all others."""

    def f(x, *args, **kwargs):
        for w in jax.tree.leaves((args, kwargs)):
            x = x * value(w)
        return x

    custom = library.filter_custom_vjp(f)
    custom.def_fwd(lambda perturbed, *args, **kwargs: (f(*args, **kwargs), None))

    @custom.def_bwd
    def _(residuals, grad, perturbed, x, *args, **kwargs):
        if jnp.issubdtype(jnp.result_type(x), jnp.inexact):
            return f(grad, *args, **kwargs)

    return custom


def by_closure(w):
    @rx.filter_custom_vjp
    def f(x):
        return x * w.value

    f.def_fwd(lambda perturbed, x: (x * w.value, None))
    f.def_bwd(lambda residuals, grad, perturbed, x: grad * w.value)
    return f


X = jnp.array(3.0)

# What is differentiated, `w`, reaches the rule by each of these ways.
WAYS = {
    "a second argument": lambda f, w: f(X, w),
    "a tree": lambda f, w: f(X, {"w": (w, 2.0)}),
    "a keyword": lambda f, w: f(X, w=w),
    "an integer first argument": lambda f, w: f(jnp.array(3), w),
    "both": lambda f, w: f(X * value(w), w),
    "a partial": lambda f, w: eqx.Partial(f, X)(w),
}

OUTER = {
    "grad": lambda lib, f, w: lib.filter_grad(f)(w),
    "jit of grad": lambda lib, f, w: lib.filter_jit(lib.filter_grad(f))(w),
    "grad of jit": lambda lib, f, w: lib.filter_grad(lib.filter_jit(f))(w),
    "vjp": lambda lib, f, w: lib.filter_vjp(f, w)[1](jnp.array(1.0)),
    "checkpoint": lambda lib, f, w: lib.filter_grad(lib.filter_checkpoint(f))(w),
    "vmap": lambda lib, f, w: lib.filter_grad(
        lambda w: jnp.sum(lib.filter_vmap(lambda x: f(w) * x)(jnp.arange(2.0)))
    )(w),
}

MATCH = "no derivative with respect to .*, which is differentiated here. Pass it in the first arg"


@pytest.mark.parametrize(
    "way, outer",
    [*((way, "grad of jit") for way in WAYS), *(("a keyword", x) for x in OUTER)],
)
def test_what_is_not_the_first_argument_is_refused(way, outer):
    ref, array = rx.Ref(jnp.array(2.0), "params"), jnp.array(2.0)
    with jax.check_tracer_leaks(False):  # the errors hold tracers
        with raises(RuntimeError, match="Unexpected tangent"):
            OUTER[outer](eqx, lambda w: WAYS[way](product(eqx), w), array)
        for w in (ref, array):
            with raises(rx.StructureError, match=MATCH):
                OUTER[outer](rx, lambda w: WAYS[way](product(rx), w), w)
    assert ref.value == 2.0


@pytest.mark.parametrize("outer", OUTER)
def test_what_the_function_closes_over_is_refused(outer):
    w = rx.Ref(jnp.array(2.0), "params")
    with jax.check_tracer_leaks(False):
        with raises(rx.StructureError, match=MATCH):
            OUTER[outer](rx, lambda w: by_closure(w)(X), w)


@pytest.mark.parametrize(
    "way, place",
    [
        ("a second argument", "the array in argument 1, which"),
        ("a tree", r"the array in argument 1 at `w\.0`, which"),
        ("a keyword", "the array in the keyword argument `w`, which"),
    ],
)
def test_the_message_says_where_the_array_is(way, place):
    with raises(rx.StructureError, match=place):
        rx.filter_grad(lambda w: WAYS[way](product(rx), w))(jnp.array(2.0))


def test_the_remedies_of_the_message():
    w, f = rx.Ref(jnp.array(2.0), "params"), product(rx)

    @rx.filter_custom_vjp
    def packed(xw):
        return xw[0] * xw[1].value

    packed.def_fwd(lambda perturbed, xw: (packed.__wrapped__(xw), None))
    packed.def_bwd(lambda residuals, grad, perturbed, xw: (None, grad * xw[0]))
    assert rx.filter_grad(lambda w: packed((X, w)))(w).value == 3.0

    model = {"w": w, "x": X}
    grads = rx.filter_grad(lambda m: f(m["x"], m["w"]), wrt=rx.path("x"))(model)
    assert grads["x"] == 2.0
    stopped = rx.filter_grad(lambda w: w.value * f(X, jax.lax.stop_gradient(w.value)))
    assert stopped(w).value == 6.0


@pytest.mark.parametrize("x_is_differentiated", [True, False])
def test_state_that_a_rule_writes_is_no_parameter(x_is_differentiated):
    model = {"w": rx.Ref(jnp.array(2.0)), "amax": rx.Ref(jnp.array(0.0), "fp8")}

    @rx.filter_custom_vjp
    def watch(x, amax):
        return x

    watch.def_fwd(lambda perturbed, x, amax: (x, None))

    @watch.def_bwd
    def _(residuals, grad, perturbed, x, amax):
        amax.value = jnp.abs(grad)
        return grad

    def loss(model, x):
        x = x * model["w"].value if x_is_differentiated else x
        return watch(x, model["amax"]) * 5 * model["w"].value

    grads = rx.filter_grad(loss)(model, X)
    assert grads["w"].value == (60.0 if x_is_differentiated else 15.0)
    assert grads["amax"].value == 0.0
    # Nothing asks the rule for a gradient of data, so it does not run, as in JAX.
    assert model["amax"].value == (10.0 if x_is_differentiated else 0.0)


def test_what_stands_after_state_that_a_rule_writes_is_refused():
    state = {"amax": rx.Ref(jnp.array(0.0)), "w": rx.Ref(jnp.array(2.0))}

    def scaled(x, state):
        state["amax"].value = jnp.abs(x)
        return x * state["w"].value

    watch = rx.filter_custom_vjp(scaled)
    watch.def_fwd(lambda perturbed, x, state: (scaled(x, state), None))
    watch.def_bwd(lambda residuals, grad, perturbed, x, state: grad * state["w"].value)

    with jax.check_tracer_leaks(False):
        with raises(rx.StructureError, match=MATCH):
            rx.filter_grad(lambda state: watch(X, state))(state)
    assert state["amax"].value == 0.0


def test_a_rule_that_only_reads_beside_one_that_writes_the_collection():
    """The channel of a ref does not hide that it is differentiated."""
    model = {"w": rx.Ref(jnp.array(2.0), "all"), "n": rx.Ref(jnp.array(0.0), "all")}

    @rx.filter_custom_vjp
    def count(x, n):
        return x

    count.def_fwd(lambda perturbed, x, n: (x, None))

    @count.def_bwd
    def _(residuals, grad, perturbed, x, n):
        n.value += 1.0
        return grad

    def loss(model):
        return count(model["w"].value, model["n"]) * product(rx)(X, model["w"])

    with raises(rx.StructureError, match=MATCH):
        rx.filter_grad(loss)(model)
    assert model["n"].value == 0.0


def test_a_loss_that_returns_a_ref_is_told_to_return_its_value():
    w = rx.Ref(jnp.array(2.0), "params")
    with raises(TypeError, match="but returned a ref. Return its value: `ref.v"):
        rx.filter_grad(lambda w: w)(w)
    assert rx.filter_grad(lambda w: w.value)(w).value == 1.0


@pytest.mark.parametrize("wrap", [lambda f: f, rx.filter_jit])
def test_what_no_backward_rule_has_written_stays_weakly_typed(wrap):
    w, model = (
        rx.Ref(jnp.array(2.0)),
        {
            "amax": rx.Ref(jnp.asarray(1.0), "fp8"),
            "other": rx.Ref(jnp.asarray(1.0), "fp8"),
            "count": rx.Ref(jnp.asarray(1), "fp8"),
            "strong": rx.Ref(jnp.ones(()), "fp8"),
        },
    )

    @rx.filter_custom_vjp
    def watch(x, model):
        return x

    watch.def_fwd(lambda perturbed, x, model: (x, None))

    @watch.def_bwd
    def _(residuals, grad, perturbed, x, model):
        model["amax"].value = jnp.abs(grad)
        return grad

    def loss(w, model):
        return watch(w.value, model) * 5

    def weak():
        return {k: jax.typeof(r.value).weak_type for k, r in model.items()}

    before = weak()
    assert before["other"] and before["count"] and not before["strong"]
    wrap(rx.filter_grad(loss))(w, model)
    assert model["amax"].value == 5.0
    assert {**weak(), "amax": None} == {**before, "amax": None}


NUMBERS = [3.0, np.float32(3.0), np.array(3.0, np.float32)]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda x: type(x).__name__)
def test_numbers_of_python_and_numpy_are_arrays_to_a_rule(number):
    """What an eager derivative hands over as it is, and no program of plain numbers."""

    @rx.filter_custom_vjp
    def double(x):
        return x.value * 2.0

    double.def_fwd(lambda perturbed, x: (double.__wrapped__(x), None))
    double.def_bwd(lambda residuals, grad, perturbed, x: grad * 2.0)
    w = rx.Ref(number, "params")
    assert rx.filter_grad(lambda w: double(w))(w).value == 2.0
    with jax.check_tracer_leaks(False):
        with raises(rx.StructureError, match=MATCH):
            rx.filter_grad(lambda w: product(rx)(2.0, w))(w)
        with raises(rx.StructureError, match=MATCH):
            rx.filter_grad(lambda w, x: product(rx)(x, w))(w, number)


@rx.filter_custom_vjp
def watch_first(x, state):
    return x


watch_first.def_fwd(lambda perturbed, x, state: (x, None))


@watch_first.def_bwd
def _(residuals, grad, perturbed, x, state):
    state[0].value = jnp.maximum(state[0].value, jnp.max(jnp.abs(grad)))
    return grad


def watched_loss(w, state):
    return watch_first(w.value, state) * 5


GRADS = {
    "grad": lambda loss, *args: rx.filter_grad(loss)(*args),
    "jit of grad": lambda loss, *args: rx.filter_jit(rx.filter_grad(loss))(*args),
    "grad of jit": lambda loss, *args: rx.filter_grad(rx.filter_jit(loss))(*args),
    "grad of checkpoint": lambda loss, *args: rx.filter_grad(
        rx.filter_checkpoint(loss)
    )(*args),
    "grad of scan": lambda loss, *args: rx.filter_grad(
        lambda w, state: rx.scan(
            lambda c, _: (c + loss(w, state), None), 0.0, length=2
        )[0]
    )(*args),
    "grad of cond": lambda loss, *args: rx.filter_grad(
        lambda w, state: rx.cond(w.value > 0, loss, loss, w, state)
    )(*args),
    "grad of vmap": lambda loss, *args: rx.filter_grad(
        lambda w, state: jnp.sum(
            rx.filter_vmap(lambda x: x * loss(w, state))(jnp.array([1.0]))
        )
    )(*args),
}


@pytest.mark.parametrize("grad", GRADS.values(), ids=GRADS)
@pytest.mark.parametrize("value", [2.0, jnp.array(2.0)], ids=["number", "array"])
def test_what_no_backward_rule_has_written_may_be_immutable(grad, value):
    w = rx.Ref(jnp.array(2.0), "params")
    state = [rx.Ref(jnp.array(0.0), "fp8"), rx.Ref(value, "fp8")]
    for limit in (~rx.collection("x") & (lambda r: r != state[1]), state[0]):
        state[0].value = jnp.array(0.0)
        with rx.mutable(limit):
            grad(watched_loss, w, state)
        assert state[0].value == 5.0 and state[1].value is value


@pytest.mark.parametrize("name", ["grad", "jit of grad", "grad of vmap"])
def test_what_no_backward_rule_has_written_is_not_written(name):
    w = rx.Ref(jnp.array(2.0), "params")
    state = [rx.Ref(jnp.array(0.0), "fp8"), rx.Ref(2.0, "fp8")]
    GRADS[name](watched_loss, w, state)
    assert state[0].value == 5.0 and type(state[1].value) is float


def test_what_the_function_writes_and_no_backward_rule():
    def loss(w, state):
        state[1].value += 1.0
        return watched_loss(w, state)

    w = rx.Ref(jnp.array(2.0), "params")
    state = [rx.Ref(jnp.array(0.0), "fp8"), rx.Ref(jnp.array(2.0), "fp8")]
    rx.filter_grad(loss)(w, state)
    assert state[0].value == 5.0 and state[1].value == 3.0


@pytest.mark.parametrize("grad", GRADS.values(), ids=GRADS)
@pytest.mark.parametrize("by_tree", [False, True])
def test_a_backward_rule_may_not_write_what_is_immutable(grad, by_tree):
    w = rx.Ref(jnp.array(2.0), "params")
    state = [rx.Ref(jnp.array(0.0), "fp8"), rx.Ref(jnp.array(2.0), "fp8")]
    limit = (rx.path("1"), state) if by_tree else ("params",)
    match = r"'fp8'.*this code runs under `rx.mutable\("
    with jax.check_tracer_leaks(False):
        with raises(rx.ImmutableError, match=match):
            with rx.mutable(*limit):
                grad(watched_loss, w, state)
    assert state[0].value == 0.0


def test_a_limit_inside_a_backward_rule_holds_there():
    w = rx.Ref(jnp.array(2.0), "params")
    state = rx.Ref(jnp.array(0.0), "fp8")

    @rx.filter_custom_vjp
    def limited(x, state):
        return x

    limited.def_fwd(lambda perturbed, x, state: (x, None))

    @limited.def_bwd
    def _(residuals, grad, perturbed, x, state):
        with rx.mutable("params"):
            state.value = grad
        return grad

    with jax.check_tracer_leaks(False):
        with raises(rx.ImmutableError, match=r"Cannot write .*'fp8'"):
            rx.filter_grad(lambda w, state: limited(w.value, state))(w, state)
    assert state.value == 0.0


def test_the_error_for_a_lost_write_shows_as_a_public_one():
    w = rx.Ref(jnp.array(2.0), "params")
    state = [rx.Ref(jnp.array(0.0), "fp8")]
    with pytest.raises(rx.CarryError) as caught:
        rx.filter_vjp(lambda w: watched_loss(w, state), w)[1](jnp.array(1.0))
    shown = f"{type(caught.value).__module__}.{type(caught.value).__qualname__}"
    assert shown == "refx_eqx.CarryError"
