"""`as_refs` on Equinox modules: they keep working, and their trees hold refs."""

# A static checker objects to what is wrong on purpose here, or made at run time.
# pyright: reportAttributeAccessIssue=false

import copy
import pickle
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jaxtyping import Array, Float
from raising import raises

import refx_eqx as rx


@pytest.fixture(autouse=True)
def _settings():
    # Under leak checks JAX keeps no traces, and there are many layers here.
    with jax.check_tracer_leaks(False):
        yield


KEY = jr.key(0)
nn = eqx.nn


def ones(*shape):
    return jnp.linspace(-1.0, 1.0, int(np.prod(shape))).reshape(shape)


class Affine(eqx.Module):
    """A layer of somebody, with all that a class can have."""

    weight: jax.Array
    layers: list[nn.Linear]
    name: str = eqx.field(static=True)

    def __check_init__(self):
        assert self.weight.ndim == 1

    @property
    def norm(self):
        return jnp.sqrt(jnp.sum(self.weight**2))

    @staticmethod
    def double(x):
        return 2 * x

    @classmethod
    def make(cls):
        return cls(ones(3), [nn.Linear(3, 3, key=KEY)], "affine")

    @eqx.filter_jit
    def jitted(self, x):
        return self(x)

    def __call__(self, x):
        return self.double(self.weight * self.layers[0](x)) + self.helper()

    def helper(self):
        assert isinstance(self.layers[0].weight, jax.Array)
        return jnp.sum(self.layers[0].weight)

    def __len__(self):
        return self.weight.shape[0]

    def __getattr__(self, name):
        if name == "first":
            return self.layers[0]
        raise AttributeError(name)


LAYERS: dict[str, tuple[Any, tuple]] = {
    "Linear": (lambda: nn.Linear(3, 2, key=KEY), (ones(3),)),
    "MLP": (lambda: nn.MLP(3, 2, 4, 2, key=KEY), (ones(3),)),
    "Identity": (lambda: nn.Identity(), (ones(3),)),
    "Lambda": (lambda: nn.Lambda(jnp.tanh), (ones(3),)),
    "Sequential": (
        lambda: nn.Sequential(
            [nn.Linear(3, 3, key=KEY), nn.Lambda(jnp.tanh), nn.Linear(3, 2, key=KEY)]
        ),
        (ones(3),),
    ),
    "Conv": (lambda: nn.Conv(1, 2, 3, 3, key=KEY), (ones(2, 8),)),
    "Conv1d": (lambda: nn.Conv1d(2, 3, 3, key=KEY), (ones(2, 8),)),
    "Conv2d": (lambda: nn.Conv2d(2, 3, 3, key=KEY), (ones(2, 6, 6),)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2, key=KEY), (ones(2, 4, 4, 4),)),
    "ConvTranspose": (lambda: nn.ConvTranspose(1, 2, 3, 3, key=KEY), (ones(2, 8),)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(2, 3, 3, key=KEY), (ones(2, 8),)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(2, 3, 3, key=KEY), (ones(2, 6, 6),)),
    "ConvTranspose3d": (
        lambda: nn.ConvTranspose3d(2, 3, 2, key=KEY),
        (ones(2, 4, 4, 4),),
    ),
    "Embedding": (lambda: nn.Embedding(5, 3, key=KEY), (jnp.array(2),)),
    "GRUCell": (lambda: nn.GRUCell(3, 2, key=KEY), (ones(3), ones(2))),
    "LSTMCell": (lambda: nn.LSTMCell(3, 2, key=KEY), (ones(3), (ones(2), ones(2)))),
    "LayerNorm": (lambda: nn.LayerNorm(3), (ones(3),)),
    "RMSNorm": (lambda: nn.RMSNorm(3), (ones(3),)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (ones(4, 3),)),
    "PReLU": (lambda: nn.PReLU(), (ones(3),)),
    "MultiheadAttention": (
        lambda: nn.MultiheadAttention(2, 4, key=KEY),
        (ones(3, 4), ones(3, 4), ones(3, 4)),
    ),
    "RotaryPositionalEmbedding": (
        lambda: nn.RotaryPositionalEmbedding(4),
        (ones(3, 4),),
    ),
    "Dropout": (lambda: nn.Dropout(0.5, inference=True), (ones(3),)),
    "WeightNorm": (lambda: nn.WeightNorm(nn.Linear(3, 2, key=KEY)), (ones(3),)),
    "AvgPool1d": (lambda: nn.AvgPool1d(2), (ones(2, 6),)),
    "AvgPool2d": (lambda: nn.AvgPool2d(2), (ones(2, 6, 6),)),
    "AvgPool3d": (lambda: nn.AvgPool3d(2), (ones(2, 4, 4, 4),)),
    "MaxPool1d": (lambda: nn.MaxPool1d(2), (ones(2, 6),)),
    "MaxPool2d": (lambda: nn.MaxPool2d(2), (ones(2, 6, 6),)),
    "MaxPool3d": (lambda: nn.MaxPool3d(2), (ones(2, 4, 4, 4),)),
    "AdaptiveAvgPool1d": (lambda: nn.AdaptiveAvgPool1d(2), (ones(2, 6),)),
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d(2), (ones(2, 6, 6),)),
    "AdaptiveAvgPool3d": (lambda: nn.AdaptiveAvgPool3d(2), (ones(2, 4, 4, 4),)),
    "AdaptiveMaxPool1d": (lambda: nn.AdaptiveMaxPool1d(2), (ones(2, 6),)),
    "AdaptiveMaxPool2d": (lambda: nn.AdaptiveMaxPool2d(2), (ones(2, 6, 6),)),
    "AdaptiveMaxPool3d": (lambda: nn.AdaptiveMaxPool3d(2), (ones(2, 4, 4, 4),)),
    "Pool": (lambda: nn.Pool(0.0, jax.lax.add, 1, 2, 1), (ones(2, 6),)),
    "AdaptivePool": (lambda: nn.AdaptivePool(2, 1, jnp.max), (ones(2, 6),)),
    "Affine": (Affine.make, (ones(3),)),
}
# What is no layer, or keeps a state outside of itself.
OTHERS = {"BatchNorm", "SpectralNorm", "State", "StateIndex", "StatefulLayer", "Shared"}


def test_every_class_of_equinox_is_here():
    classes = {name for name, x in vars(nn).items() if isinstance(x, type)}
    assert classes == (LAYERS.keys() - {"Affine"}) | OTHERS


def close(a, b):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b
    )


def total(out):
    return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(out))


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_what_it_did(name):
    make, args = LAYERS[name]
    plain, layer = make(), rx.as_refs(make(), "params")
    assert isinstance(layer, type(plain))
    expected = plain(*args)
    close(layer(*args), expected)
    close(rx.filter_jit(lambda layer, *args: layer(*args))(layer, *args), expected)
    assert jax.tree.structure(rx.snapshot(layer)) == jax.tree.structure(plain)
    assert repr(rx.snapshot(layer)) == repr(plain)

    stacked = jax.tree.map(
        lambda x: jnp.stack([x, 0.5 * x]) if name != "Embedding" else jnp.stack([x, x]),
        args,
    )
    close(rx.filter_vmap(layer)(*stacked), jax.vmap(plain)(*stacked))
    step = lambda _, args: (None, layer(*args))
    close(rx.scan(step, None, stacked)[1], jax.vmap(plain)(*stacked))

    if any(map(eqx.is_inexact_array, jax.tree.leaves(plain))):
        grads = rx.filter_grad(lambda layer: total(layer(*args)))(layer)
        plain_grads = eqx.filter_grad(lambda layer: total(layer(*args)))(plain)
        close(jax.tree.leaves(grads), jax.tree.leaves(plain_grads))


def test_outside_are_refs_and_inside_arrays():
    layer = rx.as_refs(Affine.make(), "params")
    assert isinstance(layer, Affine)
    assert isinstance(layer.weight, rx.Ref) and isinstance(layer.first.weight, rx.Ref)
    assert layer.layers[0].weight.name == "layers.0.weight"
    plain = Affine.make()
    close(layer.norm, plain.norm)
    close(layer.helper(), plain.helper())
    close(layer.jitted(ones(3)), plain(ones(3)))
    assert layer.double(2) == 4 and len(layer) == 3
    assert type(layer).__name__ == "Affine" and type(layer).__doc__ == Affine.__doc__


def test_a_method_that_was_taken_sees_the_values_when_it_is_called():
    layer = rx.as_refs(nn.Linear(3, 2, use_bias=False, key=KEY), "params")
    affine = rx.as_refs(Affine.make())
    call, jitted = layer.__call__, affine.jitted
    before = layer(ones(3)), jitted(ones(3))
    layer.weight.value *= 2
    affine.weight.value = jnp.zeros(3)
    close(call(ones(3)), 2 * before[0])
    close(jitted(ones(3)), jnp.full(3, affine.helper()))


def test_weights_are_shared_between_any_two():
    embedding = rx.as_refs(nn.Embedding(5, 3, key=KEY), "params")
    linear = rx.as_refs(nn.Linear(3, 5, use_bias=False, key=KEY), "params")
    linear = eqx.tree_at(lambda m: m.weight, linear, embedding.weight)
    embedding.weight.value = jnp.ones((5, 3))
    close(linear(ones(3)), jnp.full(5, jnp.sum(ones(3))))
    grads = rx.filter_grad(lambda m: jnp.sum(m[1](m[0](jnp.array(1)))))(
        (embedding, linear)
    )
    assert len(jax.tree.leaves(grads)) == 1


def test_sharing_becomes_a_tie():
    weight = ones(3)
    two = rx.as_refs([Affine(weight, [], "a"), Affine(weight, [], "b")])
    assert two[0].weight is two[1].weight
    pair = (nn.Embedding(5, 3, key=KEY), nn.Linear(3, 5, key=KEY))
    where, get = lambda pair: pair[1].weight, lambda pair: pair[0].weight
    shared = rx.as_refs(nn.Shared(pair, where, get), "params")
    assert len(rx.aliases(shared)) == 2
    embedding, linear = shared()
    assert embedding.weight is linear.weight


def test_collections_by_filter():
    layer = rx.as_refs(
        nn.MLP(3, 2, 4, 1, key=KEY),
        {"bias": rx.path("**.bias"), "params": eqx.is_inexact_array},
    )
    assert [ref.collection for ref in rx.aliases(layer)] == ["params", "bias"] * 2
    assert layer(ones(3)).shape == (2,)
    half = rx.as_refs(
        {"a": ones(2), "n": jnp.array(1)}, {"params": eqx.is_inexact_array}
    )
    assert isinstance(half["n"], jax.Array)


def test_one_array_is_of_one_collection():
    x = ones(2)
    with raises(rx.CollectionError, match="one array is at `a` and at `b`"):
        rx.as_refs({"a": x, "b": x}, {"params": rx.path("a"), "other": True})


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm(3, "batch", mode="batch"),
        nn.SpectralNorm(nn.Linear(3, 2, key=KEY), "weight", key=KEY),
    ],
    ids=["BatchNorm", "SpectralNorm"],
)
def test_a_state_that_is_outside_is_refused(layer):
    with raises(
        rx.StructureError,
        match="an `equinox.nn.StateIndex` at .*rx.nn.BatchNorm.*rx.nn.SpectralNorm",
    ):
        rx.as_refs({"layer": layer})


def test_a_module_that_was_written_for_refs_is_left_as_it_is():
    class Scale(rx.Module):
        by: rx.Param[jax.Array]
        shift: jax.Array

        def __call__(self, x):
            return self.by.value * x + self.shift[...]

    both = rx.as_refs(
        nn.Sequential([nn.Linear(3, 3, key=KEY), nn.Lambda(Scale(ones(3), ones(3)))])
    )
    assert type(both.layers[1].fn) is Scale
    assert isinstance(both.layers[1].fn.shift, rx.Ref)
    both(ones(3))


def test_a_module_that_declares_refs_has_them_again_after_a_snapshot():
    class Seen(rx.Module):
        last: rx.Ref[jax.Array]

        def __call__(self, x):
            before, self.last.value = self.last.value, x
            return before

    class Plain(eqx.Module):
        last: rx.Ref[jax.Array] = rx.field()

        __call__ = Seen.__call__

    for cls in (Seen, Plain):
        again = rx.as_refs(rx.snapshot(cls(jnp.ones(3))))
        assert type(again) is cls
        assert again(jnp.zeros(3))[0] == 1.0 and again.last[0] == 0.0


def test_without_a_collection_a_ref_has_that_of_its_field():
    class Norm(rx.Module):
        scale: rx.Param[jax.Array]
        means: list[rx.BatchStat[jax.Array]]

    norm = Norm(ones(3), [rx.Ref(ones(3)), rx.Ref(ones(3))])
    plain = rx.snapshot([norm.means[1], norm])
    first, again = rx.as_refs(plain)
    assert first is again.means[1]
    assert first.collection == again.means[0].collection == "batch_stats"
    assert again.scale.collection == "params"
    # A given one counts.
    assert rx.as_refs(plain, "all")[1].scale.collection == "all"


def test_what_equinox_does_with_a_module_it_does_with_this_one():
    layer = rx.as_refs(nn.MLP(3, 2, 4, 1, key=KEY), "params")
    again = rx.as_refs(
        nn.MLP(3, 2, 4, 1, activation=layer.activation, key=jr.key(1)), "params"
    )
    assert jax.tree.structure(rx.deref(layer)) != jax.tree.structure(
        nn.MLP(3, 2, 4, 1, key=KEY)
    )
    assert type(layer) is type(again)
    assert repr(layer).startswith("MLP(") and "Ref(f32[4,3]" in repr(layer)
    dropped = rx.as_refs(nn.Sequential([nn.Dropout(0.5), nn.Linear(3, 2, key=KEY)]))
    dropped = nn.inference_mode(dropped)
    assert dropped(ones(3)).shape == (2,)
    params, rest = eqx.partition(layer, rx.collection("params"))
    assert eqx.combine(params, rest)(ones(3)).shape == (2,)
    close(rx.clone(layer)(ones(3)), layer(ones(3)))


class Seven:
    """A descriptor that is neither a method nor a property."""

    def __get__(self, instance, owner=None):
        return self if instance is None else 7


def test_a_descriptor_of_another_kind_stays():
    class Layer(eqx.Module):
        weight: jax.Array
        factor: ClassVar[Any] = Seven()

        def __call__(self, x):
            return self.factor * self.weight * x

    layer = rx.as_refs(Layer(ones(2)), "params")
    assert layer.factor == 7
    close(layer(ones(2)), 7 * ones(2) * ones(2))


def test_copies_and_pickles():
    layer = rx.as_refs(Affine.make(), "params")
    tied = {"a": layer, "b": layer.layers[0].weight}
    for other in (copy.deepcopy(tied), pickle.loads(pickle.dumps(tied))):
        assert type(other["a"]) is type(layer)
        assert other["a"].layers[0].weight is other["b"] is not tied["b"]
        close(other["a"](ones(3)), layer(ones(3)))


def test_a_stack_of_layers_is_scanned():
    keys = jr.split(KEY, 4)
    stack = rx.as_refs(
        eqx.filter_vmap(lambda key: nn.Linear(3, 3, key=key))(keys), "params"
    )
    out, _ = rx.scan(lambda x, layer: (layer(x), None), ones(3), stack)
    expected = ones(3)
    for key in keys:
        expected = nn.Linear(3, 3, key=key)(expected)
    close(out, expected)


def test_a_program_serves_every_layer_of_a_structure(trace_counter):
    counted = trace_counter(lambda layer, x: layer(x))
    step = rx.filter_jit(counted)
    for key in (0, 1):
        layer = rx.as_refs(nn.MLP(3, 2, 4, 1, key=jr.key(key)), "params")
        for _ in range(3):
            step(layer, ones(3))
    assert counted.counter.count == 1


@pytest.mark.parametrize("frozen", [rx.path("layers.0.**", "laters.1.**"), "frozen"])
def test_a_name_that_is_not_in_the_tree_is_an_error(frozen):
    mlp = eqx.nn.MLP(2, 2, 2, 1, key=jr.key(0))
    filters: dict[Any, Any] = {"frozen": frozen, "params": True}
    with raises(
        rx.StructureError, match=r"selects nothing.* leaves at `layers.0.weight`"
    ):
        rx.as_refs(mlp, filters)
    filters["frozen"] = rx.path("layers.0.**") | (rx.path("laters.1.**") | False)
    model = rx.as_refs(mlp, filters)  # the remedy
    assert [ref.collection for ref in rx.aliases(model)] == ["frozen"] * 2 + [
        "params"
    ] * 2


class Scaled(rx.Module):
    weight: rx.Param[Float[Array, "n m"]]
    scale: rx.BatchStat[Float[Array, "n"]]


class TwoScaled(rx.Module):
    layers: list[Scaled]
    shift: rx.Param[Float[Array, ""]]


def test_refs_in_the_fields_of_a_snapshot_have_their_declared_types_again():
    layers = [Scaled(jnp.ones((2, 3)), jnp.ones(2)) for _ in range(2)]
    model = TwoScaled(layers, jnp.array(0.0))
    again = rx.as_refs(rx.snapshot(model))
    for layer in again.layers:
        with raises(rx.RefTypeError, match=r"`Float\[Array, \"n m\"\]` with m=3, n=2"):
            layer.weight.value = jnp.ones((3, 3))
        layer.weight.value = jnp.ones((2, 3))
    with raises(rx.RefTypeError, match=r'is declared `Float\[Array, ""\]`'):
        again.shift.value = jnp.ones(1)
    # One program for both.
    assert jax.tree.structure(rx.deref(again)) == jax.tree.structure(rx.deref(model))


class Slow(rx.Ref):
    """A ref of a class of its own."""


class Various(rx.Module):
    pair: rx.Cache[tuple[jax.Array, jax.Array]]
    layer: rx.Param[nn.Linear]
    pairs: list[rx.BatchStat[dict[str, Any]]]
    number: rx.Ref[int] = rx.field(collection="counts")
    other_number: rx.Ref[int] = rx.field(collection="counts")
    text: rx.Ref[str]
    fn: rx.Ref[Any]
    slow: Slow
    missing: rx.Param[jax.Array] | None
    plain: int
    plain_pair: tuple[jax.Array, jax.Array]


def various():
    pair = ones(2), ones(3)
    stats = rx.Ref({"mean": ones(2), "mode": "eval"}, "batch_stats")
    layer = nn.Linear(2, 2, key=KEY)
    slow = Slow(ones(4))
    return Various(pair, layer, [stats, stats], 1, 1, "x", len, slow, None, 1, pair)


def test_a_field_that_is_declared_a_ref_of_any_value_is_one_again():
    model = various()
    again = rx.as_refs(rx.snapshot(model))
    assert isinstance(again.slow, Slow) and type(again.layer.value) is nn.Linear
    assert list(rx.aliases(again).values())[:-2] == list(rx.aliases(model).values())
    assert rx.is_ref(again.plain_pair[0]) and again.plain == 1
    same = eqx.tree_at(lambda m: m.plain_pair, again, model.plain_pair)
    assert rx.tree_equal(same, model)
    with raises(rx.RefTypeError, match="declared `tuple"):
        again.pair.value = ones(2)


def test_a_predicate_selects_a_value_by_its_leaves():
    plain = rx.snapshot(various())
    again = vars(rx.as_refs(plain, where=eqx.is_array))
    assert all(map(rx.is_ref, (again["pair"], again["layer"], *again["pairs"])))
    assert again["number"] == 1 and again["text"] == "x"
    again = vars(rx.as_refs(plain, where=lambda x: getattr(x, "shape", ()) == (2, 2)))
    assert rx.is_ref(again["layer"]) and type(again["pair"]) is tuple


@pytest.mark.parametrize("name", ["GRUCell", "LSTMCell"])
def test_a_layer_with_state_works_again_after_a_snapshot(name):
    cell = getattr(rx.nn, name)(3, 2, key=KEY)
    again = rx.as_refs(rx.snapshot(cell), "params")
    assert jnp.array_equal(again(jnp.ones(3)), cell(jnp.ones(3)))
    assert again.hidden.collection == "params"
    again = rx.as_refs(rx.snapshot(cell))
    assert again.hidden.collection == "cache"
    assert rx.tree_equal(again.hidden, cell.hidden)


def test_a_part_of_a_snapshot_keeps_its_holes():
    part = eqx.filter(rx.snapshot(various()), lambda x: eqx.is_array(x) and x.ndim == 2)
    again = vars(rx.as_refs(part))
    assert rx.is_ref(again["layer"]) and again["number"] is None


def test_a_stack_of_a_snapshot_and_a_part_of_one_can_be_made_refs():
    def make(x):
        return Scaled(x * jnp.ones((2, 3)), jnp.ones(2))

    stack = rx.filter_vmap(make)(jnp.arange(4.0))
    again = rx.as_refs(rx.snapshot(stack))
    assert again.weight.shape == (4, 2, 3) and again.weight.collection == "params"
    part = rx.as_refs(rx.snapshot(make(1.0)), where=lambda x: x.ndim == 2)
    held = vars(part)
    assert rx.is_ref(held["weight"]) and not rx.is_ref(held["scale"])
