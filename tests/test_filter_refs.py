"""A ref, or a tree of refs, is a filter. A filter that names what is missing is an error."""

import asyncio
import contextlib
import gc
import re
import threading
import weakref
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from raising import message_of, raises

import refx_eqx as rx


class Linear(rx.Module):
    weight: rx.Param[jax.Array]
    calls: rx.Ref[jax.Array] = rx.field(collection="counts")

    def __init__(self):
        self.weight = jnp.array(2.0)
        self.calls = jnp.array(0)

    def __call__(self, x):
        return x * self.weight[...]


class Net(rx.Module):
    encoder: Linear
    decoder: Linear

    def __call__(self, x):
        return self.decoder(self.encoder(x))


def make():
    return Net(Linear(), Linear())


def loss(net, x):
    return net(x)


FILTERS = {
    "module": lambda net: net.decoder,
    "ref": lambda net: net.decoder.weight,
    "list": lambda net: [net.decoder.weight],
    "set": lambda net: {net.decoder.weight},
    "set of modules": lambda net: {net.decoder},
    "set in a list": lambda net: [{net.decoder.weight}],
    "pair in a set": lambda net: frozenset([(net.decoder.weight, "frozen")]),
    "refs_in of a set": lambda net: rx.refs_in({net.decoder.weight}),
    "not refs_in of keys": lambda net: (
        rx.collection("params") & ~rx.refs_in({net.encoder.weight: 0.1})
    ),
    "aliases": lambda net: rx.aliases(net.decoder),
    "and": lambda net: rx.collection("params") & net.decoder,
    "not": lambda net: ~(rx.collection() | net.encoder) & rx.collection("params"),
}


@pytest.mark.parametrize("kind", FILTERS)
def test_a_tree_of_refs_is_a_filter(kind):
    net = make()
    chosen = FILTERS[kind](net)
    spec = rx.filter_spec(net, chosen)
    assert spec.decoder.weight and not spec.encoder.weight
    part, rest = rx.partition(net, chosen)
    assert part.decoder.weight is net.decoder.weight
    assert rest.encoder.weight is net.encoder.weight
    assert "decoder.weight" in rx.state_dict(net, chosen)
    assert "encoder.weight" not in rx.state_dict(net, chosen)
    grads = rx.filter_grad(loss, wrt=chosen)(net, jnp.array(3.0))
    assert grads.decoder.weight.value == 6.0 and grads.encoder.weight.value is None
    with rx.mutable(chosen):
        net.decoder.weight.value += 1.0
        with raises(rx.ImmutableError, match="refs_in|params"):
            net.encoder.weight.value += 1.0


@pytest.mark.parametrize("kind", FILTERS)
def test_it_means_the_inner_refs_inside(kind):
    net = make()
    outside = FILTERS[kind](net)

    @rx.filter_jit
    def by_outside(net, x):
        return rx.filter_grad(loss, wrt=outside)(net, x)

    @rx.filter_jit
    def by_inside(net, x):
        return rx.filter_grad(loss, wrt=FILTERS[kind](net))(net, x)

    made_outside = rx.filter_jit(rx.filter_grad(loss, wrt=outside))
    for step in (by_outside, by_inside, made_outside):
        for _ in range(3):
            grads = step(net, jnp.array(3.0))
            assert grads.decoder.weight.value == 6.0
            assert grads.encoder.weight.value is None


def test_axes_by_ref():
    net = make()
    net.encoder.weight.value = jnp.arange(3.0)
    by_ref = rx.axes({net.encoder.weight: 0}, default=None)
    out = rx.filter_vmap(loss, in_axes=(by_ref, None))(net, jnp.array(1.0))
    assert out.tolist() == [0.0, 2.0, 4.0]
    decoder: Any = net.decoder
    by_module = rx.axes({decoder: None}, counts=None, default=0)
    out = rx.filter_vmap(loss, in_axes=(by_module, None))(net, jnp.array(1.0))
    assert out.tolist() == [0.0, 2.0, 4.0]


def test_what_a_filter_keeps_of_refs_is_weak():
    net = make()
    step = rx.filter_grad(loss, wrt=net.decoder)
    gone = weakref.ref(net.decoder.weight)
    del net
    gc.collect()
    assert gone() is None
    assert step.__name__ == "loss"


@pytest.mark.parametrize(
    "filter, text",
    [
        ("parms", r"rx.collection\('parms'\) selects nothing in this tree, which has refs of "
         r"the collections 'params', 'counts', and leaves at `encoder.weight`, "
         r"`encoder.calls`, `decoder.weight`, `decoder.calls`. Correct the name. If it may be missing, write `\(rx.collection\('parms'\) \| False\)` in its place"),
        (rx.path("encodr.**"), r"rx.path\('encodr.\*\*'\) selects nothing"),
        (rx.collection("params", "lora"),
         r"rx.collection\('lora'\), in rx.collection\('params', 'lora'\), selects nothing"),
        (rx.path("**.weight", "**.biass"), r"rx.path\('\*\*.biass'\), in .*, selects nothing"),
        (rx.collection("params") | rx.collection("parms"), r"rx.collection\('parms'\), in"),
        (rx.collection("params") & ~rx.path("**.biass"), r"rx.path\('\*\*.biass'\), in"),
        (~rx.collection("parms"), r"rx.collection\('parms'\), in ~.*, selects nothing"),
        (rx.collection("params") & rx.path("*.calls"), "selects nothing"),
        (~(rx.collection("params") & rx.path("*.calls")), "selects nothing"),
        (rx.path("*.calls") | rx.Ref(1.0), r"rx.refs_in\(an unnamed ref\), in .*, selects nothing"),
        (("params", "counts"), r"for several collections, write "
         r"`rx.collection\('params', 'counts'\)`"),
        (rx.Ref(1.0), r"rx.refs_in\(an unnamed ref\) selects nothing .*a copy has other refs"),
    ],
)  # fmt: skip
def test_a_name_that_there_is_not_is_an_error(filter, text):
    net = make()
    for use in (
        lambda: rx.filter_spec(net, filter),
        lambda: rx.partition(net, filter),
        lambda: rx.partition(net, "params", filter),
        lambda: rx.get_partition(net, filter),
        lambda: rx.state_dict(net, filter),
        lambda: rx.filter_grad(loss, wrt=filter)(net, jnp.array(1.0)),
        lambda: rx.mutable(filter, net).__enter__(),
    ):
        with raises(rx.StructureError, match=text):
            use()


def test_what_may_select_nothing():
    net = make()
    for filter in (
        False,
        rx.collection("lora") | False,
        rx.path("layers.**", "head") | rx.collection("lora") | False,
        rx.collection("params") & (rx.path("head.**") | False),
        ~(rx.collection("params") | (~rx.path("head.**") | False)),
        rx.refs_in(rx.Ref(1.0)) | False,
        rx.collection(),
        ~rx.collection("params", "counts"),
        lambda leaf: False,
    ):
        part, _ = rx.partition(net, filter)
        assert jax.tree.leaves(part) == []
    # What an earlier filter took is no typing error of a later one.
    assert len(rx.partition(net, rx.Ref, "params")) == 3
    assert rx.filter_spec((), "params") == ()


wrong: Any = rx


@pytest.mark.parametrize(
    "make_filter, text",
    [
        (lambda: wrong.collection(["a", "b"]), r"which are hashable, but was given \['a', 'b'\]"),
        (lambda: wrong.collection(rx.Ref(1)), "To select this ref, use the ref itself"),
        (lambda: wrong.path(3), "takes patterns, .* but was given 3"),
        (lambda: wrong.path(None), "but was given None"),
        (lambda: wrong.path(["a"]), r"was given \['a'\]"),
        (lambda: wrong.path(("a", 0)), r"was given \('a', 0\). Positions are strings too"),
    ],
)  # fmt: skip
def test_wrong_arguments_of_filters(make_filter, text):
    with raises(TypeError, match=text):
        make_filter()


def test_keys_that_a_pattern_cannot_say():
    names = ["a.b", "c[0]", "d*", "e?"]
    tree = {name: {"w": rx.Ref(float(i))} for i, name in enumerate(names)}
    for i, name in enumerate(names):
        assert list(rx.state_dict(tree, rx.path((name, "w"))).values()) == [i]
    tied = rx.Ref(1.0)
    tree = {"a.b": tied, "c": tied}
    with raises(rx.StructureError, match="would tear it apart") as caught:
        rx.filter_spec(tree, rx.path("c"))
    remedy = re.search(r"with `(rx\.path\(.*\))`", message_of(caught.value))
    assert remedy is not None
    both: Any = eval(remedy[1], {"rx": rx})
    assert rx.filter_spec(tree, both) == {"a.b": True, "c": True}


def test_a_predicate_only_answers():
    net = make()

    def writes(leaf):
        if isinstance(leaf, rx.Ref):
            leaf.value = leaf.value + 1
        return True

    for use in (
        lambda: rx.filter_spec(net, writes),
        lambda: eqx.partition(net, rx.collection() | writes),
    ):
        with raises(
            rx.ImmutableError,
            match=(
                r"Cannot write `Linear.weight` \(collection 'params'\): this code runs in a filter, which only selects refs. Write the ref before"
            ),
        ):
            use()
    assert net.encoder.weight.value == 2.0


# `mutable` and what runs in between


def test_mutable_is_of_its_own_task():
    ref = rx.Ref(0)

    async def limited(started, go_on):
        with rx.mutable(False):
            started.set()
            await go_on.wait()
            with pytest.raises(rx.ImmutableError):
                ref.value += 1

    async def main():
        started, go_on = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(limited(started, go_on))
        await started.wait()
        ref.value += 1
        go_on.set()
        await task

    asyncio.run(main())
    assert ref.value == 1


def test_mutable_is_of_its_own_thread():
    ref = rx.Ref(0)

    def write():
        ref.value += 1

    with rx.mutable(False):
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
    assert ref.value == 1


def test_generators_that_end_in_another_order_leave_nothing_behind():
    ref = rx.Ref(0)

    def limited():
        with rx.mutable(False):
            yield

    first, second = limited(), limited()
    next(first)
    next(second)
    first.close()
    with pytest.raises(rx.ImmutableError):
        ref.value += 1
    second.close()
    ref.value += 1
    assert ref.value == 1


def test_a_context_manager_of_a_generator_limits_its_block():
    ref = rx.Ref(0)

    @contextlib.contextmanager
    def evaluating():
        with rx.mutable(False):
            yield

    with evaluating(), pytest.raises(rx.ImmutableError):
        ref.value += 1


def test_types_are_checked_in_every_other_task():
    async def unchecked(started, go_on):
        with rx.config(check_types=False):
            started.set()
            await go_on.wait()
            assert not rx.config.check_types

    async def main():
        started, go_on = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(unchecked(started, go_on))
        await started.wait()
        assert rx.config.check_types
        go_on.set()
        await task

    asyncio.run(main())
    assert rx.config.check_types


def test_a_filter_that_selects_nothing_names_a_few_of_many_places():
    model = [rx.Ref(1.0, "params") for _ in range(12)]
    with raises(rx.StructureError, match=r"leaves at `0`, .*`7`, 4 more. Correct"):
        rx.filter_spec(model, "parms")
    assert rx.filter_spec(model, rx.collection("parms") | False) == [False] * 12
