"""`state_dict` gives the values of refs by path; `load_state_dict` writes all or none."""

# A static checker objects to what is wrong on purpose here.
# pyright: reportArgumentType=false

import io
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jaxtyping import Float
from raising import raises
from saved_models import Linear, make, make_tied

import refx_eqx as rx


PATHS = [
    "encoder.weight",
    "encoder.uses",
    "layers.0.weight",
    "layers.0.uses",
    "layers.1.weight",
    "layers.1.uses",
]


def values_of(tree):
    return {
        path: np.asarray(value).tolist() for path, value in rx.state_dict(tree).items()
    }


def refuses(tree, state, error, text, **kwargs):
    """`load_state_dict` raises this text, and has written nothing."""
    before = rx.state_dict(tree)
    with raises(error, match=re.escape(text)):
        rx.load_state_dict(tree, state, **kwargs)
    after = rx.state_dict(tree)
    assert all(after[path] is before[path] for path in before)


# state_dict


def test_each_ref_has_its_path_in_the_order_of_the_tree():
    model = make()
    state = rx.state_dict(model)
    assert list(state) == PATHS
    assert state["layers.1.weight"] is model.layers[1].weight.value


def test_a_shared_ref_is_there_once_by_its_first_place():
    assert list(rx.state_dict(make_tied())) == [
        path for path in PATHS if path != "layers.1.weight"
    ]


@pytest.mark.parametrize(
    "filter, paths",
    [
        ("params", PATHS[::2]),
        (rx.path("layers.**.uses"), ["layers.0.uses", "layers.1.uses"]),
        (~rx.collection("params") & rx.path("encoder.*"), ["encoder.uses"]),
        (False, []),
    ],
)
def test_only_what_the_filter_selects_is_there(filter, paths):
    assert list(rx.state_dict(make(), filter)) == paths


def test_a_filter_that_tears_a_tie_is_refused():
    filter = rx.path("encoder.weight")
    with raises(rx.StructureError, match="would tear it apart"):
        rx.state_dict(make_tied(), filter)
    refuses(make_tied(), {}, rx.StructureError, "would tear it apart", filter=filter)


def test_a_value_that_is_a_pytree_is_flat_by_name(tmp_path):
    def made(value):
        layer = eqx.nn.Linear(2, 3, key=jr.key(0))
        layer = eqx.tree_at(lambda m: m.bias, layer, jnp.full(3, value))
        stats = {"mean": jnp.full(2, value), "n": int(value), "name": f"of {value}"}
        return {"stats": rx.Ref(stats), "layer": rx.Ref(layer), "empty": rx.Ref(None)}

    state = rx.state_dict(made(1.0))
    names = ["layer.weight", "layer.bias", "stats.mean", "stats.n", "stats.name"]
    assert list(state) == names
    np.savez(tmp_path / "state.npz", **state)
    other = made(0.0)
    rx.load_state_dict(other, np.load(tmp_path / "state.npz"))
    assert other["stats"].value["n"] == 1 and other["stats"].value["mean"][0] == 1
    assert type(other["stats"].value["name"]) is str
    assert other["stats"].value["name"] == "of 1.0"
    assert other["layer"].value.bias[2] == 1 and other["empty"].value is None
    # One of them alone, and the whole value by the path of the ref.
    rx.load_state_dict(other, {"stats.n": 7}, strict=False)
    assert other["stats"].value["n"] == 7 and other["stats"].value["mean"][0] == 1
    whole = {"stats": {"mean": jnp.zeros(2), "n": 2, "name": "batch"}}
    rx.load_state_dict(other, whole, strict=False)
    assert other["stats"].value["n"] == 2 and other["stats"].value["mean"][0] == 0


def test_a_missing_array_of_a_pytree_is_named():
    ref = rx.Ref({"mean": jnp.zeros(2), "n": 3})
    text = "no value for `stats.n`, an unnamed ref (no collection)"
    refuses({"stats": ref}, {"stats.mean": jnp.ones(2)}, rx.StructureError, text)
    text = "at `stats.mean` holds {'mean': f32[2], 'n': 3}, and the state has"
    bad = {"stats.mean": jnp.ones(3), "stats.n": 4}
    refuses({"stats": ref}, bad, rx.StructureError, text)


def test_an_array_in_a_value_with_the_path_of_another_ref_is_refused():
    for tree in (
        {"a": rx.Ref({"b": jnp.ones(1)}), "a.b": rx.Ref(1)},
        {"a": rx.Ref({"b": {"c": jnp.ones(1)}, "b.c": jnp.ones(1)})},
    ):
        with raises(rx.StructureError, match="is the path of an array in an unnam"):
            rx.state_dict(tree)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_typed_keys_are_stored_as_data_and_stay_typed(impl, tmp_path):
    model = {"key": rx.Ref(jr.split(jr.key(1, impl=impl), 3))}
    np.savez(tmp_path / "keys.npz", **rx.state_dict(model))
    shapes = rx.filter_eval_shape(
        lambda: {"key": rx.Ref(jr.split(jr.key(0, impl=impl), 3))}
    )
    for other in ({"key": rx.Ref(jr.split(jr.key(0, impl=impl), 3))}, shapes):
        rx.load_state_dict(other, np.load(tmp_path / "keys.npz"))
        assert bool(jnp.all(other["key"].value == model["key"].value))
    bad = {"key": np.zeros(2, np.uint32)}
    refuses(model, bad, rx.StructureError, "the state has u32[2]")


def test_a_ref_that_is_the_tree_has_the_empty_path():
    ref = rx.Ref(1)
    assert rx.state_dict(ref) == {"": 1}
    rx.load_state_dict(ref, {"": 2})
    assert ref.value == 2
    refuses(
        ref, {}, rx.StructureError, "no value for `the root of the tree`, an unnamed"
    )


def test_a_derefed_tree_is_refused():
    opened = rx.deref(make())
    text = (
        "the tree is derefed: it has a Value at `encoder.weight`. Pass the tree of refs "
        "itself."
    )
    with raises(rx.StructureError, match=f"Cannot make a state dict: {text}"):
        rx.state_dict(opened)
    with raises(rx.StructureError, match=f"Cannot load the state: {text}"):
        rx.load_state_dict(opened, {})


def test_two_refs_with_one_path_are_refused():
    tree = {"a": {"b": rx.Ref(1, "params")}, "a.b": rx.Ref(2)}
    text = (
        "an unnamed ref (collection 'params') and an unnamed ref (no collection) are two "
        "refs, and `a.b` is the path of both. Rename one of the keys on the way, such as a "
        "dict key with a dot in it."
    )
    with raises(rx.StructureError, match=re.escape(text)):
        rx.state_dict(tree)
    with raises(rx.StructureError, match=re.escape(text)):
        rx.load_state_dict(tree, {"a.b": 3})
    assert tree["a"]["b"].value == 1 and tree["a.b"].value == 2
    tree["a_b"] = tree.pop("a.b")  # the remedy
    assert rx.state_dict(tree) == {"a.b": 1, "a_b": 2}


def test_a_ref_that_may_not_be_read_is_refused():
    model = make()
    with jax.check_tracer_leaks(False), pytest.raises(rx.TraceLevelError):
        jax.jit(lambda: rx.state_dict(model))()


# load_state_dict


def test_what_was_saved_is_loaded_into_the_refs_that_are_there():
    model, other = make(5.0), make()
    weight = other.layers[0].weight
    rx.load_state_dict(other, rx.state_dict(model))
    assert other.layers[0].weight is weight
    assert values_of(other) == values_of(model)


def test_a_round_trip_through_numpy():
    file = io.BytesIO()
    model, other = make_tied(5.0), make_tied()
    np.savez(file, **rx.state_dict(model))
    file.seek(0)
    with np.load(file) as state:
        rx.load_state_dict(other, state)
    assert values_of(other) == values_of(model)
    assert all(isinstance(value, jax.Array) for value in rx.state_dict(other).values())
    assert other.layers[1].weight is other.encoder.weight


def test_only_what_the_filter_selects_is_written():
    model = make()
    rx.load_state_dict(model, rx.state_dict(make(5.0), "params"), "params")
    assert model.encoder.weight.value[0] == 5 and model.encoder.uses.value == 0


def test_a_loaded_model_is_not_traced_again(trace_counter):
    counted = trace_counter(lambda model: model.encoder.weight.value * 2)
    step = rx.filter_jit(counted)
    model = make()
    step(model)
    rx.load_state_dict(model, jax.tree.map(np.asarray, rx.state_dict(make(5.0))))
    assert step(model)[0] == 10
    assert counted.counter.count == 1


def test_under_filter_jit():
    model = make()

    @rx.filter_jit
    def load(model, state):
        rx.load_state_dict(model, state)
        return rx.state_dict(model)["encoder.weight"] * 2

    assert load(model, rx.state_dict(make(5.0)))[0] == 10
    assert values_of(model) == values_of(make(5.0))


def test_a_model_of_shapes_is_filled():
    model = rx.filter_eval_shape(make)
    assert isinstance(model.encoder.weight.value, jax.ShapeDtypeStruct)
    rx.load_state_dict(model, jax.tree.map(np.asarray, rx.state_dict(make(5.0))))
    assert values_of(model) == values_of(make(5.0))

    shapes = rx.filter_eval_shape(make)
    wrong = rx.state_dict(make()) | {"encoder.weight": jnp.zeros(3)}
    refuses(shapes, wrong, rx.RefTypeError, "at `encoder.weight`: `Linear.weight`")


# Keys


def test_a_checkpoint_from_before_a_tie_is_loaded_if_the_values_are_equal():
    model = make_tied()
    state = rx.state_dict(make(5.0))
    state["layers.1.weight"] = jnp.array(
        state["encoder.weight"]
    )  # equal, another array
    rx.load_state_dict(model, state)
    assert model.layers[1].weight.value[0] == 5


def test_a_checkpoint_with_the_tie_the_other_way_round_is_loaded():
    model = make_tied()
    state = rx.state_dict(make_tied(5.0))
    state["layers.1.weight"] = state.pop("encoder.weight")
    rx.load_state_dict(model, state)
    assert model.encoder.weight.value[0] == 5


def test_different_values_for_one_ref_are_refused():
    model, state = make_tied(), rx.state_dict(make(5.0))
    refuses(
        model,
        state,
        rx.StructureError,
        "Cannot load the state: `Linear.weight` (collection 'params') is one ref at "
        "`encoder.weight` and `layers.1.weight`, and the state has a different value for "
        "each. Remove one of the two keys from the state, or untie the ref: put "
        "`rx.clone(ref)` at one of its places.",
    )
    # Both remedies.
    rx.load_state_dict(
        model, {k: v for k, v in state.items() if k != "layers.1.weight"}
    )
    assert model.layers[1].weight.value[0] == 5
    untied = eqx.tree_at(
        lambda m: m.layers[1].weight, model, rx.clone(model.layers[1].weight)
    )
    rx.load_state_dict(untied, state)
    assert untied.layers[1].weight.value[0] == 7


@pytest.mark.parametrize(
    "one, other, same",
    [
        (jnp.array(jnp.nan), jnp.array(jnp.nan), True),
        (jnp.array(0.0), jnp.array(-0.0), False),
        (jr.key(0), jr.key(0), True),
        (jr.key(0), jr.key(1), False),
        (jnp.ones(2, jnp.bfloat16), jnp.ones(2, jnp.bfloat16), True),
        (np.float32(2.0), jnp.array(2.0), True),
        (3, 3, True),
        (3, 4, False),
        ("adam", "adam", True),
        ("adam", "sgd", False),
        ({"a": jnp.ones(2)}, {"a": jnp.ones(2)}, True),
        ({"a": jnp.ones(2)}, {"a": jnp.array([1.0, 2.0])}, False),
    ],
)
def test_values_of_one_ref_are_compared_bit_by_bit(one, other, same):
    ref = rx.Ref(other)
    tree, state = {"a": ref, "b": ref}, {"a": one, "b": other}
    if same:
        rx.load_state_dict(tree, state)
    else:
        refuses(tree, state, rx.StructureError, "a different value for each")


def test_tracers_for_one_ref_must_be_the_same():
    ref = rx.Ref(jnp.array(0.0))
    tree = {"a": ref, "b": ref}

    @rx.filter_jit
    def load(tree, x, y):
        rx.load_state_dict(tree, {"a": x, "b": y})

    with jax.check_tracer_leaks(False):
        with raises(rx.StructureError, match="a different value for each"):
            load(tree, jnp.array(1.0), jnp.array(1.0))
    assert ref.value == 0

    rx.filter_jit(lambda tree, x: rx.load_state_dict(tree, {"a": x, "b": x}))(
        tree, jnp.array(1.0)
    )
    assert ref.value == 1


def test_missing_and_unexpected_keys_are_listed():
    model = make()
    state = rx.state_dict(make(5.0))
    state["old.weight"] = state.pop("encoder.weight")
    state["name"] = state.pop("layers.0.uses")
    refuses(
        model,
        state,
        rx.StructureError,
        "Cannot load the state: it does not match the tree. It has no value for "
        "`encoder.weight`, `Linear.weight` (collection 'params'); `layers.0.uses`, "
        "`Linear.uses` (collection 'counts'). No ref that the filter selects is at its keys "
        "'old.weight', 'name'. Pass the `filter` that the state was made with; or pass "
        "`strict=False`, which leaves refs without a value unchanged, and ignores other keys.",
    )
    rx.load_state_dict(model, state, strict=False)  # the remedy
    assert model.encoder.weight.value[0] == 0 and model.layers[0].weight.value[0] == 6


def test_the_filter_of_the_state_is_a_remedy_too():
    model, state = make(), rx.state_dict(make(5.0), "params")
    refuses(
        model, state, rx.StructureError, "no value for `encoder.uses`, `Linear.uses`"
    )
    rx.load_state_dict(model, state, "params")
    assert model.encoder.weight.value[0] == 5


def test_a_key_of_a_ref_that_is_not_selected_is_unexpected():
    model, state = make(), rx.state_dict(make(5.0), rx.path("encoder.*"))
    filter = rx.path("encoder.weight")
    text = "No ref that the filter selects is at its key 'encoder.uses'. Pass"
    refuses(model, state, rx.StructureError, text, filter=filter)
    rx.load_state_dict(model, state, filter, strict=False)
    assert model.encoder.weight.value[0] == 5 and model.encoder.uses.value == 0


# Values


@pytest.mark.parametrize(
    "old, new",
    [
        (jnp.array(0), np.array(7)),
        (jnp.array(0), np.array(-7)),
        (jnp.zeros(2), np.array([0.5, np.nan])),
        (jnp.zeros(2), jnp.array([0.5, 1.5], jnp.bfloat16)),
        (jnp.zeros(2), np.array([0.1, 1.5], np.float16)),
        (jnp.zeros(2, jnp.bfloat16), np.array([0.5, 1.5])),
        (jnp.zeros(2, jnp.bfloat16), np.array(jnp.ones(2, jnp.bfloat16)).view("V2")),
    ],
)
@pytest.mark.parametrize("lift", [lambda f: f, rx.filter_jit])
def test_another_precision_is_converted_if_no_number_changes(old, new, lift):
    ref = rx.Ref(old)
    # Closed over: an argument of a compiled function is converted on its way.
    lift(lambda tree: rx.load_state_dict(tree, {"a": new}))({"a": ref})
    assert ref.dtype == old.dtype
    expected = np.ones(2) if new.dtype == "V2" else np.asarray(new, np.float64)
    np.testing.assert_array_equal(np.asarray(ref.value, np.float64), expected)


@pytest.mark.parametrize(
    "old, new",
    [
        (jnp.array(0), np.array(2**31)),
        (jnp.array(0, jnp.uint8), np.array(-1)),
        (jnp.array(0), np.array(1.0)),
        (jnp.array(0.0), np.array(1)),
        (jnp.array(0.0), np.array(1e300)),
        (jnp.array(False), np.array(1)),
    ],
)
def test_a_number_that_would_change_is_refused(old, new):
    text = f'Or convert it: `jnp.asarray(value, "{old.dtype}")`.'
    refuses({"a": rx.Ref(old)}, {"a": new}, rx.StructureError, text)


def test_the_remedy_for_another_precision_runs():
    model, state = make(), rx.state_dict(make(5.0))
    state["layers.1.weight"] = np.full(2, 0.1)
    text = 'Or convert it: `jnp.asarray(value, "float32")`.'
    refuses(model, state, rx.StructureError, text)
    state["layers.1.weight"] = jnp.asarray(state["layers.1.weight"], "float32")
    rx.load_state_dict(model, state)
    assert model.layers[1].weight.value[0] == np.float32(0.1)


# Other dtypes


@pytest.mark.parametrize(
    "value", [np.array(["a", "b"]), np.ones(2, complex), jnp.full(2, 1j)]
)
def test_no_remedy_fails_or_drops_an_imaginary_part(value):
    class Line(rx.Module):
        at: rx.Param[Float[jax.Array, "n"]]

    for tree in ({"at": rx.Ref(jnp.zeros(2))}, Line(jnp.zeros(2))):
        with raises(rx.RefError, match="Cannot load the state") as error:
            rx.load_state_dict(tree, {"at": value})
        message = error.value.args[0]
        assert "jnp.asarray" not in message and "astype" not in message


def test_data_of_another_key_implementation_is_refused_by_name():
    rngs = rx.Rngs(jr.key(0, impl="rbg"))
    refuses(
        rngs,
        rx.state_dict(rx.Rngs(0)),
        rx.MismatchError,
        "`RngStream.key` (collection 'rng') at `streams.default.key` holds key<rbg>[], "
        "and the state has u32[2]",
    )
    rx.load_state_dict(rngs, rx.state_dict(rx.Rngs(jr.key(1, impl="rbg"))))


def test_data_becomes_keys_of_any_implementation_for_a_shape():
    keys = jr.split(jr.key(0, impl="unsafe_rbg"), 3)
    ref = rx.Ref(jax.ShapeDtypeStruct(keys.shape, keys.dtype))
    rx.load_state_dict({"k": ref}, rx.state_dict({"k": rx.Ref(keys)}))
    assert jnp.array_equal(ref.value, keys)


@pytest.mark.parametrize(
    "value, shown",
    [
        (np.full(2, 0.1), "f64[2](numpy)"),  # JAX would round it
    ],
)
def test_another_dtype_of_the_declared_kind_is_refused_and_nothing_is_written(
    value, shown
):
    # The last of the keys, so that there is something to write before it.
    refuses(
        make(),
        rx.state_dict(make(5.0)) | {"layers.1.weight": value},
        rx.StructureError,
        "Cannot load the state: `Linear.weight` (collection 'params') at `layers.1.weight` "
        f"holds f32[2], and the state has {shown}. If the change is intended, write it: "
        "`ref.value = ...`.",
    )


@pytest.mark.parametrize(
    "value, shown",
    [
        (jnp.zeros(3), "f32[3]"),
        (np.zeros(3, np.float32), "f32[3]"),
        (np.zeros(2, np.int32), "i32[2]"),
        (np.zeros(2, "V4"), "|V4[2](numpy)"),
        (0.0, "0.0"),
        ("no", "'no'"),
        (None, "None"),
        ([jnp.zeros(2)], "[f32[2]]"),
    ],
)
def test_what_breaks_the_declared_type_is_refused_and_nothing_is_written(value, shown):
    refuses(
        make(),
        rx.state_dict(make(5.0)) | {"layers.1.weight": value},
        rx.RefTypeError,
        "Cannot load the state: at `layers.1.weight`: `Linear.weight` (collection "
        f"'params') is declared `Float[Array, \"n\"]` with n=2, and cannot hold {shown}",
    )


def test_another_shape_is_refused_where_no_type_is_declared():
    refuses(
        {"w": rx.Ref(jnp.zeros(2), "params")},
        {"w": jnp.zeros(3)},
        rx.StructureError,
        "Cannot load the state: an unnamed ref (collection 'params') at `w` holds f32[2], "
        "and the state has f32[3]",
    )


def test_a_ref_is_no_value():
    model = make()
    state = rx.state_dict(make(5.0)) | {"layers.1.weight": rx.Ref(jnp.zeros(2), "new")}
    text = (
        "The value of a ref cannot hold a ref: `Linear.weight` (collection 'params') was "
        "given one that holds an unnamed ref (collection 'new')."
    )
    refuses(model, state, rx.StructureError, text)
    rx.load_state_dict(model, rx.snapshot(state))
    assert model.layers[1].weight.value[0] == 0


def test_a_change_that_is_meant_is_written():
    ref = rx.Ref(jnp.zeros(2))
    refuses(
        {"a": ref}, {"a": jnp.zeros(3)}, rx.StructureError, "write it: `ref.value ="
    )
    ref.value = jnp.zeros(3)  # the remedy
    rx.load_state_dict({"a": ref}, {"a": jnp.ones(3)})
    assert ref.value.tolist() == [1, 1, 1]


def test_a_value_that_breaks_the_declared_type_names_the_key():
    class Named(rx.Module):
        name: rx.Ref[str]

    tree = [Named("one"), rx.Ref(1)]
    refuses(
        tree,
        {"1": 2, "0.name": b"two"},
        rx.RefTypeError,
        "Cannot load the state: at `0.name`: `Named.name` (no collection) is declared "
        "`str`, and cannot hold b'two'",
    )
    rx.load_state_dict(tree, {"1": 2, "0.name": "two"})
    assert tree[0].name.value == "two"


@pytest.mark.parametrize(
    "old, new",
    [(1.5, 2.5), (3, 2**40), (True, False), (1j, 2j)],
    ids=["float", "int", "bool", "complex"],
)
def test_a_scalar_of_python_stays_one(old, new):
    ref = rx.Ref(old)
    rx.load_state_dict({"a": ref}, {"a": np.asarray(new)})
    assert type(ref.value) is type(old) and ref.value == new


@pytest.mark.parametrize("new", [np.asarray(1.0), np.asarray("a"), np.zeros(2, int)])
def test_a_scalar_of_python_keeps_its_kind(new):
    refuses(
        {"a": rx.Ref(3)}, {"a": new}, rx.StructureError, "at `a` holds 3, and the state"
    )


def test_a_numpy_array_stays_one_where_the_ref_holds_one():
    ref = rx.Ref(np.zeros(2))
    rx.load_state_dict({"a": ref}, {"a": np.ones(2)})
    assert type(ref.value) is np.ndarray and ref.value.dtype == np.float64


def test_the_numpy_array_may_be_written_afterwards():
    # Aligned, so that it could be shared with JAX.
    memory = np.zeros(4096 + 64, np.uint8)
    start = -memory.ctypes.data % 64
    array = memory[start : start + 4096].view(np.float32)
    ref = rx.Ref(jnp.ones(1024))
    rx.load_state_dict({"a": ref}, {"a": array})
    array[:] = 5
    assert ref.value[0] == 0


def test_jax_arrays_and_shapes_keep_the_place():
    mesh = jax.sharding.Mesh(jax.devices(), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    shape = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)
    for array in (jnp.ones(8), np.ones(8, np.float32), jnp.ones(8, jnp.bfloat16)):
        refs = [rx.Ref(jax.device_put(jnp.zeros(8), sharding)), rx.Ref(shape)]
        rx.load_state_dict(refs, {"0": array, "1": array})
        assert all(ref.value.sharding == sharding for ref in refs)
        assert all(ref.value[7] == 1 for ref in refs)
    ref = rx.Ref(shape)
    rx.update_refs([ref], [jnp.ones(8)])
    assert ref.value.sharding == sharding


def test_a_numpy_array_goes_where_the_old_value_is():
    mesh = jax.sharding.Mesh(jax.devices(), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    sharded = rx.Ref(jax.device_put(jnp.zeros(8), sharding))
    free = rx.Ref(jnp.zeros(8))
    array = np.ones(8, np.float32)
    rx.load_state_dict([sharded, free], {"0": array, "1": array})
    assert sharded.value.sharding == sharding and sharded.value[7] == 1
    assert not free.value.committed


# All or nothing


def test_a_guarded_ref_leaves_all_unwritten():
    model, state = make(), rx.state_dict(make(5.0))
    with rx.mutable("params"):
        refuses(model, state, rx.ImmutableError, "Cannot write `Linear.uses`")
    rx.load_state_dict(model, state)
    assert values_of(model) == values_of(make(5.0))


def test_a_ref_of_another_trace_leaves_all_unwritten():
    tree = make(), rx.Ref(jnp.zeros(2))
    state = rx.state_dict((make(5.0), rx.Ref(jnp.ones(2))))
    before = values_of(tree)

    with jax.check_tracer_leaks(False):
        with raises(rx.TraceLevelError, match="Cannot mutate ref from different"):
            jax.jit(lambda state: rx.load_state_dict(tree, state))(state)
    assert values_of(tree) == before
    rx.filter_jit(rx.load_state_dict)(tree, state)  # the remedy: a lifted transform
    assert values_of(tree) == values_of((make(5.0), rx.Ref(jnp.ones(2))))


def test_a_state_that_cannot_be_read_leaves_all_unwritten():
    class Torn(dict):
        def __getitem__(self, key):
            if key == "layers.1.uses":
                raise OSError("the file ends here")
            return super().__getitem__(key)

    refuses(make(), Torn(rx.state_dict(make(5.0))), OSError, "the file ends here")


def test_what_is_no_mapping_is_refused():
    model = Linear(1.0)
    with raises(TypeError, match="a mapping from path to value.*`rx.update_refs`"):
        rx.load_state_dict(model, rx.snapshot(model))
    rx.update_refs(model, rx.snapshot(model))  # the remedy
