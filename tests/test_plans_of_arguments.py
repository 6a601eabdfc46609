"""What a repeated call reads from its arguments each time."""

import enum
import gc
import operator
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from raising import raises

import refx_eqx as rx
from refx_eqx._engine import _fast_path


N = 10


def make_refs(n=N):
    return [rx.Ref(jnp.array(float(i))) for i in range(n)]


def in_dicts(leaves):
    """A list of dicts, whose keys are in another order than that of JAX."""
    return [{"b": b, "a": a} for a, b in zip(leaves[::2], leaves[1::2], strict=True)]


def in_tuples(leaves):
    return [tuple(pair) for pair in zip(leaves[::2], leaves[1::2], strict=True)]


def in_one_dict(leaves):
    return {f"{-i:03}": x for i, x in enumerate(leaves)}


GROUPED = {
    "a list": list,
    "a tuple": tuple,
    "a dict": in_one_dict,
    "a list of dicts": in_dicts,
    "a list of tuples": in_tuples,
    "lists in dicts in a tuple": lambda leaves: (in_one_dict([[x] for x in leaves]),),
}


def weigh(tree):
    """Another number for each order of the same leaves."""
    leaves = jax.tree.leaves(tree)
    values = [x.value if rx.is_ref(x) else x for x in leaves]
    return sum(x * (i + 1.0) for i, x in enumerate(values))


@pytest.mark.parametrize("group", GROUPED.values(), ids=GROUPED)
def test_a_ref_that_takes_the_place_of_another(group, trace_counter):
    refs, (other,) = make_refs(), make_refs(1)
    f = trace_counter(weigh)
    step: Any = rx.filter_jit(f)
    for tree in (group(refs), group([*refs[:3], other, *refs[4:]]), group(refs)):
        for _ in range(4):
            assert step(tree) == weigh(tree)
    assert f.counter.count == 1 and len(step._plans._plans) == 2


@pytest.mark.parametrize("group", GROUPED.values(), ids=GROUPED)
def test_arrays_and_refs_among_each_other(group, trace_counter):
    f = trace_counter(weigh)
    step = rx.filter_jit(f)
    refs = make_refs()
    for i in range(4):
        leaves = [x if k % 3 else jnp.array(1.0 + i) for k, x in enumerate(refs)]
        assert step(group(leaves)) == weigh(group(leaves))
    assert f.counter.count == 1


@pytest.mark.parametrize("group", GROUPED.values(), ids=GROUPED)
def test_new_arrays_at_each_call(group, trace_counter):
    f = trace_counter(weigh)
    step: Any = rx.filter_jit(f)
    same = jnp.array(5.0)
    for i in range(5):
        leaves = [same, same, *(jnp.array(float(k + i)) for k in range(N - 2))]
        assert step(group(leaves)) == weigh(group(leaves))
    assert f.counter.count == 1 and len(step._plans._plans) == 1


def test_a_list_that_changes_in_place(trace_counter):
    f = trace_counter(weigh)
    step = rx.filter_jit(f)
    refs = make_refs()
    layers: list[Any] = in_dicts(refs)

    def check(traced):
        for _ in range(4):
            assert step(layers) == weigh(layers)
        assert f.counter.count == traced

    check(1)
    layers[2]["a"], layers[0]["b"] = layers[0]["b"], layers[2]["a"]
    check(1)
    layers[0]["b"] = layers[1]["b"]  # shared
    check(2)
    layers[1]["c"] = layers[1].pop("a")
    check(3)
    layers.append({})
    check(4)
    layers[4] = [layers[4]["a"], layers[4]["b"]]
    check(5)


def test_levels_that_are_divided_otherwise_are_other_arguments(trace_counter):
    refs = make_refs(16)
    step = rx.filter_jit(trace_counter(lambda tree: [len(x) for x in tree]))
    ones = [[ref] for ref in refs[:6]]
    for _ in range(4):
        assert step([*ones, refs[6:8], refs[8:]]) == [1] * 6 + [2, 8]
        assert step([*ones, refs[6:14], refs[14:]]) == [1] * 6 + [8, 2]
        assert step([refs[:8], refs[8:]]) == [8, 8]


def test_two_orders_of_one_dict_run_one_program(trace_counter):
    f = trace_counter(lambda d: d["x"].value - d["y"].value)
    step: Any = rx.filter_jit(f)
    x, y = rx.Ref(jnp.array(3.0)), rx.Ref(jnp.array(1.0))
    for _ in range(4):
        assert step({"x": x, "y": y}) == step({"y": y, "x": x}) == 2.0
    assert f.counter.count == 1 and len(step._plans._plans) == 2


def test_no_plan_has_a_dict_to_look_a_ref_up_in():
    """Its key would keep the ref alive."""
    step: Any = rx.filter_jit(lambda rates, ref: ref.value * rates.get(ref, 1.0))
    refs = make_refs()
    for _ in range(4):
        assert step({refs[3]: 5.0}, refs[3]) == 15.0
        assert step({refs[2]: 5.0}, refs[3]) == 3.0
    assert not step._plans._plans


@pytest.mark.parametrize("n", [8, 100])
def test_a_list_that_holds_itself_many_times_is_refused(n):
    items: list = []
    items += [items] * n
    by_name: dict = {}
    by_name.update((str(i), [by_name]) for i in range(n))
    for cycle in (items, by_name, (items,) * n):
        with raises(rx.StructureError, match="holds itself"):
            rx.filter_jit(lambda x: None)(cycle)


# What is equal only to itself.


class Mode(enum.Enum):
    TRAIN = 1.0
    TEST = 2.0


class Level(enum.IntEnum):
    LOW = 1


def choose(which, x):
    if isinstance(which, enum.Enum):
        return x * which.value
    if isinstance(which, type):
        return x * which.factor  # pyright: ignore[reportAttributeAccessIssue]
    return which(x)


def new_class(factor):
    return type("Factor", (), {"factor": factor})


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Mode.TRAIN, Mode.TEST),
        (jnp.sin, jnp.cos),
        (operator.neg, operator.pos),
        (new_class(2.0), new_class(3.0)),
        (jax.jit(lambda x: x + 1.0), jax.jit(lambda x: x + 2.0)),
    ],
    ids=["enum", "jitted", "builtin", "class", "jax.jit"],
)
def test_what_is_equal_to_itself_alone(first, second, trace_counter):
    f = trace_counter(choose)
    step: Any = rx.filter_jit(f)
    for which in (first, second, first):
        for i in range(4):
            assert jnp.allclose(step(which, jnp.array(1.0 + i)), choose(which, 1.0 + i))
    assert f.counter.count == 2 and len(step._plans._plans) == 2


def test_an_enum_that_is_a_number_is_not_that_number():
    step = rx.filter_jit(lambda x: type(x) is Level)
    for _ in range(4):
        assert step(Level.LOW) and not step(1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: new_class(2.0),
        lambda: jax.jit(lambda x: x * 2.0),
        lambda: lambda x: x * 2.0,
    ],
    ids=["class", "jax.jit", "function"],
)
def test_what_is_equal_to_itself_alone_is_freed(make):
    step: Any = rx.filter_jit(choose)
    alive: weakref.WeakSet = weakref.WeakSet()
    which = None
    for _ in range(20):
        which = make()
        for i in range(4):
            assert step(which, jnp.array(float(i))) == 2.0 * i
        alive.add(which)
    del which
    for _ in range(3):
        gc.collect()
    assert not alive and not step._plans._plans


def test_a_call_of_ten_thousand_leaves_has_a_plan(monkeypatch, trace_counter):
    """Beyond so many it is asked first whether a list holds itself."""
    made, make_plan = [], _fast_path.make_plan

    def counted(*args):
        made.append(make_plan(*args))
        return made[-1]

    monkeypatch.setattr(_fast_path, "make_plan", counted)
    f = trace_counter(lambda numbers, ref: ref.value + numbers[-1])
    step = rx.filter_jit(f)
    ref, numbers = rx.Ref(jnp.array(1.0)), [*range(10_001)]
    for last in (10_000, 7):
        numbers[-1] = last
        for _ in range(4):
            assert step(numbers, ref) == 1.0 + last
    assert f.counter.count == len(made) == 2 and None not in made
