"""Under `jax.disable_jit` loops and branches run in Python, on arrays."""

# A static checker objects to what is wrong on purpose here, or made at run time.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from raising import raises

import refx_eqx as rx


def make():
    return {
        "total": rx.Ref(jnp.array(1.0), "state"),
        "count": rx.Ref(jnp.array(0), "state"),
        "tree": rx.Ref({"a": jnp.array(2.0), "n": 0, "text": "x"}, "state"),
        "rows": rx.Ref(jnp.arange(4.0), "rows"),
        "columns": rx.Ref(jnp.arange(8.0).reshape(2, 4), "columns"),
        "key": rx.Ref(jax.random.key(0), "rng"),
    }


def write(m, x):
    m["total"].value = m["total"].value * 0.5 + x
    m["count"].value += 1
    m["tree"].value = {**m["tree"].value, "a": m["tree"].value["a"] - x}
    return m["total"].value + m["tree"].value["a"]


AXES = rx.axes(state=None, rows=0, columns=1, rng=None)


def scan(m, reverse=False):
    def step(carry, slices):
        m, x = slices
        y = write(m, x)
        m["rows"].value = m["rows"].value + x
        m["columns"].value = m["columns"].value * y
        return carry * 2, {"y": y, "new": rx.Ref(y + x, "new"), "text": "static"}

    out = rx.scan(step, 1, (m, jnp.arange(4.0)), reverse=reverse, in_axes=(AXES, 0))
    return out[0], {**out[1], "new": out[1]["new"].value}


def scan_keys(m):
    def step(key, _):
        return key, jax.random.normal(key.value)

    return rx.scan(step, m["key"], None, 3)[1]


def while_loop(m):
    def body(carry):
        write(m, carry)
        return carry + 1.0

    return rx.while_loop(lambda _: m["total"].value < 4.0, body, 1.0)


def fori_loop(m):
    return rx.fori_loop(2, 5, lambda i, c: c * i + write(m, 1.0), 1.0)


def cond(m):
    return [
        rx.cond(m["total"].value > t, lambda m: write(m, 1.0), lambda m: 3.0, m)
        for t in (0.0, 10.0)
    ]


def switch(m):
    branches = [lambda m: 0.0, lambda m: write(m, 3.0), lambda m: write(m, 4.0)]
    return [rx.switch(i, branches, m) for i in (-1, 1, 7)]


def map_(m):
    return rx.map(lambda x: write(m, x), jnp.arange(3.0))


def map_in_batches(m):
    return rx.map(lambda x: x * m["total"].value, jnp.arange(5.0), batch_size=2)


def associative_scan(m):
    return rx.associative_scan(lambda a, b: a * b * m["total"].value, jnp.arange(4.0))


PROGRAMS: dict[str, Callable] = {
    "scan": scan,
    "scan, reversed": lambda m: scan(m, reverse=True),
    "scan with keys": scan_keys,
    "scan without steps": lambda m: rx.scan(lambda c, x: (c + x, c), 0.0, jnp.ones(0)),
    "while_loop": while_loop,
    "while_loop without steps": lambda m: rx.while_loop(
        lambda c: False, lambda c: c + write(m, 1.0), 2.0
    ),
    "fori_loop": fori_loop,
    "fori_loop without steps": lambda m: rx.fori_loop(3, 2, lambda i, c: c, 1.0),
    "cond": cond,
    "switch": switch,
    "map": map_,
    "map in batches": map_in_batches,
    "associative_scan": associative_scan,
}


def _arrays(tree):
    return jax.tree.map(lambda x: x if isinstance(x, str) else jnp.asarray(x), tree)


def run(program, outer):
    m = make()
    out = outer(program)(m)
    m["key"].value = jax.random.key_data(m["key"].value)
    return _arrays((out, rx.snapshot(m)))


@pytest.mark.parametrize("outer", [lambda f: f, rx.filter_jit])
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_outcome_is_the_same(name, outer):
    program = PROGRAMS[name]
    staged = run(program, outer)
    with jax.disable_jit():
        in_python = run(program, outer)
    assert jax.tree.structure(staged) == jax.tree.structure(in_python)
    for a, b in zip(jax.tree.leaves(staged), jax.tree.leaves(in_python)):
        if isinstance(a, str):
            assert a == b
        else:
            assert a.dtype == b.dtype and jnp.allclose(a, b)


@pytest.mark.parametrize("loop", ["scan", "while_loop", "fori_loop"])
def test_derivatives_are_the_same(loop):
    def loss(w):
        if loop == "scan":
            return rx.scan(lambda c, x: (c * w.value + x, None), 1.0, jnp.ones(3))[0]
        if loop == "fori_loop":
            return rx.fori_loop(0, 3, lambda i, c: c * w.value + 1, 1.0)
        return rx.while_loop(lambda c: c < 10.0, lambda c: c * w.value + 1, 1.0)

    def derivative():
        return rx.filter_jvp(loss, (rx.Ref(jnp.array(2.0)),), (jnp.array(1.0),))[1]

    staged = derivative()
    with jax.disable_jit():
        assert jnp.allclose(derivative(), staged)
        grads = rx.filter_grad(loss)(rx.Ref(jnp.array(2.0)))
    assert jnp.allclose(grads.value, staged)


def test_a_step_sees_arrays_and_may_decide_on_them():
    count, rows, kinds = rx.Ref(jnp.array(0)), rx.Ref(jnp.zeros(4)), set()

    def step(carry, x):
        x, row = x
        kinds.add(isinstance(x, jax.core.Tracer) or isinstance(carry, jax.core.Tracer))
        if x > 1:  # the others do not write
            count.value += 1
            row.value = x * 10.0
        return carry + int(x), None

    with jax.disable_jit():
        total, _ = rx.scan(step, 0, (jnp.arange(4.0), rows))
    assert kinds == {False}
    assert total == 6 and count.value == 2
    assert rows.value.tolist() == [0, 0, 20, 30]


def test_only_the_chosen_branch_runs_once():
    ran = []

    def branch(i):
        def run(ref):
            ran.append(i)
            ref.value += 1.0

        return run

    ref = rx.Ref(jnp.array(0.0))
    with jax.disable_jit():
        rx.cond(True, branch(0), branch(1), ref)
        rx.cond(False, branch(2), branch(3), ref)
        rx.switch(5, [branch(4), branch(5)], ref)
    assert ran == [0, 3, 5] and ref.value == 3.0


def test_what_is_mapped_is_staged_as_by_jax():
    def f(x):
        return rx.while_loop(lambda c: c < 10.0, lambda c: c * 2, x)

    with jax.disable_jit():
        out = rx.filter_vmap(f)(jnp.arange(1.0, 4.0))
        assert out.tolist() == [16.0, 16.0, 12.0]
        branches = rx.filter_vmap(lambda x: rx.cond(x > 1, lambda: x, lambda: -x))
        assert branches(jnp.arange(3.0)).tolist() == [0.0, -1.0, 2.0]


def test_a_failed_step_changes_nothing_and_faults_are_named():
    ref = rx.Ref(jnp.array(0.0), "state")

    def fails(carry, x):
        ref.value += 1.0
        if x == 2:
            raise ZeroDivisionError
        return carry, None

    def changes(carry, x):
        ref.value = {"a": ref.value}
        return carry, None

    def differs(carry, x):
        return carry, {str(x): x}

    with jax.disable_jit():
        with pytest.raises(ZeroDivisionError):
            rx.scan(fails, 0, jnp.arange(3))
        with raises(rx.StructureError, match="changes the structure of its"):
            rx.scan(changes, 0, jnp.arange(3))
        with raises(rx.StructureError, match="each step must return the same"):
            rx.scan(differs, 0, jnp.arange(3))
        with raises(rx.StructureError, match="`cond_fun` writes"):
            rx.while_loop(
                lambda c: (ref.__setitem__(..., 1.0), c < 3)[1], lambda c: c + 1, 0
            )
    assert ref.value == 0.0
