"""What is traced again and what is not; and that nothing is kept that should be dropped."""

# A static checker objects to what is wrong on purpose here, or made at run time.
# pyright: reportPossiblyUnboundVariable=false

import dataclasses
import gc
import os
import subprocess
import sys
import textwrap
import weakref
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmarks import _arguments
from jaxtyping import Array

import refx_eqx as rx
from refx_eqx._engine import _fast_path


# With `.lower` and `__wrapped__`, which a `Callable` does not have for type checkers.
filter_jit: Any = rx.filter_jit


ONES, ZEROS, ZERO = jnp.ones((3, 3)), jnp.zeros(3), jnp.array(0, jnp.int32)


class Block(rx.Module):
    weight: rx.Param[Array]
    bias: rx.Param[Array]
    calls: rx.Ref[Array] = rx.field(collection="counts")
    slope: float | None

    def __init__(self):
        self.weight = ONES
        self.bias = ZEROS
        self.slope = 1.0
        self.calls = ZERO

    def __call__(self, x):
        self.calls.value += 1
        return self.weight.value @ x + self.bias.value


class Stack(rx.Module):
    blocks: list
    named: dict


def make_stack():
    return Stack([Block(), Block()], {"head": Block()})


def _apply(model, x):
    for block in model.blocks:
        x = block(x)
    return model.named["head"](x)


@pytest.fixture
def counted(trace_counter):
    f = trace_counter(_apply)
    return rx.filter_jit(f), f.counter


X = jnp.ones(3)


# Not traced again.


def _same_model():
    model = make_stack()
    return model, model


def _new_model():
    return make_stack(), make_stack()


def _tree_at_copy():
    model = make_stack()
    weight = rx.clone(model.blocks[0].weight)
    model2 = eqx.tree_at(lambda m: m.blocks[0].weight, model, weight)
    return model, model2, eqx.tree_at(lambda m: m.named["head"], model2, Block())


def _tree_map_copy():
    model = make_stack()
    return model, jax.tree.map(lambda ref: ref, model)


def _clone():
    model = make_stack()
    return model, rx.clone(model)


def _same_module_with_another_value():
    model = make_stack()
    other = make_stack()
    other.blocks[1].weight.value = jnp.zeros((3, 3))
    return model, other


@pytest.mark.parametrize(
    "models",
    [
        _same_model,
        _new_model,
        _tree_at_copy,
        _tree_map_copy,
        _clone,
        _same_module_with_another_value,
    ],
    ids=lambda f: f.__name__.strip("_"),
)
def test_an_equal_structure_is_not_traced_again(models, counted):
    f, counter = counted
    for model in models():
        for _ in range(2):
            assert jnp.array_equal(f(model, X), _apply(rx.clone(model), X))
    assert counter.count == 1


def test_wrapping_anew_does_not_trace_again(trace_counter):
    f = trace_counter(_apply)
    model = make_stack()
    for _ in range(3):
        rx.filter_jit(f)(model, X)
    assert f.counter.count == 1


def test_a_function_made_anew_is_another_function(trace_counter):
    counts = []
    for k in range(3):

        def f(ref, k=k):
            return ref.value + k

        counted = trace_counter(f)
        assert rx.filter_jit(counted)(rx.Ref(jnp.array(0))) == k
        counts.append(counted.counter.count)
    assert counts == [1, 1, 1]


def test_a_bound_method_of_each_object_is_one_program():
    count = 0

    class Model(rx.Module):
        w: rx.Param[Array]

        def f(self, x):
            nonlocal count
            count += 1
            return self.w.value * x

    for i in range(3):
        assert rx.filter_jit(Model(jnp.array(float(i))).f)(jnp.array(2.0)) == 2.0 * i
    assert count == 1


def test_closures_with_refs_of_equal_structure_are_one_program_each(trace_counter):
    f = trace_counter(lambda ref: ref.value)

    def make(value):
        ref = rx.Ref(jnp.array(value))
        return rx.filter_jit(lambda: f(ref))

    a, b = make(1.0), make(2.0)
    for _ in range(2):
        assert a() == 1.0 and b() == 2.0
    assert f.counter.count <= 2


OUTER = {
    "grad": lambda f: rx.filter_grad(f),
    "jvp": lambda f: lambda w, x: rx.filter_jvp(f, (w, x), (X, X)),
    "vjp": lambda f: lambda w, x: rx.filter_vjp(f, w, x)[1](jnp.sum(X)),
    "linearize": lambda f: lambda w, x: rx.filter_linearize(f, w, x)[1](X, X),
    "jacfwd": lambda f: rx.filter_jacfwd(f),
    "jacrev": lambda f: rx.filter_jacrev(f),
    "hessian": lambda f: rx.filter_hessian(f),
    "vmap": lambda f: rx.filter_vmap(f, in_axes=(None, 0)),
    "checkpoint": lambda f: rx.filter_checkpoint(f),
}

INNER = {
    "jit": lambda f: rx.filter_jit(f),
    "checkpoint": lambda f: rx.filter_checkpoint(f),
    "cond": lambda f: lambda w, x: rx.cond(True, f, f, w, x),
    "scan": lambda f: _scanned(f),
}


def _scanned(f):
    def step(carry, _):
        return carry, f(*carry)

    return lambda w, x: rx.scan(step, (w, x), None, 2)[1].sum()


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("outer", OUTER)
def test_what_is_inside_of_a_transform_is_not_traced_again(outer, inner):
    n, count = 0, rx.Ref(jnp.array(0), "counts")

    def f(w, x):
        nonlocal n
        n += 1
        count.value += 1
        return jnp.sum(w.value * x) * count.value

    transformed = OUTER[outer](INNER[inner](f))
    w, x = rx.Ref(X, "params"), jnp.eye(3) if outer == "vmap" else X
    transformed(w, x)
    first = n
    for _ in range(2):
        transformed(w, x)
        transformed(rx.Ref(2 * X, "params"), x)
    assert n == first
    assert count.value == (10 if inner == "scan" else 5)


def test_a_repeated_call_notices_what_a_closure_variable_is_bound_to():
    class Options:
        pass

    ref, options = rx.Ref(jnp.array(1.0)), Options()

    @rx.filter_jit
    def f(ref):
        return ref.value * (2.0 if options is None else 3.0)

    assert [float(f(ref)) for _ in range(3)] == [3.0, 3.0, 3.0]
    options = None  # and the old content is gone
    assert [float(f(ref)) for _ in range(3)] == [2.0, 2.0, 2.0]
    options = Options()
    assert [float(f(ref)) for _ in range(3)] == [3.0, 3.0, 3.0]
    del options
    with pytest.raises(NameError):
        f(ref)


@dataclasses.dataclass(unsafe_hash=True)
class Options:
    factor: float


class WithOptions(eqx.Module):
    ref: rx.Ref
    options: Options


@pytest.mark.parametrize("where", ["in a module", "closure", "argument"])
def test_a_repeated_call_notices_a_static_leaf_that_changed_in_place(where):
    options, ref = Options(2.0), rx.Ref(jnp.array(1.0))
    model = WithOptions(ref, options)
    by_module = rx.filter_jit(lambda model: model.ref.value * model.options.factor)
    by_closure = rx.filter_jit(lambda: model.ref.value * model.options.factor)
    by_argument = rx.filter_jit(lambda ref, options: ref.value * options.factor)
    call = {
        "in a module": lambda: float(by_module(model)),
        "closure": lambda: float(by_closure()),
        "argument": lambda: float(by_argument(ref, options)),
    }[where]
    for factor in (2.0, 3.0, 2.0, 5.0):
        options.factor = factor
        assert [call() for _ in range(4)] == [factor] * 4


def _planned(monkeypatch):
    """What `make_plan` returns, call by call."""
    plans, make_plan = [], _fast_path.make_plan
    keeping = lambda *args: plans.append(make_plan(*args)) or plans[-1]
    monkeypatch.setattr(_fast_path, "make_plan", keeping)
    return plans


class Unstable:
    """A node that makes other children each time."""

    def __init__(self, x):
        self.x = x


jax.tree_util.register_pytree_node(
    Unstable, lambda node: (((node.x,),), None), lambda _, xs: Unstable(xs[0][0])
)


@pytest.mark.parametrize("content", [Unstable("text"), {0: "a", "x": "b"}, {1, 2}])
def test_a_closure_over_anything_is_planned(content, monkeypatch):
    plans = _planned(monkeypatch)
    ref = rx.Ref(jnp.array(1.0))
    f = rx.filter_jit(lambda ref, x: (content, ref.value + x)[1])
    for _ in range(10):
        assert f(ref, jnp.array(2.0)) == 3.0
    assert len(plans) == 1 and None not in plans


def test_a_ref_with_a_pytree_is_planned(monkeypatch):
    plans = _planned(monkeypatch)
    state = rx.Ref({"mean": jnp.array(0.0), "n": 0, "name": "mean"})

    @rx.filter_jit
    def f(state, x):
        mean, n = state.value["mean"] + x, state.value["n"] + 1
        state.value = {"mean": mean, "n": n, "name": "mean"}

    for i in range(1, 10):
        f(state, jnp.array(2.0))
        assert (state.value["mean"], state.value["n"]) == (2.0 * i, i)
    assert len(plans) == 1 and None not in plans


@pytest.mark.parametrize(
    "value",
    [
        np.zeros(3, np.float32),
        {"x": jnp.zeros(3)},
        {"x": jnp.zeros(3), "text": "a"},
        {"x": jnp.zeros(3), "text": "b"},
        (jnp.zeros(3), None),
        [0.0, 0.0, 0.0],
        None,
        jnp.zeros(3),
    ],
    ids=str,
)
@pytest.mark.parametrize("first", [jnp.ones(3), {"x": jnp.ones(3), "text": "a"}])
def test_a_value_of_another_structure_is_noticed(value, first):
    @rx.filter_jit
    def g(ref):
        total = jnp.array(0.0)
        for x in jax.tree.leaves(ref.value):
            total += jnp.sum(x) if not isinstance(x, str) else ord(x)
        return total

    def plain(tree):
        return sum(
            ord(x) if isinstance(x, str) else float(np.sum(x))
            for x in jax.tree.leaves(tree)
        )

    ref = rx.Ref(first)
    for new in (first, value, first, value):
        ref.value = new
        assert [float(g(ref)) for _ in range(4)] == [plain(new)] * 4


def test_arguments_that_are_grouped_otherwise_are_other_arguments():
    refs = [rx.Ref(jnp.array(float(i))) for i in range(9)]

    @rx.filter_jit
    def f(*args):
        return len(args), [len(x) for x in args if isinstance(x, list)]

    def check(*args):
        for _ in range(4):
            lists = [len(x) for x in args if isinstance(x, list)]
            assert f(*args) == (len(args), lists)

    for n in (1, 7, 8, 9):
        check([X] * n, *refs)
        check([X, *refs[: n - 1]], *refs[n - 1 :])
        check(refs[:n], *[X] * n)
        check([*refs[:n], X], *[X] * (n - 1))
        check([refs[:n]], [X] * n)
        check([refs[:n], [X] * n])


# Traced again.


def _another_sharing():
    model = make_stack()
    tied = eqx.tree_at(lambda m: m.blocks[1], model, model.blocks[0])
    return model, tied


def _another_shape():
    model = make_stack()
    model.named["head"].weight.value = jnp.ones((5, 3))
    model.named["head"].bias.value = jnp.ones(5)
    return make_stack(), model


def _another_dtype():
    model = make_stack()
    model.named["head"].calls.value = jnp.array(0, jnp.int16)
    return make_stack(), model


def _another_collection():
    model = make_stack()
    frozen = rx.Ref(jnp.ones((3, 3)), "frozen")
    return model, eqx.tree_at(lambda m: m.blocks[0].weight, model, frozen)


def _another_ref_type():
    class Special(rx.Ref):
        pass

    model = make_stack()
    special = Special(jnp.ones((3, 3)), "params")
    return model, eqx.tree_at(lambda m: m.blocks[0].weight, model, special)


def _another_static_value():
    model = make_stack()
    return model, eqx.tree_at(lambda m: m.blocks[0].slope, model, 1)


@pytest.mark.parametrize(
    "models",
    [
        _another_sharing,
        _another_shape,
        _another_dtype,
        _another_collection,
        _another_ref_type,
        _another_static_value,
    ],
    ids=lambda f: f.__name__.strip("_"),
)
def test_another_structure_is_traced_again_once(models, counted):
    f, counter = counted
    for model in models():
        model = rx.clone(model)
        assert jnp.array_equal(f(model, X), _apply(rx.clone(model), X))
    assert counter.count == 2


def test_both_sharings_are_kept(counted):
    f, counter = counted
    untied, tied = _another_sharing()
    for _ in range(3):
        f(rx.clone(untied), X)
        f(rx.clone(tied), X)
    assert counter.count == 2


def test_a_weakly_typed_value_is_another_type(trace_counter):
    f = trace_counter(lambda ref: ref.value * 1)
    jitted = rx.filter_jit(f)
    for value in (0, jnp.array(0, jnp.int32)) * 2:
        ref = rx.Ref(value)
        assert jitted(ref).weak_type is isinstance(value, int)
    assert f.counter.count == 2


def test_sharing_between_arguments_is_a_part_of_the_structure(trace_counter):
    f = trace_counter(lambda a, b: a.value + b.value)
    jitted = rx.filter_jit(f)
    a, b = rx.Ref(jnp.array(1)), rx.Ref(jnp.array(2))
    pairs = [(a, b), (a, a), (b, a), (b, b)]
    assert [int(jitted(*pair)) for pair in pairs] == [3, 2, 3, 4]
    assert f.counter.count == 2


# Nothing is kept.


def _collect():
    for _ in range(3):
        gc.collect()


def test_many_models_come_and_go():
    f = rx.filter_jit(_apply)
    f(make_stack(), X)
    alive: weakref.WeakSet = weakref.WeakSet()
    _collect()
    before = len(gc.get_objects())
    model = None
    for i in range(1000):
        model = make_stack()
        if i % 10 == 0:
            f(model, X)
            alive.add(model.blocks[0])
        alive.add(model.named["head"].weight)
    del model
    _collect()
    assert len(alive) == 0
    assert len(gc.get_objects()) - before < 300


def test_ten_thousand_models_come_and_go():
    class Scale(rx.Module):
        factors: list[rx.Param[jax.Array]]

    @rx.filter_jit
    def f(model, x):
        return model.factors[0].value * x

    alive: weakref.WeakSet = weakref.WeakSet()
    counts = []
    for i in range(10_001):
        model = Scale([rx.Ref(X)])
        for _ in range(3):  # the third is a repeated call, of which something is kept
            f(model, X)
        alive.add(model.factors[0])
        if i in (1000, 10_000):
            _collect()
            counts.append(len(gc.get_objects()))
            assert len(alive) == 1
    assert abs(counts[1] - counts[0]) < 100


@pytest.mark.parametrize("row", _arguments.ROWS)
def test_arguments_of_any_kind_come_and_go(row):
    f: Any = rx.filter_jit(_arguments.step("one"))
    alive: weakref.WeakSet = weakref.WeakSet()
    for _ in range(20):
        args, kwargs = _arguments.ROWS[row](2)
        for _ in range(3):
            with jax.check_tracer_leaks(False):  # quick
                f(*args, **kwargs)
        refs = _arguments.refs_inside((args, kwargs))
        assert refs
        alive |= set(refs)
    del args, kwargs, refs
    _collect()
    assert len(alive) == 0
    plans = f._plans
    assert len(plans._plans) <= 1 and not plans._known


def test_a_ref_beside_a_model_that_stays_is_freed():
    model, f = make_stack(), rx.filter_jit(lambda model, ref: ref.value + X)
    alive: weakref.WeakSet = weakref.WeakSet()
    for _ in range(300):
        ref = rx.Ref(ZEROS)
        for _ in range(3):
            with jax.check_tracer_leaks(False):  # quick
                f(model, ref)
        alive.add(ref)
    del ref
    _collect()
    assert len(alive) == 0


def test_a_function_keeps_a_bounded_number_of_plans():
    f: Any = rx.filter_jit(lambda ref, x: ref.value + x)
    refs = [rx.Ref(ZEROS) for _ in range(600)]
    with jax.check_tracer_leaks(False):  # quick
        for ref in refs:
            for _ in range(3):
                f(ref, X)
    assert len(f._plans._plans) <= 256 and len(f._plans._noted) <= 1000


def test_a_recursive_function_as_an_argument_is_freed():
    def make(ref):
        def recursive(n):
            return ref.value if n == 0 else recursive(n - 1)

        return recursive

    f = rx.filter_jit(lambda fn: fn(2))
    watched = []
    for i in range(3):
        fn = make(rx.Ref(jnp.full(3, float(i))))
        assert [float(f(fn)[0]) for _ in range(4)] == [float(i)] * 4
        watched.append(weakref.ref(fn))
    del fn
    _collect()
    assert [ref() for ref in watched] == [None] * 3


def test_a_module_whose_init_calls_a_compiled_function_is_seen_as_it_becomes():
    seen = []

    @rx.filter_jit
    def total(model):
        return sum(jnp.sum(x) for x in jax.tree.leaves(rx.snapshot(model)))

    class Grows(rx.Module):
        a: rx.Param[Array]
        b: rx.Param[Array]

        def __init__(self):
            self.a = ZEROS + 1.0
            seen.extend(float(total(self)) for _ in range(4))
            self.b = ZEROS + 1.0

    model = Grows()
    seen.extend(float(total(model)) for _ in range(4))
    assert seen == [3.0] * 4 + [6.0] * 4


def test_a_model_dies_at_once_without_the_collector():
    # Its arrays are large: they must not wait for the garbage collector.
    f = rx.filter_jit(_apply)
    f(make_stack(), X)
    _collect()
    gc.disable()
    try:
        model = make_stack()
        f(model, X)
        watched = [
            weakref.ref(model),
            weakref.ref(model.blocks[0]),
            weakref.ref(model.blocks[0].weight),
        ]
        del model
        assert [ref() for ref in watched] == [None] * len(watched)
    finally:
        gc.enable()


def test_old_values_die_at_once():
    f = rx.filter_jit(lambda ref, x: setattr(ref, "value", ref.value + x))
    ref = rx.Ref(jnp.zeros(3))
    f(ref, jnp.ones(3))
    gc.disable()
    try:
        old = weakref.ref(ref.value)
        f(ref, jnp.ones(3))
        assert old() is None
    finally:
        gc.enable()


def test_the_programs_of_a_dead_function_die():
    def make():
        constant = jnp.arange(3.0) + 1.0  # lives in the program

        def f(ref):
            ref.value = ref.value + constant

        rx.filter_jit(f)(rx.Ref(jnp.zeros(3)))
        return weakref.ref(f), weakref.ref(constant)

    make()
    watched = make()
    _collect()
    assert [ref() for ref in watched] == [None, None]


def test_the_programs_of_a_dead_function_die_if_it_is_wrapped():
    def make():
        constant = jnp.arange(3.0) + 1.0

        def f(x):
            return x + constant

        rx.filter_jit(jax.jit(f))(ZEROS)
        return weakref.ref(f), weakref.ref(constant)

    make()
    watched = make()
    _collect()
    assert [ref() for ref in watched] == [None, None]


def test_many_functions_come_and_go():
    def make():
        ref = rx.Ref(jnp.zeros(3))

        @filter_jit
        def f(x):
            ref.value = ref.value + x

        f(jnp.ones(3))
        return weakref.ref(f.__wrapped__), weakref.ref(ref)

    watched = [ref for _ in range(20) for ref in make()]
    _collect()
    assert not any(ref() is not None for ref in watched)


def test_a_failed_trace_keeps_nothing():
    @rx.filter_jit
    def f(model):
        model.blocks[0].weight.value += 1.0
        raise KeyError("mine")

    def fail():
        model = make_stack()
        with pytest.raises(KeyError):
            f(model)
        return weakref.ref(model.blocks[0].weight)

    watched = fail()
    _collect()
    assert watched() is None


# Across processes.


_PROGRAM = """
    import jax, jax.numpy as jnp, refx_eqx as rx

    hits = []
    jax.monitoring.register_event_listener(
        lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None
    )

    class Model(rx.Module):
        w: rx.Param[jax.Array]

    @rx.filter_jit(donate="refs")
    def a_step(model, x):
        model.w.value = jnp.sin(model.w.value) @ x

    model = Model(jnp.eye(3))
    a_step(model, jnp.eye(3))
    jax.config.update("jax_enable_compilation_cache", False)
    print(len(hits), float(model.w.value[0, 0]))
"""


def test_a_new_process_finds_the_program_in_the_compilation_cache(tmp_path):
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_CHECK_TRACER_LEAKS": "0",
    }

    def run():
        out = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(_PROGRAM)],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert out.returncode == 0, out.stderr
        hits, value = out.stdout.split()
        stored = {name for name in os.listdir(tmp_path) if "a_step" in name}
        return int(hits), float(value), {n for n in stored if not n.endswith("atime")}

    _, first, stored = run()
    hits, second, stored_after = run()
    assert first == second
    assert len(stored) == 1 and stored_after == stored
    assert hits >= 1


def test_a_function_that_closes_over_none_is_known_again(trace_counter):
    def make(nothing):
        return lambda x: x if nothing is None else x + nothing

    @trace_counter
    def apply(fn, x):
        return fn(x)

    jitted, fn = rx.filter_jit(apply), make(None)
    for _ in range(3):
        assert jitted(fn, jnp.array(1.0)) == 1.0
    assert apply.counter.count == 1
    assert jitted(make(1.0), jnp.array(1.0)) == 2.0
    assert apply.counter.count == 2
