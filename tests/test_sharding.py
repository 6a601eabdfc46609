"""Models over a mesh of 8 simulated devices: where arrays should be, are put, and stay."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax._src.test_util import count_jit_and_pmap_lowerings as counting_compilations
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxtyping import Array, Float, PyTree
from raising import raises

import refx_eqx as rx


pytestmark = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 devices")


@pytest.fixture(autouse=True)
def _settings():
    # Under leak checks JAX keeps no traces, which makes the many small models slow; and
    # Optax relies on standard promotion.
    with jax.numpy_dtype_promotion("standard"), jax.check_tracer_leaks(False):
        yield


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


class FeedForward(rx.Module):
    up: rx.Param[Float[Array, "ffn embed"]]
    down: rx.Param[Float[Array, "embed ffn"]]
    scale: rx.Param[Float[Array, ""]]
    mean: rx.BatchStat[Float[Array, "embed"]]
    activation: Any

    def __init__(self, key):
        k1, k2 = jr.split(key)
        self.up = jr.normal(k1, (16, 8)) / 4
        self.down = jr.normal(k2, (8, 16)) / 4
        self.scale = jnp.array(1.0)
        self.mean = jnp.zeros(8)
        self.activation = jnp.tanh

    def __call__(self, x):
        self.mean.value = 0.9 * self.mean[...] + 0.1 * x
        h = self.activation(self.up[...] @ (x - self.mean[...]))
        return x + self.scale[...] * (self.down[...] @ h)


class Deep(rx.Module):
    layers: rx.Batched[FeedForward, "depth"]
    last: FeedForward

    def __init__(self, key):
        self.layers = rx.filter_vmap(FeedForward)(jr.split(key, 2))
        self.last = FeedForward(key)


RULES = rx.axis_rules(ffn="tensor", embed="fsdp")


def paths(specs) -> dict[str, Any]:
    """The specs by place."""
    is_leaf = lambda x: isinstance(x, P | rx.Value | rx.Index)
    leaves, _ = jax.tree_util.tree_flatten_with_path(specs, is_leaf=is_leaf)
    return {
        jax.tree_util.keystr(path): x.value if isinstance(x, rx.Value) else x
        for path, x in leaves
    }


def spec_of(ref) -> Any:
    return ref.value.sharding.spec


# What the rules say


def test_the_names_of_a_declared_type_are_those_of_the_rules():
    specs = RULES.specs(FeedForward(jr.key(0)))
    assert paths(specs) == {
        ".up": P("tensor", "fsdp"),
        ".down": P("fsdp", "tensor"),
        ".scale": P(),
        ".mean": P("fsdp"),
    }


def test_specs_have_the_form_of_the_derefed_tree():
    model = FeedForward(jr.key(0))
    derefed = rx.deref((model, model))
    specs = RULES.specs((model, model))
    arrays = eqx.filter(derefed, eqx.is_array)
    treedef = jax.tree.structure(specs, is_leaf=lambda x: isinstance(x, P))
    assert treedef == jax.tree.structure(arrays)
    assert RULES.specs(derefed) == specs
    abstract = rx.filter_eval_shape(FeedForward, jr.key(0))
    assert RULES.specs((abstract, abstract)) == specs


def test_shardings_are_on_the_mesh_that_is_given_or_set(mesh):
    model = FeedForward(jr.key(0))
    shardings = RULES.shardings(model, mesh)
    assert shardings.up.value == NamedSharding(mesh, P("tensor", "fsdp"))
    with jax.set_mesh(mesh):
        assert RULES.shardings(model) == shardings
    with raises(ValueError, match="there is no mesh"):
        RULES.shardings(model)
    placed = jax.device_put(eqx.filter(rx.deref(model), eqx.is_array), shardings)
    assert placed.up.value.sharding.spec == P("tensor", "fsdp")


def test_a_mesh_axis_may_be_several_and_a_name_may_have_none():
    rules = rx.axis_rules({"ffn": ("fsdp", "tensor"), "embed": None})
    specs = rules.specs(FeedForward(jr.key(0)))
    assert specs.up.value == P(("fsdp", "tensor"))
    assert specs.down.value == P(None, ("fsdp", "tensor"))


def test_a_part_of_a_derefed_tree_whose_values_are_elsewhere_has_no_specs():
    model = FeedForward(jr.key(0))
    derefed = rx.deref({"a": model, "b": model})
    specs = rx.axis_rules(ffn="tensor").specs(derefed)
    assert specs["a"].up.value == P("tensor")
    part = rx.axis_rules(ffn="tensor").specs(derefed["b"])
    assert jax.tree.leaves(specs["b"]) == jax.tree.leaves(part) == []
    assert isinstance(part.up, rx.Index)


def test_a_part_that_is_one_for_a_whole_stack_has_no_axis_of_it():
    class Block(rx.Module):
        own: rx.Param[Float[Array, "embed"]]
        shared: FeedForward

    class Tied(rx.Module):
        blocks: rx.Batched[Block, "depth"]

    make = rx.filter_vmap(lambda shared, own: Block(own, shared), in_axes=(None, 0))
    tied = Tied(make(FeedForward(jr.key(0)), jnp.ones((2, 8))))
    specs = rx.axis_rules(depth="fsdp", ffn="tensor").specs(tied)
    assert specs.blocks.own.value == P("fsdp")
    assert specs.blocks.shared.up.value == P("tensor")


def test_a_stack_has_its_axis_in_front_and_batched_names_it():
    deep = rx.filter_eval_shape(Deep, jr.key(0))
    specs = RULES.specs(deep)
    assert specs.layers.up.value == P(None, "tensor", "fsdp")
    assert specs.layers.scale.value == P()
    assert specs.last.up.value == P("tensor", "fsdp")
    by_depth = rx.axis_rules(depth="fsdp", ffn="tensor").specs(deep)
    assert by_depth.layers.up.value == P("fsdp", "tensor")
    assert by_depth.layers.scale.value == P("fsdp")
    assert by_depth.last.up.value == P("tensor")
    ensemble = rx.filter_eval_shape(rx.filter_vmap(Deep), jr.split(jr.key(0), 3))
    specs = rx.axis_rules(depth="fsdp", ffn="tensor").specs(ensemble)
    assert specs.layers.up.value == P(None, "fsdp", "tensor")
    assert specs.last.up.value == P(None, "tensor")


def test_a_stack_that_is_not_stacked_in_front(mesh):
    up = FeedForward(jr.key(0)).up
    stack = rx.filter_vmap(lambda: rx.clone(up), axis_size=3, out_axes=1)()
    assert stack.shape == (16, 3, 8)
    assert RULES.specs(stack, mesh).value == P("tensor", None, "fsdp")


def test_a_rule_for_these_very_refs_is_for_a_tree_of_refs():
    a, b = rx.Ref(jnp.ones(4), "params"), rx.Ref(jnp.ones(4), "params")
    given: Any = rx.collection("params") & ~rx.path("1") & [a]
    rules = rx.axis_rules({given: P("fsdp")}, default=P("data"))
    assert repr(rules).endswith(f"default={P('data')!r})")
    assert [x.value for x in rules.specs([a, b])] == [P("fsdp"), P("data")]
    with raises(rx.StructureError, match="is derefed and has none.*the tree of refs"):
        rules.specs(rx.deref([a, b]))


def test_one_ref_in_two_fields_of_two_shardings_is_refused_until_it_is_given_one():
    class Rows(rx.Module):
        weight: rx.Param[Array] = rx.field(sharding=P("fsdp"))

    class Columns(rx.Module):
        weight: rx.Param[Array] = rx.field(sharding=P(None, "fsdp"))

    rows = Rows(jnp.ones((4, 4)))
    tied = [rows, Columns(rows.weight)]
    with raises(rx.StructureError, match=r"one ref in two fields.*Give it only one: "):
        rx.axis_rules().specs(tied)
    rules = rx.axis_rules({rx.path("*.weight"): P("fsdp")})
    assert rules.specs(tied)[0].weight.value == P("fsdp")


@pytest.mark.parametrize("place", ["embed", "head"])
@pytest.mark.parametrize("is_derefed", [False, True])
def test_a_rule_for_any_place_of_a_tied_ref_is_for_the_ref(place, is_derefed):
    ref = rx.Ref(jnp.ones((4, 4)), "params")
    model = {"embed": ref, "head": ref, "other": rx.Ref(jnp.ones((4, 4)), "params")}
    optimizer = rx.Optimizer(model, optax.adam(0.1))
    tree = {**model, "opt": optimizer}
    tree = rx.deref(tree) if is_derefed else tree
    for path in place, f"**.{place}":
        specs = rx.axis_rules({rx.path(path): P("fsdp")}).specs(tree)
        found = rx.state_dict(rx.reref(specs))
        mu = [x for k, x in found.items() if ".mu." in f"{k}." and "embed" in k]
        assert found["embed"] == P("fsdp") and found["other"] == P()
        assert mu == [P("fsdp")]


def test_the_first_rule_decides_at_whatever_place_it_selects():
    ref = rx.Ref(jnp.ones((4, 4)), "params")
    rules = {rx.path("head"): P("fsdp"), rx.path("embed"): P("data")}
    assert rx.axis_rules(rules).specs({"embed": ref, "head": ref})["embed"].value == P(
        "fsdp"
    )


def test_filters_come_first_then_the_field_then_names_then_the_default():
    class Layer(rx.Module):
        weight: rx.Param[Float[Array, "out in"]]
        bias: rx.Param[Float[Array, "out"]] = rx.field(sharding=P("fsdp"))
        other: rx.Param[Array]
        plain: Array

        def __init__(self):
            self.weight, self.bias = jnp.ones((4, 2)), jnp.ones(4)
            self.other = self.plain = jnp.ones(8)

    rules = rx.axis_rules(out="tensor", default=P("data"))
    specs = rules.specs(Layer())
    assert specs.weight.value == P("tensor") and specs.bias.value == P("fsdp")
    assert specs.other.value == P("data") and specs.plain == P("data")
    rules = rx.axis_rules({rx.path("**.bias", "plain"): P("seq")}, out="tensor")
    assert rules.specs(Layer()).bias.value == P("seq")
    assert rules.specs(Layer()).plain == P("seq")
    assert rules.specs(Layer()).other.value == P()
    stack = rx.filter_vmap(Layer, axis_size=3)()
    assert rx.axis_rules().specs(stack).bias.value == P(None, "fsdp")


def test_the_default_may_ask_the_array():
    model = rx.as_refs(eqx.nn.MLP(8, 8, 16, 1, key=jr.key(0)), "params")

    def largest(x):
        return P(*("fsdp" if n == max(x.shape) else None for n in x.shape[:1]))

    specs = rx.axis_rules(default=largest).specs(model)
    assert specs.layers[0].weight.value == P("fsdp")
    with raises(TypeError, match="must return a `PartitionSpec`"):
        rx.axis_rules(default=lambda x: "fsdp").specs(model)


def test_a_ref_of_two_fields_has_the_names_of_both():
    class Embedding(rx.Module):
        table: rx.Param[Float[Array, "vocab embed"]]

    class Head(rx.Module):
        weight: rx.Param[Float[Array, "out in"]]

    embedding = Embedding(jnp.ones((8, 4)))
    model = embedding, Head(embedding.table)
    assert rx.axis_rules(vocab="tensor").specs(model)[0].table.value == P("tensor")
    assert rx.axis_rules(out="tensor").specs(model)[0].table.value == P("tensor")
    rules = rx.axis_rules(vocab="tensor", out="fsdp")
    with raises(rx.StructureError, match="call axis 0 'vocab' and 'out'"):
        rules.specs(model)
    rules = rx.axis_rules(
        {rx.path("**.table", "**.weight"): P("tensor")}, vocab="tensor", out="fsdp"
    )
    assert rules.specs(model)[0].table.value == P("tensor")


def test_values_that_are_containers():
    class Layer(rx.Module):
        state: rx.Ref[tuple[Float[Array, "a b"], dict[str, Float[Array, "b"]], int]]

    layer = Layer((jnp.ones((2, 4)), {"x": jnp.ones(4)}, 3))
    specs = rx.axis_rules(b="tensor").specs(layer)
    assert specs.state.value == (P(None, "tensor"), {"x": P("tensor")}, P())


class Dense(NamedTuple):
    weight: Float[Array, "a b"]
    bias: Float[Array, "b"]


ONES = jnp.ones(4)


@pytest.mark.parametrize(
    ("hint", "value", "specs"),
    [
        (Dense, Dense(jnp.ones((2, 4)), ONES), [P(None, "tensor"), P("tensor")]),
        (Sequence[Float[Array, "b"]], [ONES], [P("tensor")]),
        (Mapping[str, Float[Array, "b"]], {"x": ONES}, [P("tensor")]),
        (PyTree[Float[Array, "b"]], ({"x": ONES},), [P("tensor")]),
        (
            tuple[Float[Array, "a"], Float[Array, "b"]],
            (ONES, ONES),
            [P(), P("tensor")],
        ),
    ],
    ids=lambda x: "",
)
def test_each_array_in_a_value_has_the_axes_of_its_own_type(hint, value, specs):
    class Layer(rx.Module):
        state: rx.Ref[hint]  # pyright: ignore[reportInvalidTypeForm]

    found = rx.axis_rules(a=None, b="tensor").specs(Layer(value)).state.value
    assert type(found) is type(value)
    assert jax.tree.leaves(found) == specs


def test_slots_and_averages_follow_their_weights():
    def make(key):
        model = Deep(key)
        optimizer = rx.Optimizer(model, optax.adam(1e-3, mu_dtype=jnp.bfloat16))
        return model, optimizer, rx.nn.EMA(model, 0.9)

    model, optimizer, ema = rx.filter_eval_shape(make, jr.key(0))
    state: Any = RULES.specs(optimizer).opt_state[0]
    weights = RULES.specs(model)
    assert state.count.value == P()
    for moments in (state.mu, state.nu):
        assert moments["layers.up"].value == weights.layers.up.value
        assert moments["last.down"].value == weights.last.down.value
    assert RULES.specs(ema).model.layers.up.value == weights.layers.up.value


def test_slots_follow_weights_that_a_function_holds():
    def make(key):
        model = Deep(key)
        held = functools.partial(jax.tree.leaves, model)
        return model, rx.Optimizer(held, optax.sgd(0.1, momentum=0.9))

    model, optimizer = rx.filter_eval_shape(make, jr.key(0))
    rules = rx.axis_rules(depth="fsdp", ffn="tensor")
    slots: Any = rules.specs(optimizer).opt_state[0].trace
    weights = rules.specs(model)
    assert weights.layers.up.value[0] == "fsdp"
    assert slots["args.0.layers.up"].value == weights.layers.up.value
    assert slots["args.0.last.down"].value == weights.last.down.value


def test_slots_follow_by_filter_and_by_field_too():
    class Layer(rx.Module):
        weight: rx.Param[Array]
        bias: rx.Param[Array] = rx.field(sharding=P("tensor"))

    layer = Layer(jnp.ones((4, 4)), jnp.ones(4))
    make = lambda: rx.Optimizer(layer, optax.adam(1e-3))
    rules = rx.axis_rules({rx.path("weight"): P("fsdp")})
    for optimizer in (make(), rx.clone(make()), rx.filter_eval_shape(make)):
        state: Any = rules.specs(optimizer).opt_state[0]
        assert state.mu["weight"].value == P("fsdp")
        assert state.mu["bias"].value == P("tensor")
    by_collection = rx.axis_rules({rx.collection("params"): P("fsdp")})
    state = by_collection.specs(make()).opt_state[0]
    assert state.nu["bias"].value == P("fsdp") and state.count.value == P()
    ensemble = rx.filter_vmap(
        lambda: rx.Optimizer(layer, optax.adam(1e-3)), axis_size=3
    )
    state = rx.axis_rules().specs(ensemble()).opt_state[0]
    assert state.mu["bias"].value == P(None, "tensor")


# What the rules cannot mean


def test_a_size_that_is_not_divided(mesh):
    class Layer(rx.Module):
        weight: rx.Param[Float[Array, "out in"]]

    model = {"a": Layer(jnp.ones((6, 3)))}
    rules = rx.axis_rules(out="tensor")
    message = (
        r"`a\.weight`, `Layer\.weight` \(collection 'params'\): axis 0 has size 6, but "
        r"`P\('tensor', None\)` splits it in 4"
    )
    with raises(rx.StructureError, match=message):
        rules.shardings(model, mesh)
    rx.axis_rules(out="fsdp").shardings(model, mesh)  # 2 divides 6
    rx.axis_rules(out=None).shardings(model, mesh)


def test_a_mesh_axis_for_two_axes_of_one_array():
    rules = rx.axis_rules(ffn="tensor", embed="tensor")
    with raises(rx.StructureError, match="'tensor' for axis 0 and for axis 1"):
        rules.specs(FeedForward(jr.key(0)))
    rules = rx.axis_rules(
        {rx.path("up", "down"): P("tensor")}, ffn="tensor", embed="tensor"
    )
    assert rules.specs(FeedForward(jr.key(0))).up.value == P("tensor")


def test_a_mesh_axis_that_there_is_not(mesh):
    rules = rx.axis_rules(ffn="model")
    with raises(rx.StructureError, match="but the mesh has 'fsdp', 'tensor'"):
        rules.specs(FeedForward(jr.key(0)), mesh)


def test_a_name_in_the_rules_that_is_misspelled():
    rules = rx.axis_rules(fnn="tensor", batch="data")
    message = (
        "called 'fnn': the types declare 'ffn', 'embed'. Did you mean 'ffn', of `up`"
    )
    with raises(rx.StructureError, match=message):
        rules.specs(FeedForward(jr.key(0)))
    rx.axis_rules({"ffn": None}, fnn="tensor").specs(FeedForward(jr.key(0)))
    # A name of the data is the name of no weight.
    rx.axis_rules(batch="data").specs(FeedForward(jr.key(0)))


def test_strict_rules_say_all():
    model = FeedForward(jr.key(0))
    strict = rx.axis_rules(ffn="tensor", embed=None, strict=True)
    assert strict.specs(model).up.value == P("tensor")
    with raises(rx.StructureError, match="no rule for its axis 'embed'"):
        rx.axis_rules(ffn="tensor", strict=True).specs(model)
    with raises(rx.StructureError, match="called 'batch': the types declare"):
        rx.axis_rules(ffn=None, embed=None, batch=None, strict=True).specs(model)
    bare = {"w": rx.Ref(jnp.ones(2), "params")}
    with raises(rx.StructureError, match="`w`, .* no type declares the names"):
        rx.axis_rules(strict=True).specs(bare)
    rx.axis_rules({rx.path("w"): P()}, strict=True).specs(bare)


def test_a_spec_of_too_many_entries():
    rules = rx.axis_rules({rx.path("w"): P(None, "tensor")})
    with raises(rx.StructureError, match="for 2 axes, but its shape is"):
        rules.specs({"w": rx.Ref(jnp.ones(4))})


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: rx.axis_rules(["ffn"]), "give a mapping"),  # type: ignore
        (lambda: rx.axis_rules({"params": P("fsdp")}), "use a filter as the key"),
        (
            lambda: rx.axis_rules({rx.path("w"): "fsdp"}),
            "must be a `PartitionSpec` for all axes",
        ),
        (lambda: rx.axis_rules(default="fsdp"), "give a `PartitionSpec`, such as"),
        (lambda: rx.field(sharding="fsdp"), "give a `jax.sharding.PartitionSpec`"),  # type: ignore
    ],
)
def test_what_is_no_rule(make, message):
    with raises(TypeError, match=message):
        make()


def test_a_field_without_a_ref_has_no_sharding():
    # Python 3.11 wraps what `__set_name__` raises.
    with pytest.raises((TypeError, RuntimeError)) as error:

        class Layer(rx.Module):
            size: int = rx.field(sharding=P())

    assert "of `Layer.size`: the field holds no ref" in str(
        error.value.__cause__ or error.value
    )
    with raises(ValueError, match="sharding=..., static=True"):
        rx.field(sharding=P(), static=True)


def test_rules_are_compared_by_value():
    assert rx.axis_rules(a="x") == rx.axis_rules({"a": "x"})
    assert hash(rx.axis_rules(a="x")) == hash(rx.axis_rules({"a": "x"}))
    assert rx.axis_rules(a="x") != rx.axis_rules(a="x", strict=True)
    assert repr(rx.axis_rules(a="x", strict=True)) == (
        "rx.axis_rules({'a': 'x'}, strict=True)"
    )


# Placing


def test_refs_are_moved_in_place(mesh):
    model = FeedForward(jr.key(0))
    before = rx.snapshot(model)
    assert rx.filter_shard(model, RULES.shardings(model, mesh)) is model
    assert spec_of(model.up) == P("tensor", "fsdp")
    assert model.scale.value.sharding == NamedSharding(mesh, P())
    assert eqx.tree_equal(rx.snapshot(model), before)
    with jax.set_mesh(mesh):
        rx.filter_shard(model, rx.axis_rules(ffn="fsdp"))
        assert spec_of(model.up) == P("fsdp")
        rx.filter_shard(model.up, P(None, "tensor"))
    assert spec_of(model.up) == P(None, "tensor")
    rx.filter_shard(model, jax.devices()[3])
    assert model.up.value.devices() == {jax.devices()[3]}


def test_arrays_outside_refs_are_moved_in_a_new_tree(mesh):
    tree = {"ref": rx.Ref(jnp.ones(4)), "x": jnp.ones(4), "f": jnp.tanh, "n": 3}
    moved = rx.filter_shard(
        tree, {"ref": None, "x": NamedSharding(mesh, P("fsdp")), "f": None, "n": None}
    )
    assert moved["ref"] is tree["ref"] and moved["f"] is jnp.tanh and moved["n"] == 3
    assert moved["x"].sharding.spec == P("fsdp")
    assert len(tree["ref"].value.devices()) == len(tree["x"].devices()) == 1


def test_inside_of_a_transform_refs_are_constrained(mesh):
    model = FeedForward(jr.key(0))

    @rx.filter_jit
    def place(model):
        rx.filter_shard(model, RULES)

    with jax.set_mesh(mesh):
        place(model)
    assert model.up.value.sharding.is_equivalent_to(
        NamedSharding(mesh, P("tensor", "fsdp")), 2
    )
    # One that is on a mesh is constrained inside, and comes back to where it was.
    model = FeedForward(jr.key(0))
    rx.filter_shard(model, NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        place(model)
        assert spec_of(model.up) == P()
        rx.filter_shard(model, RULES)  # the way to move it
    assert spec_of(model.up) == P("tensor", "fsdp")


def test_shapes_are_annotated(mesh):
    model = rx.filter_eval_shape(FeedForward, jr.key(0))
    rx.filter_shard(model, RULES.shardings(model, mesh))
    assert model.up.value.sharding == NamedSharding(mesh, P("tensor", "fsdp"))


def test_all_is_moved_or_nothing(mesh):
    model = {"a": rx.Ref(jnp.ones(8)), "b": rx.Ref(jnp.ones(3))}
    with raises(rx.StructureError, match=r"axis 0 has size 3"):
        rx.filter_shard(model, NamedSharding(mesh, P("fsdp")))
    with rx.mutable(rx.path("a"), model):
        with pytest.raises(rx.ImmutableError):
            rx.filter_shard(model, NamedSharding(mesh, P()))
    assert len(model["a"].value.devices()) == 1


def test_what_filter_shard_is_not_given(mesh):
    replicated, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("fsdp"))
    ref = rx.Ref(jnp.ones(4), "params")
    with raises(rx.StructureError, match="one ref at two places"):
        rx.filter_shard([ref, ref], [replicated, split])
    rx.filter_shard([ref, ref], [split, split])
    with raises(rx.StructureError, match="a prefix of the derefed tree"):
        rx.filter_shard([ref, ref], [split])
    with raises(rx.StructureError, match="'fsdp' is not a sharding"):
        rx.filter_shard(ref, "fsdp")
    with raises(ValueError, match="needs a mesh, but there is none"):
        rx.filter_shard(ref, P("fsdp"))


def test_what_is_placed_has_buffers_of_its_own(mesh):
    """Else a call that donates would take those of whoever holds the array."""
    x = jnp.ones(8)
    replicated = NamedSharding(mesh, P())
    a, b = rx.Ref(x), rx.Ref(x)
    c, d = rx.filter_eval_shape(lambda: (rx.Ref(x), rx.Ref(x)))
    rx.filter_shard([a, b, c, d], replicated)
    rx.load_state_dict({"c": c}, {"c": x})
    rx.update_refs(d, rx.Ref(x))

    @rx.filter_jit(donate="refs")
    def double(refs):
        for ref in refs:
            ref.value = 2 * ref.value

    double([a, b, c, d])
    double([a, b, c, d])
    assert x[0] == 1
    assert all(jnp.array_equal(ref.value, 4 * x) for ref in (a, b, c, d))
    before = a.value
    rx.filter_shard(a, replicated)
    assert a.value is before


# Staying


def put(x, mesh, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))


def running_mean(m, w, x):
    m.value = 0.9 * m.value + 0.1 * (x @ w.value).mean(0)


@pytest.fixture
def drifting(mesh):
    """The refs and the batch of a step whose result JAX splits otherwise than its state."""
    m = rx.Ref(put(jnp.zeros(16), mesh))
    w = rx.Ref(put(jnp.ones((8, 16)), mesh, None, "tensor"))
    x = put(jnp.ones((8, 8)), mesh, "fsdp")
    moved = jax.jit(lambda m, w, x: 0.9 * m + (x @ w).mean(0))(m.value, w.value, x)
    assert moved.sharding.spec == P("tensor")
    return m, w, x


@pytest.mark.parametrize("donate", ["none", "refs"])
def test_a_written_ref_stays_where_it_was(drifting, donate, trace_counter):
    m, w, x = drifting
    counted = trace_counter(running_mean)
    step = rx.filter_jit(counted, donate=donate)
    compiled = []
    for _ in range(4):
        with counting_compilations() as count:
            step(m, w, x)
        compiled.append(count())
        assert spec_of(m) == P()
    assert compiled == [1, 0, 0, 0]
    assert counted.counter.count == 1
    assert jnp.allclose(m.value, 8 * (1 - 0.9**4))


def test_a_program_compiled_ahead_of_time_takes_its_own_state(drifting):
    compiled = rx.filter_jit(running_mean, donate="refs").lower(*drifting).compile()
    for _ in range(3):
        compiled(*drifting)
    assert spec_of(drifting[0]) == P()


def test_a_ref_that_is_moved_stays_where_it_is_put(drifting, mesh, trace_counter):
    m, w, x = drifting
    counted = trace_counter(running_mean)
    step = rx.filter_jit(counted)
    for _ in range(3):  # the last is planned
        step(m, w, x)
    for spec in (P("fsdp"), P(("tensor", "fsdp")), P()):
        rx.filter_shard(m, NamedSharding(mesh, spec))
        for _ in range(3):
            step(m, w, x)
            assert spec_of(m) == spec
    assert counted.counter.count == 3  # once for each place


def test_a_value_of_another_shape_goes_anywhere(mesh):
    m = rx.Ref(put(jnp.zeros(16), mesh, "tensor"))

    @rx.filter_jit
    def shrink(m):
        m.value = m.value[:3]

    shrink(m)
    assert m.shape == (3,)


def test_the_state_of_loops_stays_too(drifting):
    m, w, x = drifting
    rx.scan(lambda _, x: (None, running_mean(m, w, x)), None, jnp.stack([x, x]))
    assert spec_of(m) == P()


def test_a_value_that_is_a_pytree_stays(drifting, mesh):
    m, w, x = drifting
    state = rx.Ref({"m": m.value, "n": 0})

    @rx.filter_jit
    def step(state, w, x):
        m = 0.9 * state.value["m"] + (x @ w.value).mean(0)
        state.value = {"m": m, "n": state.value["n"] + 1}

    for _ in range(4):
        step(state, w, x)
        assert state.value["m"].sharding.spec == P()
    moved = put(state.value["m"], mesh, "fsdp")
    state.value = {"m": moved, "n": state.value["n"]}
    step(state, w, x)
    assert state.value["m"].sharding.spec == P("fsdp")
    assert state.value["n"] == 5


def test_a_spec_may_say_that_the_last_axes_are_whole(mesh):
    w = rx.Ref(put(jnp.zeros((8, 8)), mesh, "tensor", None))

    @rx.filter_jit
    def step(w, x):
        w.value = w.value + x

    compiled = []
    for _ in range(4):
        with counting_compilations() as count:
            step(w, put(jnp.ones((8, 8)), mesh, None, "fsdp"))
        compiled.append(count())
    assert compiled[2:] == [0, 0]
    assert spec_of(w) in (P("tensor"), P("tensor", None))


# Making and loading


class Large(rx.Module):
    up: rx.Param[Float[Array, "ffn embed"]]
    bias: rx.Param[Float[Array, "ffn"]]

    def __init__(self, key):
        self.up = jr.normal(key, (512, 256))
        self.bias = jnp.zeros(512)


def make(key):
    model = Large(key)
    return model, rx.Optimizer(model, optax.adam(1e-3))


LARGE = 3 * 4 * (512 * 256 + 512)  # bytes: the weights, and two moments of each


def bytes_on(device, *trees) -> int:
    arrays = jax.tree.leaves(rx.deref(trees))
    return sum(
        shard.data.nbytes
        for x in arrays
        if isinstance(x, jax.Array)
        for shard in x.addressable_shards
        if shard.device == device
    )


def test_a_model_is_made_in_shards_and_is_never_on_one_device(mesh):
    sharded = rx.filter_jit(make, out_shardings=RULES)
    with jax.set_mesh(mesh):
        compiled = sharded.lower(jr.key(0)).compile()
        model, optimizer = sharded(jr.key(0))
    assert spec_of(model.up) == P("tensor", "fsdp")
    moments = optimizer.opt_state[0].mu
    assert spec_of(moments["up"]) == P("tensor", "fsdp")
    # The bias is split in 4: all else in 8. Beyond that there are two counters.
    expected = LARGE / 8 + 3 * 4 * 512 / 8
    for device in jax.devices():
        assert abs(bytes_on(device, model, optimizer) - expected) < 100
    memory = compiled.memory_analysis()
    assert memory.output_size_in_bytes < 1.05 * expected
    assert memory.temp_size_in_bytes < 1.05 * expected
    assert jnp.array_equal(model.up.value, Large(jr.key(0)).up.value)


def test_out_shardings_may_be_a_tree_for_the_abstract_model(mesh):
    abstract = rx.filter_eval_shape(make, jr.key(0))
    shardings = RULES.shardings(abstract, mesh)
    model, optimizer = rx.filter_jit(make, out_shardings=shardings)(jr.key(0))
    assert model.up.value.sharding == shardings[0].up.value
    assert spec_of(optimizer.opt_state[0].nu["bias"]) == P("tensor")


def test_a_state_is_loaded_into_shards(mesh):
    model = Large(jr.key(0))
    state = {key: jax.device_get(x) for key, x in rx.state_dict(model).items()}
    for source in (state, rx.state_dict(model)):
        abstract = rx.filter_eval_shape(Large, jr.key(0))
        rx.filter_shard(abstract, RULES.shardings(abstract, mesh))
        rx.load_state_dict(abstract, source)
        assert spec_of(abstract.up) == P("tensor", "fsdp")
        assert bytes_on(jax.devices()[5], abstract) == 4 * (512 * 256 / 8 + 512 / 4)
        assert jnp.array_equal(abstract.up.value, model.up.value)
    abstract = rx.filter_eval_shape(Large, jr.key(0))
    rx.filter_shard(abstract, RULES.shardings(abstract, mesh))
    rx.update_refs(abstract, model)
    assert spec_of(abstract.up) == P("tensor", "fsdp")


def test_in_shardings_are_a_prefix_of_the_arguments(mesh):
    model = Large(jr.key(0))
    replicated = NamedSharding(mesh, P())

    def step(model, x):
        model.bias.value = model.bias.value + model.up.value @ x
        return model.bias.value

    in_shardings = RULES.shardings(model, mesh), None
    out = rx.filter_jit(step, in_shardings=in_shardings)(model, jnp.ones(256))
    assert out.sharding.spec == P("tensor")
    # What is written goes there; what is only read is moved for the call.
    assert spec_of(model.bias) == P("tensor") and len(model.up.value.devices()) == 1
    with jax.set_mesh(mesh):
        by_rules = rx.filter_jit(
            step, in_shardings=(RULES, P()), out_shardings=P(("fsdp", "tensor"))
        )
        out = by_rules(Large(jr.key(0)), jnp.ones(256))
        assert out.sharding.spec == P(("fsdp", "tensor"))
    rx.filter_shard(model, replicated)
    rx.filter_jit(step, in_shardings=in_shardings)(model, jnp.ones(256))
    assert spec_of(model.bias) == P()


def test_in_shardings_of_functions_that_hold_arrays_and_refs(mesh):
    sharding = NamedSharding(mesh, P("fsdp"))
    w, x = rx.Ref(jnp.ones(8)), jnp.ones(8)

    def scale(y):
        w.value = w.value + 1
        return w.value * y

    @rx.filter_jit(in_shardings=sharding, out_shardings=(sharding, None))
    def call(f, g, y):
        return f(y), g

    out, g = call(scale, jax.tree_util.Partial(jnp.multiply, x), x)
    assert jnp.array_equal(out, jnp.full(8, 2.0)) and spec_of(w) == P("fsdp")
    assert out.sharding == sharding and jnp.array_equal(g(x), x)


def test_shardings_that_do_not_fit(mesh):
    model = {"a": rx.Ref(jnp.ones(8)), "b": rx.Ref(jnp.ones(6))}
    replicated = NamedSharding(mesh, P())
    for options, message in [
        ({"in_shardings": (replicated, None)}, r"in_shardings=...\)`: .* a prefix of"),
        ({"out_shardings": [replicated]}, r"out_shardings=...\)`: .* a prefix of"),
        ({"in_shardings": NamedSharding(mesh, P("tensor"))}, "axis 0 has size 6"),
        ({"in_shardings": ("fsdp",)}, "'fsdp' is not a sharding"),
    ]:
        step = rx.filter_jit(lambda model: model["a"].value, **options)
        with raises(rx.StructureError, match=message):
            step(model)


def test_rules_that_ask_which_refs_they_are_need_the_refs(mesh):
    model = Large(jr.key(0))
    rules = rx.axis_rules({model.bias: P("tensor")})
    assert rules.specs(model).bias.value == P("tensor")
    with raises(rx.StructureError, match="Make the shardings from the tree of refs"):
        rules.specs(rx.deref(model))
    step = rx.filter_jit(lambda m: m.bias.value, in_shardings=(rules,))
    with (
        jax.set_mesh(mesh),
        raises(rx.StructureError, match="by the identity of refs"),
    ):
        step(model)
    shardings = rules.shardings(model, mesh)
    out = rx.filter_jit(lambda m: m.bias.value, in_shardings=(shardings,))(model)
    assert out.sharding.spec == P("tensor")


def test_jax_jit_lifted_takes_the_tree_of_a_model(mesh):
    model = Large(jr.key(0))
    shardings = RULES.shardings(model, mesh)

    def halve(model):
        model.up.value = model.up.value / 2

    halved = rx.lift(jax.jit)(halve, in_shardings=(shardings,))
    halved(model)
    halved(model)
    assert spec_of(model.up) == P("tensor", "fsdp")
    # What it returns has one sharding for all: the refs that it writes are a part of it.
    halved = rx.lift(jax.jit)(halve, out_shardings=shardings)
    with raises(rx.StructureError, match="use `rx.filter_jit`"):
        halved(model)


# Writing in eager code


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_sharded_ref_is_written_outside_of_a_mesh(kind):
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(kind,) * 2)
    model = FeedForward(jr.key(0))
    rx.filter_shard(model, RULES.shardings(model, mesh))
    expected = model.up.value
    model.up.value = 2 * model.up.value
    model.up[0] = 1.0
    model.up[1:3, 0] = jnp.zeros(2)
    expected = (2 * jax.device_get(expected)).copy()
    expected[0], expected[1:3, 0] = 1.0, 0.0
    assert jnp.array_equal(jax.device_get(model.up.value), expected)
    assert spec_of(model.up) == P("tensor", "fsdp")

    @rx.filter_jit
    def write(model):
        model.up[2] = 3.0

    with jax.set_mesh(mesh):
        write(model)
    assert (jax.device_get(model.up.value)[2] == 3.0).all()
    assert spec_of(model.up) == P("tensor", "fsdp")


# Looking


def test_a_table_shows_the_spec_and_the_bytes_on_each_device(mesh):
    pytest.importorskip("rich")
    model = Large(jr.key(0))
    assert "on each device" not in rx.tabulate(model)
    abstract = rx.filter_eval_shape(Large, jr.key(0))
    for tree in (model, abstract):
        rx.filter_shard(tree, RULES.shardings(tree, mesh))
        lines = rx.tabulate(tree).splitlines()
        (up,) = (line for line in lines if " up " in line)
        assert "512.0 KiB" in up and "P('tensor', 'fsdp')" in up
        assert up.endswith("64.0 KiB")
        (bias,) = (line for line in lines if " bias " in line)
        assert bias.endswith("512 B") and "P('tensor',)" in bias
        (total,) = (line for line in lines if "total" in line)
        assert total.endswith("64.5 KiB")


def test_filter_shard_of_equinox_sees_no_arrays_in_refs(mesh):
    """As the docstring of ours says. Equinox gives no hook to say it at the call."""
    model = Large(jr.key(0))
    moved = eqx.filter_shard(model, NamedSharding(mesh, P("fsdp")))
    assert moved.up is model.up and len(model.up.value.devices()) == 1


def test_a_ref_in_host_memory_moves_as_an_array_does(mesh):
    sharding = NamedSharding(mesh, P("fsdp"), memory_kind="pinned_host")
    ref = rx.Ref(jax.device_put(jnp.zeros(8), sharding))

    def new(x):
        return jnp.ones_like(x)

    def write(ref):
        ref.value = new(ref.value)

    expected = jax.jit(new)(ref.value).sharding
    rx.filter_jit(write)(ref)
    assert ref.value.sharding == expected and ref.value.tolist() == [1.0] * 8


def test_a_shape_with_a_sharding_takes_an_array_of_numpy_there(mesh):
    sharding = NamedSharding(mesh, P("fsdp"))
    ref = rx.Ref(jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding))
    rx.update_refs(ref, np.arange(8, dtype=np.float32))
    assert isinstance(ref.value, jax.Array) and ref.value.sharding == sharding
    assert ref.value.tolist() == list(range(8))


def test_the_axes_of_a_union_are_those_of_the_member_that_fits(mesh):
    class Table(rx.Module):
        rows: rx.Param[Float[Array, " size"] | Float[Array, "size out"]]

    rules = rx.axis_rules({"size": "fsdp", "out": "tensor"})
    for shape, spec in [((8,), P("fsdp")), ((8, 4), P("fsdp", "tensor"))]:
        found = rules.shardings(Table(jnp.zeros(shape)), mesh)
        assert found.rows.value.spec == spec


def test_the_types_of_arrays_outside_refs_name_no_stack(mesh):
    class Tabled(rx.Module):
        table: Float[Array, "n"]
        layers: rx.Batched[FeedForward, "depth"]

    layers = rx.filter_vmap(FeedForward)(jr.split(jr.key(0), 4))
    rules = rx.axis_rules({"depth": "fsdp"})
    found = rules.shardings(Tabled(jnp.zeros(4), layers), mesh)
    assert found.layers.scale.value.spec == P("fsdp") and found.table.spec == P()
