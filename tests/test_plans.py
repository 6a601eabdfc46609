"""What a repeated call notices inside a module or a function that it already knows."""

import types
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array, Float
from raising import raises

import refx_eqx as rx
from refx_eqx._engine import _fast_path


class Box:
    """A node that may change."""

    def __init__(self, x):
        self.x = x


class Fresh(Box):
    """One whose children are new each time that it is flattened."""


jax.tree_util.register_pytree_node(Box, lambda b: ((b.x,), None), lambda _, c: Box(*c))
jax.tree_util.register_pytree_node(
    Fresh, lambda b: ((jnp.array(b.x),), None), lambda _, c: Fresh(*c)
)


class Holder(eqx.Module):
    held: Any
    ref: rx.Ref


@pytest.mark.parametrize("make", [Box, Fresh])
def test_a_node_that_changes_below_a_module(make, trace_counter):
    f = trace_counter(lambda holder: holder.ref.value * holder.held.x)
    step = rx.filter_jit(f)
    holder = Holder(make(jnp.array(2.0)), rx.Ref(jnp.array(1.0)))
    for _ in range(4):
        assert step(holder) == 2.0
    holder.held.x = jnp.array(3.0)
    for _ in range(3):
        assert step(holder) == 3.0
    assert f.counter.count == 1


def test_a_default_that_is_another_ref(trace_counter):
    two, three = rx.Ref(jnp.array(2.0)), rx.Ref(jnp.array(3.0))

    def scale(x, by=two):
        return x * by.value

    f = trace_counter(lambda fn, x: fn(x))
    step = rx.filter_jit(f)
    for _ in range(4):
        assert step(scale, jnp.array(1.0)) == 2.0
    scale.__defaults__ = (three,)
    for _ in range(3):
        assert step(scale, jnp.array(1.0)) == 3.0
    assert f.counter.count == 1


def test_a_keyword_default_that_is_another_ref():
    one, five = rx.Ref(jnp.array(1.0)), rx.Ref(jnp.array(5.0))

    def add(x, *, to=one):
        to.value = to.value + x

    step = rx.filter_jit(add)
    for _ in range(4):
        step(jnp.array(1.0))
    add.__kwdefaults__ = {"to": five}
    step(jnp.array(1.0))
    assert one.value == 5.0 and five.value == 6.0


class Two(rx.Module):
    array: rx.Param[Float[Array, "2"]]


def test_a_ref_that_is_declared_between_two_calls():
    @rx.filter_jit
    def lengthen(ref):
        ref.value = jnp.zeros(3)

    ref = rx.Ref(jnp.ones(2), "params")
    for _ in range(4):
        lengthen(ref)
        ref.value = jnp.ones(2)
    Two(ref)
    with raises(rx.RefTypeError, match=r"`Two.array`.*cannot hold f32\[3\]"):
        lengthen(ref)
    assert ref.value.tolist() == [1.0, 1.0]


def test_a_closure_variable_that_is_deleted():
    y = 2.0

    def scale(x):
        return x * y

    def forget():
        nonlocal y
        del y

    step, ref = rx.filter_jit(lambda fn, ref: fn(ref.value)), rx.Ref(jnp.array(1.0))
    for _ in range(4):
        assert step(scale, ref) == 2.0
    forget()
    with raises(NameError, match="'y'"):
        step(scale, ref)


def test_a_ref_that_gets_a_collection_between_two_calls():
    ref = rx.Ref(jnp.array(1.0))

    @rx.filter_jit
    def step(ref):
        return ref.value * (2.0 if ref.collection == "params" else 1.0)

    class Model(rx.Module):
        w: rx.Param[jax.Array]

    for _ in range(4):
        assert step(ref) == 1.0
    Model(ref)
    for _ in range(3):
        assert step(ref) == 2.0


def test_a_bound_method_of_a_list(trace_counter):
    f = trace_counter(lambda method, x: method(x))
    step, refs = rx.filter_jit(f), [rx.Ref(jnp.array(2.0))]
    method = types.MethodType(lambda refs, x: refs[0].value * x, refs)
    for i in range(4):
        assert step(method, jnp.array(float(i))) == 2.0 * i
    refs[0] = rx.Ref(jnp.array(3.0))
    for i in range(4):
        assert step(method, jnp.array(float(i))) == 3.0 * i
    assert f.counter.count == 1


class Named(eqx.Module):
    ref: rx.Ref
    names: list[str] = eqx.field(static=True)


def test_a_static_field_that_has_no_hash(trace_counter):
    f = trace_counter(lambda named: named.ref.value * len(named.names))
    step, named = rx.filter_jit(f), Named(rx.Ref(jnp.array(1.0)), ["a", "b"])
    for _ in range(4):
        assert step(named) == 2.0
    assert step(Named(rx.Ref(jnp.array(1.0)), ["a"])) == 1.0
    assert f.counter.count == 2


def test_keys_that_cannot_be_sorted_are_refused_as_by_jax():
    step = rx.filter_jit(lambda d: d[0])
    for _ in range(3):
        with raises(ValueError, match="sorting pytree dictionary keys"):
            step({0: jnp.array(1.0), "x": jnp.array(2.0)})


def test_a_float_that_is_not_a_number_is_known_again():
    step: Any = rx.filter_jit(lambda ref, x: ref.value + x)
    ref = rx.Ref(jnp.array(1.0))
    for _ in range(4):
        assert jnp.isnan(step(ref, float("nan")))  # an object of its own each time
    assert len(step._plans._plans) == 1


def test_a_variable_that_a_function_inside_of_the_function_rebinds(trace_counter):
    """A side effect, once a trace, and no input."""
    count, ref = 0, rx.Ref(jnp.array(2.0))

    def scale(x):
        def note():
            nonlocal count
            count += 1

        note()
        return ref.value * x

    f = trace_counter(lambda fn, x: fn(x))
    step = rx.filter_jit(f)
    for _ in range(4):
        assert step(scale, jnp.array(1.0)) == 2.0
    assert f.counter.count == count == 1


def _scale_by_default(ref):
    return lambda x, ref=ref: x * ref.value


def _scale_by_closure(ref):
    return lambda x: x * ref.value


class Scale(rx.Module):
    ref: rx.Ref

    def __call__(self, x):
        return x * self.ref.value


@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize("make", [_scale_by_default, _scale_by_closure, Scale])
@pytest.mark.parametrize("is_there_before", [True, False])
def test_a_variable_that_a_function_may_rebind_and_that_is_rebound_elsewhere(
    make, is_kept, is_there_before, trace_counter
):
    two, three = (make(rx.Ref(jnp.array(x))) for x in (2.0, 3.0))
    ref = rx.Ref(jnp.array(1.0))
    scale = two if is_there_before else None
    kept = [two] if is_kept else []
    del two

    def apply(x):
        nonlocal scale
        if x is None:
            scale = None
        return (x if scale is None else scale(x)) * ref.value  # pyright: ignore[reportOptionalOperand]

    def rebind(new):
        nonlocal scale
        scale = new

    f = trace_counter(apply)
    step = rx.filter_jit(lambda x: f(x))
    for _ in range(4):
        assert step(jnp.array(1.0)) == (2.0 if is_there_before else 1.0)
    rebind(three)
    for _ in range(4):
        assert step(jnp.array(1.0)) == 3.0
    assert f.counter.count == (1 if is_there_before else 2)
    assert len(kept) == is_kept


@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize("is_there_before", [True, False])
def test_a_function_without_refs_in_a_variable_that_its_user_may_rebind(
    is_kept, is_there_before
):
    def times(n):
        return lambda x: x * n

    scale = times(2.0) if is_there_before else None
    kept = [scale] if is_kept else []

    def apply(x):
        nonlocal scale
        if x is None:
            scale = None
        return x if scale is None else scale(x)

    step, ref = rx.filter_jit(lambda fn, ref: fn(ref.value)), rx.Ref(jnp.array(1.0))
    for _ in range(4):
        assert step(apply, ref) == (2.0 if is_there_before else 1.0)
    scale = times(3.0)
    for _ in range(4):
        assert step(apply, ref) == 3.0
    assert len(kept) == is_kept


def test_a_function_that_is_gone():
    box = [_scale_by_closure(rx.Ref(jnp.array(2.0)))]
    holder = Holder(eqx.nn.Lambda(box.pop()), rx.Ref(jnp.array(1.0)))
    step = rx.filter_jit(lambda holder, x: holder.held(x) * holder.ref.value)
    for _ in range(4):
        assert step(holder, jnp.array(1.0)) == 2.0
    # Past the guard of its type, so that only the function itself can tell.
    new = _scale_by_closure(rx.Ref(jnp.array(3.0)))
    object.__setattr__(holder.held, "fn", new)
    for _ in range(4):
        assert step(holder, jnp.array(1.0)) == 3.0


def test_what_changes_at_each_call_is_planned_a_bounded_number_of_times(monkeypatch):
    made = []
    make_plan = _fast_path.make_plan

    def counted(*args):
        made.append(args)
        return make_plan(*args)

    monkeypatch.setattr(_fast_path, "make_plan", counted)
    monkeypatch.setattr(_fast_path, "_MAX_REMADE", 3)
    step = rx.filter_jit(lambda holder: holder.ref.value * holder.held[0])
    holder = Holder([0.0, 1.0], rx.Ref(jnp.array(2.0)))
    for _ in range(6):
        assert step(holder) == 0.0
    assert len(made) == 1
    for i in range(12):
        holder.held[0] = jnp.array(float(i))
        assert step(holder) == 2.0 * i
    assert 1 < len(made) <= 3


def test_a_shape_is_a_static_argument():
    step = rx.filter_jit(lambda shape, ref: ref.value.reshape(shape.shape))
    ref = rx.Ref(jnp.arange(4.0))
    for shape in [(2, 2), (2, 2), (4, 1), (2, 2)]:
        out = step(jax.ShapeDtypeStruct(shape, jnp.float32), ref)
        assert out.shape == shape
