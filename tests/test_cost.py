"""What a call costs, counted in calls of this library's Python functions: that is the same
on every machine. Times are measured by `tests/benchmarks`."""

import collections
import gc
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from benchmarks import _arguments
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import refx_eqx as rx


# With `.lower`, which a `Callable` does not have for type checkers.
filter_jit: Any = rx.filter_jit

HOME = str(pathlib.Path(rx.__file__).parent)


def count(run) -> int:
    """How many Python functions of the library `run()` calls."""
    counter: collections.Counter = collections.Counter()

    def on_event(frame, event, arg):
        if event == "call" and frame.f_code.co_filename.startswith(HOME):
            counter[frame.f_code] += 1

    # Else callbacks for what earlier tests have left are counted, whenever it is collected.
    gc.collect()
    gc.disable()
    before = sys.getprofile()
    sys.setprofile(on_event)
    try:
        run()
    finally:
        sys.setprofile(before)
        gc.enable()
    return counter.total()


# Made once: under leak checks, JAX 0.10 compiles again for each array.
ONES, ZEROS, X = jnp.ones(1), jnp.zeros(1), jnp.float32(1.0)


class Layer(rx.Module):
    weight: rx.Param[jax.Array]
    bias: rx.Param[jax.Array]


class Model(rx.Module):
    layers: tuple[Layer, ...]


def make(n_refs):
    return Model(tuple(Layer(ONES, ZEROS) for _ in range(n_refs // 2)))


def step(model, x):
    for layer in model.layers:
        layer.weight.value += x
        layer.bias.value += x
    return x


def fresh_step():
    """A function that was never traced."""
    return lambda model, x: step(model, x)


def test_a_repeated_call_runs_as_much_python_for_a_thousand_refs_as_for_ten():
    def of(n_refs):
        f, model = filter_jit(fresh_step()), make(n_refs)
        for _ in range(3):
            f(model, X)
        return count(lambda: f(model, X))

    assert of(1000) == of(10) < 10


@pytest.fixture
def quick():
    with jax.check_tracer_leaks(False):
        yield


@pytest.mark.parametrize("row", _arguments.ROWS)
@pytest.mark.parametrize("written", ["one", "all"])
@pytest.mark.usefixtures("quick")
def test_a_repeated_call_of_any_argument_runs_a_fixed_number_of_functions(row, written):
    f = filter_jit(_arguments.step(written))

    def of(n_refs):
        args, kwargs = _arguments.ROWS[row](n_refs)
        for _ in range(4):
            f(*args, **kwargs)
        assert f._plans._plans
        return count(lambda: f(*args, **kwargs))

    few = of(10)
    assert few <= 40 and of(20) == few


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 devices")
@pytest.mark.parametrize("donate", ["none", "refs"])
def test_a_repeated_call_on_a_mesh_runs_as_much_python_as_one_on_a_device(donate):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def of(sharding):
        f, model = filter_jit(fresh_step(), donate=donate), make(4)
        rx.filter_shard(model, sharding)
        for _ in range(4):
            f(model, X)
        return count(lambda: f(model, X))

    replicated = NamedSharding(mesh, PartitionSpec())
    assert of(replicated) == of(jax.devices()[0])


@pytest.mark.parametrize("donate", ["refs", "all"])
def test_a_repeated_call_that_donates_does_not_walk_the_arrays(donate):
    def of(n_refs):
        model = make(n_refs)
        f = rx.filter_jit(
            lambda model: setattr(
                model.layers[0].bias, "value", model.layers[0].bias.value + 1.0
            ),
            donate=donate,
        )
        for _ in range(4):
            f(model)
        return count(lambda: f(model))

    assert of(40) == of(10) < 20


@pytest.mark.parametrize(
    "run",
    [
        lambda n: filter_jit(fresh_step()).lower(make(n), X),
        lambda n: rx.filter_eval_shape(
            rx.filter_grad(lambda m: step(m, X) * m.layers[0].bias.value[0]), make(n)
        ),
        lambda n: rx.filter_eval_shape(
            lambda m: rx.fori_loop(0, 2, lambda i, m: (step(m, X), m)[1], m), make(n)
        ),
        lambda n: rx.reref(rx.deref(make(n))),
        lambda n: rx.combine(*rx.partition(make(n), "params")),
    ],
    ids=["filter_jit", "filter_grad", "fori_loop", "deref", "partition"],
)
def test_the_work_grows_linearly_with_the_refs(run):
    run(10)
    few, many = count(lambda: run(100)), count(lambda: run(1000))
    assert 5 * few < many < 11 * few


def test_a_new_equal_shaped_model_costs_a_fraction_of_its_tracing():
    f = filter_jit(fresh_step())
    first = count(lambda: f(make(100), X)) - count(lambda: make(100))
    second = count(lambda: f(make(100), X)) - count(lambda: make(100))
    assert 0 < second < first / 3, (first, second)
