"""`filter_jit(donate=...)`: old buffers are reused, and nothing that is needed is lost."""

import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import refx_eqx as rx


# With `.lower` and `__wrapped__`, which a `Callable` does not have for type checkers.
filter_jit: Any = rx.filter_jit


def make_ref(value=0.0, collection="state"):
    return rx.Ref(jnp.full((4,), value, jnp.float32), collection)


def _step(written, read, x):
    written.value += read.value + x
    return jnp.sum(written.value)


@pytest.mark.parametrize(
    "donate, written, bare",
    [
        ("none", False, False),
        ("refs", True, False),
        ("all", True, True),
        ("warn", True, True),
        ("all-except-first", False, True),
        ("warn-except-first", False, True),
    ],
)
def test_what_each_mode_donates(donate, written, bare):
    a, b, x = make_ref(1.0), make_ref(2.0), jnp.ones(4)
    old_a, old_b = a.value, b.value

    def step(a, b, x):
        a.value += b.value + x
        return x * 2.0  # the buffer of `x` has a use

    out = rx.filter_jit(step, donate=donate)(a, b, x)
    assert old_a.is_deleted() is written
    assert x.is_deleted() is bare
    assert not old_b.is_deleted()
    assert jnp.array_equal(a.value, jnp.full(4, 4.0))
    assert jnp.array_equal(b.value, jnp.full(4, 2.0))
    assert jnp.array_equal(out, jnp.full(4, 2.0))


@pytest.mark.parametrize("donate", ["all-except-first", "warn-except-first"])
def test_the_first_argument_is_kept_also_by_keyword(donate):
    first, second = jnp.ones(4), jnp.ones(4)

    @rx.filter_jit(donate=donate)
    def f(first, second):
        return first + 1.0, second + 1.0

    f(second=second, first=first)
    assert second.is_deleted() and not first.is_deleted()


def test_donated_calls_follow_one_another():
    a, b = make_ref(0.0), make_ref(1.0)
    step = rx.filter_jit(_step, donate="refs")
    olds = []
    for i in range(4):
        olds.append(a.value)
        assert step(a, b, jnp.ones(4)) == 8.0 * (i + 1)
    assert all(old.is_deleted() for old in olds)


def test_the_program_aliases_its_input_with_its_output():
    a, b = make_ref(0.0), make_ref(1.0)
    compiled = filter_jit(_step, donate="refs").lower(a, b, jnp.ones(4)).compile()
    assert "input_output_alias" in compiled.as_text()
    old = a.value
    assert compiled(a, b, jnp.ones(4)) == 8.0
    assert old.is_deleted() and a.value[0] == 2.0
    plain = filter_jit(_step).lower(a, b, jnp.ones(4)).compile()
    assert "input_output_alias" not in plain.as_text()


def test_donating_traces_once(trace_counter):
    step = trace_counter(_step)
    jitted = rx.filter_jit(step, donate="refs")
    a, b = make_ref(0.0), make_ref(1.0)
    for _ in range(3):
        jitted(a, b, jnp.ones(4))
    jitted(make_ref(), make_ref(), jnp.ones(4))
    assert step.counter.count == 1


def test_two_refs_with_one_buffer():
    zeros = jnp.zeros(4)
    a, b = rx.Ref(zeros), rx.Ref(zeros)

    @rx.filter_jit(donate="refs")
    def f(a, b):
        a.value += 1.0
        b.value += 2.0

    for i in range(1, 3):
        f(a, b)
        assert a.value[0] == 1.0 * i and b.value[0] == 2.0 * i


def test_a_written_ref_with_the_buffer_of_one_that_is_read():
    # An average that starts at the parameters.
    params = rx.Ref(jnp.ones(4), "params")
    average = rx.Ref(params.value, "average")

    @rx.filter_jit(donate="refs")
    def f(params, average):
        average.value = 0.5 * (average.value + params.value)

    for _ in range(2):
        f(params, average)
    assert params.value[0] == 1.0 and average.value[0] == 1.0


def test_a_bare_array_that_is_a_ref_s_buffer_too():
    a = make_ref(1.0)

    @rx.filter_jit(donate="refs")
    def f(a, x):
        a.value += x

    x = a.value
    f(a, x)
    assert a.value[0] == 2.0
    assert not x.is_deleted() and x[0] == 1.0


def test_two_refs_that_swap_their_buffers():
    a, b = make_ref(1.0), make_ref(2.0)

    @rx.filter_jit(donate="refs")
    def swap(a, b):
        a.value, b.value = b.value, a.value

    for _ in range(3):
        swap(a, b)
    assert a.value[0] == 2.0 and b.value[0] == 1.0


def test_a_ref_that_changes_its_shape_or_dtype_is_not_donated():
    a, b = make_ref(1.0), make_ref(2.0)

    @rx.filter_jit(donate="refs")
    def f(a, b):
        a.value = jnp.concatenate([a.value, a.value])
        b.value = b.value.astype(jnp.int32)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f(a, b)
    assert a.shape == (8,) and b.dtype == jnp.int32


def test_what_is_written_may_depend_on_the_shapes():
    @rx.filter_jit(donate="refs")
    def f(a, b):
        if a.shape[0] == 4:
            a.value += 1.0
        else:
            b.value += 1.0

    for n, writes_a in [(4, True), (5, False), (4, True), (6, False)]:
        a, b = rx.Ref(jnp.zeros(n)), rx.Ref(jnp.zeros(n))
        old_a, old_b = a.value, b.value
        for _ in range(2):
            f(a, b)
        assert old_a.is_deleted() is writes_a
        assert old_b.is_deleted() is not writes_a
        assert a.value[0] == 2.0 * writes_a
        assert b.value[0] == 2.0 * (not writes_a)


def test_what_is_donated_may_depend_on_the_types(trace_counter):
    def keep(last, x):
        last.value = x + jnp.mean(last.value)
        return jnp.sum(x)

    keep = trace_counter(keep)
    f = rx.filter_jit(keep, donate="refs")
    last = rx.Ref(jnp.ones(2))

    def call(n):
        old, before = last.value, keep.counter.count
        f(last, jnp.ones(n))
        assert old.is_deleted() is (old.shape == (n,))
        return keep.counter.count - before

    for n in (2, 2, 3, 3, 2):
        call(n)
    # Each pair of types was there once, so none is traced again.
    assert [call(n) for n in (2, 3, 3, 2, 2)] == [0] * 5


def test_a_constant_may_be_written():
    a, b = rx.Ref(jnp.ones(2)), rx.Ref(jnp.array(1.0))

    @rx.filter_jit(donate="refs")
    def f(a, b):
        a.value += 1.0
        b.value = jnp.asarray(0.375)  # in the program, a literal

    for _ in range(3):
        f(a, b)
    assert (a.value == 4.0).all() and b.value == 0.375


def test_lowered_for_types_of_which_another_ref_is_donated():
    @rx.filter_jit(donate="refs")
    def keep(last, x):
        last.value = 2 * x
        return jnp.sum(x)

    last = rx.Ref(jnp.ones(2))
    keep(last, jnp.ones(2))
    compiled = keep.lower(last, jnp.ones(3)).compile()
    assert compiled(last, jnp.ones(3)) == 3.0 and last.shape == (3,)


def test_an_exception_while_tracing_donates_nothing():
    a = make_ref(1.0)
    old = a.value

    @rx.filter_jit(donate="all")
    def f(a, x):
        a.value += x
        raise KeyError("mine")

    x = jnp.ones(4)
    with pytest.raises(KeyError, match="mine"):
        f(a, x)
    assert a.value is old and not old.is_deleted() and not x.is_deleted()


def test_a_failed_check_loses_nothing():
    with jax.check_tracer_leaks(False):
        a = make_ref(1.0)

        @rx.filter_jit(donate="refs")
        def f(a, x):
            a.value = eqx.error_if(a.value + x, jnp.any(x < 0.0), "negative")

        for _ in range(2):
            with pytest.raises(eqx.EquinoxRuntimeError, match="negative"):
                f(a, -jnp.ones(4))
            assert not a.value.is_deleted() and a.value[0] == 1.0
        f(a, jnp.ones(4))
        assert a.value[0] == 2.0


def test_the_remedy_for_a_donated_value_runs():
    a, kept = make_ref(1.0), make_ref(1.0)
    step = rx.filter_jit(_step, donate="refs")
    old = jnp.array(a.value, copy=True)
    step(a, kept, jnp.ones(4))
    assert old[0] == 1.0


@pytest.mark.parametrize("donate", ["all", "all-except-first"])
def test_all_modes_are_silent_on_an_unused_donation(donate):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f = rx.filter_jit(lambda ref, x: jnp.sum(x), donate=donate)
        f(make_ref(), jnp.ones(4))


@pytest.mark.parametrize("donate", ["warn", "warn-except-first"])
def test_warn_modes_warn_of_an_unused_donation(donate):
    f = rx.filter_jit(lambda ref, x: jnp.sum(x), donate=donate)
    with pytest.warns(UserWarning, match="Some donated buffers were not usable"):
        f(make_ref(), jnp.ones(4))


def test_a_donated_ref_of_a_module_keeps_its_sharing():
    shared = make_ref(1.0)
    tree = {"a": shared, "b": [shared]}

    @rx.filter_jit(donate="refs")
    def f(tree):
        tree["b"][0].value += tree["a"].value

    f(tree)
    f(tree)
    assert tree["a"].value[0] == 4.0 and tree["a"] is tree["b"][0]


def test_a_closed_over_ref_is_donated():
    a = make_ref(1.0)

    @rx.filter_jit(donate="refs")
    def f():
        a.value += 1.0

    old = a.value
    f()
    f()
    assert old.is_deleted() and a.value[0] == 3.0


def test_a_ref_with_a_pytree_value_is_right_after():
    a = rx.Ref({"x": jnp.zeros(4), "n": 1})

    @rx.filter_jit(donate="refs")
    def f(a):
        a.value = {"x": a.value["x"] + 1.0, "n": a.value["n"] + 1}

    for _ in range(3):
        f(a)
    assert a.value["x"][0] == 3.0 and a.value["n"] == 4


def test_a_value_that_was_donated_elsewhere_is_a_clear_error():
    a = make_ref(1.0)
    jax.jit(lambda x: x + 1.0, donate_argnums=0)(a.value)
    text = r"The buffer of an unnamed ref \(collection 'state'\) is gone.*copy it"
    for donate in ("none", "refs"):
        with pytest.raises(rx.ConcurrencyError, match=text):
            rx.filter_jit(_step, donate=donate)(a, make_ref(), jnp.ones(4))


def test_the_buffers_of_a_value_with_several_arrays_are_reused():
    state = rx.Ref({"mu": jnp.zeros(3), "nu": [jnp.ones(3)], "name": "adam"})
    old = jax.tree.leaves(state.value)

    @rx.filter_jit(donate="refs")
    def step(state):
        mu, nu = state.value["mu"], state.value["nu"][0]
        state.value = {"mu": mu + 1.0, "nu": [nu], "name": "adam"}

    step(state)
    assert old[0].is_deleted()
    assert jnp.array_equal(state.value["mu"], jnp.ones(3))
    step(state)
    assert jnp.array_equal(state.value["mu"], jnp.full(3, 2.0))
    assert jnp.array_equal(state.value["nu"][0], jnp.ones(3))
