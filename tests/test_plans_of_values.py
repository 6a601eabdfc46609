"""Repeated calls whose refs hold anything other than one array each."""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import refx_eqx as rx
from refx_eqx._core._ref import commits, set_value


class State(NamedTuple):
    mean: Any
    name: str


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Data:
    mean: Any
    name: str = dataclasses.field(metadata=dict(static=True))


class Module(eqx.Module):
    mean: Any
    rate: float
    name: str = eqx.field(static=True)


ONE = jnp.array(1.0)

VALUES = {
    "a NamedTuple": lambda x, name: State(x, name),
    "a dataclass": lambda x, name: Data(x, name),
    "a module": lambda x, name: Module(x, 0.5, name),
    "a dict": lambda x, name: {"name": name, "mean": x, "none": None},
    "a list": lambda x, name: [x, [name, (x, 0.5)]],
    "a tuple": lambda x, name: (name, x, np.ones(2, np.float32), 1),
}


def add(tree, by):
    def plus(x):
        return x + by if eqx.is_array_like(x) else x

    return jax.tree.map(plus, tree)


@pytest.mark.parametrize("make", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("donate", ["none", "refs"])
def test_what_is_written_is_what_a_first_call_writes(make, donate, trace_counter):
    def step(refs, by):
        for ref in refs:
            ref.value = add(ref.value, by)
        return by, len(refs)

    f = trace_counter(step)
    compiled: Any = rx.filter_jit(f, donate=donate)
    traced = []
    refs, plain = ([rx.Ref(make(ONE * i, "a")) for i in range(3)] for _ in range(2))
    for i in range(5):
        by = jnp.array(float(i))
        assert compiled(refs, by) == (by, 3)
        # Each a first call.
        rx.filter_jit(lambda refs, by: step(refs, by), donate=donate)(plain, by)
        assert rx.tree_equal(refs, plain)
        values, expected = rx.snapshot((refs, plain))
        assert jax.tree.structure(values) == jax.tree.structure(expected)
        traced.append(f.counter.count)
    assert traced[2] == traced[4]  # for arrays instead of numbers
    assert len(compiled._plans._plans) == 1


@pytest.mark.parametrize("make", VALUES.values(), ids=VALUES)
def test_a_text_that_is_another_is_noticed(make, trace_counter):
    f = trace_counter(lambda ref: [x for x in texts_in(ref.value) if x in "ab"])
    step, ref = rx.filter_jit(f), rx.Ref(make(ONE, "a"))
    for name in ("a", "b", "a"):
        ref.value = make(ONE, name)
        for _ in range(4):
            assert step(ref) == [name]
    assert f.counter.count == 2


def texts_in(value):
    if isinstance(value, Data | Module):
        return [value.name]
    return [x for x in jax.tree.leaves(value) if isinstance(x, str)]


def test_what_changes_in_place_is_noticed(trace_counter):
    def total(refs):
        leaves = jax.tree.leaves([ref.value for ref in refs])
        return sum(len(x) if isinstance(x, str) else jnp.sum(x) for x in leaves)

    f = trace_counter(total)
    step = rx.filter_jit(f)
    array = np.ones(2, np.float32)
    refs = [rx.Ref({"x": ONE}), rx.Ref([ONE, "a"]), rx.Ref(array), rx.Ref(2.0)]

    def check(traced):
        for _ in range(4):
            assert step(refs) == total(refs)
        assert f.counter.count == traced

    check(1)
    refs[0].value["x"] = jnp.array(5.0)
    refs[2].value[0] = 7.0
    check(1)
    refs[0].value["y"] = ONE
    check(2)
    refs[1].value[1] = "ab"
    check(3)
    refs[1].value.append(None)
    check(4)
    refs[1].value[0] = {"x": ONE}
    check(5)
    refs[1].value[0] = (ONE,)
    check(6)
    refs[3].value = "text"
    check(7)
    del refs[0].value["y"]
    refs[1].value[:] = [ONE, "a"]
    refs[3].value = 3.0
    check(7)


def test_numbers_become_arrays_one_by_one(trace_counter):
    @trace_counter
    def step(refs, i):
        for k, ref in enumerate(refs):
            ref.value = jnp.where(k == i, ref.value + 1.0, ref.value)

    compiled: Any = rx.filter_jit(step)
    refs = [rx.Ref(0.0) for _ in range(20)]
    by_hand = np.zeros(20)
    for i in range(40):
        for ref, x in zip(refs, by_hand):
            if i % 3 == 0:
                ref.value = float(x)  # a number again
        compiled(refs, jnp.array(i % 20))
        by_hand[i % 20] += 1.0
        assert [float(ref.value) for ref in refs] == list(by_hand)
    assert len(compiled._plans._plans) == 1


def test_a_text_is_written_for_another():
    @rx.filter_jit
    def step(ref, x):
        ref.value = (ref.value[0] + x, "b" if ref.value[1] == "a" else "a")

    ref = rx.Ref((ONE, "a"))
    for i in range(8):
        step(ref, ONE)
        assert ref.value == (2.0 + i, "ab"[(i + 1) % 2])


def test_a_tree_is_written_where_an_array_was(trace_counter):
    def step(ref):
        is_array = eqx.is_array(ref.value)
        ref.value = (ref.value, "a") if is_array else ref.value[0] + 1.0

    f = trace_counter(step)
    compiled, ref = rx.filter_jit(f), rx.Ref(ONE)
    for i in range(6):
        compiled(ref)
        compiled(ref)
        assert ref.value == 2.0 + i
    assert f.counter.count == 2


class Doubling:
    """A node that makes something else of the array it is rebuilt with."""

    def __init__(self, x):
        self.x = x


jax.tree_util.register_pytree_node(
    Doubling,
    lambda node: ((node.x,), None),
    lambda _, xs: Doubling(xs[0] * 2.0 if type(xs[0]) is type(ONE) else xs[0]),
)


def test_a_node_that_makes_something_else_of_its_arrays():
    step = rx.filter_jit(lambda ref, x: setattr(ref, "value", Doubling(x)))
    ref = rx.Ref(Doubling(ONE))
    for i in range(6):
        step(ref, jnp.array(float(i)))
        assert ref.value.x == 2.0 * i


def test_one_array_is_written_to_two_trees():
    @rx.filter_jit
    def step(a, b, x):
        a.value, b.value = {"x": x}, (x, "text", x)

    a, b = rx.Ref({"x": ONE}), rx.Ref((ONE, "text", ONE))
    for i in range(6):
        step(a, b, jnp.array(float(i)))
        assert a.value == {"x": i} and b.value == (i, "text", i)


@pytest.fixture
def meanwhile(monkeypatch):
    """`meanwhile(step, write)` lets `write` run once in the middle of the next planned call of
    `step`, when it has read its refs."""

    def make(step, write):
        (plan,) = step._plans._plans.values()
        left = [write]

        def run(*args):
            if left:
                left.pop()()
            return plain(*args)

        if plan.donates:
            plain = plan.variant.dispatch_donating
            monkeypatch.setattr(plan.variant, "dispatch_donating", run)
        else:
            plain = plan.run
            plan.run = run
        return left

    return make


def look(ref, x):
    value = ref.value
    return value if value is None or isinstance(value, str) else value * 2.0, x + 1.0


def planned(value):
    """`look`, called until it has a plan for a ref that holds this."""
    step: Any = rx.filter_jit(look)
    ref = rx.Ref(value)
    for _ in range(4):
        step(ref, ONE)
    return step, ref


CHANGES = [(1.0, "a"), ("a", "b"), (None, 1.0), (None, "a")]


@pytest.mark.parametrize(("first", "second"), CHANGES)
def test_a_value_that_is_written_in_the_middle_of_a_call(first, second, meanwhile):
    step, ref = planned(first)
    left = meanwhile(step, lambda: setattr(ref, "value", second))
    assert step(ref, ONE) == look(rx.Ref(second), 1.0) and not left


@pytest.mark.parametrize(("first", "second"), CHANGES)
def test_a_write_of_which_a_call_sees_the_first_half(first, second, meanwhile):
    step, ref = planned(first)

    def write_second_half():
        commits.count += 1

    left = meanwhile(step, write_second_half)
    set_value(ref, second)
    for _ in range(3):
        assert step(ref, ONE) == look(rx.Ref(second), 1.0) and not left


@pytest.mark.parametrize("donate", ["none", "refs"])
def test_another_ref_that_is_written_in_the_middle_of_a_call(donate, meanwhile):
    @jax.check_tracer_leaks(False)
    def run():
        step: Any = rx.filter_jit(
            lambda a, b: setattr(a, "value", a.value + b.value), donate=donate
        )
        a, b, other = rx.Ref(ONE + 0.0), rx.Ref(1.0), rx.Ref(0.0)
        for _ in range(4):
            step(a, b)
        left = meanwhile(step, lambda: setattr(other, "value", 1.0))
        step(a, b)
        assert not left and a.value == 6.0

    run()
