"""`filter_make_jaxpr`, `filter_closure_convert`, `filter_pure_callback`."""

import functools

import equinox as eqx
import jax
import jax.extend.core
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from raising import raises

import refx_eqx as rx
from refx_eqx._engine._run_time_errors import _callback_errors, _MAX_CALLBACK_ERRORS


def test_make_jaxpr_without_refs_is_that_of_equinox():
    def f(tree, x, *, flag):
        return {"a": tree["x"] * x, "flag": flag, "n": 3}

    args = {"x": jnp.ones(2), "text": "a"}, jax.ShapeDtypeStruct((2,), jnp.float32)
    ours = rx.filter_make_jaxpr(f)(*args, flag=True)
    theirs = eqx.filter_make_jaxpr(f)(*args, flag=True)
    assert str(ours[0]) == str(theirs[0])
    assert ours[1:] == theirs[1:]


def test_make_jaxpr_takes_derefed_leaves_and_returns_what_is_written():
    w, count, held = (
        rx.Ref(jnp.array([1.0, 2.0])),
        rx.Ref(jnp.array(0)),
        rx.Ref(jnp.array(5.0)),
    )

    def f(model, x):
        model["count"].value += 1
        return rx.Ref(model["w"].value * x * held.value), model["w"], "text"

    model, x = {"count": count, "w": w, "z": w}, jnp.array(3.0)
    jaxpr, struct, static = rx.filter_make_jaxpr(f)(model, x)
    assert count.value == 0
    inputs = [*jax.tree.leaves(rx.deref((model, x))), held.value]
    made, same, new_count = jax.extend.core.jaxpr_as_fun(jaxpr)(*inputs)
    assert jnp.array_equal(made, jnp.array([15.0, 30.0]))
    assert jnp.array_equal(same, w.value) and new_count == 1
    assert struct[0].value.shape == struct[1].value.shape == (2,)
    assert struct[2] is None and static == (None, None, "text")


def test_closure_convert_reads_and_writes_the_same_refs():
    w, count = rx.Ref(jnp.array(2.0), "params"), rx.Ref(jnp.array(0))

    def f(count, x):
        count.value += 1
        return w.value * x

    converted = rx.filter_closure_convert(f, count, jnp.array(1.0))
    assert count.value == 0
    assert converted(count, jnp.array(3.0)) == 6.0 and count.value == 1
    w.value = jnp.array(5.0)
    other = rx.Ref(jnp.array(7))
    assert converted(other, jnp.array(3.0)) == 15.0
    assert other.value == 8 and count.value == 1
    # It is a pytree, so a lifted transform carries the refs in it.
    assert rx.filter_jit(lambda c, n, x: c(n, x))(converted, count, jnp.array(1.0)) == 5
    assert count.value == 2


def test_closure_convert_hoists_tracers_and_is_traced_once(trace_counter):
    counted = trace_counter(lambda a, y: a + y)

    @jax.grad
    def f(x):
        z = x * 2
        g = rx.filter_closure_convert(lambda a: counted(a, z), x)
        assert [c is z for c in g.consts] == [True]
        return g(x) + g(x)

    assert f(1.0) == 6.0
    assert counted.counter.count == 1


def test_closure_convert_makes_arrays_of_constants():
    def f(ref):
        ref.value = jnp.asarray(0.5)
        return jnp.asarray(3.0), rx.Ref(jnp.asarray(2.0))

    ref = rx.Ref(jnp.array(1.0))
    out, made = rx.filter_closure_convert(f, ref)(ref)
    for x, value in ((out, 3.0), (made.value, 2.0), (ref.value, 0.5)):
        assert isinstance(x, jax.Array) and x.weak_type and x == value


def test_closure_convert_refuses_other_arguments():
    a, b = rx.Ref(jnp.array(1.0)), rx.Ref(jnp.array(2.0))

    def f(a, b):
        a.value = b.value
        return a.value

    converted = rx.filter_closure_convert(f, a, b)
    match = "`.*f` was closure-converted for arguments of another structure"
    with raises(rx.StructureError, match=match):
        converted(a, a)
    with raises(rx.StructureError, match=match):
        converted(a, rx.Ref(jnp.ones(2)))
    # The remedy: convert it again.
    assert rx.filter_closure_convert(f, a, a)(a, a) == 1.0


@pytest.mark.parametrize("wrap", [lambda f: f, rx.filter_jit], ids=["eager", "jit"])
def test_pure_callback_reads_the_values_of_the_moment(wrap):
    w, hidden = rx.Ref(jnp.array(2.0), "params"), rx.Ref(jnp.array(10.0))

    def host(tree, x, *, scale):
        total = np.asarray(tree["w"].value) * np.asarray(x) + np.asarray(hidden.value)
        return {"y": np.float32(total * scale), "text": "a"}

    @wrap
    def f(w, x):
        w.value = w.value + 1.0
        return rx.filter_pure_callback(
            host,
            {"w": w},
            x,
            scale=2,
            result_shape_dtypes={"y": jax.ShapeDtypeStruct((), "float32"), "text": "a"},
        )

    assert f(w, jnp.array(3.0)) == {"y": 38.0, "text": "a"}
    hidden.value = jnp.array(0.0)
    assert f(w, jnp.array(3.0)) == {"y": 24.0, "text": "a"}


def test_pure_callback_under_vmap():
    w = rx.Ref(jnp.array(2.0), "params")

    def f(w, x):
        return rx.filter_pure_callback(
            lambda w, x: np.float32(np.asarray(w.value) * np.asarray(x)),
            w,
            x,
            result_shape_dtypes=jax.ShapeDtypeStruct((), "float32"),
            vmap_method="sequential",
        )

    out = rx.filter_vmap(f, in_axes=(None, 0))(w, jnp.arange(3.0))
    assert jnp.array_equal(out, 2 * jnp.arange(3.0))


@pytest.mark.parametrize(
    "vectorized, method", [(False, "sequential"), (True, "expand_dims")]
)
def test_pure_callback_says_what_jax_has_instead_of_vectorized(vectorized, method):
    w, shapes = rx.Ref(jnp.array(2.0), "params"), []

    def callback(w, x):
        shapes.append(np.shape(x))
        return np.asarray(w.value * x)

    def f(w, x, **options):
        result = jax.ShapeDtypeStruct((), jnp.float32)
        call = rx.filter_pure_callback
        return call(callback, w, x, result_shape_dtypes=result, **options)

    with raises(
        TypeError,
        match=rf"`filter_pure_callback\(\.\.\., vectorized={vectorized}\)`: JAX has removed "
        rf'this argument\. Pass `vmap_method="{method}"` instead\.',
    ):
        f(w, jnp.array(1.0), vectorized=vectorized)
    assert shapes == []
    lifted = rx.filter_vmap(functools.partial(f, vmap_method=method), in_axes=(None, 0))
    assert jnp.array_equal(lifted(w, jnp.arange(3.0)), 2 * jnp.arange(3.0))
    assert shapes == ([(3,)] if vectorized else [()] * 3)


def test_pure_callback_refuses_writes_and_other_results():
    w = rx.Ref(jnp.array(2.0), "params")
    struct = jax.ShapeDtypeStruct((), "float32")

    def write(w):
        w.value = w.value + 1
        return np.float32(0)

    def call(callback):
        out = rx.filter_pure_callback(callback, w, result_shape_dtypes=struct)
        jax.block_until_ready(out)

    with raises(Exception, match="cannot write .*'params'.*Return the new"):
        call(write)
    with raises(Exception, match="must return what `result_shape_dtypes` says"):
        call(lambda w: "text")
    assert w.value == 2.0


@pytest.mark.parametrize("wrap", [lambda f: f, rx.filter_jit])
@pytest.mark.parametrize("method", [None, "expand_dims"])
@pytest.mark.parametrize(
    "wrong", [np.ones(5, np.float32), np.ones(2, np.int32), None, [np.ones(2)]]
)
def test_pure_callback_names_a_result_of_another_shape_dtype_or_structure(
    wrap, method, wrong
):
    w = rx.Ref(jnp.ones(2), "params")

    @wrap
    def f(w, right):
        return rx.filter_pure_callback(
            lambda w: np.ones(2) if right else wrong,  # in double precision, as for JAX
            w,
            result_shape_dtypes=jax.ShapeDtypeStruct((2,), jnp.float32),
            vmap_method=method,
        )

    text = r"says: ShapeDtypeStruct\(shape=\(2,\), dtype=float32\); it returned "
    with raises(rx.MismatchError, match=text):
        f(w, False)
    assert jnp.array_equal(f(w, True), jnp.ones(2))


def test_what_is_closure_converted_says_what_it_takes():
    x, ref = jnp.ones(3), rx.Ref(jnp.array(2.0), "params")
    plain = lambda x, *, scale, act: act(x["x"]) * scale
    given = dict(scale=np.ones(3), act=jnp.sin)
    equinox = eqx.filter_closure_convert(plain, {"x": x, "n": 2}, **given).in_struct
    ours = rx.filter_closure_convert(plain, {"x": x, "n": 2}, **given).in_struct
    assert ours == equinox
    two = lambda a, b, f: a.value + b.value + f()
    converted = rx.filter_closure_convert(two, ref, ref, lambda: ref.value)
    (first, second, _), kwargs = converted.in_struct
    assert first.value == jax.ShapeDtypeStruct((), jnp.float32)
    assert first.collection == "params" and second.index == first.index and not kwargs
    assert jtu.tree_map(lambda x: x, converted).in_struct == converted.in_struct
    assert hash(jtu.tree_structure(converted)) == hash(jtu.tree_structure(converted))


def test_what_is_closure_converted_says_what_it_returns():
    x, ref = jnp.ones(3), rx.Ref(jnp.array(2.0), "params")

    def plain(x):
        return {"y": jnp.sum(x), "text": "a"}

    equinox = eqx.filter_closure_convert(plain, x).out_struct
    assert rx.filter_closure_convert(plain, x).out_struct == equinox

    def f(ref, x):
        ref.value = ref.value + 1
        return ref, rx.Ref(x, "new"), "text"

    given, new, text = rx.filter_closure_convert(f, ref, x).out_struct
    assert given.value.shape == () and given.collection == "params"
    assert new.value.shape == (3,) and new.collection == "new" and text == "text"


def test_what_callbacks_raised_and_nobody_asked_for_is_not_kept():
    def fail(x):
        raise ValueError("no")

    @jax.jit  # of JAX: it hands the error over as a text
    def run(x):
        return rx.filter_pure_callback(fail, x, result_shape_dtypes=x)

    for _ in range(_MAX_CALLBACK_ERRORS + 2):
        with raises(Exception, match="CallbackFailed"):
            run(jnp.array(1.0))
    assert len(_callback_errors) <= _MAX_CALLBACK_ERRORS
    with raises(ValueError, match="^no"):
        rx.filter_jit(run)(jnp.array(1.0))
