"""A function that holds refs is part of a tree, for everything that looks at the tree."""

import functools
import types
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from raising import raises

import refx_eqx as rx


def with_closure(w, b):
    scale = 2.0

    def f(x):
        return (x * w[...] + b[...]) * scale

    return f


def closing(w, b):
    return with_closure(w, b)


def partial(w, b):
    return functools.partial(lambda w, x, b: (x * w[...] + b[...]) * 2.0, w, b=b)


def nested(w, b):
    inner = with_closure(w, b)
    return lambda x: inner(x)


def default(w, b):
    return lambda x, w=w, b=b: (x * w[...] + b[...]) * 2.0


class Affine(rx.Module):
    w: rx.Param[jax.Array]
    b: rx.Param[jax.Array]

    def apply(self, x):
        return (x * self.w[...] + self.b[...]) * 2.0


def method(w, b):
    return types.MethodType(
        lambda pair, x: (x * pair[0][...] + pair[1][...]) * 2.0, [w, b]
    )


PLACES = {
    closing: ("f.b", "f.w"),
    partial: ("f.args.0", "f.keywords.b"),
    nested: ("f.inner.b", "f.inner.w"),
    default: ("f.__defaults__.0", "f.__defaults__.1"),
    method: ("f.__self__.0", "f.__self__.1"),
}


@pytest.fixture(params=PLACES, ids=lambda make: make.__name__)
def make(request):
    return request.param


def refs():
    return rx.Ref(jnp.array(3.0), "params"), rx.Ref(jnp.array(1.0), "params")


def model_of(make):
    w, b = refs()
    return {"f": make(w, b), "n": rx.Ref(jnp.array(0), "counts")}, w, b


def test_aliases_name_the_places_in_a_function(make):
    model, w, b = model_of(make)
    found = {place for places in rx.aliases(model).values() for place in places}
    assert found == {*PLACES[make], "n"}
    assert {w, b} < set(rx.aliases(model))


def test_state_dict_has_what_a_function_holds_and_loads_it(make):
    model, _w, _b = model_of(make)
    state = rx.state_dict(model, "params")
    assert set(state) == set(PLACES[make])
    other, w2, b2 = model_of(make)
    w2.value, b2.value = jnp.array(0.0), jnp.array(0.0)
    rx.load_state_dict(other, state, "params")
    assert other["f"](1.0) == model["f"](1.0) == 8.0


def test_a_clone_has_functions_of_its_own(make):
    model, w, _b = model_of(make)
    copy = rx.clone(model)
    w.value = jnp.array(0.0)
    assert copy["f"](1.0) == 8.0 and model["f"](1.0) == 2.0


def test_a_snapshot_keeps_the_values_that_a_function_held():
    w, _b = refs()
    model = {"f": functools.partial(lambda w, x: w * x, w), "g": {"w": w}}
    snapshot = rx.snapshot(model)
    assert not rx.aliases(snapshot)
    w.value = jnp.array(0.0)
    assert snapshot["f"] is not model["f"] and snapshot["f"](2.0) == 6.0


def test_derefed_functions_are_nodes_that_any_transform_carries(make):
    model, _w, _b = model_of(make)
    derefed = rx.deref(model)
    assert len(jax.tree.leaves(eqx.filter(derefed, eqx.is_array))) == 3
    assert jax.tree.structure(derefed) == jax.tree.structure(rx.deref(rx.clone(model)))

    @eqx.filter_jit
    def double(derefed):
        tree = rx.reref(derefed)
        for ref in rx.aliases(tree):
            ref.value *= 2
        return rx.deref(tree), tree["f"](1.0)

    if make in (closing, nested, default):
        jax.jit(double)(derefed)
    out, y = double(derefed)
    again = rx.reref(out)
    assert y == again["f"](1.0) == 16.0 and model["f"](1.0) == 8.0


def test_gradients_have_what_a_function_holds(make):
    model, _w, _b = model_of(make)
    for wrt in (None, "params", rx.path("f.**")):
        grads = rx.filter_grad(lambda model: model["f"](5.0), wrt=wrt)(model)
        assert sorted(jax.tree.leaves(grads)) == [2.0, 10.0]
        moved = rx.reref(eqx.combine(grads, rx.deref(model)))
        assert moved["f"](1.0) == 24.0


def test_gradients_by_plain_equinox_agree(make):
    model, _w, _b = model_of(make)
    params, rest = eqx.partition(rx.deref(model), rx.filter_spec(model, "params"))

    def loss(params):
        return rx.reref(eqx.combine(params, rest))["f"](5.0)

    grads = eqx.filter_grad(loss)(params)
    lifted = rx.filter_grad(lambda model: model["f"](5.0), wrt="params")(model)
    assert eqx.tree_equal(grads, lifted)


def test_apply_updates_moves_what_a_function_holds(make):
    model, w, b = model_of(make)
    grads = rx.filter_grad(lambda model: model["f"](5.0), wrt="params")(model)
    rx.apply_updates(model, jax.tree.map(lambda g: -g, grads))
    assert w[...] == -7.0 and b[...] == -1.0


def test_update_refs_takes_another_model_of_the_same_functions(make):
    model, w, _b = model_of(make)
    target, w2, _b2 = model_of(make)
    w.value = jnp.array(5.0)
    for source in (model, rx.deref(model)):
        w2.value = jnp.array(0.0)
        rx.update_refs(target, source)
        assert w2[...] == 5.0


def test_a_partition_parts_the_refs_of_a_function_and_joins_them(make):
    w, b = rx.Ref(jnp.array(3.0), "params"), rx.Ref(jnp.array(1.0), "lora")
    model = {"f": make(w, b)}
    params, rest = rx.partition(model, "params")
    assert jax.tree.leaves(params) == [w] and b in jax.tree.leaves(rest)
    whole = rx.combine(params, rest)
    assert whole["f"](1.0) == 8.0 and set(rx.aliases(whole)) == {w, b}
    b.value = jnp.array(2.0)
    assert whole["f"](1.0) == 10.0
    parts, treedef = rx.tree_partition(model, "params")
    assert rx.merge_partitions(parts, treedef)["f"](1.0) == 10.0


def test_a_tie_between_a_field_and_a_function_is_one_ref(make):
    w, b = refs()
    model = {"f": make(w, b), "w": w}
    copy = rx.clone(model)
    copy["w"].value = jnp.array(0.0)
    assert copy["f"](1.0) == 2.0 and len(rx.state_dict(model)) == 2
    with raises(rx.StructureError, match="at all of its places or at none"):
        rx.filter_spec(model, rx.path("w"))
    grads = rx.filter_grad(lambda m: m["f"](5.0) + m["w"][...])(model)
    assert sorted(jax.tree.leaves(grads)) == [2.0, 11.0]


def test_a_recursive_function_and_one_at_two_places():
    w = rx.Ref(jnp.array(3.0), "params")

    def power(n):
        return w[...] * power(n - 1) if n else 1.0

    model = [power, power]
    first, second = rx.clone(model)
    assert first is second and first(2) == 9.0
    w.value = jnp.array(0.0)
    assert first(2) == 9.0
    with raises(rx.StructureError, match="is only at the later one here"):
        rx.reref(rx.deref(model)[1])


def test_functions_without_refs_are_left_as_they_are():
    gain = jnp.array(2.0)
    tree = {
        "act": jax.nn.relu,
        "f": lambda x: gain * x,
        "p": functools.partial(jax.nn.leaky_relu, negative_slope=0.1),
        "w": rx.Ref(1.0),
    }
    derefed = rx.deref(tree)
    for name in ("act", "f", "p"):
        assert derefed[name] is tree[name]
        assert rx.clone(tree)[name] is tree[name]


def test_a_module_with_a_function_for_a_field():
    class Block(rx.Module):
        f: Callable
        scale: rx.Param[jax.Array]

        def __call__(self, x):
            return self.f(x) * self.scale[...]

    w, b = refs()
    block = Block(closing(w, b), jnp.array(1.0))
    assert list(rx.state_dict(block)) == ["f.b", "f.w", "scale"]
    spec = rx.filter_spec(block, rx.path("f.w"))
    params, rest = eqx.partition(rx.deref(block), spec)
    assert jax.tree.leaves(params) == [3.0]
    assert rx.reref(eqx.combine(params, rest))(1.0) == 8.0
    tangent = rx.filter_grad(lambda m: m(1.0))(block)
    _out, moved = rx.filter_jvp(lambda m: m(1.0), (block,), (tangent,))
    assert moved == 2.0**2 + 2.0**2 + 8.0**2


def test_the_later_place_of_a_function_alone_is_refused():
    f = with_closure(rx.Ref(2.0), rx.Ref(1.0))
    derefed = rx.deref({"first": f, "later": f})
    with raises(rx.StructureError, match="only at the later one here.*the whole tree"):
        rx.reref(derefed["later"])
    assert rx.reref(derefed)["later"](1.0) == f(1.0)


def test_a_derefed_function_is_equal_to_itself_while_it_holds_the_same():
    ref = rx.Ref(jnp.array(1.0), "params")

    def scale(x):
        return x * ref.value

    first = rx.deref(scale)
    assert first == rx.deref(scale) and first != rx.deref(lambda x: scale(x))
    ref.value = jnp.array(2.0)
    assert first != rx.deref(scale) and first != ref.value


def test_a_recursive_function_as_an_argument():
    ref = rx.Ref(jnp.array(2.0), "params")

    def factorial(n):
        return ref.value if n == 0 else n * factorial(n - 1)

    assert repr(rx.deref(factorial)).startswith(
        "Closure(factorial=Closure(), ref=Value("
    )
    grads = rx.filter_grad(lambda f: f(3))(factorial)
    (grad,) = jax.tree.leaves(grads)
    assert grad == 6.0


def test_a_function_that_a_program_returns_is_no_static_part_of_its_result():
    def adder(x):
        return lambda y: x + y, "a text"

    _, out_shape, static = rx.filter_make_jaxpr(adder)(jnp.array(1.0))
    assert out_shape == (None, None) and static == (None, "a text")
