"""Fields declared as Python numbers, of which a lifted call makes arrays without axes."""

# A static checker objects to what is wrong on purpose here, or made at run time.
# pyright: reportArgumentType=false, reportInvalidTypeForm=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from typing import Annotated, Literal, NewType

import jax
import jax.numpy as jnp
import optax
import pytest
from beartype.vale import Is
from jaxtyping import Array, Float, PyTree
from raising import raises

import refx_eqx as rx


def holder_of(hint):
    class Holder(rx.Module):
        n: rx.Param[hint]

    return Holder


Holder = {hint: holder_of(hint) for hint in (int, float, complex)}
NUMBERS = [(int, 1), (float, 1.0), (complex, 1j)]


@rx.filter_jit
def add(holder, x):
    holder.n.value = holder.n.value + x


def write(holder, x):
    holder.n.value = x


def increment(holder, x):
    holder.n.value += x


def through_a_dag(holder):
    return jax.jit(lambda dag: dag)(rx.Dag(holder)).value


@pytest.mark.parametrize(
    "door", [rx.clone, lambda x: rx.reref(rx.deref(x)), through_a_dag]
)
@pytest.mark.parametrize(("hint", "one"), NUMBERS)
def test_the_array_of_a_number_stays_what_was_declared(hint, one, door):
    holder = Holder[hint](one)
    add(holder, one)
    assert isinstance(holder.n.value, jax.Array)
    again = door(holder)
    assert again.n.value == 2 * one
    for change in (increment, write, add, rx.filter_jit(write)):
        change(again, one)
    assert isinstance(again.n, rx.Ref[hint])
    with raises(rx.RefTypeError, match=rf"declared `{hint.__name__}`, and cannot hold"):
        again.n.value = jnp.ones(2)
    with raises(rx.RefTypeError, match=rf"declared `{hint.__name__}`, and cannot hold"):
        again.n.value = "a"


@pytest.mark.parametrize(("hint", "one"), NUMBERS[:2])
def test_the_array_of_a_number_can_be_stored_and_averaged(hint, one, tmp_path):
    holder, target = Holder[hint](one), Holder[hint](one)
    add(holder, one)
    rx.save(tmp_path / "number.safetensors", holder)
    rx.load(tmp_path / "number.safetensors", target)
    assert target.n.value == 2
    rx.load(tmp_path / "number.safetensors", target)
    rx.update_refs(target, rx.snapshot(holder))
    rx.load_state_dict(target, rx.state_dict(holder))
    rx.nn.EMA(target, 0.5).update(holder)
    assert target.n.value == 2


@pytest.mark.parametrize("jit", [lambda f: f, rx.filter_jit])
def test_a_number_is_trained(jit):
    model = Holder[float](0.0)
    optimizer = rx.Optimizer(model, optax.sgd(0.25))

    @jit
    def step(model, optimizer):
        loss = lambda model: (model.n.value - 3.0) ** 2
        optimizer.update(model, rx.filter_grad(loss)(model))

    for _ in range(3):
        step(model, optimizer)
    average = rx.nn.EMA(model, 0.5)
    average.update(model)
    assert model.n.value == average.model.n.value == 3.0 * (1 - 0.5**3)
    rx.apply_updates(model, rx.filter_grad(lambda model: model.n.value)(model))
    assert model.n.value == average.model.n.value + 1.0


@pytest.mark.parametrize(
    "transform",
    [
        rx.filter_jit,
        rx.filter_checkpoint,
        lambda f: lambda m, x: rx.cond(True, lambda m: f(m, x), lambda m: None, m),
        lambda f: lambda m, x: rx.fori_loop(0, 3, lambda i, m: (f(m, x), m)[1], m),
    ],
)
@pytest.mark.parametrize(("hint", "one"), NUMBERS)
def test_a_number_may_be_written_inside_a_transform(transform, hint, one):
    holder = Holder[hint](one)
    transform(write)(holder, 4 * one)
    assert holder.n.value == 4 * one
    transform(lambda m, _: write(m, 5 * one))(holder, None)
    assert holder.n.value == 5 * one
    with raises(rx.RefTypeError, match=rf"declared `{hint.__name__}`, and cannot hold"):
        transform(lambda m, _: write(m, "a"))(holder, None)


def test_a_number_may_be_of_a_narrower_kind():
    holder = Holder[float](1)
    assert type(holder.n.value) is float
    holder.n.value = 2
    assert type(holder.n.value) is float
    rx.filter_jit(lambda m: write(m, 3))(holder)
    assert holder.n.dtype == jnp.float32
    for wrong in (True, 1j, jnp.array(1), 10**400):
        with raises(rx.RefTypeError, match="declared `float`, and cannot hold"):
            holder_of(float)(wrong)
    with raises(rx.RefTypeError, match="declared `int`, and cannot hold"):
        Holder[int](1.0)


@pytest.mark.parametrize("hint", [int, bool, int | None, int | Float[Array, "n"]])
def test_no_array_with_axes_replaces_a_number(hint):
    holder = holder_of(hint)(True if hint is bool else 1)
    before = holder.n.value
    for dtype in (bool, int, float):
        with raises(rx.RefTypeError, match="cannot hold"):
            holder.n.value = jnp.ones((3, 4), dtype)
    assert holder.n.value is before


def test_stacked_numbers_know_their_stack():
    stack = rx.filter_vmap(Holder[int])(jnp.arange(3))
    assert isinstance(stack, rx.Batched[Holder[int], "3"])
    rx.filter_vmap(lambda m: write(m, m.n.value + 4))(stack)
    stack.n.value = stack.n.value + 1
    assert (stack.n.value == jnp.array([5, 6, 7])).all()
    with raises(
        rx.RefTypeError, match=r"sizes of the stack are \(4,\) instead of \(3,\)"
    ):
        stack.n.value = jnp.arange(4)


Steps = NewType("Steps", int)


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (Steps, 1),
        (Literal[1, 2], 1),
        (list[int], [1, 2]),
        (dict[str, float], {"a": 1.0}),
        (PyTree[float], {"a": [1.0]}),
        (float | None, 1.0),
        (Annotated[int, Is[lambda n: n > 0]], 1),
        (Annotated[Float[Array, ""], Is[lambda x: x > 0]], 1.0),
    ],
    ids=str,
)
def test_numbers_inside_of_a_type(hint, value):
    holder = holder_of(hint)(value)

    @rx.filter_jit
    def same(holder):
        holder.n.value = jax.tree.map(lambda x: x * 1, holder.n.value)

    same(holder)
    again = rx.clone(holder)
    again.n.value = value
    for wrong in ("a", jax.tree.map(lambda x: jnp.array(True), value)):
        if wrong == "a" or "float" in str(hint).lower():
            with raises(rx.RefTypeError, match="cannot hold"):
                again.n.value = wrong


def test_a_validator_sees_what_is_not_traced():
    Positive = Annotated[int, Is[lambda n: n > 0]]
    holder = holder_of(Positive)(1)
    rx.filter_jit(lambda m, x: write(m, x))(holder, 2)
    for wrong in (-1, jnp.array(-1)):
        with raises(
            rx.RefTypeError, match=r"cannot hold .* Write a value of the declared"
        ):
            holder.n.value = wrong
    with raises(rx.RefTypeError, match="cannot hold -1"):
        rx.filter_jit(lambda m: write(m, -1))(holder)
