"""What is a filter, and what is refused as one."""

import functools
import gc
import weakref
from typing import Annotated, Any, TypeVar
from typing_extensions import TypeAliasType

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest
from raising import raises

import refx_eqx as rx


T = TypeVar("T")
Lora = Annotated[rx.Ref[T], rx.Collection("lora")]


class Scale(rx.Module):
    weight: rx.Param[jax.Array]
    factor: Lora[jax.Array]

    def __call__(self, x):
        return self.weight[...] * self.factor[...] * x


class Net(rx.Module):
    encoder: Scale
    decoder: Scale

    def __call__(self, x):
        return self.decoder(self.encoder(x))


class Tag(rx.Ref[T]):
    pass


TaggedParam = Annotated[Tag[T], rx.Collection("params")]
hint: Any = TaggedParam.__origin__  # type: ignore[attr-defined]


def make():
    return Net(*(Scale(jnp.ones(2), jnp.ones(2)) for _ in range(2)))


def selected(tree, filter):
    return list(rx.state_dict(tree, filter))


@pytest.mark.parametrize("annotation, name", [(rx.Param, "params"), (Lora, "lora")])
def test_an_annotation_is_a_filter_for_its_collection(annotation, name):
    net = make()
    x = jnp.ones(2)
    assert selected(net, annotation) == selected(net, name)
    loss = lambda net, x: jnp.sum(net(x))
    grads = rx.filter_grad(loss, wrt=annotation)(net, x)
    assert eqx.tree_equal(grads, rx.filter_grad(loss, wrt=name)(net, x))
    optimizer = rx.Optimizer(net, optax.sgd(1.0), wrt=annotation)
    assert sorted(optimizer.update(net, grads)) == sorted(selected(net, name))
    stack = Scale(jnp.ones((3, 2)), jnp.ones((3, 2)))
    axes = rx.axes({annotation: 0}, default=0)
    assert repr(axes).startswith(f"rx.axes(rx.collection('{name}')=0")
    out = rx.filter_vmap(lambda scale: scale(x), in_axes=(axes,))(stack)
    assert out.shape == (3, 2)
    with rx.mutable(annotation):
        rx.update_refs(net, rx.partition(net, annotation)[0])


def test_an_annotation_asks_for_its_class_of_refs():
    tagged: Any = TaggedParam
    tree = [Tag(1.0, "params"), rx.Ref(1.0, "params"), Tag(1.0)]
    assert rx.filter_spec(tree, tagged) == [True, False, False]
    assert rx.filter_spec(tree, rx.Param) == [True, True, False]


def test_a_type_alias_is_what_it_stands_for():
    tree = [rx.Ref(1.0, "lora"), rx.Ref(1.0, "params")]
    make_alias: Any = TypeAliasType  # a static checker wants it at the top of a module
    alias = make_alias("alias", Lora)
    of_types = make_alias("of_types", Lora, type_params=(T,))
    for wrt in (alias, of_types):
        assert rx.filter_spec(tree, wrt) == [True, False]
    with raises(TypeError, match="is not a filter: a filter does not ask for the type"):
        rx.filter_spec(tree, of_types[jax.Array])


def test_what_annotates_a_field_is_not_taken_for_a_name():
    with raises(
        TypeError,
        match=r"`rx.Collection\('lora'\)` is not a filter: it annotates a field. Write it "
        r"with a small letter: `rx.collection\('lora'\)`",
    ):
        rx.filter_spec(make(), rx.Collection("lora"))


@pytest.mark.parametrize("wrong", [rx.Param[jax.Array], hint, Annotated[int, "x"]])
def test_an_annotation_with_a_type_is_refused(wrong):
    with raises(TypeError, match="is not a filter: a filter does not ask for the type"):
        rx.filter_spec(make(), wrong)


def plain():
    return eqx.nn.Linear(2, 2, key=jr.key(0))


no_refs = "it has no refs to select. Pass the tree of refs"
derefed = "it is derefed, so it has no refs to select. Pass the tree of refs"
bools = "it is a tree of bools, as `rx.filter_spec` returns. Pass the filter that it"
called = (
    "it calls a module, `Scale`, which is no function of a leaf. .* pass the module"
)

WRONG = {
    "snapshot": (lambda net: rx.snapshot(net.encoder), no_refs),
    "layer": (lambda net: plain(), no_refs),
    "partial of a layer": (lambda net: functools.partial(plain()), no_refs),
    "method of a layer": (lambda net: plain().__call__, no_refs),
    "tuple of snapshots": (lambda net: (rx.snapshot(net.encoder),), no_refs),
    "derefed": (rx.deref, derefed),
    "derefed dict": (lambda net: rx.deref({"net": net}), derefed),
    "dag": (rx.Dag, derefed),
    "spec": (lambda net: rx.filter_spec(net, "params"), bools),
    "spec of a layer": (lambda net: rx.filter_spec(rx.as_refs(plain()), True), bools),
    "spec of a dict": (lambda net: {"a": True, "b": False}, bools),
    "partial": (lambda net: functools.partial(net.decoder), called),
    "Partial": (lambda net: eqx.Partial(net.decoder), called),
    "method": (lambda net: net.decoder.__call__, called),
}


@pytest.mark.parametrize("make_filter, text", WRONG.values(), ids=list(WRONG))
def test_a_tree_without_refs_is_not_a_filter(make_filter, text):
    net = make()
    wrong = make_filter(net)
    for use in (
        lambda: rx.filter_spec(net, wrong),
        lambda: rx.filter_grad(lambda net: 0.0, wrt=wrong)(net),
        lambda: rx.Optimizer(net, optax.sgd(1.0), wrt=wrong),
        lambda: rx.mutable(wrong).__enter__(),
        lambda: rx.collection("params") & wrong,
    ):
        with raises(TypeError, match=rf"This `\w+` is not a filter: {text}"):
            use()
    assert selected(net, net.decoder) == [
        "decoder.weight",
        "decoder.factor",
    ]  # the remedy


class HasDimension(eqx.Module):
    ndim: int
    or_scalar: bool = False

    def __call__(self, leaf: Any) -> bool:
        return leaf.ndim == self.ndim or (self.or_scalar and leaf.ndim == 0)


def test_a_module_may_be_a_predicate():
    tree = [rx.Ref(jnp.ones(2)), rx.Ref(jnp.ones(()))]
    assert rx.filter_spec(tree, HasDimension(1)) == [True, False]
    assert rx.filter_spec(tree, functools.partial(HasDimension(0))) == [False, True]
    at_least = lambda size, ref: ref.size >= size
    assert rx.filter_spec(tree, eqx.Partial(at_least, jnp.array(2))) == [True, False]


def test_refs_of_a_tree_can_be_excluded():
    net = make()
    rest = rx.collection("params") & ~rx.refs_in(net.decoder)
    assert selected(net, rest) == ["encoder.weight"]
    assert selected(net, rx.refs_in(net.decoder.weight) | "lora") == [
        "encoder.factor",
        "decoder.weight",
        "decoder.factor",
    ]
    both = rx.refs_in(net.decoder.weight, [net.encoder.weight])
    assert selected(net, both) == ["encoder.weight", "decoder.weight"]
    assert repr(rx.refs_in(net)) == (
        "rx.refs_in(Scale.weight, Scale.factor, Scale.weight, 1 more)"
    )


@pytest.mark.parametrize("wrong", ["params", rx.snapshot(make()), (), 1.0])
def test_refs_in_takes_refs(wrong):
    with raises(TypeError, match=r"was given a `\w+` without a ref"):
        rx.refs_in(make(), wrong)


@pytest.mark.parametrize("other", ["lora", rx.path("encoder.*"), rx.Ref, Lora])
@pytest.mark.parametrize("kind", [list, tuple, set])
def test_a_list_of_refs_has_no_other_filters(kind, other):
    net = make()
    with raises(
        TypeError, match=r"this one has .* in it. Combine two filters with `\|`"
    ):
        rx.partition(net, kind([net.decoder.weight, other]))
    remedy = rx.refs_in(net.decoder) | other
    assert {"encoder.factor", "decoder.weight"} <= set(selected(net, remedy))
    tree = [net.decoder.weight, "a name"]
    assert selected(net, rx.refs_in(tree)) == ["decoder.weight"]


def test_each_item_of_a_list_selects_something():
    net, other = make(), make()
    chosen = [net.decoder.weight, net.encoder]
    assert len(selected(net, chosen)) == 3
    for use in (rx.filter_spec, rx.partition, rx.state_dict):
        with raises(
            rx.StructureError, match=r"rx.refs_in\(Scale.weight\), in .*nothing"
        ):
            use(net, [net.decoder.weight, other.decoder.weight])
    may_be_missing = rx.refs_in(other) | False
    assert selected(net, rx.refs_in(net.decoder.weight) | may_be_missing) == [
        "decoder.weight"
    ]
    assert rx.state_dict(net, rx.refs_in()) == {}
    # A set is looked up in: it may have more.
    mixed = {net.decoder.weight, other.decoder.weight}
    assert selected(net, mixed) == ["decoder.weight"]


def test_a_list_in_an_option_is_not_kept_alive():
    net = make()
    gone = jax.tree.leaves(net)
    step = rx.filter_grad(lambda net: 0.0, wrt=[net.decoder, net.encoder])
    dead = [weakref.ref(ref) for ref in gone]
    del net, gone
    gc.collect()
    assert [ref() for ref in dead] == [None] * 4 and step is not None


@pytest.mark.parametrize(
    "wrong, text", [(rx.Ref(1.0, "x"), "a ref,"), (rx.Param, "an annotation,")]
)
def test_a_collection_is_a_name(wrong, text):
    for use in (
        lambda: rx.Ref(1.0, wrong),
        lambda: rx.field(collection=wrong),
        lambda: rx.Collection(wrong),
        lambda: rx.Value(1.0, 0, wrong),
        lambda: rx.as_refs({"a": jnp.ones(2)}, wrong),
        lambda: rx.as_refs({"a": jnp.ones(2)}, {wrong: True}),
        lambda: rx.collection(wrong),
    ):
        with raises(TypeError, match=f"given .*{text}"):
            use()


def test_a_model_without_refs_is_told_how_to_get_them():
    model = plain()
    for use in (
        lambda: rx.Optimizer(model, optax.sgd(1.0)),
        lambda: rx.filter_grad(lambda model: 0.0, wrt=rx.Param)(model),
        lambda: rx.partition(model, "params"),
    ):
        with raises(
            rx.StructureError, match=r"has no refs \(`rx.as_refs\(model, 'params'\)"
        ):
            use()
    assert selected(rx.as_refs(model, "params"), "params") == ["weight", "bias"]
    with raises(rx.StructureError, match="which has no refs, and leaves at `weight`"):
        rx.partition(model, rx.path("wieght"))
