"""Wrong inputs of loops, derivatives and callbacks: our error, and nothing has changed."""

# A static checker objects to what is wrong on purpose here, or made at run time.
# pyright: reportArgumentType=false

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from raising import raises

import refx_eqx as rx


@pytest.mark.parametrize("length", [2.7, "3", 2.0, jnp.array(2.0)])
def test_a_length_is_a_whole_number(length):
    match = "`scan`: `length` must be an integer .* Pass an `int`."
    with raises(TypeError, match=match):
        rx.scan(lambda c, x: (c, x), 1.0, None, length)
    with raises(ValueError, match="`length` must be at least 0, but is -1"):
        rx.scan(lambda c, x: (c, x), 1.0, None, -1)
    for right in (3, np.int64(3), jnp.array(3)):
        assert rx.scan(lambda c, _: (c + 1, None), 0, None, right)[0] == 3


def test_bounds_of_a_loop_are_whole_numbers():
    def count(lower, upper):
        return rx.fori_loop(lower, upper, lambda i, c: c + i, 0)

    for lower, upper in [(0, 2.5), (0.0, 2), ("0", 3), (0, None), (0, jnp.arange(2))]:
        with raises(TypeError, match="`fori_loop`: `.*` must be an integer"):
            count(lower, upper)
    with raises(TypeError, match="`upper` must be a scalar integer, but is"):
        rx.filter_jit(count)(0, jnp.array(2.5))
    assert count(np.int32(1), 4) == 6
    assert rx.filter_jit(lambda n: count(0, n.astype(int)))(jnp.array(4.0)) == 6


@pytest.mark.parametrize(
    "size, error",
    [("a", TypeError), (2.5, TypeError), (0, ValueError), (-1, ValueError)],
)
def test_a_batch_has_a_size(size, error):
    with raises(error, match="`map`: `batch_size` must be"):
        rx.map(lambda x: x, jnp.arange(3), batch_size=size)


def test_a_counter_counts_batches_or_elements():
    batches, elements = rx.Ref(jnp.array(0)), rx.Ref(jnp.zeros(5, int))

    def f(x):
        x, element = x
        batches.value += 1
        element.value += 1
        return x

    rx.map(f, (jnp.arange(5), elements), batch_size=2)
    assert batches.value == 3 and jnp.sum(elements.value) == 5


@pytest.mark.parametrize("elems", [None, (), "abc", {"a": None}, 1.0])
def test_an_associative_scan_has_arrays(elems):
    with raises(ValueError, match="`associative_scan`: `elems` must have arrays"):
        rx.associative_scan(lambda a, b: a, elems)
    with raises(ValueError, match="all with an axis 1 to scan along"):
        rx.associative_scan(jnp.add, jnp.arange(3), axis=1)


def test_primals_are_a_tuple():
    ref = rx.Ref(jnp.array(2.0))
    with raises(TypeError, match=r"primals must be a tuple.* `\(primal,\)`"):
        rx.filter_jvp(lambda r: r.value, ref, (jnp.array(1.0),))
    with raises(TypeError, match=r"tangents must be a tuple.* `\(tangent,\)`"):
        rx.filter_jvp(lambda r: r.value, (ref,), jnp.array(1.0))
    assert rx.filter_jvp(lambda r: r.value, (ref,), (jnp.array(1.0),))[1] == 1.0


def test_a_gradient_of_a_wrong_shape_is_named():
    model = {"w": rx.Ref(jnp.array(2.0), "params")}

    @rx.filter_custom_vjp
    def f(model):
        return model["w"].value

    f.def_fwd(lambda perturbed, model: (model["w"].value, None))
    f.def_bwd(lambda residuals, grad, perturbed, model: {"w": jnp.ones(3)})
    match = r"backward rule of .*f` returns f32\[3\] as the gradient by .*'params'.*same shape"
    with raises(rx.StructureError, match=match):
        rx.filter_grad(f)(model)


@pytest.mark.parametrize("wrap", [lambda f: f, rx.filter_jit])
def test_a_failing_callback_raises_its_own_error(wrap):
    ref = rx.Ref(jnp.array(2.0), "params")
    result = jax.ShapeDtypeStruct((), jnp.float32)

    def call(callback):
        def f(ref, x):
            ref.value = x
            return rx.filter_pure_callback(callback, ref, result_shape_dtypes=result)

        return wrap(f)(ref, jnp.array(3.0))

    class Mine(Exception):
        pass

    def fails(ref):
        raise Mine("this one")

    def writes(ref):
        ref.value = 1.0
        return np.float32(0)

    for _ in range(3):
        with raises(Mine, match="this one"):
            call(fails)
    with raises(rx.StructureError, match="A pure callback cannot write"):
        call(writes)
    with raises(rx.StructureError, match="must return what `result_shape_dt"):
        call(lambda ref: "text")
    assert call(lambda ref: np.asarray(ref.value)) == 3.0


def test_a_tree_changed_in_place_where_it_may_only_be_read():
    ref = rx.Ref({"a": jnp.array(1.0)}, "state")
    read = rx.filter_jit(lambda r: r.value["a"])
    for _ in range(3):  # from now on by a plan
        assert read(ref) == 1.0

    def f(x):
        ref.value.update(a=x)
        return x

    with jax.check_tracer_leaks(False):
        jax.vmap(f)(jnp.arange(3.0))
    match = (
        "'state'.*: a list or a dict in its value was changed in place.*`ref.value = "
    )
    with raises(rx.TraceLevelError, match=match):
        _ = ref.value
    with raises(rx.TraceLevelError, match=match):
        read(ref)
    # The remedy.
    ref.value = {"a": jnp.array(2.0)}
    assert read(ref) == 2.0


def test_the_deprecated_ways_to_set_rules():
    def run(library_vjp, library_jvp):
        f = library_vjp(lambda x, n: {"y": x * n, "n": n})
        g = library_jvp(lambda x, y: x * y)
        with pytest.warns(
            DeprecationWarning, match="is deprecated, as in Equinox. Use"
        ):
            f.defvjp(
                lambda x, n: ({"y": x * n, "n": n}, n),
                lambda n, grad, x, same_n: 5 * grad["y"] * n,
            )
        with pytest.warns(
            DeprecationWarning, match="is deprecated, as in Equinox. Use"
        ):
            g.defjvp(lambda p, t: (p[0] * p[1], 7 * t[0] + t[1]))
        x, y = jnp.array(2.0), jnp.array(3.0)
        return (
            rx.filter_grad(lambda x: f(x, jnp.array(3.0))["y"])(x),
            rx.filter_grad(g)(x, y),
        )

    assert run(rx.filter_custom_vjp, rx.filter_custom_jvp) == (15.0, 7.0)


@pytest.mark.parametrize("xs", [None, "a", {"a": 1.0}])
def test_nothing_to_slice_is_refused_and_the_remedies_run(xs):
    ref = rx.Ref(jnp.array(0.0))

    def step(x):
        ref.value += 1.0
        return x

    with raises(ValueError, match=r"Pass an array, such as `jnp\.arange\(n\)`\.$"):
        rx.map(step, xs)
    text = r"nothing to slice.* Pass an array, such as `jnp\.arange\(n\)`, or give `length`\.$"
    with raises(ValueError, match=text):
        rx.scan(lambda c, x: (c, step(x)), None, xs)
    assert ref.value == 0.0
    rx.map(step, jnp.arange(3))
    rx.scan(lambda c, x: (c, step(x)), None, jnp.arange(2))
    rx.scan(lambda c, x: (c, step(x)), None, length=2)
    assert ref.value == 7.0
