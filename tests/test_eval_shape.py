"""`filter_eval_shape`: what a call would return, without computing it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float
from raising import raises

import refx_eqx as rx


class Tied(rx.Module):
    a: rx.Param[Float[Array, "n n"]]
    b: rx.Param[Float[Array, "n n"]]
    count: rx.Ref[Array] = rx.field(collection="counts")
    name: str

    def __init__(self, n, *, key):
        self.a = jr.normal(key, (n, n))
        self.b = self.a
        self.count = jnp.array(0, jnp.int32)
        self.name = "tied"

    def __call__(self, x):
        self.count.value += 1
        return self.b.value @ x


def _struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_a_module_is_shown_without_being_allocated():
    model = rx.filter_eval_shape(Tied, 100_000, key=jr.key(0))  # 40 GB
    assert isinstance(model, Tied) and model.name == "tied"
    assert model.a.value == _struct(100_000, 100_000)
    assert model.a is model.b
    assert model.a.collection == "params" and model.a.name == "Tied.a"
    assert model.count.value == _struct(dtype=jnp.int32)


def test_a_call_is_shown_and_nothing_is_written():
    model = Tied(3, key=jr.key(0))
    old = model.a.value
    assert rx.filter_eval_shape(lambda m, x: m(x), model, jnp.ones(3)) == _struct(3)
    assert model.count.value == 0 and model.a.value is old


def test_shapes_may_go_in():
    shown = rx.filter_eval_shape(Tied, 3, key=jr.key(0))
    assert rx.filter_eval_shape(lambda m, x: m(x), shown, _struct(3)) == _struct(3)
    assert rx.filter_eval_shape(lambda x: x + 1.0, _struct(2)) == _struct(2)


def test_the_refs_of_the_result_are_new_and_show_what_would_be_written():
    ref, other = rx.Ref(jnp.zeros(3), "params"), rx.Ref(jnp.zeros(2))

    def f(ref, other):
        ref.value = jnp.zeros((4, 4))
        return ref, [ref, other]

    first, (again, kept) = rx.filter_eval_shape(f, ref, other)
    assert first is again and first is not ref
    assert first.value == _struct(4, 4) and first.collection == "params"
    assert kept is not other and kept.value == _struct(2)
    assert ref.shape == (3,)


def test_static_values_are_the_same():
    out = rx.filter_eval_shape(lambda x, flag: (x, flag, "text"), jnp.ones(2), True)
    assert out == (_struct(2), True, "text")


def test_the_shown_model_is_filled_from_a_checkpoint(tmp_path):
    model = Tied(3, key=jr.key(0))
    path = tmp_path / "model.eqx"
    eqx.tree_serialise_leaves(path, rx.deref(model))
    like = rx.filter_eval_shape(Tied, 3, key=jr.key(1))
    loaded = rx.reref(eqx.tree_deserialise_leaves(path, rx.deref(like)))
    assert jnp.array_equal(loaded.a.value, model.a.value)
    assert loaded.a is loaded.b


def test_a_shape_error_is_raised():
    model = Tied(3, key=jr.key(0))
    with raises(TypeError, match="dot_general"):
        rx.filter_eval_shape(lambda m, x: m(x), model, _struct(4))


def test_it_nests():
    model = Tied(3, key=jr.key(0))

    @rx.filter_jit
    def outer(model, x):
        shown = rx.filter_eval_shape(lambda m, x: m(x), model, x)
        return jnp.zeros(shown.shape)

    assert outer(model, jnp.ones(3)).shape == (3,)
    assert model.count.value == 0
    grads = rx.filter_eval_shape(
        rx.filter_grad(lambda m, x: jnp.sum(m(x)), wrt="params"), model, jnp.ones(3)
    )
    assert grads.a.value == _struct(3, 3)
    assert model.count.value == 0


def test_a_global_ref_is_refused():
    global _global_ref
    _global_ref = rx.Ref(jnp.zeros(2))
    with raises(rx.TraceLevelError, match="the body of `filter_eval_shape`"):
        rx.filter_eval_shape(lambda: _global_ref.value)
