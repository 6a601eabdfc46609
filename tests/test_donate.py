"""`filter_jit(donate=...)`: old buffers are reused, and nothing that is needed is lost."""

import copy
import pickle
import sys
import threading
import warnings
import weakref
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.core import Tracer
from raising import raises

import refx_eqx as rx
from refx_eqx._engine._run_time_errors import explain


# With `.lower` and `__wrapped__`, which a `Callable` does not have for type checkers.
filter_jit: Any = rx.filter_jit


def make_ref(value=0.0, collection="state"):
    return rx.Ref(jnp.full((4,), value, jnp.float32), collection)


def buffer(ref):
    """Where the value is. (To hold the value itself would keep its buffer alive.)"""
    (array,) = jax.tree.leaves(ref.value)
    return array.unsafe_buffer_pointer()


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
    # They share the buffers, and are not counted as holding the arrays.
    old_a, old_b = a.value.addressable_data(0), b.value.addressable_data(0)

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


@pytest.mark.parametrize("value, old", [(False, True), (2, 1), (2.0, 1.0), (2.0, 1)])
def test_a_number_is_written_to_a_donated_ref(value, old):
    ref = rx.Ref(jnp.array(old))

    def write(ref):
        ref.value = value

    rx.filter_jit(write, donate="refs")(ref)
    rx.filter_jit(write, donate="refs")(ref)
    assert ref.value == value


def test_donated_calls_follow_one_another():
    a, b = make_ref(0.0), make_ref(1.0)
    step = rx.filter_jit(_step, donate="refs")
    first = buffer(a)
    for i in range(4):
        assert step(a, b, jnp.ones(4)) == 8.0 * (i + 1)
        assert buffer(a) == first


def test_the_program_aliases_its_input_with_its_output():
    a, b = make_ref(0.0), make_ref(1.0)
    compiled = filter_jit(_step, donate="refs").lower(a, b, jnp.ones(4)).compile()
    assert "input_output_alias" in compiled.as_text()
    old = buffer(a)
    assert compiled(a, b, jnp.ones(4)) == 8.0
    assert buffer(a) == old and a.value[0] == 2.0
    plain = filter_jit(_step).lower(a, b, jnp.ones(4)).compile()
    assert "input_output_alias" not in plain.as_text()


@jax.check_tracer_leaks(False)  # under them JAX takes the slow path
def test_a_repeated_donating_call_runs_no_python_of_jax():
    @filter_jit(donate="refs")
    def f(refs):
        for ref in refs:
            ref.value += 1.0

    refs = [make_ref(), make_ref()]
    for _ in range(3):
        f(refs)
    files = []
    sys.setprofile(lambda frame, event, arg: files.append(frame.f_code.co_filename))
    try:
        f(refs)
    finally:
        sys.setprofile(None)
    assert files and not [file for file in files if "pjit.py" in file]


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
        old_a, old_b = buffer(a), buffer(b)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what is donated has a use
            for _ in range(2):
                f(a, b)
        assert buffer(a) == old_a and buffer(b) == old_b
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
        old, shape, before = weakref.ref(last.value), last.shape, keep.counter.count
        kept = last.value.addressable_data(0)  # shares the buffer
        f(last, jnp.ones(n))
        assert old() is None and kept.is_deleted() is (shape == (n,))
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
    with raises(KeyError, match="mine"):
        f(a, x)
    assert a.value is old and not old.is_deleted() and not x.is_deleted()


def test_a_failed_check_loses_nothing():
    with jax.check_tracer_leaks(False):
        a = make_ref(1.0)

        @rx.filter_jit(donate="refs")
        def f(a, x):
            a.value = eqx.error_if(a.value + x, jnp.any(x < 0.0), "negative")

        for _ in range(2):
            with raises(eqx.EquinoxRuntimeError, match="negative"):
                f(a, -jnp.ones(4))
            assert not a.value.is_deleted() and a.value[0] == 1.0
        f(a, jnp.ones(4))
        assert a.value[0] == 2.0


class Small:
    def __init__(self, x):
        if eqx.is_array(x) and not isinstance(x, Tracer) and x > 2:
            raise ValueError("too large")
        self.x = x


jax.tree_util.register_pytree_node(
    Small, lambda small: ((small.x,), None), lambda _, x: Small(*x)
)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_result_that_cannot_be_made_leaves_the_new_values(compiled):
    """The old ones are gone."""

    def f(ref):
        ref.value = ref.value + 1.0
        return Small(ref.value[0])

    ref = make_ref()
    f = filter_jit(f, donate="refs")
    call = f.lower(ref).compile() if compiled else f
    for i in (1.0, 2.0):
        call(ref)
        assert ref.value[0] == i
    for i in (3.0, 4.0):
        with raises(ValueError, match="too large"):
            call(ref)
        assert ref.value[0] == i


def test_where_a_ref_may_not_be_written_nothing_of_it_is_donated():
    ref, other = make_ref(), make_ref(collection="other")

    @rx.filter_jit(donate="refs")
    def f(ref, other):
        ref.value = ref.value + 1.0
        other.value = other.value + 1.0

    for _ in range(3):
        f(ref, other)
    with rx.mutable("other"), raises(rx.ImmutableError, match="Cannot write"):
        f(ref, other)
    assert ref.value[0] == 3.0 and other.value[0] == 3.0
    f(ref, other)
    assert ref.value[0] == 4.0 and other.value[0] == 4.0


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

    old = buffer(a)
    f()
    f()
    assert buffer(a) == old and a.value[0] == 3.0


def test_a_ref_with_a_pytree_value_is_right_after():
    a = rx.Ref({"x": jnp.zeros(4), "n": 1})

    @rx.filter_jit(donate="refs")
    def f(a):
        a.value = {"x": a.value["x"] + 1.0, "n": a.value["n"] + 1}

    for _ in range(3):
        f(a)
    assert a.value["x"][0] == 3.0 and a.value["n"] == 4


_donating = jax.jit(lambda x: x + 1.0, donate_argnums=0)


@pytest.mark.parametrize("donate", ["none", "refs"])
def test_a_value_that_was_donated_elsewhere_is_a_clear_error(donate):
    a, step = make_ref(1.0), rx.filter_jit(_step, donate=donate)
    for _ in range(3):  # a plan says the same
        step(a, make_ref(), jnp.ones(4))
    _donating(a.value)
    text = r"The buffer of an unnamed ref \(collection 'state'\) is gone: its array was also used elsewhere.*Donate a copy: `jnp.array\(ref.value, copy=True\)`"
    with raises(rx.DonatedError, match=text):
        step(a, make_ref(), jnp.ones(4))
    a.value = jnp.ones(4)
    _donating(jnp.array(a.value, copy=True))
    step(a, make_ref(), jnp.ones(4))


def _total(tree):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(tree["w"].value))


DOORS = {
    "jit": rx.filter_jit(_total),
    "grad": rx.filter_grad(_total),
    "jvp": lambda tree: rx.filter_jvp(
        lambda tree, x: x * _total(tree), (tree, 1.0), (None, 1.0)
    ),
    "vmap": lambda tree: rx.filter_vmap(lambda x: x * _total(tree))(jnp.ones(2)),
    "scan": lambda tree: rx.scan(lambda c, _: (c, _total(tree)), 0, length=2),
    "checkpoint": rx.filter_checkpoint(_total),
    "deref": rx.deref,
    "clone": rx.clone,
    "snapshot": rx.snapshot,
    "state_dict": rx.state_dict,
    "tree_equal": lambda tree: rx.tree_equal(tree, tree),
    "Dag": lambda tree: jax.jit(lambda dag: _total(dag.value))(rx.Dag(tree)),
    "copy": lambda tree: copy.copy(tree["w"]),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
}


@pytest.mark.parametrize("is_tree", [False, True])
@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_every_door_names_the_ref_whose_buffer_is_gone(door, is_tree):
    value = (jnp.ones(3), jnp.zeros(2)) if is_tree else jnp.ones(3)
    tree = {"w": rx.Ref(value, "params")}
    door(tree)
    _donating(value[0] if is_tree else value)
    with raises(
        rx.DonatedError, match=r"The buffer of .*'params'\) is gone: its array"
    ):
        door(tree)
    # Its shape is still known, and a new value may be written.
    shape = rx.filter_eval_shape(lambda tree: tree["w"].value, tree)
    assert jax.tree.leaves(shape)[0].shape == (3,)
    rx.update_refs(tree, {"w": (jnp.ones(3), jnp.zeros(2)) if is_tree else jnp.ones(3)})
    door(tree)


def test_of_several_threads_the_error_speaks_of_them():
    a, go_on = make_ref(1.0), threading.Event()
    thread = threading.Thread(target=go_on.wait)
    thread.start()
    try:
        _donating(a.value)
        with raises(rx.ConcurrencyError, match="Guard donating calls"):
            rx.filter_jit(_step)(a, make_ref(), jnp.ones(4))
    finally:
        go_on.set()
        thread.join()


@pytest.mark.parametrize(
    "text",
    [
        "Array has been deleted",
        "INVALID_ARGUMENT: Donation requested for invalid buffer",
    ],
)
def test_what_jax_says_of_a_donated_buffer_on_any_platform_is_understood(text):
    a = make_ref(1.0)
    value = a.value
    value.delete()
    with raises(rx.DonatedError, match="The buffer of an unnamed ref"):
        explain(jax.errors.JaxRuntimeError(text), [a], [value])


COPIES = {
    "snapshot": rx.snapshot,
    "clone": rx.clone,
    "deref": rx.deref,
    "reref": lambda m: rx.reref(rx.deref(m)),
    "as_refs": lambda m: rx.as_refs(rx.snapshot(m)),
    "state_dict": rx.state_dict,
    "Dag": lambda m: jax.tree.leaves(rx.Dag(m)),
    "copy": lambda m: {k: copy.copy(ref) for k, ref in m.items()},
    "value": lambda m: [ref.value for ref in m.values()],
    "another ref": lambda m: {k: rx.Ref(ref.value) for k, ref in m.items()},
}


def _updated(model):
    target = rx.clone(model)
    rx.update_refs(target, model)
    return target


def _loaded(model):
    target = jax.tree.map(lambda x: x * 0, rx.deref(model))
    target = rx.reref(target)
    rx.load_state_dict(target, rx.state_dict(model))
    return target


COPIES |= {"update_refs": _updated, "load_state_dict": _loaded}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("n_before", [0, 4])
def test_a_copy_outlives_donation(how, n_before):
    model = {
        "array": rx.Ref(jnp.zeros(4), "state"),
        "tree": rx.Ref({"mu": jnp.zeros(4), "n": jnp.array(0.0)}, "state"),
        "key": rx.Ref(jax.random.key(0), "rng"),
    }
    if how in ("state_dict", "load_state_dict"):
        del model["key"]

    @rx.filter_jit(donate="refs")
    def step(model):
        model["array"].value += 1.0
        model["tree"].value = jax.tree.map(lambda x: x + 1.0, model["tree"].value)
        if "key" in model:
            model["key"].value = jax.random.split(model["key"].value)[0]

    numbers = lambda tree: [
        np.asarray(
            jax.random.key_data(x)
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
            else x
        )
        for x in jax.tree.leaves(
            rx.snapshot(rx.reref(tree) if how == "deref" else tree)
        )
        if eqx.is_array(x)
    ]
    for _ in range(n_before):
        step(model)
    kept = COPIES[how](model)
    before = [x.copy() for x in numbers(kept)]
    assert before
    for _ in range(4):
        step(model)
    assert all(map(np.array_equal, numbers(kept), before))
    assert model["array"].value[0] == n_before + 4.0


def test_a_buffer_is_copied_only_as_long_as_it_is_held():
    a, b = make_ref(0.0), make_ref(1.0)
    step = rx.filter_jit(_step, donate="refs")
    for _ in range(4):
        step(a, b, jnp.ones(4))
    best, old = rx.snapshot(a), buffer(a)
    step(a, b, jnp.ones(4))
    new = buffer(a)
    assert new != old and best[0] == 8.0
    step(a, b, jnp.ones(4))
    assert buffer(a) == new


def test_no_door_takes_a_deleted_array():
    model = {"a": rx.Ref(jnp.zeros(4)), "tree": rx.Ref((jnp.zeros(4),))}
    best = jax.tree.map(lambda x: x + 1.0, rx.deref(model))
    for leaf in jax.tree.leaves(best):
        leaf.delete()
    text = r"Cannot put a deleted array into an unnamed ref.*float32\[4\].*a copy"
    doors = [
        lambda: rx.update_refs(model, best),
        lambda: rx.reref(best),
        lambda: setattr(model["a"], "value", best["a"].value),
        lambda: setattr(model["tree"], "value", best["tree"].value),
        lambda: rx.Ref(best["a"].value),
        lambda: rx.as_refs([best["a"].value]),
        lambda: rx.load_state_dict([model["a"]], {"0": best["a"].value}),
    ]
    for door in doors:
        with raises(rx.DonatedError, match=text):
            door()
    assert model["a"].value[0] == 0.0 and model["tree"].value[0][0] == 0.0


def test_the_buffers_of_a_value_with_several_arrays_are_reused():
    state = rx.Ref({"mu": jnp.zeros(3), "nu": [jnp.ones(3)], "name": "adam"})
    old = state.value["mu"].unsafe_buffer_pointer()

    @rx.filter_jit(donate="refs")
    def step(state):
        mu, nu = state.value["mu"], state.value["nu"][0]
        state.value = {"mu": mu + 1.0, "nu": [nu], "name": "adam"}

    step(state)
    assert state.value["mu"].unsafe_buffer_pointer() == old
    assert jnp.array_equal(state.value["mu"], jnp.ones(3))
    step(state)
    assert jnp.array_equal(state.value["mu"], jnp.full(3, 2.0))
    assert jnp.array_equal(state.value["nu"][0], jnp.ones(3))
