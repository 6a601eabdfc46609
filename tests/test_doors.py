"""Every door through which a value gets into a ref is guarded by the declared type, and none
is closed to what a program may legitimately do with a tree."""

# A static checker objects to what is wrong on purpose here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

import copy
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jaxtyping import Array, Float, Int
from raising import message_of, raises

import refx_eqx as rx


class Linear(rx.Module):
    weight: rx.Param[Float[Array, "out in"]]
    bias: rx.Param[Float[Array, "out"]] | None
    uses: rx.Ref[Int[Array, ""]] = rx.field(collection="counts")

    def __init__(self, weight=None):
        self.weight = jnp.ones((2, 3)) if weight is None else weight
        self.bias = jnp.zeros(2)
        self.uses = jnp.array(0)

    def __call__(self, x):
        self.uses.value += 1
        return self.weight.value @ x + self.bias.value

    def store(self, value):
        self.weight.value = value


class Stacked(rx.Module):
    layers: tuple[rx.Param[Float[Array, "n"]], ...]


def stack_of(n):
    return rx.filter_vmap(lambda _: Linear())(jnp.arange(n))


def values_in(linear):
    return [leaf._value for leaf in jax.tree.leaves(linear)]


# Each door takes a linear layer and a value for its weight.


def setter(linear, value):
    linear.weight.value = value


def ellipsis(linear, value):
    linear.weight[...] = value


def method(linear, value):
    linear.store(value)


def inside_filter_jit(linear, value):
    rx.filter_jit(Linear.store)(linear, value)


def inside_filter_grad(linear, value):
    def loss(linear):
        linear.weight.value = value
        return jnp.sum(linear.weight.value)

    rx.filter_grad(loss)(linear)


def inside_eval_shape(linear, value):
    rx.filter_eval_shape(Linear.store, linear, value)


def inside_functionalize(linear, value):
    rx.functionalize(Linear.store)(*rx.deref((linear,)), value)


def inside_a_lifted_checkpoint(linear, value):
    rx.lift(jax.checkpoint)(lambda linear: linear.store(value))(linear)


def inside_jit_with_dag(linear, value):
    jax.jit(lambda dag: dag.value.store(value))(rx.Dag(linear))


def reref_of_a_replaced_value(linear, value):
    opened = rx.deref(linear)
    rx.reref(eqx.tree_at(lambda m: m.weight.value, opened, value))


def mapped_dag(linear, value):
    n = iter(range(3))
    dag = jax.tree.map(lambda x: value if next(n) == 0 else x, rx.Dag(linear))
    dag.value  # noqa: B018


def construction(linear, value):
    Linear(value)


def construction_with_a_ref(linear, value):
    Linear(rx.Ref(value, "params"))


def of_a_clone(linear, value):
    rx.clone(linear).weight.value = value


def of_a_deep_copy(linear, value):
    copy.deepcopy(linear).weight.value = value


def of_a_copy(linear, value):
    copy.copy(linear.weight).value = value


def of_an_unpickled(linear, value):
    pickle.loads(pickle.dumps(linear)).weight.value = value


def of_a_ref_shared_with_another_module(linear, value):
    Linear(linear.weight).weight.value = value


def optimizer_step(linear, value):
    # An update of another shape or dtype, as a wrong `optax` chain would make.
    params = rx.deref(linear.weight)
    new = optax.apply_updates(params, jax.tree.map(jnp.zeros_like, params))
    rx.update_refs(linear.weight, jax.tree.map(lambda _: value, new))


def loaded_state(linear, value):
    rx.load_state_dict(linear, rx.state_dict(linear) | {"weight": value})


def loaded_state_of_numpy(linear, value):
    loaded_state(linear, np.asarray(value))


DOORS = [
    setter,
    ellipsis,
    method,
    inside_filter_jit,
    inside_filter_grad,
    inside_eval_shape,
    inside_functionalize,
    inside_a_lifted_checkpoint,
    inside_jit_with_dag,
    reref_of_a_replaced_value,
    mapped_dag,
    construction,
    construction_with_a_ref,
    of_a_clone,
    of_a_deep_copy,
    of_a_copy,
    of_an_unpickled,
    of_a_ref_shared_with_another_module,
]

# A value, and how a message shows it.
WRONG = {
    "size": (jnp.ones((7, 7)), "f32[7,7]"),
    "rank": (jnp.ones(3), "f32[3]"),
    "dtype": (jnp.ones((2, 3), int), "i32[2,3]"),
    "complex": (jnp.ones((2, 3), complex), "c64[2,3]"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_a_wrong_write_raises_and_changes_nothing(door, wrong):
    linear = Linear()
    before = values_in(linear)
    value, shown = WRONG[wrong]
    with pytest.raises(rx.RefTypeError) as info:
        door(linear, value)
    text = message_of(info.value)
    if wrong == "size" and door in (construction, construction_with_a_ref):
        # Names are free at construction, so it is the bias that does not fit.
        assert (
            "`Linear.bias` (collection 'params') is declared `Float[Array, \"out\"]`"
            in text
        )
        assert "f32[2]" in text and "out=7" in text
    else:
        assert "`Linear.weight` (collection 'params')" in text
        assert 'is declared `Float[Array, "out in"]`' in text
        assert f"cannot hold {shown}" in text
    assert all(a is b for a, b in zip(values_in(linear), before))


@pytest.mark.parametrize(
    "value",
    [
        np.ones((2, 3), np.float32),
        np.float64(1.0),  # a subclass of `float`
        [[1.0] * 3] * 2,
        "no",
        None,
        1.0,
        True,
    ],
    ids=["numpy", "numpy float", "list", "str", "none", "float", "bool"],
)
def test_what_is_no_array_does_not_go_into_an_array(value):
    linear = Linear()
    before = values_in(linear)
    with raises(rx.RefTypeError, match=r"`Linear.weight` .* and cannot hold"):
        linear.weight.value = value
    assert values_in(linear)[0] is before[0]


@pytest.mark.parametrize("value", [1.5, 1j, True, jnp.array(1.0), jnp.array([1])])
def test_a_counter_takes_only_integers(value):
    linear = Linear()
    with raises(rx.RefTypeError, match=r'`Linear.uses` .*`Int\[Array, ""\]`'):
        linear.uses.value = value
    assert linear.uses.value == 0


@pytest.mark.parametrize(
    "value",
    [
        jnp.ones((4, 7, 7)),
        jnp.ones((5, 2, 3)),
        jnp.ones((2, 3)),
        jnp.ones((4, 2, 3), int),
    ],
    ids=["lane", "stack", "plain", "dtype"],
)
def test_a_wrong_write_to_a_stack_raises(value):
    stack = stack_of(4)
    before = stack.weight.value
    with raises(rx.RefTypeError, match=r"`Linear.weight`.*\(4,\) come on top"):
        stack.weight.value = value
    assert stack.weight.value is before


@pytest.mark.parametrize(
    "value", [jnp.ones((7, 7)), jnp.ones((2, 3), int), jnp.ones(3)]
)
def test_a_wrong_write_to_a_lane_raises(value):
    stack = stack_of(4)
    before = stack.weight.value
    with raises(rx.RefTypeError, match=r"`Linear.weight`.*cannot hold"):
        rx.filter_vmap(lambda linear: linear.store(value))(stack)
    assert stack.weight.value is before


@pytest.mark.parametrize("value", [jnp.ones(3), jnp.ones(2, int), jnp.ones((2, 2))])
def test_a_wrong_write_to_an_item_raises(value):
    stacked = Stacked((jnp.ones(2), jnp.zeros(2)))
    with raises(rx.RefTypeError, match=r"`Stacked.layers\[1\]` .*n=2"):
        stacked.layers[1].value = value
    assert stacked.layers[1].value.shape == (2,)


def test_a_part_of_a_value_keeps_its_shape():
    linear = Linear()

    def write(row):
        row.value = jnp.ones(4)

    with raises(rx.RefTypeError, match=r"must keep its shape.* f32\[3\]"):
        rx.filter_vmap(write)(linear.weight)
    assert linear.weight.shape == (2, 3)


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(
    "door",
    [optimizer_step, loaded_state, loaded_state_of_numpy],
    ids=lambda door: door.__name__,
)
def test_an_update_that_does_not_fit_raises(door, wrong):
    linear = Linear()
    before = values_in(linear)
    value, shown = WRONG[wrong]
    with pytest.raises(rx.RefTypeError) as info:
        door(linear, value)
    assert "`Linear.weight` (collection 'params')" in message_of(info.value)
    assert "out in" in message_of(info.value) and shown in message_of(info.value)
    assert all(a is b for a, b in zip(values_in(linear), before))


# Each of these takes a linear layer and a stack of four. None of them may raise.


def _loss(linear, x):
    return jnp.sum(linear(x) ** 2)


def _raw_loss(opened, x):
    return _loss(rx.reref(opened), x)


def _optax_step(linear, _):
    params, rest = eqx.partition(rx.deref(linear), rx.filter_spec(linear, "params"))
    optim = optax.sgd(1e-3, momentum=0.9)
    state = optim.init(params)
    updates, _ = optim.update(jax.tree.map(jnp.ones_like, params), state, params)
    rx.update_refs(linear, eqx.combine(eqx.apply_updates(params, updates), rest))


def _scan_over_stack(_, stack):
    def body(x, opened):
        linear = rx.reref(opened)
        linear.weight.value = linear.weight.value * 2
        return x, jnp.sum(linear(x))

    jax.lax.scan(body, jnp.ones(3), rx.deref(stack))


def _write(value):
    def write(linear, _):
        linear.weight.value = value

    return write


def _write_lane(_, stack):
    rx.filter_vmap(lambda linear: linear.store(linear.weight.value * 2))(stack)


def _rows(linear, _):
    def double(row):
        row.value = row.value * 2

    rx.filter_vmap(double)(linear.weight)


def _set_none(linear, _):
    opened = rx.deref(linear)
    closed = rx.reref(jax.tree.map(lambda _: None, opened))
    closed.weight.value = jnp.ones((2, 3))


def _shapes_then_arrays(linear, _):
    shapes = rx.filter_eval_shape(Linear)
    shapes.weight.value = jnp.ones((2, 3))


LEGITIMATE = {
    "same value": lambda m, s: setter(m, m.weight.value),
    "another value": _write(jnp.zeros((2, 3))),
    "another float dtype": _write(jnp.zeros((2, 3), jnp.bfloat16)),
    "an index write": lambda m, s: m.weight.__setitem__((0, 1), 5.0),
    "an int for a counter": lambda m, s: setattr(m.uses, "value", 3),
    "an array for a counter": lambda m, s: setattr(m.uses, "value", jnp.array(3)),
    "gradients": lambda m, s: rx.filter_grad(_loss)(m, jnp.ones(3)),
    "gradients as refs": lambda m, s: rx.reref(rx.filter_grad(_loss)(m, jnp.ones(3))),
    "jax.grad of a derefed": lambda m, s: jax.grad(_raw_loss, allow_int=True)(
        rx.deref(m), jnp.ones(3)
    ),
    "a gradient that is a Dag": lambda m, s: jax.grad(
        lambda dag: _loss(dag.value, jnp.ones(3)), allow_int=True
    )(rx.Dag(m)),
    "float0 as refs": lambda m, s: rx.reref(
        jax.grad(_raw_loss, allow_int=True)(rx.deref(m), jnp.ones(3))
    ),
    "all None": lambda m, s: rx.reref(jax.tree.map(lambda _: None, rx.deref(m))),
    "a partition": lambda m, s: [
        rx.reref(part)
        for part in eqx.partition(rx.deref(m), rx.filter_spec(m, "params"))
    ],
    "a partition of refs": lambda m, s: eqx.partition(m, rx.collection("params")),
    "a write to what was None": _set_none,
    "a spec of bools": lambda m, s: rx.reref(rx.filter_spec(m, "params")),
    "a spec of bools by map": lambda m, s: rx.reref(
        jax.tree.map(lambda _: True, rx.deref(m))
    ),
    "shapes of construction": lambda m, s: rx.filter_eval_shape(Linear),
    "shapes of a tree": lambda m, s: rx.reref(jax.eval_shape(lambda x: x, rx.deref(m))),
    "construction with shapes": lambda m, s: Linear(
        jax.ShapeDtypeStruct((2, 3), jnp.float32)
    ),
    "arrays after shapes": _shapes_then_arrays,
    "strings": lambda m, s: rx.reref(jax.tree.map(str, rx.deref(m))),
    "NumPy arrays": lambda m, s: rx.reref(jax.tree.map(np.asarray, rx.deref(m))),
    "a stack": lambda m, s: stack_of(4),
    "a stack of stacks": lambda m, s: rx.filter_vmap(lambda _: stack_of(4))(
        jnp.arange(2)
    ),
    "a stack along the last axis": lambda m, s: rx.filter_vmap(
        lambda _: Linear(), out_axes=eqx.if_array(-1)
    )(jnp.arange(4)),
    "a stack by eqx.filter_vmap": lambda m, s: rx.reref(
        eqx.filter_vmap(lambda _: rx.deref(Linear()))(jnp.arange(4))
    ),
    "a stack by jnp.stack": lambda m, s: rx.reref(
        jax.tree.map(lambda *x: jnp.stack(x), *[rx.deref(rx.clone(m))] * 2)
    ),
    "a write to a stack": lambda m, s: setter(s, jnp.zeros((4, 2, 3))),
    "a clone of a stack": lambda m, s: setter(rx.clone(s), jnp.zeros((4, 2, 3))),
    "a write in a lane": _write_lane,
    "a layer out of a stack": lambda m, s: setter(
        rx.reref(jax.tree.map(lambda x: x[0], rx.deref(s))), jnp.zeros((2, 3))
    ),
    "a stack in filter_jit": lambda m, s: rx.filter_jit(Linear.store)(
        s, jnp.zeros((4, 2, 3))
    ),
    "jax.vmap of a derefed": lambda m, s: jax.vmap(_raw_loss, in_axes=(0, None))(
        rx.deref(s), jnp.ones(3)
    ),
    "a scan over a derefed stack": _scan_over_stack,
    "the rows of a weight": _rows,
    "a step of optax": _optax_step,
    "a state dict": lambda m, s: rx.load_state_dict(m, rx.state_dict(Linear())),
    "a state dict of NumPy arrays": lambda m, s: rx.load_state_dict(
        s, jax.tree.map(np.asarray, rx.state_dict(s))
    ),
    "eqx.apply_updates": lambda m, s: rx.reref(
        eqx.apply_updates(rx.deref(m), rx.filter_grad(_loss)(m, jnp.ones(3)))
    ),
    "tree_at of a ref": lambda m, s: eqx.tree_at(
        lambda m: m.weight, m, rx.Ref(jnp.ones((4, 5)))
    ),
    "another precision": lambda m, s: rx.reref(
        jax.tree.map(
            lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x,
            rx.deref(m),
        )
    ),
    "a ref shared by two layers": lambda m, s: Linear(m.weight)(jnp.ones(3)),
    "pickle": lambda m, s: pickle.loads(pickle.dumps(m))(jnp.ones(3)),
    "deepcopy": lambda m, s: copy.deepcopy(m)(jnp.ones(3)),
    "inference of shapes in filter_jit": lambda m, s: rx.filter_jit(_loss)(
        m, jnp.ones(3)
    ),
    "construction in filter_jit": lambda m, s: rx.filter_jit(lambda w: Linear(w))(
        jnp.ones((2, 3))
    ),
    "a key": lambda m, s: rx.Ref[jax.Array](jr.key(0)),
}


@pytest.mark.parametrize("manipulation", LEGITIMATE)
def test_a_legitimate_manipulation_is_not_accused(manipulation):
    LEGITIMATE[manipulation](Linear(), stack_of(4))


def test_the_tables_are_as_long_as_they_should_be():
    assert len(DOORS) * len(WRONG) >= 60
    assert len(LEGITIMATE) >= 40
