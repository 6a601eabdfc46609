"""A ref used as if it were its value: the error names it, and says how to read the value."""

import builtins
import copy
import math
import operator
import pickle
import traceback

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from raising import raises

import refx_eqx as rx


class Linear(rx.Module):
    weight: rx.Param[jax.Array]


def make():
    return Linear(jnp.ones((2, 2))).weight


MESSAGE = (
    r"A ref is not its value: `.*` was called on `Linear.weight` \(collection "
    r"'params'\). To use the value, read it: `ref\[...\]`"
)


@pytest.mark.parametrize(
    "name",
    ["add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift"]
    + ["and_", "or_", "xor", "lt", "le", "gt", "ge", "eq", "ne"],
)  # fmt: skip
@pytest.mark.parametrize("other", [2, 2.0, np.float32(2), jnp.ones((2, 2))])
def test_operators(name, other):
    ref, op = make(), getattr(operator, name)
    with raises(rx.RefTypeError, match=MESSAGE):
        op(ref, other)
    with raises(rx.RefError, match=r"Linear.weight"):
        op(other, ref)


@pytest.mark.parametrize(
    "fn",
    [operator.neg, operator.pos, operator.abs, operator.invert, len, int, float, complex]
    + [round, math.floor, math.ceil, math.trunc, lambda ref: divmod(ref, 2)]
    + [iter, list, np.stack, lambda ref: 1.0 in ref, lambda ref: [*ref]]
    + [lambda ref: f"{ref:.2f}", "{:>8}".format],
)  # fmt: skip
def test_functions(fn):
    with raises(rx.RefTypeError, match=MESSAGE):
        fn(make())


def test_a_ref_is_shown_where_no_format_is_asked_for():
    ref = make()
    assert f"{ref}" == f"{ref!s}" == str(ref) == "{}".format(ref)  # noqa: UP032
    assert f"{ref[0, 0]:.2f}" == "1.00"  # the remedy


def test_in_place():
    ref = make()
    before = ref
    with raises(rx.RefTypeError, match=r"and write it: `ref\[...\] = ...`"):
        ref += 1  # type: ignore[operator]
    assert ref is before
    ref[...] += 1  # the remedy
    assert ref[0, 0] == 2.0


def test_truth():
    with raises(rx.RefTypeError, match=r"there is a ref: `ref is not None`"):
        builtins.bool(rx.Ref(False))


def test_attributes_of_the_value():
    ref = make()
    with raises(
        AttributeError,
        match=r"has no attribute 'T'. The value of `Linear.weight` .* has it: read it, "
        r"`ref\[...\].T`",
    ):
        ref.T  # type: ignore[attr-defined] # noqa: B018
    assert ref[...].T.shape == (2, 2)  # the remedy
    with raises(AttributeError, match=r"no attribute 'valeu'$"):
        ref.valeu  # type: ignore[attr-defined] # noqa: B018
    with raises(AttributeError, match="holds str, which has no shape"):
        rx.Ref("text").shape  # noqa: B018
    assert not hasattr(ref, "T") and not hasattr(ref, "aval")


def test_a_ref_is_still_a_leaf_for_everybody():
    ref = make()
    assert jax.tree.leaves([ref]) == [ref] and [ref].index(ref) == 0
    assert ref in [None, "a", ref] and ref != "a"
    assert not eqx.is_array(ref) and not eqx.is_inexact_array(ref)
    assert eqx.filter([ref, 1.0], eqx.is_inexact_array) == [None, None]
    assert copy.deepcopy(ref) != ref
    assert pickle.loads(pickle.dumps(ref)).shape == (2, 2)
    assert "Ref" in repr(ref) and "Ref" in eqx.tree_pformat([ref])
    for fn in (
        jnp.sum,
        jax.nn.relu,
        jax.nn.logsumexp,
        jax.lax.sin,
        jax.lax.stop_gradient,
    ):
        with raises(rx.TraceLevelError, match="Cannot use ref as an array"):
            fn(ref)  # type: ignore[arg-type]


def test_jax_and_equinox_may_compare_a_ref_with_a_number():
    ref = make()
    # Each has a cache, of which a key with the one is compared with a key with the other.
    same = eqx.filter_jit(lambda x: x)
    assert same(1.0) == 1.0 and same(ref) is ref
    assert eqx.filter_eval_shape(lambda: 1.0) == 1.0
    assert eqx.filter_eval_shape(lambda: ref) is ref
    assert not eqx.tree_equal([ref], [1.0]) and not eqx.tree_equal([1.0], [ref])

    tagged = jax.jit(lambda x, tag: x, static_argnums=1)
    assert tagged(1.0, 0) == tagged(1.0, ref) == 1.0
    assert {ref: 1, 0: 2}[ref] == 1 and ref in {ref, 0}

    zeros = lambda model: jax.tree.map(lambda leaf: leaf == 0, model)
    for compare in (lambda: ref == 0, lambda: ref in [0], lambda: zeros([ref])):
        with raises(rx.RefTypeError, match="`==` was called on"):
            compare()


@pytest.mark.parametrize("value", [0, 0.0, jnp.array(0), jnp.array(0.0), False])
def test_a_ref_is_no_predicate(value):
    ref = rx.Ref(value)

    def choose(ref):
        return jax.lax.cond(ref, lambda: 1, lambda: 2)

    for call in (choose, rx.filter_jit(choose)):
        with raises((rx.RefTypeError, rx.TraceLevelError), match=r"read it: `ref"):
            call(ref)
    assert rx.filter_jit(lambda ref: choose(ref[...]))(ref) == 2  # the remedy


def test_numpy_does_not_compare_a_ref():
    ref = make()
    for compare in (np.array_equal, np.array_equiv, np.equal, np.allclose):
        for both in ((ref, ref[...]), (np.ones(2), ref)):
            with raises(rx.TraceLevelError, match="Cannot use ref as an array"):
                compare(*both)
    assert np.array_equal(ref[...], ref[...])  # the remedy
    assert (np.shape(ref), np.ndim(ref), np.size(ref)) == ((2, 2), 2, 4)
    assert np.result_type(ref) == ref.dtype
    with raises(rx.RefTypeError, match="`!=` was called on `Linear.weight`"):
        _ = ref != 0


def test_equality_is_by_value_when_it_is_asked_for():
    a = Linear(jnp.ones((2, 2)))
    assert rx.tree_equal(a, rx.clone(a)) and rx.tree_equal(a, rx.deref(a))
    assert not rx.tree_equal(a, Linear(jnp.zeros((2, 2))))
    assert rx.tree_equal(a, Linear(jnp.ones((2, 2)) + 1e-3), atol=1e-2)
    assert not rx.tree_equal([rx.Ref(1, "a")], [rx.Ref(1, "b")])


def test_errors_show_where_they_are_imported_from():
    names = [name for name in dir(rx) if name.endswith("Error")]
    assert len(names) >= 7
    for name in names:
        error = getattr(rx, name)
        assert error.__module__ == "refx_eqx"
        assert pickle.loads(pickle.dumps(error("text"))).args == ("text",)
        shown = traceback.format_exception_only(error("text"))
        assert shown == [f"refx_eqx.{name}: text\n"]


def test_a_layer_of_equinox_with_refs_for_its_arrays():
    plain, x = eqx.nn.Linear(2, 2, key=jax.random.key(0)), jnp.ones(2)
    layer = eqx.tree_at(lambda m: m.weight, plain, rx.Ref(plain.weight, "params"))
    with raises(
        rx.RefTypeError,
        match=r"`@` was called on an unnamed ref \(collection 'params'\).* with "
        r"`rx.as_refs\(layer, 'params'\)`.* or call `rx.snapshot\(layer\)`",
    ):
        layer(x)
    expected = plain(x)
    assert jnp.array_equal(rx.as_refs(plain, "params")(x), expected)  # the remedies
    assert jnp.array_equal(rx.snapshot(layer)(x), expected)


# Gradients, and other derefed trees.


def gradients():
    linear = Linear(jnp.ones((2, 2)))
    return rx.filter_grad(lambda m: jnp.sum(m.weight[...]))(linear)


OF_A_NODE = (
    r"A node is not its value: .* was called on the Value of `Linear.weight` \(collection "
    r"'params'\), in a derefed tree such as gradients. To use the value, read it: `node.value`"
)


@pytest.mark.parametrize(
    "fn",
    [
        lambda node: 0.1 * node,
        lambda node: node - 1,
        lambda node: node @ jnp.ones(2),
        lambda node: jnp.ones(2) @ node,
        lambda node: np.ones((2, 2)) * node,
        lambda node: -node,
        lambda node: node < 1.0,
        lambda node: node[...],
        lambda node: node[0],
        bool,
        float,
        len,
        list,
        np.sum,
        np.asarray,
    ],
)
def test_a_node_of_gradients_is_not_its_value(fn):
    grads = gradients()
    with raises(rx.RefTypeError, match=OF_A_NODE):
        fn(grads.weight)
    with raises(rx.RefTypeError, match=OF_A_NODE):
        rx.filter_jit(lambda grads: fn(grads.weight))(grads)
    fn(
        grads.weight.value[0, 0] if fn in (bool, float) else grads.weight.value
    )  # the remedy


def test_an_index_has_no_value_to_compute_with():
    linear = Linear(jnp.ones((2, 2)))
    index = rx.deref((linear.weight, linear.weight))[1]
    with raises(rx.RefTypeError, match="was called on the Index of `Linear.weight`"):
        _ = 2.0 * index  # pyright: ignore[reportOperatorIssue]
    with raises(ValueError, match="Cannot get value of Index"):
        _ = index.value


def test_an_attribute_of_the_value_of_a_node_is_named():
    node = gradients().weight
    with raises(AttributeError, match=r"has it: read it, `node\.value\.shape`"):
        _ = node.shape
    assert node.value.shape == (2, 2)
    with raises(AttributeError, match="'Value' object has no attribute 'shapes'$"):
        _ = node.shapes
    for other in (copy.deepcopy(node), pickle.loads(pickle.dumps(node))):
        assert other == node
