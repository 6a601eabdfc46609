"""`save` and `load`: what comes back from a file is what was saved, or nothing changes."""

# A static checker objects to what is wrong on purpose here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

import functools
import json
import os
import pickle
import re
import subprocess
import sys
import textwrap
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import safetensors.numpy
from jax.extend.random import define_prng_impl
from raising import raises
from saved_models import Linear, make, make_tied

import refx_eqx as rx
from refx_eqx._checkpoint import _file


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def values_of(tree):
    return [np.asarray(value).tolist() for value in rx.state_dict(tree).values()]


def refuses(path, tree, error, text, **kwargs):
    """`load` raises this text, and has written nothing."""
    before = rx.state_dict(tree)
    with raises(error, match=re.escape(text)) as caught:
        rx.load(path, tree, **kwargs)
    after = rx.state_dict(tree)
    assert all(after[key] is before[key] for key in before)
    return caught.value


# What is saved is what is loaded


def test_what_was_saved_is_loaded_into_the_refs_that_are_there(path):
    model, other = make(5.0), make()
    weight = other.layers[0].weight
    rx.save(path, model)
    rx.load(path, other)
    assert other.layers[0].weight is weight
    assert values_of(other) == values_of(model)


def test_the_file_is_one_that_other_readers_read(path):
    model = make_tied(5.0)
    rx.save(str(path), model)
    arrays = safetensors.numpy.load_file(path)
    assert set(arrays) == set(rx.state_dict(model))
    assert arrays["layers.0.weight"].tolist() == [6, 6]


X64 = ["int64", "uint64", "float64", "complex128"]  # in NumPy arrays
DTYPES = [
    *("bool", "int8", "int16", "int32", "uint8", "uint16", "uint32", "float16"),
    *("bfloat16", "float32", "complex64", "int4", "uint4", "float8_e4m3fn"),
    *("float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e4m3b11fnuz"),
    *("float8_e3m4", "float8_e4m3", "float8_e8m0fnu", "float4_e2m1fn", "int2"),
]


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_dtype_of_jax_comes_back_bit_by_bit(path, dtype, shape):
    size = int(np.prod(shape))
    value = (jnp.arange(size) % 2).reshape(shape).astype(dtype)
    assert value.dtype == dtype
    ref = rx.Ref(value)
    rx.save(path, ref)
    ref.value = jnp.zeros_like(value)
    rx.load(path, ref)
    assert isinstance(ref.value, jax.Array)
    assert (ref.shape, ref.dtype) == (shape, dtype)
    assert np.asarray(ref.value).tobytes() == np.asarray(value).tobytes()


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 2)])
@pytest.mark.parametrize("dtype", [*X64, ">f4", "<U3", "S2", "datetime64[s]"])
def test_each_dtype_of_numpy_comes_back_bit_by_bit(path, dtype, shape):
    value = np.ones(shape, dtype)
    ref = rx.Ref(value)
    rx.save(path, ref)
    ref.value = np.zeros(shape, dtype)
    rx.load(path, ref)
    assert type(ref.value) is np.ndarray and ref.value.flags.writeable
    assert (ref.value.shape, ref.value.dtype) == (shape, np.dtype(dtype))
    assert ref.value.tobytes() == value.tobytes()


def test_special_numbers_come_back_bit_by_bit(path):
    bits = np.array([0x7FC00001, 0xFF800000, 0x80000000, 1], np.uint32)
    ref = rx.Ref(jnp.asarray(bits.view(np.float32)))
    rx.save(path, ref)
    ref.value = jnp.zeros(4)
    rx.load(path, ref)
    assert np.asarray(ref.value).view(np.uint32).tolist() == bits.tolist()


@pytest.mark.parametrize("value, other", [
    (True, False),
    (3, 0),
    (2**100, 0),
    (0.1, 0.0),
    (float("inf"), 0.0),
    (-0.0, 0.0),
    (1 + 2j, 0j),
    ("adam", "sgd"),
    (np.float32(0.1), np.float32(0)),
])  # fmt: skip
def test_numbers_and_texts_of_python_stay_what_they_are(path, value, other):
    ref = rx.Ref(value)
    rx.save(path, ref)
    ref.value = other
    rx.load(path, ref)
    assert type(ref.value) is type(value) and repr(ref.value) == repr(value)


def test_numbers_and_texts_inside_a_value_are_loaded_too(path):
    saved = {"k": jnp.ones(2), "mode": "eval", "rate": 0.5}
    first, ref = (
        rx.Ref(saved),
        rx.Ref({"k": jnp.zeros(2), "mode": "train", "rate": 0.0}),
    )
    rx.save(path, {"state": first, "again": first})
    rx.load(path, {"state": ref})
    assert rx.tree_equal(ref.value, saved)
    assert rx.state_dict({"s": ref})["s.mode"] == "eval"


def test_code_inside_a_value_stays_that_of_the_tree(path):
    plain = lambda seed, fn: eqx.nn.MLP(2, 2, 2, 1, fn, key=jr.key(seed))
    saved, ref = rx.Ref(plain(0, jax.nn.relu)), rx.Ref(plain(1, jax.nn.tanh))
    rx.save(path, saved)
    rx.load(path, ref)
    assert ref.value.activation is jax.nn.tanh
    assert jnp.array_equal(ref.value.layers[0].weight, saved.value.layers[0].weight)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_a_key_of_jax_comes_back_with_its_implementation(path, impl, shape):
    key = jr.key(7, impl=impl)
    ref = rx.Ref(jr.split(key, shape) if shape else key, "rng")
    drawn = jr.key_data(ref.value)
    rx.save(path, ref)
    ref.value = jr.split(jr.key(0, impl=impl), shape) if shape else jr.key(0, impl=impl)
    rx.load(path, ref)
    assert jr.key_impl(ref.value) == impl
    assert np.array_equal(jr.key_data(ref.value), drawn)


def test_a_key_of_another_implementation_is_refused(path):
    rx.save(path, rx.Ref(jr.key(7, impl="rbg")))
    ref = rx.Ref(jr.key(7, impl="unsafe_rbg"))
    refuses(
        path, ref, rx.StructureError, "holds key<urbg>[], and the state has key<rbg>[]"
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32, jnp.complex64])
def test_a_weak_type_comes_back(path, dtype):
    weak = jax.lax.full((2,), jnp.asarray(dtype(3).item()))
    assert weak.weak_type
    ref = rx.Ref(weak)
    rx.save(path, ref)
    ref.value = jnp.zeros(2, dtype)
    rx.load(path, ref)
    assert ref.value.weak_type and ref.value.tolist() == weak.tolist()


def test_a_model_of_shapes_is_filled(path):
    rx.save(path, make(5.0))
    model = rx.filter_eval_shape(make)
    rx.load(path, model)
    assert values_of(model) == values_of(make(5.0))


def test_a_loaded_model_is_not_traced_again(path, trace_counter):
    counted = trace_counter(lambda tree: tree["w"].value * 2)
    step = rx.filter_jit(counted)
    tree = {"w": rx.Ref(jnp.array(1.0)), "k": rx.Ref(jr.key(0)), "n": rx.Ref(2.0)}
    step(tree)
    rx.save(path, tree)
    rx.load(path, tree)
    step(tree)
    assert counted.counter.count == 1


@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs 4 devices")
def test_values_go_to_the_devices_of_those_that_they_replace(path):
    devices = jax.devices()
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    weak = jax.lax.full((4,), jnp.asarray(3.0))
    tree = {
        "array": rx.Ref(jnp.arange(4.0)),
        "key": rx.Ref(jr.split(jr.key(0), 4)),
        "weak": rx.Ref(weak),
    }
    rx.save(path, tree)
    for sharding in (spread, jax.sharding.SingleDeviceSharding(devices[2])):
        other = {
            "array": rx.Ref(jax.device_put(jnp.zeros(4), sharding)),
            "key": rx.Ref(jax.device_put(jr.split(jr.key(1), 4), sharding)),
            "weak": rx.Ref(jax.device_put(0 * weak, sharding)),
        }
        rx.load(path, other)
        assert all(ref.value.sharding == sharding for ref in other.values())
        assert other["array"].value.tolist() == [0, 1, 2, 3]
    rx.save(path, other)  # from the other device
    rx.load(path, tree)
    assert tree["array"].value.tolist() == [0, 1, 2, 3]


def test_the_state_of_an_optimizer(path):
    def make_all(seed):
        model = {"w": rx.Ref(jr.normal(jr.key(seed), (3,)), "params")}
        tx = optax.adam(optax.cosine_decay_schedule(0.1, 10))
        state = tx.init(rx.snapshot(model))
        return model, rx.as_refs(state, "opt_state")

    one, other = make_all(0), make_all(1)
    rx.save(path, one)
    rx.load(path, other)
    assert eqx.tree_equal(rx.snapshot(one), rx.snapshot(other))


def test_streams_of_randomness_go_on_where_they_were(path):
    rngs, other = rx.Rngs(0, dropout=1), rx.Rngs(2, dropout=3)
    rngs.dropout()
    rx.save(path, rngs)
    rx.load(path, other)
    assert jnp.array_equal(jr.key_data(rngs.dropout()), jr.key_data(other.dropout()))
    assert jnp.array_equal(jr.key_data(rngs.params()), jr.key_data(other.params()))


def test_a_tree_without_refs(path):
    rx.save(path, {"rate": 0.1})
    rx.load(path, {"rate": 0.1})
    assert safetensors.numpy.load_file(path) == {}


@pytest.mark.parametrize("key", ["", "ü.名", "a b/c", "filename", "a\nb"])
def test_any_text_is_a_name(path, key):
    tree = {key: rx.Ref(jnp.array(1.0))}
    rx.save(path, tree)
    tree[key].value = jnp.array(0.0)
    rx.load(path, tree)
    assert tree[key].value == 1.0


# Names


def test_only_what_the_filter_selects_is_saved_and_loaded(path):
    rx.save(path, make(5.0), "params")
    assert "encoder.uses" not in safetensors.numpy.load_file(path)
    model = make()
    rx.load(path, model, "params")
    assert model.encoder.weight.value[0] == 5 and model.encoder.uses.value == 0


def test_missing_and_left_over_names_are_listed(path):
    rx.save(path, [make(5.0).encoder, rx.Ref(1)])
    tree = [Linear(), rx.Ref(1), rx.Ref(2, "counts")]
    refuses(
        path,
        tree,
        rx.StructureError,
        "no value for `2`, an unnamed ref (collection 'counts').",
    )
    error = refuses(
        path,
        [Linear()],
        rx.StructureError,
        "No ref that the filter selects is at its key '1'. Pass the `filter` that the state was made with; or pass `strict=False`",
    )
    assert str(path) in error.__notes__[0] and "`rename=`" in error.__notes__[0]
    rx.load(path, tree, strict=False)
    assert tree[0].weight.value[0] == 5 and tree[2].value == 2


@pytest.mark.parametrize("tied_at", ["encoder", "decoder"])
def test_a_tie_is_there_once_and_loaded_by_any_of_its_names(path, tied_at):
    shared = rx.Ref(jnp.ones(2), "params")
    rx.save(path, {"decoder": shared, "encoder": shared})
    assert len(safetensors.numpy.load_file(path)) == 1
    alone = {tied_at: rx.Ref(jnp.zeros(2), "params")}
    rx.load(path, alone)
    assert alone[tied_at].value[0] == 1


def test_a_tie_is_loaded_into_two_refs(path):
    rx.save(path, make_tied(5.0))
    model = make()
    rx.load(path, model)
    assert model.layers[1].weight.value[0] == 5 == model.encoder.weight.value[0]
    assert model.layers[1].weight is not model.encoder.weight


def test_two_values_are_loaded_into_a_tie_only_if_they_are_equal(path):
    rx.save(path, make(5.0))
    refuses(path, make_tied(), rx.StructureError, "a different value for each")
    model = make(5.0)
    model.layers[1].weight.value = model.encoder.weight.value
    rx.save(path, model)
    tied = make_tied()
    rx.load(path, tied)
    assert tied.encoder.weight.value[0] == 5


def test_the_order_of_the_names_does_not_count(path):
    refs = {"a": rx.Ref(jnp.array(1.0)), "b": rx.Ref(jnp.array(2.0))}
    rx.save(path, list(refs.values()))
    tree = {"1": rx.Ref(jnp.array(0.0)), "0": rx.Ref(jnp.array(0.0))}
    rx.load(path, tree)
    assert tree["0"].value == 1 and tree["1"].value == 2


def test_names_are_mapped_by_a_dict_or_a_function(path):
    rx.save(path, {"old": rx.Ref(1), "b": rx.Ref(2), "c": rx.Ref(3)})
    for rename in (
        {"old": "a", "c": None},
        lambda name: {"old": "a", "b": "b", "c": None}[name],
    ):
        tree = {"a": rx.Ref(0), "b": rx.Ref(0)}
        rx.load(path, tree, rename=rename)
        assert tree["a"].value == 1 and tree["b"].value == 2


def test_a_submodule_is_loaded_from_the_file_of_the_whole(path):
    rx.save(path, make(5.0))
    layer = Linear()

    def within(name):
        return name.removeprefix("layers.0.") if name.startswith("layers.0.") else None

    rx.load(path, layer, rename=within)
    assert layer.weight.value[0] == 6


def test_any_name_of_a_tie_can_be_mapped(path):
    shared = rx.Ref(1)
    rx.save(path, {"a": shared, "b": shared})
    tree = {"c": rx.Ref(0)}
    rx.load(path, tree, rename={"b": "c"})
    assert tree["c"].value == 1


def test_a_wrong_mapping_of_names_is_refused(path):
    tree = {"weight": rx.Ref(1), "b": rx.Ref(2)}
    rx.save(path, tree)
    text = f"`rename` has 'wieght', but {path} does not. It has 'weight'."
    refuses(path, tree, rx.StructureError, text, rename={"wieght": "w"})
    text = "`rename` maps both 'b' and 'weight' to `b`. Map one of them to `None`."
    refuses(path, tree, rx.StructureError, text, rename={"weight": "b"})
    rx.load(path, tree, rename={"weight": "b", "b": None}, strict=False)  # the remedy
    assert tree["weight"].value == tree["b"].value == 1


# Third-party files


def test_arrays_are_converted_on_the_way(path):
    kernel = np.arange(6, dtype=np.float32).reshape(3, 2)
    safetensors.numpy.save_file({"Dense_0.kernel": kernel}, path)
    model = {"weight": rx.Ref(jnp.zeros((2, 3), jnp.bfloat16))}

    def convert(name, array):
        assert name == "weight"
        return array.T.astype(jnp.bfloat16)

    rx.load(path, model, rename={"Dense_0.kernel": "weight"}, convert=convert)
    assert np.array_equal(model["weight"].value, kernel.T.astype(jnp.bfloat16))
    assert isinstance(model["weight"].value, jax.Array)


def test_what_a_conversion_raises_is_raised(path):
    rx.save(path, rx.Ref(jnp.ones(2)))

    def convert(name, array):
        raise ValueError("mine")

    refuses(path, rx.Ref(jnp.zeros(2)), ValueError, "mine", convert=convert)


def test_what_a_conversion_gives_is_checked(path):
    rx.save(path, make(5.0))
    text = 'is declared `Float[Array, "n"]` with n=2, and cannot hold f32[1]'
    refuses(path, make(), rx.RefTypeError, text, convert=lambda name, array: array[:1])


def test_a_file_of_pytorch(path):
    """The names, the order and the metadata are those that PyTorch writes."""
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    state = {"encoder.0.bias": rows[:, 0].copy(), "encoder.0.weight": rows}
    state["bn.num_batches_tracked"] = np.array(3, np.int64)
    safetensors.numpy.save_file(state, path, metadata={"format": "pt"})
    linear = rx.as_refs(eqx.nn.Linear(3, 2, key=jr.key(0)), "params")
    model = {"encoder": [linear], "rate": 0.1}
    rx.load(path, model, rename={"bn.num_batches_tracked": None})
    assert np.array_equal(linear.weight.value, rows)
    assert linear.bias.value.tolist() == [0, 3]


# Refusals


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        pickle.dumps({"a": 1}),
        b"PK\x03\x04" + b"\0" * 100,  # of NumPy, or of PyTorch
        b"a text of some length, which is none",
        (10).to_bytes(8, "little") + b"not JSON !",
    ],
)
def test_a_file_of_another_format_is_refused(path, content):
    path.write_bytes(content)
    refuses(
        path,
        make(),
        rx.CheckpointError,
        f"Cannot load {path}: it is not a complete safetensors file (",
    )
    with raises(rx.CheckpointError, match="give the arrays to `rx.load_state_dict`"):
        rx.load(path, make())


def test_a_file_that_is_cut_off_anywhere_is_refused(path):
    rx.save(path, make(5.0))
    whole = path.read_bytes()
    model = make()
    for n in range(0, len(whole), 5):
        path.write_bytes(whole[:n])
        refuses(
            path, model, rx.CheckpointError, "If it was truncated, load an earlier one."
        )
    path.write_bytes(whole + b"\0")
    refuses(path, model, rx.CheckpointError, "it is not a complete safetensors file")
    path.write_bytes(whole)
    rx.load(path, model)


def test_a_file_with_a_damaged_header_loads_nothing_that_was_not_meant(path):
    zeros = np.zeros(2, np.float32)
    tree = {"a": rx.Ref(zeros), "n": rx.Ref(1)}
    rx.save(path, {"a": rx.Ref(zeros + 1), "n": rx.Ref(2)})
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for i in range(end):
        for byte in b"\0", b"1", b"a":
            path.write_bytes(whole[:i] + byte + whole[i + 1 :])
            tree["a"].value, tree["n"].value = zeros, 1
            try:
                rx.load(path, tree)
            except rx.RefError:
                refused += 1
                assert tree["a"].value.tolist() == [0, 0] and tree["n"].value == 1
            else:
                assert tree["a"].value.tolist() == [1, 1]
                assert type(tree["n"].value) is int
    assert refused > end


@pytest.mark.parametrize(
    "ours",
    ["no JSON", "1", "[]", "{}", '{"version": null}'],
)
def test_metadata_that_cannot_be_read_is_refused(path, ours):
    safetensors.numpy.save_file({"": np.ones(2)}, path, metadata={"refx_eqx": ours})
    text = f"Cannot load {path}: its metadata cannot be read. Load an earlier file."
    refuses(path, rx.Ref(jnp.ones(2)), rx.CheckpointError, text)


@pytest.mark.parametrize(
    "note",
    [
        {"key": "no such implementation"},
        {"key": "rbg"},
        {"dtype": "O"},
        {"dtype": "no such dtype"},
        {"dtype": "float64"},
    ],
)
def test_a_note_that_does_not_fit_its_array_is_refused(path, note):
    ours = json.dumps({"version": 1, "notes": {"a": note}, "tied": {}})
    array = np.ones((2, 3), np.uint32)
    safetensors.numpy.save_file({"a": array}, path, metadata={"refx_eqx": ours})
    tree = {"a": rx.Ref(jnp.ones((2, 3), jnp.uint32))}
    text = f"Cannot load {path}: the value of 'a' cannot be read. Load an earlier file."
    refuses(path, tree, rx.CheckpointError, text)


def test_a_newer_version_of_the_format_is_refused(path):
    ours = json.dumps({"version": 2})
    safetensors.numpy.save_file({"": np.ones(2)}, path, metadata={"refx_eqx": ours})
    text = f"Cannot load {path}: it has version 2 of the format, but this version of refx_eqx only reads up to 1. Load it with the version that wrote it, or a newer"
    refuses(path, rx.Ref(jnp.ones(2)), rx.CheckpointError, text)


def test_a_dtype_that_numpy_does_not_have_is_refused(path):
    header = {"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0")
    tree = {"a": rx.Ref(jnp.ones(2))}
    text = (
        f"Cannot load {path}: 'a' in it has dtype F4, which NumPy does not have. Convert "
        "the file, or leave the name out: `rename={'a': None}`."
    )
    refuses(path, tree, rx.CheckpointError, text)
    rx.load(path, tree, rename={"a": None}, strict=False)


def test_a_wrong_shape_or_dtype_is_refused_and_nothing_is_written(path):
    tree = {"a": rx.Ref(jnp.ones(2)), "b": rx.Ref(jnp.array([1.5, 1.5]))}
    rx.save(path, tree)
    text = "at `b` holds {}, and the state has f32[2]"
    other = {"a": rx.Ref(jnp.zeros(2)), "b": rx.Ref(jnp.zeros(3))}
    refuses(path, other, rx.StructureError, text.format("f32[3]"))
    other = {"a": rx.Ref(jnp.zeros(2)), "b": rx.Ref(jnp.zeros(2, jnp.int32))}
    refuses(path, other, rx.StructureError, text.format("i32[2]"))
    # The remedy.
    rx.load(path, other, convert=lambda name, x: x.astype(other[name].dtype))
    assert other["b"].value.tolist() == [1, 1]


def test_there_is_no_such_file(path):
    refuses(path, make(), FileNotFoundError, str(path))
    refuses(path.parent, make(), IsADirectoryError, str(path.parent))


def saves_nothing(path, tree, error, text, *args):
    path.write_bytes(b"old")
    with raises(error, match=re.escape(text)):
        rx.save(path, tree, *args)
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == [path.name]


def test_an_array_outside_refs_is_not_lost_in_silence(path):
    model = {"w": rx.Ref(jnp.ones(2), "params"), "mean": jnp.zeros(2)}
    text = (
        "Cannot save: the array at `mean` is not in a ref, so it would not be in the file. "
        "Declare a field a ref, such as `weight: rx.Param[Array]`, or turn the arrays of a "
        "tree into refs with `rx.as_refs`. Or pass `rx.Ref` as `filter`, which only selects refs."
    )
    saves_nothing(path, model, rx.StructureError, text)
    saves_nothing(path, model, rx.StructureError, text, rx.path("mean"))
    rx.save(path, model, "params")
    rx.save(path, model, rx.Ref)
    text = (
        "Cannot load: the array at `mean` is not in a ref, so it would not be loaded."
    )
    refuses(path, model, rx.StructureError, text)
    rx.load(path, model, rx.Ref)
    rx.save(path, rx.as_refs(model))
    assert len(safetensors.numpy.load_file(path)) == 2


HOLDERS = {
    "partial": lambda array: functools.partial(jnp.add, array),
    "closure": lambda array: lambda x: jnp.add(array, x),
    "bound method": lambda array: types.MethodType(jnp.add, array),
}


@pytest.mark.parametrize("holder", HOLDERS.values(), ids=HOLDERS)
def test_an_array_that_a_function_holds_is_not_lost_in_silence(path, holder):
    tree = {"w": rx.Ref(jnp.ones(2), "params"), "f": holder(jnp.ones(2))}
    text = "Cannot save: the array at `f."
    saves_nothing(path, tree, rx.StructureError, text)
    saves_nothing(path, tree, rx.StructureError, text, rx.path("f.**"))
    for filter in "params", rx.Ref:
        rx.save(path, tree, filter)
        with raises(rx.StructureError, match=r"Cannot load: the array at `f\."):
            rx.load(path, tree)
        rx.load(path, tree, filter)
    array = rx.Ref(jnp.ones(2), "params")
    call = lambda array, x: jnp.add(array[...], x)
    tree["f"] = functools.partial(call, array)  # the remedy
    rx.save(path, tree)
    array.value *= 2
    rx.load(path, tree)
    assert tree["f"](1.0)[0] == 2


def test_the_options_of_a_transformation_need_not_be_in_refs(path):
    model = {"w": rx.Ref(jnp.ones(2), "params")}
    schedule = optax.piecewise_interpolate_schedule("linear", 0.1, {10: 0.1, 20: 0.5})
    for rate in jnp.array(0.1), schedule:
        optimizer = rx.Optimizer(model, optax.adam(rate))
        rx.check((model, optimizer))
        rx.save(path, (model, optimizer))
        rx.load(path, (model, optimizer))


@pytest.mark.parametrize(
    "value, text",
    [
        (
            len,
            "`a` holds <built-in function len>, but a file can only hold arrays, numbers and",
        ),
        (b"no", "`a` holds b'no'"),
        ({"x": jnp.ones(2), "mode": b"no"}, "`a.mode` holds b'no'"),
        ([functools.partial(jnp.add, jnp.ones(2))], "`a.0` holds partial("),
        (
            np.array([None]),
            "the array at `a` has dtype object, which a file cannot hold",
        ),
        (np.zeros(2, [("x", "O")]), "the array at `a` has dtype [('x', 'O')], which"),
    ],
)
def test_what_no_file_can_hold_is_refused(path, value, text):
    tree = {"a": rx.Ref(value), "b": rx.Ref(1, "params")}
    saves_nothing(path, tree, rx.StructureError, f"Cannot save: {text}")
    rx.save(path, tree, "params")  # the remedy


@pytest.mark.parametrize("value", [jnp.ones(2), 1.0, "text"])
def test_a_name_that_cannot_be_encoded_is_refused(path, value):
    text = "'\\ud800' cannot be a name in a file: it has half of a character"
    saves_nothing(path, {"\ud800": rx.Ref(value)}, rx.StructureError, text)
    tied = rx.Ref(value)  # another name of it can be encoded
    rx.save(path, {"a": tied, "\ud800": tied})
    rx.load(path, {"\ud800": tied})


def test_the_one_name_that_no_file_can_hold_is_refused(path):
    tree = {"__metadata__": rx.Ref(1)}
    text = "'__metadata__' cannot be a name in a safetensors file. Rename the key of the ref."
    saves_nothing(path, tree, rx.StructureError, text)


def test_a_tracer_is_not_saved(path):
    ref = rx.Ref(jnp.ones(2))

    @rx.filter_jit
    def f(ref):
        rx.save(path, {"a": ref})

    with jax.check_tracer_leaks(False):
        with raises(rx.TraceLevelError, match="the value at `a` is a tracer"):
            f(ref)
    assert not path.exists()


def test_an_array_that_was_donated_is_not_saved(path):
    ref = rx.Ref(jnp.ones(2))
    new = jax.jit(lambda x: x + 1, donate_argnums=0)(ref.value)
    text = "The buffer of an unnamed ref (no collection) is gone"
    saves_nothing(path, {"a": ref}, rx.DonatedError, text)
    ref.value = new  # the remedy
    rx.save(path, {"a": ref})


def test_a_derefed_tree_is_refused(path):
    text = "Cannot save: the tree is derefed"
    saves_nothing(path, rx.deref({"a": rx.Ref(1)}), rx.StructureError, text)


# The file


def test_a_file_is_replaced_and_nothing_else_is_left(path):
    for value in (1.0, 2.0):
        rx.save(path, make(value))
        assert os.listdir(path.parent) == [path.name]
    model = make()
    rx.load(path, model)
    assert model.encoder.weight.value[0] == 2


def test_the_file_has_the_mode_of_any_new_file(path):
    rx.save(path, make())
    other = path.with_name("other")
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


def test_a_link_stays_a_link(tmp_path, path):
    (tmp_path / "folder").mkdir()
    target = tmp_path / "folder" / "target.safetensors"
    path.symlink_to(target)
    rx.save(path, make(5.0))
    assert path.is_symlink() and target.exists()
    rx.load(path, make())


def test_a_write_that_fails_leaves_the_old_file(path, monkeypatch):
    rx.save(path, make(5.0))

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with raises(OSError, match="No space left"):
        rx.save(path, make(6.0))
    assert os.listdir(path.parent) == [path.name]
    model = make()
    rx.load(path, model)
    assert model.encoder.weight.value[0] == 5


def test_the_arrays_are_aligned_in_the_file(path):
    tree = {"a": rx.Ref(jnp.zeros(3, jnp.int8)), "b": rx.Ref(jnp.zeros(2))}
    rx.save(path, tree)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0 and header["b"]["data_offsets"][0] == 0


def test_a_missing_extra_is_named(tmp_path):
    code = """
        import sys
        sys.modules["safetensors"] = None
        import refx_eqx as rx
        for call in (rx.save, rx.load):
            try:
                call("model.safetensors", {"a": rx.Ref(1)})
            except ImportError as e:
                print(e)
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    text = (
        "`rx.save` and `rx.load` need the package `safetensors`: `pip install "
        "'refx_eqx[checkpoint]'`.\n"
    )
    assert done.stdout == text * 2 and os.listdir(tmp_path) == []


# What a platform, or another process, does


def test_where_files_cannot_be_locked_a_file_is_written_all_the_same(path, monkeypatch):
    """As on Windows."""
    monkeypatch.setattr(_file, "fcntl", None)
    other = make()
    rx.save(path, make(4.0))
    rx.save(path, make(5.0))
    rx.load(path, other)
    assert values_of(other) == values_of(make(5.0))
    assert os.listdir(path.parent) == [path.name]


def test_a_new_file_that_another_process_took_for_a_leftover_is_made_again(
    path, monkeypatch
):
    fcntl = pytest.importorskip("fcntl")
    taken, lock = [], fcntl.flock

    def flock(file, operation):
        if not taken:
            taken.append(file.name)
            os.unlink(file.name)
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    other = make()
    rx.save(path, make(5.0))
    rx.load(path, other)
    assert values_of(other) == values_of(make(5.0))
    assert len(taken) == 1 and os.listdir(path.parent) == [path.name]


def test_an_array_of_several_processes_is_refused(path, monkeypatch):
    ref = rx.Ref(jnp.ones(2))
    monkeypatch.setattr(type(ref.value), "is_fully_addressable", False)
    with raises(rx.StructureError, match="`0` is spread over several processes"):
        rx.save(path, [ref])
    assert os.listdir(path.parent) == []


def test_a_key_of_an_implementation_without_a_name_is_refused(path):
    implementation = define_prng_impl(
        key_shape=(2,),
        seed=lambda seed: jnp.full(2, seed, jnp.uint32),
        split=lambda key, shape: jnp.broadcast_to(key, (*shape, 2)),
        random_bits=lambda key, width, shape: jnp.zeros(shape, jnp.uint32),
        fold_in=lambda key, data: key,
    )
    ref = rx.Ref(jr.key(3, impl=implementation))
    with raises(rx.StructureError, match="an implementation without a registered name"):
        rx.save(path, [ref])
    rx.save(path, [rx.Ref(jr.key_data(ref.value))])
    data = rx.Ref(jnp.zeros(2, jnp.uint32))
    rx.load(path, [data])
    assert data.value.tolist() == [3, 3]
