"""A Python number that replaces an array, and an array that replaces a Python number."""

import pathlib
import re
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from raising import raises

import refx_eqx as rx


def loaded(ref, number):
    rx.load_state_dict({"n": ref}, {"n": number})


def updated(ref, number):
    rx.update_refs({"n": ref}, {"n": number})


def saved(ref, number):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "numbers.safetensors")
        rx.save(path, {"n": rx.Ref(number)})
        rx.load(path, {"n": ref})


@pytest.mark.parametrize("write", [loaded, saved, updated])
@pytest.mark.parametrize(
    "old, number",
    [
        (jnp.array(3, jnp.int8), -5),
        (jnp.array(3, jnp.uint8), 255),
        (jnp.array(3), 5),  # weakly typed
        (jnp.array(1.0, jnp.float32), 0.1),
        (jnp.array(1.0, jnp.bfloat16), float("inf")),
        (jnp.array(False), True),
        (jnp.array(0j, jnp.complex64), 1j),
        (np.array(3, np.int8), 5),
        (np.float32(1.0), 2.0),
    ],
)
def test_a_number_for_an_array_becomes_an_array_like_it(write, old, number):
    ref = rx.Ref(old)
    traces = []

    @rx.filter_jit
    def read(ref):
        traces.append(1)
        return ref.value

    read(ref)
    write(ref, number)
    assert type(ref.value) is type(old) and jax.typeof(ref.value) == jax.typeof(old)
    assert ref.value == jnp.asarray(number, old.dtype)
    read(ref)
    assert len(traces) == 1


@pytest.mark.parametrize("write", [loaded, updated])
@pytest.mark.parametrize(
    "old, number, held",
    [
        (jnp.array(3, jnp.int8), 300, "i8[]"),
        (jnp.array(3, jnp.uint8), -1, "u8[]"),
        (jnp.array(3, jnp.int32), 2**40, "i32[]"),
        (jnp.array(3, jnp.int32), 2**70, "i32[]"),
        (jnp.array(1.0, jnp.float32), 1e300, "f32[]"),
        (jnp.array(3, jnp.int32), 2.0, "i32[]"),
        (jnp.array(1.0, jnp.float32), 2, "f32[]"),
        (jnp.array(1.0, jnp.float32), 2j, "f32[]"),
        (jnp.array(False), 1, "bool[]"),
        (jnp.array(3, jnp.int32), True, "i32[]"),
        (jnp.zeros(1, jnp.float32), 2.0, "f32[1]"),
        (np.array(3, np.int8), 300, "i8[](numpy)"),
        (jr.key(0), 1, "key<fry>[]"),
    ],
)
def test_a_number_that_does_not_fit_an_array_is_refused(write, old, number, held):
    ref = rx.Ref(old)
    text = re.escape(f"at `n` holds {held}, and the s")
    with raises(
        rx.MismatchError, match=text + rf"\w+ has {re.escape(str(number))}\. .*write it"
    ):
        write(ref, number)
    assert ref.value is old or (isinstance(old, np.ndarray) and ref.value == old)
    ref.value = number  # the remedy


def test_a_number_replaces_a_shape_and_a_committed_array_where_they_are():
    shape = jax.ShapeDtypeStruct((), jnp.int8)
    committed = jax.device_put(jnp.array(0, jnp.int8), jax.devices()[1])
    for old, write in [(shape, loaded), (committed, loaded), (committed, updated)]:
        ref: rx.Ref[Any] = rx.Ref(old)
        write(ref, 5)
        new: Any = ref.value
        if old is committed:
            assert new.sharding == committed.sharding and new.committed
        assert new.dtype == jnp.int8 and new == 5


def test_numbers_in_a_pytree_in_a_ref_become_arrays():
    for key, given in [("r", {"a": 5, "b": 2}), ("r.a", 5)]:
        ref = rx.Ref({"a": jnp.array(0, jnp.int8), "b": 1})
        rx.load_state_dict({"r": ref}, {key: given}, strict=False)
        assert ref.value["a"].dtype == jnp.int8 and type(ref.value["b"]) is int


def test_an_array_for_a_number_of_python_becomes_one():
    for array in (jnp.array(5), np.array(5), np.int8(5)):
        ref = rx.Ref(3)
        loaded(ref, array)
        assert type(ref.value) is int and ref.value == 5


@pytest.mark.parametrize("write", [loaded, updated])
def test_a_number_becomes_an_array_in_a_compiled_function_too(write):
    ref = rx.Ref(jnp.array(0, jnp.int8))
    rx.filter_jit(lambda ref: write(ref, 5))(ref)
    assert jax.typeof(ref.value).dtype == jnp.int8 and ref.value == 5
    with raises(rx.MismatchError, match=r"holds i8\[\], and .* has 300"):
        rx.filter_jit(lambda ref: write(ref, 300))(ref)
    assert ref.value == 5
