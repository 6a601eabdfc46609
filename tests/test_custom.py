"""`filter_custom_jvp`, and `filter_custom_vjp` with a backward rule that writes refs."""

import types

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from raising import raises

import refx_eqx as rx


# A wrapper for each way to run the function that is differentiated.
def bare(fn):
    return fn


outer_and_inner = pytest.mark.parametrize(
    "outer, inner",
    [
        (bare, bare),
        (rx.filter_jit, bare),
        (bare, rx.filter_jit),
        (bare, rx.filter_checkpoint),
    ],
    ids=["eager", "jit", "inner-jit", "checkpoint"],
)


@rx.filter_custom_jvp
def tenfold(w, x, *, uses, text="a"):
    uses.value += 1
    return {"y": w.value * x, "text": text}


@tenfold.def_jvp
def _(primals, tangents, *, uses, text="a"):
    w, x = primals
    t_w, t_x = tangents
    t = jnp.zeros(()) if t_w.value is None else 10 * t_w.value * x
    t = t if t_x is None else t + 100 * w.value * t_x
    return tenfold(w, x, uses=uses, text=text), {"y": t, "text": None}


@outer_and_inner
def test_custom_jvp_uses_the_rule_and_counts_once(outer, inner):
    w, uses = rx.Ref(jnp.array(2.0), "params"), rx.Ref(jnp.array(0))

    def loss(wx, uses):
        return tenfold(*wx, uses=uses)["y"]

    grads = outer(rx.filter_grad(inner(loss)))((w, jnp.array(3.0)), uses)
    assert grads[0].value == 30.0 and grads[1] == 200.0
    assert uses.value == 1
    only_x = outer(rx.filter_grad(inner(lambda x: loss((w, x), uses))))
    assert only_x(jnp.array(3.0)) == 200.0 and uses.value == 2
    assert inner(tenfold)(w, jnp.array(3.0), uses=uses)["text"] == "a"
    assert uses.value == 3


@pytest.mark.parametrize("wrap", [bare, rx.filter_jit, rx.filter_checkpoint])
def test_what_a_custom_function_assigns_has_no_derivative_even_if_it_was_there(wrap):
    def f(w, x):
        w.value = x
        return 1.0 * x

    def rule(primals, tangents):
        return wrap(f)(*primals), 1.0 * tangents[1]

    custom = rx.filter_custom_jvp(wrap(f))
    custom.def_jvp(rule)

    def loss(w, assign):
        if assign:
            custom(w, w.value)
        return 3.0 * w.value

    w = rx.Ref(jnp.array(2.0), "params")
    assert rx.filter_grad(loss)(w, True).value == 0.0 and w.value == 2.0
    assert rx.filter_grad(loss)(w, False).value == 3.0


def test_custom_jvp_forward_mode_and_vmap():
    w, uses = rx.Ref(jnp.array(2.0), "params"), rx.Ref(jnp.array(0))

    def f(w, x, uses):
        return tenfold(w, x, uses=uses)

    primals = (w, jnp.array(3.0), uses)
    out, t_out = rx.filter_jvp(f, primals, (jnp.array(1.0), None, None))
    assert out == {"y": 6.0, "text": "a"} and t_out["y"] == 30.0 and uses.value == 1

    def g(xs, w, uses):
        vmapped = rx.filter_vmap(
            lambda x, w, uses: f(w, x, uses)["y"], in_axes=(0, None, None)
        )
        return jnp.sum(vmapped(xs, w, uses))

    grads = rx.filter_grad(g)(jnp.arange(3.0), w, uses)
    assert jnp.array_equal(grads, jnp.full(3, 200.0)) and uses.value == 2


def test_custom_jvp_is_equinox_without_refs():
    def make(library):
        @library.filter_custom_jvp
        def f(x, y, *, fn):
            return fn(x, y)

        @f.def_jvp
        def _(primals, tangents, *, fn):
            x, y = primals
            tx, ty = tangents
            assert ty is None
            return f(x, y, fn=fn), 2 * tx

        return library.filter_grad(f)(jnp.array(2.0), jnp.array(2.0), fn=jnp.add)

    assert make(rx) == make(eqx) == 2.0


def test_custom_jvp_refuses():
    w, uses = rx.Ref(jnp.array(2.0), "params"), rx.Ref(jnp.array(0), "counts")
    x = jnp.array(3.0)

    @rx.filter_custom_jvp
    def f(x, *, w):
        return w.value * x

    with raises(RuntimeError, match="`def_jvp` has not been called for `.*f`"):
        f(x, w=w)

    @f.def_jvp
    def rule(primals, tangents, *, w):
        return f(*primals, w=w), tangents[0]

    assert rule is not None
    with raises(
        rx.StructureError, match="no derivative with respect to an unnamed.*'params'"
    ):
        rx.filter_grad(lambda w, x: f(x, w=w))(w, x)
    # The remedies.
    assert rx.filter_grad(lambda x: f(x, w=w))(x) == 1.0
    both = (w, x)
    assert rx.filter_grad(lambda t: f(t[1], w=t[0]), wrt=rx.path("1"))(both)[1] == 1.0

    @rx.filter_custom_jvp
    def counting(x, uses):
        uses.value += 1
        return x

    counting.def_jvp(lambda primals, tangents: (primals[0], tangents[0]))
    # (The error keeps tracers alive, which the leak checks take for a leak.)
    with raises(rx.StructureError, match="must write.*no others.*'counts'"):
        with jax.check_tracer_leaks(False):
            rx.filter_grad(rx.filter_jit(counting))(x, uses)
    counting.def_jvp(lambda primals, tangents: primals[0])
    with raises(TypeError, match=r"must return a pair `\(out, tangent_out\)`"):
        rx.filter_grad(counting)(x, uses)
    assert uses.value == 0


def test_custom_rules_on_methods():
    class Model(rx.Module):
        w: rx.Param[jax.Array]
        uses: rx.Ref[jax.Array] = rx.field(collection="counts")

        @rx.filter_custom_vjp
        def __call__(self, x):
            self.uses.value += 1
            return self.w.value * x

        @__call__.def_fwd
        def _fwd(perturbed, self, x):
            self.uses.value += 1
            assert perturbed.w.value is True and perturbed.uses.value is False
            return self.w.value * x, x

        @__call__.def_bwd
        def _bwd(x, grad_out, perturbed, self, same_x):
            grads = jax.tree.map(lambda _: None, perturbed)
            return eqx.tree_at(
                lambda g: g.w.value,
                grads,
                7 * grad_out * x,
                is_leaf=lambda g: g is None,
            )

    model = Model(jnp.array(2.0), jnp.array(0))
    assert model(jnp.array(3.0)) == 6.0 and model.uses.value == 1
    grads = rx.filter_grad(lambda m, x: m(x))(model, jnp.array(3.0))
    assert grads.w.value == 21.0 and model.uses.value == 2


# The running maximum of the absolute gradient, and how often it was taken.
@rx.filter_custom_vjp
def watch(x, amax, n):
    return x


@watch.def_fwd
def _(perturbed, x, amax, n):
    return x, None


@watch.def_bwd
def _(residuals, grad, perturbed, x, amax, n):
    amax.value = jnp.maximum(amax.value, jnp.max(jnp.abs(grad)))
    n.value += 1
    return grad


def watched(model, x):
    return watch(x, model["amax"], model["n"])


def make_state():
    return {
        "amax": rx.Ref(jnp.array(0.0), "fp8"),
        "n": rx.Ref(jnp.array(0), "fp8"),
        "w": rx.Ref(jnp.array(2.0), "params"),
    }


xs = jnp.array([1.0, 3.0])


@outer_and_inner
def test_a_backward_rule_writes_a_ref(outer, inner):
    def loss(model, x):
        return jnp.sum(watched(model, model["w"].value * x) ** 2)

    model = make_state()
    step = outer(rx.filter_grad(inner(loss)))
    # The state is among what is differentiated: its gradient is zero.
    grads = step(model, xs)
    assert grads["w"].value == 40.0 and grads["amax"].value == 0.0
    assert model["amax"].value == 12.0 and model["n"].value == 1
    step(model, 10 * xs)
    assert model["amax"].value == 120.0 and model["n"].value == 2
    step(model, xs)
    assert model["amax"].value == 120.0 and model["n"].value == 3
    # Without a derivative no backward rule runs.
    assert inner(loss)(model, xs) == 40.0 and model["n"].value == 3
    assert type(model["amax"]) is rx.Ref and type(model["amax"].value) is type(xs)


def test_the_other_refs_and_the_value_are_those_of_the_function():
    model = make_state() | {"mean": rx.Ref(jnp.array(0.0), "batch_stats")}

    def loss(model, x):
        model["mean"].value += jnp.mean(model["w"].value * x)
        return jnp.sum(watched(model, model["w"].value * x) ** 2), (model["w"], "aux")

    (value, (w, aux)), grads = rx.filter_value_and_grad(
        loss, wrt="params", has_aux=True
    )(model, xs)
    assert value == 40.0 and w is model["w"] and aux == "aux"
    assert model["mean"].value == 4.0 and model["amax"].value == 12.0
    assert grads["mean"].value is None and grads["amax"].value is None


@outer_and_inner
def test_backward_rules_run_in_reverse_order_on_one_state(outer, inner):
    """What Python code would do that calls the rules itself."""

    @rx.filter_custom_vjp
    def record(x, log, i):
        log.value = log.value * 10 + i
        return x

    @record.def_fwd
    def _(perturbed, x, log, i):
        log.value = log.value * 10 + i
        return x, i

    @record.def_bwd
    def _(i, grad, perturbed, x, log, same_i):
        log.value = log.value * 10 + i + 4
        return grad

    log = rx.Ref(jnp.array(0), "log")

    def loss(x):
        x = record(x, log, jnp.array(1))
        x = record(x, log, jnp.array(2))
        log.value = log.value * 10 + 3
        return record(x, log, jnp.array(4))

    assert outer(rx.filter_grad(inner(loss)))(jnp.array(1.0)) == 1.0
    assert log.value == 1234865


def scanned(fn):
    def loss(x, log):
        return rx.scan(lambda c, i: (fn(c, log, i), None), x, jnp.arange(1, 4))[0]

    return loss


def looped(fn):
    return lambda x, log: rx.fori_loop(1, 4, lambda i, c: fn(c, log, i), x)


def branching(fn):
    def loss(x, log):
        def step(c, i):
            return rx.cond(i == 2, lambda c: fn(c, log, i), lambda c: c, c), None

        return rx.scan(step, x, jnp.arange(1, 4))[0]

    return loss


def in_lanes(fn):
    # Each lane writes the same: one value for all.
    def loss(x, log):
        return jnp.sum(rx.filter_vmap(lambda y: fn(y * x, log))(jnp.arange(2.0)))

    return loss


@pytest.mark.parametrize(
    "make, log_of_calls",
    [
        (lambda f: scanned(f), [1, 2, 3]),
        (lambda f: scanned(rx.filter_checkpoint(f)), [1, 2, 3]),
        (lambda f: rx.filter_checkpoint(scanned(rx.filter_jit(f))), [1, 2, 3]),
        (lambda f: looped(f), [1, 2, 3]),
        (lambda f: branching(f), [2]),
        (lambda f: in_lanes(scanned(f)), [1, 2, 3]),
        (lambda f: in_lanes(rx.filter_jit(scanned(f))), [1, 2, 3]),
    ],
    ids=["scan", "scan-ckpt", "ckpt-scan-jit", "fori", "cond", "vmap", "vmap-jit"],
)
def test_backward_writes_through_other_transforms(make, log_of_calls):
    @rx.filter_custom_vjp
    def record(x, log, i):
        log.value = log.value * 7 + i
        return x

    @record.def_fwd
    def _(perturbed, x, log, i):
        log.value = log.value * 7 + i
        return x, i

    @record.def_bwd
    def _(i, grad, perturbed, x, log, same_i):
        log.value = log.value * 5 + i
        return grad

    expected = 0
    for i in log_of_calls:
        expected = expected * 7 + i
    for i in reversed(log_of_calls):
        expected = expected * 5 + i
    log = rx.Ref(jnp.array(0), "log")
    rx.filter_grad(make(record))(jnp.array(1.0), log)
    assert log.value == expected


def test_under_scan_the_state_is_threaded_through_the_steps():
    model = make_state()

    def loss(model, xs):
        def step(carry, x):
            return carry, watched(model, model["w"].value * x) ** 2

        _, ys = rx.scan(step, None, xs)
        return jnp.sum(ys)

    for fn in (loss, rx.filter_jit(loss)):
        grads = rx.filter_grad(fn, wrt="params")(model, xs)
        assert grads["w"].value == 40.0
    assert model["amax"].value == 12.0 and model["n"].value == 4


def test_under_scan_with_checkpoint_and_cond():
    model = make_state()

    @rx.filter_checkpoint
    def layer(model, x):
        return watched(model, model["w"].value * x) ** 2

    def loss(model, xs):
        def step(carry, x):
            y = rx.cond(x > 2, lambda m: layer(m, x), lambda m: m["w"].value * x, model)
            return carry + y, None

        return rx.scan(step, jnp.array(0.0), xs)[0]

    grads = rx.filter_grad(loss, wrt="params")(model, jnp.array([1.0, 3.0, 4.0]))
    assert grads["w"].value == 1 + 4 * 9 + 4 * 16
    assert model["amax"].value == 16.0 and model["n"].value == 2


def test_under_vmap_with_one_value_for_all_lanes():
    @rx.filter_custom_vjp
    def watch_all(x, amax):
        return x

    watch_all.def_fwd(lambda perturbed, x, amax: (x, None))

    @watch_all.def_bwd
    def _(residuals, grad, perturbed, x, amax):
        largest = jax.lax.pmax(jnp.abs(grad), "batch")
        amax.value = jnp.maximum(amax.value, largest)
        return grad

    def loss(model, xs):
        def one(model, x):
            return watch_all(model["w"].value * x, model["amax"]) ** 2

        axes = (None, 0)
        return jnp.sum(rx.filter_vmap(one, in_axes=axes, axis_name="batch")(model, xs))

    for wrap in (bare, rx.filter_jit):
        model = make_state()
        grads = wrap(rx.filter_grad(loss, wrt="params"))(model, xs)
        assert grads["w"].value == 40.0 and model["amax"].value == 12.0


@pytest.mark.parametrize("inner", [bare, rx.filter_jit, rx.filter_checkpoint])
def test_under_vmap_the_gradient_of_what_is_broadcast_is_the_sum(inner):
    @rx.filter_custom_vjp
    def product(wx, amax):
        return wx[0].value * wx[1]

    product.def_fwd(lambda perturbed, wx, amax: (wx[0].value * wx[1], None))

    @product.def_bwd
    def _(residuals, grad, perturbed, wx, amax):
        w, x = wx
        amax.value = jnp.maximum(amax.value, jax.lax.pmax(jnp.abs(grad), "batch"))
        return grad * x, grad * w.value

    def loss(w, amax, xs):
        one = inner(lambda x: product((w, x), amax) ** 2)
        return jnp.sum(rx.filter_vmap(one, axis_name="batch")(xs))

    w, amax = rx.Ref(jnp.array(2.0), "params"), rx.Ref(jnp.array(0.0), "fp8")
    grads = rx.filter_grad(loss, wrt="params")(w, amax, xs)
    assert grads.value == 40.0 and amax.value == 12.0


@pytest.mark.parametrize("inner", [bare, rx.filter_jit, rx.filter_checkpoint])
def test_under_vmap_a_value_for_each_lane_is_refused_or_mapped(inner):
    def loss(model, xs, in_axes):
        @inner
        def one(model, x):
            return watched(model, model["w"].value * x) ** 2

        return jnp.sum(rx.filter_vmap(one, in_axes=(in_axes, 0))(model, xs))

    model = make_state()
    match = "`watch` writes .*'fp8'.*broadcast by `filter_vmap`.*along the mapped axis"
    with raises(rx.StructureError, match=match):
        with jax.check_tracer_leaks(False):
            rx.filter_grad(loss, wrt="params")(model, xs, None)
    assert model["amax"].value == 0.0
    # The remedy: map it.
    model["amax"].value, model["n"].value = jnp.zeros(2), jnp.zeros(2, int)
    axes = rx.axes(fp8=0, default=None)
    rx.filter_grad(loss, wrt="params")(model, xs, axes)
    assert jnp.array_equal(model["amax"].value, jnp.array([4.0, 12.0]))
    assert jnp.array_equal(model["n"].value, jnp.ones(2, int))


def test_inside_of_vmap_each_lane_has_its_own_state():
    def step(model, x):
        def loss(model, x):
            model["amax"].value = jnp.array(0.0)
            return watched(model, model["w"].value * x) ** 2

        return rx.filter_grad(loss, wrt="params")(model, x)["w"].value

    model = make_state()
    model["amax"].value, model["n"].value = jnp.zeros(2), jnp.zeros(2, int)
    axes = rx.axes(fp8=0, default=None)
    of_w = rx.filter_vmap(step, in_axes=(axes, 0))(model, xs)
    assert jnp.array_equal(of_w, jnp.array([4.0, 36.0]))
    assert jnp.array_equal(model["amax"].value, jnp.array([4.0, 12.0]))


@pytest.mark.parametrize(
    "value",
    [
        jnp.array([-3, 2**31 - 1], jnp.int32),
        jnp.array([200, 255], jnp.uint8),
        jnp.array([True, False]),
        jnp.array([1.5, -0.1], jnp.bfloat16),
        jnp.array([1 + 2j, -3j]),
        {"a": jnp.array(1e30), "b": (jnp.array(-7, jnp.int16), "text")},
        0.5,
    ],
    ids=lambda v: str(jnp.result_type(v)) if eqx.is_array_like(v) else "tree",
)
def test_values_of_every_type_come_out_exactly(value):
    state = rx.Ref(jax.tree.map(lambda x: x, value), "fp8")

    @rx.filter_custom_vjp
    def f(x, state):
        return x

    f.def_fwd(lambda perturbed, x, state: (x, None))
    flipped = jax.tree.map(
        lambda x: x[::-1] if eqx.is_array(x) and x.ndim else x, value
    )

    @f.def_bwd
    def _(residuals, grad, perturbed, x, state):
        assert eqx.tree_equal(
            jax.tree.structure(state.value), jax.tree.structure(value)
        )
        state.value = jax.tree.map(
            lambda x: x[::-1] if eqx.is_array(x) and x.ndim else x, state.value
        )
        return grad

    rx.filter_grad(f)(jnp.array(1.0), state)
    for a, b in zip(jax.tree.leaves(state.value), jax.tree.leaves(flipped)):
        assert a == b if isinstance(b, str) else jnp.array_equal(a, b)


def test_second_derivatives():
    model = make_state()

    def loss(x, model):
        return watched(model, x**3)

    def squared(x, model):
        return rx.filter_grad(loss)(x, model) ** 2

    # d/dx (3 x^2)^2 = 36 x^3
    assert rx.filter_grad(squared)(jnp.array(2.0), model) == 288.0
    assert model["n"].value == 1 and model["amax"].value == 1.0


def test_refs_by_closure_of_the_rules():
    amax, scale = rx.Ref(jnp.array(0.0), "fp8"), rx.Ref(jnp.array(3.0))

    @rx.filter_custom_vjp
    def f(x):
        return x * scale.value

    @f.def_fwd
    def _(perturbed, x):
        return x * scale.value, None

    @f.def_bwd
    def _(residuals, grad, perturbed, x):
        amax.value = jnp.abs(grad)
        return grad * scale.value

    assert rx.filter_grad(lambda x: f(x) ** 2)(jnp.array(1.0)) == 18.0
    assert amax.value == 6.0


def test_the_function_is_traced_once_more_when_a_rule_writes(trace_counter):
    def make(rule):
        @rx.filter_custom_vjp
        def f(x, state):
            return x

        f.def_fwd(lambda perturbed, x, state: (x, None))
        f.def_bwd(rule)
        return f

    def writes(residuals, grad, perturbed, x, state):
        state.value = jnp.abs(grad)
        return grad

    for rule, count in ((writes, 2), (lambda r, grad, p, x, s: grad, 1)):
        f = make(rule)
        counted = trace_counter(lambda x, state, f=f: f(x, state) ** 2)
        step = rx.filter_jit(rx.filter_grad(counted))
        state = rx.Ref(jnp.array(0.0), "fp8")
        step(jnp.array(1.0), state)
        step(jnp.array(2.0), rx.Ref(jnp.array(0.0), "fp8"))
        assert counted.counter.count == count


def test_a_backward_pass_that_cannot_bring_the_value_out_is_refused():
    model = make_state()

    def loss(x):
        return watched(model, x)

    match = "backward rule of `watch` writes .*'fp8'.*cannot return the value"
    with raises(rx.StructureError, match=match):
        rx.filter_vjp(loss, jnp.array(1.0))[1](jnp.array(1.0))
    with raises(rx.StructureError, match=match):
        rx.filter_jacrev(loss)(jnp.array(1.0))

    def plain(x):
        return watched(make_state(), x)

    with raises(rx.StructureError, match=match):
        jax.grad(plain)(jnp.array(1.0))
    with raises(rx.StructureError, match=match):
        rx.filter_grad(plain)(jnp.array(1.0))
    # The remedy.
    assert rx.filter_grad(loss)(jnp.array(1.0)) == 1.0 and model["n"].value == 1


def make_vjp(fwd=None, bwd=None):
    @rx.filter_custom_vjp
    def f(x, state, w=None):
        return x * 2

    f.def_fwd(fwd or (lambda perturbed, x, state, w=None: (x * 2, None)))
    f.def_bwd(bwd or (lambda residuals, grad, perturbed, x, state, w=None: grad))
    return f


def test_custom_vjp_refuses():
    x, state = jnp.array(1.0), rx.Ref(jnp.array(0.0), "fp8")
    w = rx.Ref(jnp.array(2.0), "params")

    half = rx.filter_custom_vjp(lambda x: x)
    with raises(RuntimeError, match="`def_fwd` or `def_bwd` has not been called"):
        half(x)
    f = make_vjp()
    with raises(TypeError, match="`filter_custom_vjp` differentiates the first"):
        f(x=x)  # pyright: ignore[reportCallIssue]

    def by_w(xw, state):
        return f(xw[0], state, w=xw[1])

    with raises(
        rx.StructureError, match="no derivative with respect to an unnamed.*'params'"
    ):
        rx.filter_grad(by_w)((x, w), state)
    assert rx.filter_grad(by_w, wrt=rx.path("0"))((x, w), state)[0] == 1.0

    def wrong_shape(residuals, grad, perturbed, x, state, w=None):
        state.value = jnp.zeros(3)
        return grad

    with raises(rx.StructureError, match=r"with f32\[3\], but it holds .*f32\[\]"):
        rx.filter_grad(make_vjp(bwd=wrong_shape))(x, state)

    keeps = make_vjp(fwd=lambda perturbed, x, state, w=None: (x * 2, {"s": state}))
    with raises(rx.StructureError, match=r"residuals of .* at `s`. Residuals"):
        rx.filter_grad(keeps)(x, state)

    pairless = make_vjp(fwd=lambda perturbed, x, state, w=None: x)
    with raises(TypeError, match=r"must return a pair `\(out, residuals\)`"):
        rx.filter_grad(pairless)(x, state)

    other = make_vjp(
        bwd=lambda residuals, grad, perturbed, x, state, w=None: (grad,) * 2
    )
    with raises(rx.StructureError, match="gradient that a backward rule returns"):
        rx.filter_grad(other)(x, state)

    text = make_vjp(fwd=lambda perturbed, x, state, w=None: ((x * 2, "a"), None))
    with raises(rx.StructureError, match="a result of the same structure"):
        with jax.check_tracer_leaks(False):
            rx.filter_grad(rx.filter_jit(text))(x, state)
    assert state.value == 0.0


def test_custom_vjp_is_equinox_without_refs():
    def run(library):
        @library.filter_custom_vjp
        def f(tree, y, *, power):
            return tree["x"] * y, "text", jnp.array(3)

        @f.def_fwd
        def _(perturbed, tree, y, *, power):
            assert perturbed == {"x": True, "n": False, "text": False}
            return (tree["x"] * y, "text", jnp.array(3)), (y, "static")

        @f.def_bwd
        def _(residuals, grad, perturbed, tree, y, *, power):
            res_y, static = residuals
            assert static == "static" and grad[1:] == (None, None)
            return {"x": 5 * grad[0] * res_y**power, "n": None, "text": None}

        tree = {"x": jnp.array(2.0), "n": jnp.array(1), "text": "a"}

        def loss(tree, y):
            return f(tree, y, power=2)[0]

        return library.filter_grad(loss)(tree, jnp.array(3.0))

    assert run(rx) == run(eqx) == {"x": 45.0, "n": None, "text": None}


def test_update_refs_and_clones_inside():
    model = make_state()

    def loss(w, model):
        out = watched(model, w) * 3
        rx.update_refs(model["amax"], jnp.array(2.0))
        copy = rx.clone(model["amax"])
        assert repr(copy) == repr(rx.Ref(copy.value, "fp8"))
        return out, copy

    grads, copy = rx.filter_grad(loss, has_aux=True)(jnp.array(1.0), model)
    assert grads == 3.0 and model["n"].value == 1
    assert model["amax"].value == 3.0 and copy.value == 2.0
    assert type(copy) is rx.Ref


@pytest.mark.parametrize("wrap", [bare, rx.filter_jit])
def test_a_rule_may_not_reach_a_ref_that_it_is_not_given(wrap):
    """It would be stale when the rule is not run again."""
    plain = types.SimpleNamespace(ref=rx.Ref(jnp.array(2.0), "state"))

    @rx.filter_custom_jvp
    def f(x):
        return 1.0 * x

    @f.def_jvp
    def _(primals, tangents):
        return f(*primals), tangents[0] * plain.ref.value

    with raises(rx.TraceLevelError, match="'state'.*was not passed in"):
        wrap(rx.filter_grad(f))(jnp.array(1.0))


def test_a_rule_of_a_class_is_had_from_the_class():
    class Scale(rx.Module):
        by: rx.Param[jax.Array]

        @rx.filter_custom_jvp
        def __call__(self, x):
            return self.by.value * x

    @Scale.__call__.def_jvp
    def _(primals, tangents):
        scale, x = primals
        return scale(x), 10 * tangents[1]

    scale = Scale(jnp.array(2.0))
    assert Scale.__call__(scale, jnp.array(3.0)) == 6.0
    assert rx.filter_grad(lambda x: scale(x))(jnp.array(3.0)) == 10.0


def test_a_backward_write_beside_an_array_without_elements():
    @rx.filter_custom_vjp
    def f(x, empty, count):
        return 2.0 * x + jnp.sum(empty)

    @f.def_fwd
    def _(perturbed, x, empty, count):
        return f(x, empty, count), None

    @f.def_bwd
    def _(residuals, grad, perturbed, x, empty, count):
        count.value += grad
        return 2.0 * grad

    count = rx.Ref(jnp.array(0.0))
    grad = rx.filter_grad(f)(jnp.array(1.0), jnp.zeros(0), count)
    assert grad == 2.0 and count.value == 1.0
