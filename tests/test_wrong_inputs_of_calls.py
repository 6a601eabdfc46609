"""Arguments for which no program can be compiled, and invalid options."""

# A static checker objects to what is wrong on purpose here, or made at run time.
# pyright: reportAttributeAccessIssue=false

import jax.numpy as jnp
import numpy as np
import pytest
from raising import raises

import refx_eqx as rx


OBJECTS = np.array(["a", {}], dtype=object)
TEXTS = np.array(["a", "b"])
DATES = np.array(["2020-01-01"], dtype="datetime64[D]")
XS = jnp.ones(2)


def first(ref, *args, **kwargs):
    return ref.value


@pytest.mark.parametrize(
    "array", [OBJECTS, TEXTS, DATES], ids=["object", "text", "date"]
)
def test_an_array_that_is_none_of_numbers_is_told_by_its_place(array):
    ref, names = rx.Ref(jnp.array(1.0), "params"), rx.Ref(array, "names")
    jitted = rx.filter_jit(first)
    none = f"JAX has no arrays of {array.dtype}".replace("[", r"\[").replace("]", r"\]")
    with raises(TypeError, match=rf"\(argument 1 at `k`\): {none}"):
        jitted(ref, {"k": array})
    with raises(TypeError, match=rf"\(the keyword argument `names`\): {none}"):
        jitted(ref, names=array)
    with raises(TypeError, match=rf"ref .*'names'.*in argument 1\): {none}"):
        jitted(ref, names)
    closed = lambda ref: (names.value, ref.value)[1]
    with raises(TypeError, match=rf"'names'.*what the function holds\): {none}"):
        rx.filter_jit(closed)(ref)
    # Ahead of time, and where a call was planned for numbers.
    with raises(TypeError, match=rf"\(argument 1 at `k`\): {none}"):
        jitted.lower(ref, {"k": array})
    with raises(TypeError, match=rf"\(argument 1 at `k`\): {none}"):
        jitted.lower(ref, {"k": XS}).compile()(ref, {"k": array})
    for _ in range(3):
        jitted(ref, np.ones(2, np.float32))
    with raises(TypeError, match=rf"\(argument 1\): {none}"):
        jitted(ref, array)
    # The remedy.
    assert jitted(ref, tuple(array.tolist())[:1]) == 1.0
    # Nothing is compiled here, so it may stay what it is.
    assert rx.filter_grad(first)(ref, array).value == 1.0
    assert rx.scan(lambda c, x: (c, c.value), ref, XS)[1].shape == (2,)


def test_a_set_is_told_by_its_place():
    ref = rx.Ref(jnp.array(1.0))
    with raises(TypeError, match=r"\{1\} \(argument 1\): .*`frozenset`"):
        rx.filter_jit(first)(ref, {1})
    tags = rx.Ref({"kind": {1}}, "tags")
    with raises(TypeError, match=r"\{1\} \(.*'tags'.*, in argument 1\)"):
        rx.filter_jit(first)(ref, tags)
    with raises(TypeError, match=r"what the function in argument 0 holds\)"):
        rx.associative_scan(lambda a, b: a + b + len(tags.value["kind"]), XS)
    tags.value = {"kind": frozenset({1})}
    assert rx.filter_jit(first)(ref, tags) == 1.0


@pytest.mark.parametrize("unroll", [-1, 1.5, "a", [1], None])
def test_a_wrong_unroll(unroll):
    match = r"`unroll` must be (at least 0|an integer)"
    with raises((TypeError, ValueError), match=f"`scan`: {match}"):
        rx.scan(lambda c, x: (c, x), XS, XS, unroll=unroll)
    if unroll is not None:
        with raises((TypeError, ValueError), match=f"`fori_loop`: {match}"):
            rx.fori_loop(0, 2, lambda i, x: x, XS, unroll=unroll)


@pytest.mark.parametrize("unroll", [0, 1, 2, True, False, np.int32(2)])
def test_a_right_unroll(unroll):
    ref = rx.Ref(jnp.array(0.0))

    def step(ref, x):
        ref.value += x
        return ref, ref.value

    assert rx.scan(step, ref, XS, unroll=unroll)[1].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("reverse", ["a", 3, None, 1.0, [True]])
def test_a_wrong_reverse(reverse):
    with raises(TypeError, match="`scan`: `reverse` must be `True` or `False`"):
        rx.scan(lambda c, x: (c, x), XS, XS, reverse=reverse)
    with raises(TypeError, match="`associative_scan`: `reverse` must be"):
        rx.associative_scan(lambda a, b: a + b, XS, reverse=reverse)


@pytest.mark.parametrize("wrap", [lambda f: f, rx.filter_jit], ids=["eager", "jit"])
def test_a_rule_that_writes_what_the_function_does_not(wrap):
    w, log = rx.Ref(jnp.array(1.0), "params"), rx.Ref(jnp.array(0.0), "log")
    f = rx.filter_custom_jvp(lambda w, x: w.value * x)

    @f.def_jvp
    def rule(primals, tangents):
        log.value = log.value + 1.0
        return primals[0].value * primals[1], tangents[0].value * primals[1]

    del rule
    match = "the rule .* must write the refs that the function writes.*'log'"
    with raises(rx.StructureError, match=match):
        wrap(rx.filter_grad(lambda w, x: f(w, x)))(w, jnp.array(2.0))
    assert log.value == 0.0


def test_another_type_than_was_compiled_for_is_told_by_its_place():
    ref = rx.Ref(jnp.ones(2), "params")
    compiled = rx.filter_jit(lambda ref, x: ref.value * x["a"]).lower(ref, {"a": XS})
    compiled = compiled.compile()
    match = (
        r"for float32\[2\] in argument 1 at `a`, but is called with int32\[2\] there"
    )
    with raises(rx.MismatchError, match=match):
        compiled(ref, {"a": jnp.arange(2)})
    match = r"for float32\[2\] in an unnamed ref \(collection 'params'\), in argument 0"
    with raises(rx.MismatchError, match=match):
        compiled(rx.Ref(jnp.ones(3), "params"), {"a": XS})
    assert compiled(ref, {"a": np.ones(2, np.float32)}).tolist() == [1.0, 1.0]
