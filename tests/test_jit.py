"""`filter_jit`: by reference, all or nothing, and asynchronous."""

# A static checker objects to what is wrong on purpose here, or made at run time.
# pyright: reportAttributeAccessIssue=false

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jaxtyping import Array
from raising import raises

import refx_eqx as rx


# With `.lower` and `__wrapped__`, which a `Callable` does not have for type checkers.
filter_jit: Any = rx.filter_jit


class Linear(rx.Module):
    weight: rx.Param[Array]
    uses: rx.Ref[Array] = rx.field(collection="counts")

    def __init__(self, n_in, n_out, *, key):
        self.weight = jr.normal(key, (n_out, n_in))
        self.uses = jnp.array(0)

    def __call__(self, x):
        self.uses.value += 1
        return self.weight[...] @ x

    @rx.filter_jit
    def compiled(self, x, *, scale=1.0):
        self.uses.value += 1
        return self.weight[...] @ x * scale

    def plain(self, x):
        return self(x)


def make_linear():
    return Linear(3, 2, key=jr.key(0))


def make_count(n=0):
    return rx.Ref(jnp.array(n), "counts")


# What comes back.


def test_writes_come_back_to_the_refs_of_the_caller():
    linear, x = make_linear(), jnp.ones(3)
    jitted = rx.filter_jit(lambda m, x: m(x))
    expected = linear.weight.value @ x
    for i in range(3):
        assert jnp.allclose(jitted(linear, x), expected)
        assert linear.uses.value == i + 1


def test_a_ref_that_is_not_written_keeps_its_very_array():
    linear = make_linear()
    weight = linear.weight.value
    rx.filter_jit(lambda m, x: m(x))(linear, jnp.ones(3))
    assert linear.weight.value is weight


def test_only_what_was_written_is_an_output_of_the_program():
    linear, x = make_linear(), jnp.ones(3)
    lowered = filter_jit(lambda m, x: m(x)).lower(linear, x)
    shapes = [leaf.shape for leaf in jax.tree.leaves(lowered.out_info)]
    assert shapes == [(), (2,)]  # the counter and the result, not the weight
    lowered = filter_jit(lambda m, x: m.weight.value @ x).lower(linear, x)
    assert [leaf.shape for leaf in jax.tree.leaves(lowered.out_info)] == [(2,)]


def test_grad_of_a_written_counter_does_not_return_the_parameters():
    @filter_jit
    def step(model, x):
        grads = rx.filter_grad(lambda m, x: jnp.sum(m(x)), wrt="params")(model, x)
        return jnp.sum(grads.weight.value)

    lowered = step.lower(make_linear(), jnp.ones(3))
    assert [leaf.shape for leaf in jax.tree.leaves(lowered.out_info)] == [(), ()]


def test_a_returned_ref_is_the_caller_s_own():
    a, b = make_count(1), make_count(2)

    @rx.filter_jit
    def f(a, b):
        a.value += 10
        return {"b": b, "pair": (a, a)}

    out = f(a, b)
    assert out["b"] is b and out["pair"] == (a, a)
    assert a.value == 11 and b.value == 2


def test_new_refs_come_out_with_their_sharing():
    @rx.filter_jit
    def make(x):
        shared, alone = rx.Ref(x, "params"), rx.Ref(x + 1.0, "params")
        return [shared, alone, {"again": shared}]

    shared, alone, again = make(jnp.array(1.0))
    assert again["again"] is shared and alone is not shared
    assert shared.collection == "params"
    shared.value = shared.value + 5.0  # and they belong to the caller
    assert shared.value == 6.0 and alone.value == 2.0
    assert make(jnp.array(1.0))[0] is not shared


def test_a_module_made_inside_comes_out_as_one():
    linear = rx.filter_jit(lambda key: Linear(3, 2, key=key))(jr.key(0))
    assert isinstance(linear, Linear)
    assert linear.weight.name == "Linear.weight"
    assert jnp.array_equal(linear.weight.value, make_linear().weight.value)


def test_a_ref_with_a_pytree_value_may_change_its_structure():
    ref = rx.Ref({"a": jnp.zeros(2), "name": "x"})

    @rx.filter_jit
    def f(ref):
        ref.value = {"b": ref.value["a"] + 1.0, "name": ref.value["name"] + "y"}

    f(ref)
    assert ref.value["name"] == "xy" and ref.value["b"].shape == (2,)


def test_one_ref_met_twice_is_one_ref_inside():
    @rx.filter_jit
    def f(a, b):
        a.value += 1
        b.value *= 2
        return a is b

    a, b = make_count(3), make_count(3)
    assert f(a, b) is False
    assert (a.value, b.value) == (4, 6)
    assert f(a, a) is True
    assert a.value == 10


def test_a_python_scalar_in_a_ref_is_traced(trace_counter):
    ref = rx.Ref(1.0)
    f = trace_counter(lambda ref: ref.value * 2)
    jitted = rx.filter_jit(f)
    assert jitted(ref) == 2.0
    ref.value = 5.0
    assert jitted(ref) == 10.0
    assert f.counter.count == 1


# All or nothing.


def test_an_exception_in_the_body_changes_nothing():
    a, b = make_count(1), make_count(2)

    @rx.filter_jit
    def f(a, b):
        a.value += 1
        raise KeyError("mine")

    for _ in range(2):
        with raises(KeyError, match="mine"):
            f(a, b)
    assert (a.value, b.value) == (1, 2)


def test_a_write_that_is_refused_in_the_end_changes_nothing():
    a, b = make_count(1), rx.Ref(jnp.array(2.0), "params")

    @rx.filter_jit
    def f(a, b):
        a.value += 1
        b.value += 1.0

    f(a, b)  # compiled where all is allowed
    with rx.mutable("counts"):
        with raises(rx.ImmutableError, match=r"Cannot write an unnamed ref"):
            f(a, b)
    assert (a.value, b.value) == (2, 3.0)


def test_a_failed_check_leaves_every_ref_at_its_old_value():
    with jax.check_tracer_leaks(False):
        a, b = make_count(1), make_count(2)

        @rx.filter_jit
        def f(a, b, x):
            a.value += 1
            b.value = eqx.error_if(b.value + 1, x < 0.0, "x must not be negative")
            return x

        for _ in range(2):
            with raises(eqx.EquinoxRuntimeError, match="x must not be negative"):
                f(a, b, jnp.array(-1.0))
            assert (a.value, b.value) == (1, 2)
        f(a, b, jnp.array(1.0))
        assert (a.value, b.value) == (2, 3)


# Asynchronous dispatch.


def _slow(x, n):
    return jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ x) * 0.1, x)


def _time(step, *args):
    """The time until the call returns, and until the result is there."""
    start = time.perf_counter()
    out = step(*args)
    returned = time.perf_counter()
    jax.block_until_ready(out)
    return returned - start, time.perf_counter() - start


def _share_of_time_inside(step, ref):
    """The first of the two as a part of the second, of a computation of half a second on
    this machine, whatever it is."""
    n = 8
    jax.block_until_ready(step(ref, jnp.int32(n)))
    while (taken := _time(step, ref, jnp.int32(n))[1]) < 0.1:
        n *= 4
    n = jnp.int32(n * 0.5 / taken)
    return min(inside / total for inside, total in (_time(step, ref, n) for _ in "abc"))


@pytest.mark.skipif(
    jax.default_backend() != "cpu",
    reason="a loop on an accelerator is launched step by step",
)
def test_a_call_returns_before_the_computation_ends():
    ref = rx.Ref(jnp.ones((200, 200)) * 0.01)

    @rx.filter_jit
    def step(ref, n):
        ref.value = _slow(ref.value, n)
        return ref.value

    assert _share_of_time_inside(step, ref) < 0.1


def test_a_call_with_a_run_time_check_waits():
    with jax.check_tracer_leaks(False):
        ref = rx.Ref(jnp.ones((200, 200)) * 0.01)

        @rx.filter_jit
        def step(ref, n):
            y = _slow(ref.value, n)
            ref.value = eqx.error_if(y, jnp.any(jnp.isnan(y)), "nan")
            return ref.value

        assert _share_of_time_inside(step, ref) > 0.5


# What is static, and what is not.


@pytest.mark.parametrize(
    "values",
    [
        (1, 1.0, True),
        (0, 0.0, False),
        (0.0, -0.0),
        (complex(0.0, 0.0), complex(0.0, -0.0)),
        ("a", b"a"),
        (None, 0),
    ],
    ids=repr,
)
def test_static_values_that_are_equal_but_not_the_same_are_told_apart(values):
    jitted = rx.filter_jit(lambda ref, k: repr(k))
    ref = make_count()
    for _ in range(2):
        assert [jitted(ref, k) for k in values] == [repr(k) for k in values]


def test_arrays_beside_refs_are_traced_numpy_too(trace_counter):
    f = trace_counter(lambda ref, x: ref.value + x)
    jitted = rx.filter_jit(f)
    ref = rx.Ref(jnp.array(1.0))
    assert jitted(ref, np.array(1.0, np.float32)) == 2.0
    assert jitted(ref, np.array(2.0, np.float32)) == 3.0
    assert jitted(ref, np.float32(3.0)) == 4.0
    assert f.counter.count == 1


def test_an_unhashable_static_value_is_a_clear_error():
    f = rx.filter_jit(lambda ref, k: ref.value + len(k))
    ref = make_count()
    with raises(TypeError, match=r"Cannot cache on the static value \{1, 2\}"):
        f(ref, {1, 2})
    assert f(ref, frozenset({1, 2})) == 2  # the remedy


def test_keyword_arguments_are_carried():
    count = make_count()

    @rx.filter_jit
    def f(x, *, count, scale=2.0):
        count.value += 1
        return x * scale

    assert f(jnp.array(1.0), count=count) == 2.0
    assert f(jnp.array(1.0), scale=3.0, count=count) == 3.0
    assert f(count=count, x=jnp.array(1.0)) == 2.0
    assert count.value == 3


def test_arguments_named_as_our_own_parameters():
    @rx.filter_jit
    def f(self, fn, args, kwargs, opened, structure):
        return self + fn + args + kwargs + opened + structure

    one = jnp.array(1)
    names = ("self", "fn", "args", "kwargs", "opened", "structure")
    assert f(**dict.fromkeys(names, one)) == 6


# What can be compiled.


def test_a_method_may_be_decorated():
    linear, x = make_linear(), jnp.ones(3)
    expected = linear.weight.value @ x
    assert jnp.allclose(linear.compiled(x), expected)
    assert jnp.allclose(linear.compiled(x, scale=2.0), expected * 2.0)
    assert jnp.allclose(Linear.compiled(linear, x), expected)
    assert linear.uses.value == 3


def test_a_bound_method_carries_its_module():
    linear, x = make_linear(), jnp.ones(3)
    jitted = rx.filter_jit(linear.plain)
    jitted(x)
    linear.weight.value = jnp.zeros((2, 3))
    assert jnp.array_equal(jitted(x), jnp.zeros(2))
    assert linear.uses.value == 2


def test_a_module_is_a_function():
    linear, x = make_linear(), jnp.ones(3)
    jitted = rx.filter_jit(linear)
    jitted(x)
    linear.weight.value = jnp.zeros((2, 3))
    assert jnp.array_equal(jitted(x), jnp.zeros(2))
    assert linear.uses.value == 2


def test_a_partial_carries_what_it_holds():
    linear, x = make_linear(), jnp.ones(3)
    for partial in (functools.partial, eqx.Partial):
        jitted = rx.filter_jit(partial(lambda m, x: m(x), linear))
        jitted(x)
        jitted(x)
    assert linear.uses.value == 4


def test_a_closure_carries_its_refs_under_one_name_with_the_arguments():
    count = make_count()

    @rx.filter_jit
    def f(argument):
        count.value += 1
        return argument.value  # the same ref: sees the write

    assert f(count) == 1
    assert f(count) == 2
    other = make_count(10)
    assert f(other) == 10
    assert count.value == 3


def test_a_closure_variable_that_is_bound_anew_is_noticed():
    count = make_count()

    @rx.filter_jit
    def f():
        count.value += 1
        return count.value

    assert f() == 1
    count = make_count(10)
    assert f() == 11


def test_the_result_has_the_name_and_the_text_of_the_function():
    @filter_jit
    def f(x):
        """Text."""
        return x

    assert f.__name__ == "f" and f.__doc__ == "Text."
    assert repr(f).startswith("filter_jit(") and "f)" in repr(f)
    assert f.__wrapped__(3) == 3


def test_a_global_ref_is_refused_with_a_remedy_that_runs():
    global _global_count
    _global_count = make_count()

    @rx.filter_jit
    def f():
        return _global_count.value

    text = r"used inside the body of `filter_jit`, but was not passed in.*Pass the ref"
    with raises(rx.TraceLevelError, match=text):
        f()
    assert rx.filter_jit(lambda count: count.value)(_global_count) == 0


# Nesting.


def test_a_jit_inside_a_jit():
    count = make_count()

    @rx.filter_jit
    def inner(count):
        count.value += 1
        return count

    @rx.filter_jit
    def outer(count):
        inner(count)
        assert inner(count) is count
        return count.value

    assert outer(count) == 2
    assert outer(count) == 4


def test_a_jit_inside_a_grad():
    w, count = rx.Ref(jnp.array(3.0), "params"), make_count()

    @rx.filter_jit
    def square(w, count):
        count.value += 1
        return w.value**2

    def loss(w, count):
        return square(w, count) + square(w, count)

    assert rx.filter_grad(loss)(w, count).value == 12.0
    assert count.value == 2


def test_a_grad_of_a_grad_through_a_jit():
    w = rx.Ref(jnp.array(3.0), "params")

    @rx.filter_jit
    def cube(w):
        return w.value**3

    def slope(w):
        return rx.filter_grad(cube)(w).value

    assert rx.filter_grad(slope)(w).value == 18.0


def test_a_jit_inside_a_vmap():
    w, total = rx.Ref(jnp.array(2.0)), rx.Ref(jnp.zeros(3))

    @rx.filter_jit
    def step(w, total, x):
        total.value += w.value * x
        return total.value

    mapped = rx.filter_vmap(step, in_axes=(None, 0, 0))
    out = mapped(w, total, jnp.arange(3.0))
    assert jnp.array_equal(out, jnp.array([0.0, 2.0, 4.0]))
    assert jnp.array_equal(total.value, out)


def test_a_vmap_inside_a_jit():
    w, total = rx.Ref(jnp.array(2.0)), rx.Ref(jnp.zeros(3))

    def step(w, total, x):
        total.value += w.value * x
        return total.value

    jitted = rx.filter_jit(rx.filter_vmap(step, in_axes=(None, 0, 0)))
    jitted(w, total, jnp.arange(3.0))
    out = jitted(w, total, jnp.arange(3.0))
    assert jnp.array_equal(out, jnp.array([0.0, 4.0, 8.0]))


def test_a_donating_jit_inside_another_transform_donates_nothing():
    w = rx.Ref(jnp.array(3.0), "params")

    @rx.filter_jit(donate="refs")
    def square(w):
        w.value = w.value * 1.0
        return w.value**2

    old = w.value
    assert rx.filter_grad(square)(w).value == 6.0
    assert not old.is_deleted()


# Lists and dicts change.


class Net(rx.Module):
    layers: list
    named: dict

    def __call__(self, x):
        for layer in self.layers:
            x = layer.value * x
        for key in self.named:
            x = self.named[key].value - x
        return x


def make_net():
    refs = [rx.Ref(jnp.array(float(i))) for i in range(2, 6)]
    return Net(refs[:2], {"a": refs[2], "b": refs[3]})


def _append(net):
    net.layers.append(rx.Ref(jnp.array(7.0)))


def _replace(net):
    net.named["a"] = rx.Ref(jnp.array(9.0))


def _replace_by_another(net):
    net.named["a"] = rx.Ref(jnp.array([9.0]))


def _replace_by_a_known_one(net):
    net.named["a"] = net.layers[0]


def _reorder_list(net):
    net.layers.reverse()


def _reorder_dict(net):
    net.named["a"] = net.named.pop("a")


def _delete(net):
    del net.layers[0]


def _add_key(net):
    net.named["c"] = rx.Ref(jnp.array(11.0))


def _replace_by_another_collection(net):
    net.layers[1] = rx.Ref(jnp.array(8.0), "other")


_CHANGES = [
    _append,
    _replace,
    _replace_by_another,
    _replace_by_a_known_one,
    _reorder_list,
    _delete,
    _add_key,
    _replace_by_another_collection,
]


@pytest.mark.parametrize("change", _CHANGES, ids=lambda f: f.__name__)
def test_a_container_changed_between_calls_is_noticed(change):
    net, jitted = make_net(), rx.filter_jit(lambda net, x: net(x))
    x = jnp.array(1.5)
    assert jitted(net, x) == net(x)
    change(net)
    assert jitted(net, x) == net(x)
    assert jitted(make_net(), x) == make_net()(x)


@pytest.mark.parametrize(
    "change",
    [_append, _replace, _replace_by_a_known_one, _reorder_list, _delete, _add_key],
    ids=lambda f: f.__name__,
)
def test_a_container_changed_inside_is_refused(change):
    net = make_net()
    values = rx.snapshot(net)

    @rx.filter_jit
    def f(net):
        net.layers[0].value = jnp.array(0.0)
        change(net)

    text = r"`filter_jit` cannot carry back a change of structure: .* argument 0"
    with raises(rx.StructureError, match=text):
        f(net)
    assert bool(eqx.tree_equal(rx.snapshot(net), values))


def test_the_remedy_for_a_changed_container_runs():
    items = rx.Ref([jnp.array(1.0)])

    @rx.filter_jit
    def f(items):
        items.value = [*items.value, jnp.array(2.0)]

    f(items)
    assert len(items.value) == 2


def test_a_list_inside_a_ref_changed_in_place_comes_back():
    items = rx.Ref([jnp.array(1.0)])

    @rx.filter_jit
    def f(items):
        items.value.append(jnp.array(2.0))

    f(items)
    assert len(items.value) == 2


def test_a_closure_variable_bound_anew_inside_is_refused():
    count = make_count()

    @rx.filter_jit
    def f():
        nonlocal count
        count = rx.Ref(jnp.array(5))

    with raises(rx.StructureError, match="the callable, or what it closes over"):
        f()


@jax.tree_util.register_pytree_node_class
class Positive:
    """A class of a user's that checks what it is rebuilt of."""

    def __init__(self, x):
        if eqx.is_array(x) and not isinstance(x, jax.core.Tracer) and x < 0:
            raise ValueError("must be positive")
        self.x = x

    def tree_flatten(self):
        return (self.x,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


@pytest.mark.parametrize("value", [jnp.array(0.0), [jnp.array(0.0)]])
def test_a_result_that_cannot_be_rebuilt_changes_nothing(value):
    ref = rx.Ref(value)

    @rx.filter_jit
    def f(ref, x):
        ref.value = jax.tree.map(lambda y: y + 1, ref.value)
        return Positive(x), rx.Ref(x)

    def total():
        return sum(jax.tree.leaves(ref.value))

    for k in range(3):  # the third by a plan
        f(ref, jnp.array(1.0))
        with raises(ValueError, match="must be positive"):
            f(ref, jnp.array(-1.0))
        assert total() == k + 1


def test_a_function_that_wraps_itself():
    def f(x):
        return x + 1

    class Wrapper:
        def __call__(self, x):
            return x + 1

    own, other = Wrapper(), Wrapper()
    own.__wrapped__ = own  # pyright: ignore[reportAttributeAccessIssue]
    f.__wrapped__ = other  # pyright: ignore[reportFunctionMemberAccess]
    other.__wrapped__ = f  # pyright: ignore[reportAttributeAccessIssue]
    for fn in (own, f, other):
        assert rx.filter_jit(fn)(jnp.array(1.0)) == 2.0
        assert rx.filter_vmap(fn)(jnp.ones(2))[1] == 2.0


# Ahead of time.


def test_a_compiled_program_writes_back():
    linear, x = make_linear(), jnp.ones(3)
    compiled = filter_jit(lambda m, x: m(x)).lower(linear, x).compile()
    assert linear.uses.value == 0
    expected = linear.weight.value @ x
    assert jnp.allclose(compiled(linear, x), expected)
    other = make_linear()
    compiled(other, x)
    assert linear.uses.value == 1 and other.uses.value == 1
    assert compiled.memory_analysis() is not None
    assert "HloModule" in compiled.as_text()


def test_a_compiled_program_refuses_another_sharing():
    a, b = make_count(), make_count()
    jitted = filter_jit(lambda a, b: a.value + b.value)
    compiled = jitted.lower(a, b).compile()
    assert compiled(a, b) == 0
    text = "was compiled for arguments of another structure"
    with raises(rx.StructureError, match=text):
        compiled(a, a)
    assert jitted(a, a) == 0  # the remedy


def test_a_compiled_program_refuses_a_value_of_another_structure():
    one, two = rx.Ref((jnp.ones(2),)), rx.Ref((jnp.ones(2), jnp.ones(3)))
    jitted = filter_jit(lambda ref: ref.value[0])
    compiled = jitted.lower(one).compile()
    with raises(rx.StructureError, match="arguments of another structure"):
        compiled(two)
    assert jitted(two).tolist() == [1.0, 1.0]  # the remedy


def test_lowering_writes_nothing_and_takes_keywords():
    count = make_count()

    @filter_jit
    def f(count, *, k):
        count.value += k

    lowered = f.lower(count, k=2)
    assert count.value == 0
    lowered.compile()(count, k=2)
    assert count.value == 2
    assert "stablehlo" in lowered.as_text()


# Options.


def test_options_are_checked():
    with raises(ValueError, match=r"donate='some'\)` must be one of 'all'"):
        rx.filter_jit(lambda x: x, donate="some")  # type: ignore[call-overload]
    for name in ("static_argnums", "donate_argnums", "static_argnames"):
        with raises(ValueError, match=f"does not take '{name}'"):
            rx.filter_jit(lambda x: x, **{name: 0})  # type: ignore[arg-type]


def test_options_are_passed_on_to_jax():
    @filter_jit(compiler_options={"xla_cpu_enable_fast_math": False})
    def f(x):
        return x + 1

    assert f(jnp.array(1)) == 2

    unused = filter_jit(lambda ref: 1, keep_unused=True).lower(make_count())
    assert "%arg0" in unused.as_text()
    assert "%arg0" not in filter_jit(lambda ref: 1).lower(make_count()).as_text()


def test_a_call_with_jit_disabled_runs_as_plain_python():
    count = make_count()

    @rx.filter_jit
    def f(count):
        count.value += 1
        return float(count.value)  # a number, where nothing is traced

    with jax.disable_jit():
        assert f(count) == 1.0
    assert count.value == 1


def test_a_function_made_inside_comes_out():
    out, made = rx.filter_jit(lambda x: (x, lambda: 7))(jnp.array(1.0))
    assert out == 1.0 and made() == 7
    again, made = rx.filter_jit(lambda x: (x, lambda: 7))(jnp.array(1.0))
    assert again == 1.0 and made() == 7


def test_a_ref_can_be_given_a_static_value_made_inside():
    ref = rx.Ref({"x": jnp.array(1.0), "f": None})

    @rx.filter_jit
    def f(ref):
        ref.value = {"x": ref.value["x"], "f": lambda: 3}

    f(ref)
    assert ref.value["f"]() == 3


def test_the_arrays_bound_in_a_partial_are_traced(trace_counter):
    f = trace_counter(lambda w, x: w * x)
    for i in range(3):
        part = functools.partial(f, jnp.array(float(i)))
        assert rx.filter_jit(part)(jnp.array(2.0)) == 2.0 * i
    assert f.counter.count == 1


def test_a_traceback_shows_the_code_of_the_user():
    ref = rx.Ref(jnp.array(1.0))

    def body(x):
        raise KeyError("mine")

    def nested(ref, x):
        return rx.filter_vmap(body)(x)

    # `tracebackhide`, the default of JAX in a terminal, hides frames from IPython alone.
    before = jax.config.values["jax_traceback_filtering"]
    jax.config.update("jax_traceback_filtering", "remove_frames")
    try:
        with pytest.raises(KeyError) as caught:
            rx.filter_jit(nested)(ref, jnp.ones(2))
    finally:
        jax.config.update("jax_traceback_filtering", before)
    frames = [(Path(e.path).parent.name, e.name) for e in caught.traceback]
    inside = [name for folder, name in frames if folder in ("refx_eqx", "_transforms")]
    # The lifted function itself, which is what the user called.
    assert inside == ["__call__"], frames
    assert [name for _, name in frames if name in ("nested", "body")] == [
        "nested",
        "body",
    ]


def test_a_result_may_have_no_hash(trace_counter):
    f = trace_counter(lambda x: ({1, 2}, x))
    step = rx.filter_jit(f)
    for i in range(4):
        assert step(jnp.array(i)) == ({1, 2}, i)
    assert f.counter.count == 1


def test_an_argument_without_a_hash_is_named():
    @dataclasses.dataclass
    class Settings:
        size: int

    @dataclasses.dataclass(frozen=True)
    class Frozen:
        size: int

    f = rx.filter_jit(lambda settings: jnp.zeros(settings.size))
    with raises(TypeError, match=r"\(argument 0\): a Settings .* make it hashable"):
        f(Settings(2))
    assert f(Frozen(2)).shape == (2,)


def test_a_check_in_a_program_that_was_compiled_ahead_of_time():
    def step(ref, x):
        ref.value = ref.value + 1.0
        return eqx.error_if(x, x > 1.0, "too large")

    ref = rx.Ref(jnp.array(1.0))
    with jax.check_tracer_leaks(False):  # `eqx.error_if` leaks one, whoever calls it
        compiled = rx.filter_jit(step).lower(ref, jnp.array(0.0)).compile()
    assert compiled(ref, jnp.array(0.5)) == 0.5 and ref.value == 2.0
    with raises(eqx.EquinoxRuntimeError, match="too large"):
        compiled(ref, jnp.array(2.0))
    assert ref.value == 2.0
