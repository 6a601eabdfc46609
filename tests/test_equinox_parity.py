"""Leaves that are not arrays, and failed checks, as in Equinox's transforms."""

# A static checker objects to what is wrong on purpose here, or made at run time.
# pyright: reportAttributeAccessIssue=false

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import refx_eqx as rx


XS = jnp.arange(3.0)


@pytest.mark.parametrize(
    "out_axes",
    [
        0,
        None,
        eqx.if_array(0),
        lambda x: 0,
        lambda x: None,
        (0, None),
        rx.axes(default=0),
    ],
    ids=["0", "None", "if_array", "int-valued", "None-valued", "tuple", "rx.axes"],
)
def test_a_number_in_the_result_of_a_vmap_has_the_axis_that_it_is_given(out_axes):
    def f(x):
        return (jnp.array(2.0), (3, 2.5, np.arange(2)))

    theirs = 0 if isinstance(out_axes, rx.axes) else out_axes
    expected = eqx.filter_vmap(f, out_axes=theirs)(XS)
    found = rx.filter_vmap(f, out_axes=out_axes)(XS)
    assert jax.tree.map(type, found) == jax.tree.map(type, expected)
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, expected)
    assert eqx.tree_equal(found, expected)


def test_a_number_beside_a_ref_has_the_axis_too():
    ref = rx.Ref(jnp.array(1.0))
    same, n = rx.filter_vmap(
        lambda x: (ref, 3), axis_size=2, in_axes=None, out_axes=(None, 0)
    )(0.0)
    assert same is ref and n.shape == (2,)


def test_a_shape_in_a_result_is_no_array():
    shape = jax.ShapeDtypeStruct((3,), jnp.float32)

    def f(x):
        return x * 2, shape, "text"

    found, expected = (lib.filter_make_jaxpr(f)(jnp.ones(2)) for lib in (rx, eqx))
    assert found[1:] == expected[1:]
    assert len(found[0].out_avals) == 1
    assert rx.filter_jit(f)(jnp.ones(2))[1:] == (shape, "text")
    assert rx.filter_jit(lambda x: rx.Ref(x))(jnp.ones(2)).shape == (2,)


def checked(x):
    return eqx.error_if(x, x < 0, "x must not be negative")


@jax.check_tracer_leaks(False)  # `eqx.error_if` leaks one, whoever calls it
def test_a_failed_check_shows_the_stack_inside_of_the_program():
    ref = rx.Ref(jnp.array(1.0))

    @rx.filter_jit
    def step(ref, x):
        ref.value += rx.filter_jit(checked)(x)

    for _ in range(3):  # compiled; by a plan later
        with pytest.raises(eqx.EquinoxRuntimeError) as info:
            step(ref, jnp.array(-1.0))
        inside = str(info.value).split("Below is the stack inside of JIT:\n", 1)[1]
        inside = inside.split("equinox.EquinoxRuntimeError: x must not be negative")[0]
        frames = [line for line in inside.splitlines() if line.startswith("  File")]
        assert [line.rsplit(" in ", 1)[1] for line in frames] == ["step", "checked"]
        assert ref.value == 1.0
