"""A filter decides per ref, whatever its form, and sees a ref in a derefed tree too."""

import itertools
import threading
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from raising import raises

import refx_eqx as rx
from refx_eqx._filters import _select
from refx_eqx._trees import _paths


class Lora(rx.Ref):
    pass


def make():
    w, a, n = rx.Ref(1.0, "params"), Lora(2.0, "lora"), rx.Ref(0, "counts")
    return {"enc": [{"w": w, "a": a}, {"w": w}], "n": n, "bare": 3.0, "act": "relu"}


def selected(filter):
    tree = make()
    spec = rx.filter_spec(tree, filter)
    assert spec == rx.filter_spec(rx.deref(tree), filter)
    return spec


def expected(w=False, a=False, n=False, bare=False, act=False):
    return {
        "enc": [{"w": w, "a": a}, {"w": w}],
        "n": n,
        "bare": bare,
        "act": act,
    }


@pytest.mark.parametrize(
    "filter, answer",
    [
        ("params", expected(w=True)),
        (Lora, expected(a=True)),
        (rx.Ref, expected(w=True, a=True, n=True)),
        (True, expected(True, True, True, True, True)),
        (False, expected()),
        (rx.collection("params", "lora"), expected(w=True, a=True)),
        (rx.collection(), expected()),
        (rx.path("enc.*.w"), expected(w=True)),
        (rx.path("enc.**"), expected(w=True, a=True)),
        (rx.path("**.w", "n"), expected(w=True, n=True)),
        (rx.path("ba*"), expected(bare=True)),
        (rx.path("**"), expected(True, True, True, True, True)),
        (lambda x: isinstance(x, float), expected(bare=True)),
        (lambda x: isinstance(x, rx.Ref) and x.value == 0, expected(n=True)),
        (rx.collection("params") | Lora, expected(w=True, a=True)),
        (rx.Ref, expected(w=True, a=True, n=True)),
        (rx.collection("params") & rx.path("enc.**"), expected(w=True)),
        ("params" | rx.path("n"), expected(w=True, n=True)),
        (~rx.collection("params"), expected(False, True, True, True, True)),
        (rx.path("enc.**") & ~rx.collection("lora"), expected(w=True)),
        (~(~rx.collection("params")), expected(w=True)),
        (Lora & rx.path("**"), expected(a=True)),
        (
            (lambda x: not rx.is_ref(x) and x == 3.0) | rx.path("act"),
            expected(bare=True, act=True),
        ),
    ],
)
def test_every_form_of_filter(filter, answer):
    assert selected(filter) == answer


@pytest.mark.parametrize("name", [None, 3, ("a", "b")])
def test_any_hashable_names_a_collection(name):
    tree = [rx.Ref(1, name), rx.Ref(2, "other")]
    assert rx.filter_spec(tree, rx.collection(name)) == [True, False]
    if name is not None:
        assert rx.filter_spec(tree, name) == [True, False]


def test_none_names_refs_without_a_collection():
    assert rx.filter_spec([rx.Ref(1), rx.Ref(1, "x")], None) == [True, False]


@pytest.mark.parametrize("wrong", [["params"], {"a": 1}])
def test_what_is_no_filter_is_refused(wrong):
    with raises(TypeError, match=r"is not a filter. A filter is a collection name"):
        rx.filter_spec(make(), wrong)


def test_a_filter_is_neither_true_nor_false():
    params, bias = rx.collection("params"), rx.path("**.bias")
    for ask in (lambda: not params, lambda: params and bias, lambda: bias or params):
        with raises(TypeError, match="has no truth value"):
            ask()


def test_a_class_of_modules_is_not_a_filter():
    class Layer(rx.Module):
        weight: rx.Param[jax.Array]

    model = [Layer(jnp.zeros(1)), rx.Ref(jnp.zeros(1), "params")]
    with raises(TypeError, match="class `Layer` is not a filter.*pass the module"):
        rx.filter_spec(model, Layer)
    assert rx.filter_spec(model, model[0])[1] is False  # the remedy


def test_path_segments_are_whole_keys():
    tree = {"encoder": {"weight": 1, "weights": 2}, "en": {"weight": 3}}
    assert rx.filter_spec(tree, rx.path("en.weight")) == {
        "encoder": {"weight": False, "weights": False},
        "en": {"weight": True},
    }
    assert rx.filter_spec(tree, rx.path("en*.weight?"))["encoder"] == {
        "weight": False,
        "weights": True,
    }


def test_paths_of_modules_are_attribute_names():
    class Linear(rx.Module):
        weight: rx.Param[jax.Array]

    class Net(rx.Module):
        layers: tuple[Linear, ...]

    net = Net((Linear(jnp.ones(2)), Linear(jnp.ones(2))))
    spec = rx.filter_spec(net, rx.path("layers.1.weight"))
    assert [layer.weight for layer in spec.layers] == [False, True]


def test_a_path_filter_is_not_a_function_of_a_leaf():
    tree = make()
    with raises(
        TypeError,
        match=(
            r"`rx.path\('n'\)` selects by place, so it needs the tree, not a leaf. Convert it to an Equinox filter spec: `rx.filter_spec\(tree, filter\)`"
        ),
    ):
        eqx.partition(tree, rx.path("n"))
    part, _ = eqx.partition(tree, rx.filter_spec(tree, rx.path("n")))  # the remedy
    assert part["n"] is tree["n"]


def test_a_filter_is_an_equinox_filter_on_a_tree_of_refs():
    tree = make()
    part, rest = eqx.partition(tree, rx.collection("params"))
    assert part["enc"][0]["w"] is tree["enc"][1]["w"]
    assert part["n"] is None and rest["n"] is tree["n"]
    again = eqx.combine(part, rest)
    assert again["enc"][0]["w"] is again["enc"][1]["w"] is tree["enc"][0]["w"]


def test_a_spec_is_a_prefix_of_the_derefed_tree():
    tree = {"w": rx.Ref({"a": jnp.ones(2), "b": jnp.ones(3)}, "params"), "n": rx.Ref(0)}
    params, rest = eqx.partition(rx.deref(tree), rx.filter_spec(tree, "params"))
    assert params["w"].value["b"].shape == (3,)
    assert params["n"].value is None and rest["w"].value == {"a": None, "b": None}
    again = rx.reref(eqx.combine(params, rest))
    assert eqx.tree_equal(rx.snapshot(again), rx.snapshot(tree))


def test_a_spec_goes_to_optax():
    tree = {"w": rx.Ref(jnp.ones(2), "params"), "n": rx.Ref(jnp.zeros(2), "counts")}
    opened: Any = rx.deref(tree)
    spec = rx.filter_spec(tree, "params")
    optimizer = optax.masked(optax.sgd(0.5), spec)
    grads: Any = jax.tree.map(jnp.ones_like, opened)
    updates: Any = optimizer.update(grads, optimizer.init(opened))[0]
    assert updates["w"].value.tolist() == [-0.5, -0.5]
    assert updates["n"].value.tolist() == [1.0, 1.0]


def test_a_filter_cannot_tear_a_tie():
    ref = rx.Ref(1.0, "params")
    tree = {"enc": ref, "dec": ref}
    with raises(
        rx.StructureError,
        match=(
            r"A filter must select a ref at all of its places or at none: an unnamed ref "
            r"\(collection 'params'\) is one ref at `dec` and `enc`, and rx.path\('enc'\) "
            r'would tear it apart. Select both, for example with `rx.path\("dec", "enc"\)`'
        ),
    ):
        rx.filter_spec(tree, rx.path("enc"))
    with raises(rx.StructureError, match="all of its places"):
        rx.filter_spec(rx.deref(tree), rx.path("enc"))
    both = rx.path("dec", "enc")  # the remedy
    assert rx.filter_spec(tree, both) == {"enc": True, "dec": True}


def test_a_predicate_sees_the_ref_where_the_tree_is_derefed():
    seen = []
    tree = make()
    rx.filter_spec(rx.deref(tree), lambda x: bool(seen.append(x)))
    refs = [x for x in seen if isinstance(x, rx.Ref)]
    assert len(refs) == 4 and len(set(refs)) == 3
    assert not any(isinstance(x, rx.Value | rx.Index) for x in seen)


def test_an_index_alone_cannot_be_filtered():
    ref = rx.Ref(1, "params")
    _, index = rx.deref((ref, ref))
    with raises(
        rx.StructureError,
        match=r"Index 0 \(.*'params'\)\) has no Value in this tree. Pass the whole derefed",
    ):
        rx.filter_spec([index], "params")


def test_filters_print_as_they_are_written():
    def is_big(x):
        return False

    f = (
        (rx.collection("a", "b") | rx.path("x.**"))
        & ~rx.collection(None)
        & Lora
        & is_big
    )
    assert repr(f) == (
        "((((rx.collection('a', 'b') | rx.path('x.**')) & ~rx.collection(None)) & Lora) "
        "& is_big)"
    )


def test_filters_of_equal_meaning_are_equal():
    assert rx.collection("a") == rx.collection("a")
    assert rx.collection("a") | rx.path("b") == rx.collection("a") | rx.path("b")
    assert rx.collection("a") != rx.collection("b")
    assert len({rx.path("a"), rx.path("a")}) == 1


def test_joined_filters_are_options_and_keys_as_others_are(trace_counter):
    def make():
        params = rx.collection("params")
        return params & ~rx.path("b"), params | "lora", ~params

    assert len({*make(), *make()}) == 3
    refs = {"a": rx.Ref(jnp.ones(2), "params"), "b": rx.Ref(jnp.ones(2), "params")}
    f = trace_counter(lambda refs: jnp.sum(refs["a"].value * refs["b"].value))
    for _ in range(3):
        grads = rx.filter_jit(rx.filter_grad(f, wrt=make()[0]))(refs)
        assert grads["b"].value is None and f.counter.count == 1
        axes = rx.axes({make()[1]: 0})
        product = lambda refs: refs["a"].value * refs["b"].value
        assert rx.filter_vmap(product, in_axes=(axes,))(refs).shape == (2,)


def test_filters_are_classes_that_can_be_extended():
    class Big(rx.Filter):
        def matches(self, path, leaf):
            return isinstance(leaf, rx.Ref) and leaf.size > 1

    tree = [rx.Ref(jnp.ones(2)), rx.Ref(jnp.ones(1))]
    assert rx.filter_spec(tree, Big()) == [True, False]
    assert rx.filter_spec(tree, ~Big()) == [False, True]
    with raises(NotImplementedError, match="Filter must define `matches`"):
        rx.Filter()(1)


def test_aliases_are_all_the_places_of_each_ref():
    tree = make()
    w = tree["enc"][0]["w"]
    found = rx.aliases(tree)
    assert found == {
        tree["enc"][0]["a"]: ("enc.0.a",),
        w: ("enc.0.w", "enc.1.w"),
        tree["n"]: ("n",),
    }
    assert rx.aliases(w) == {w: ("",)}
    assert rx.aliases([1, None]) == {}


def test_aliases_reads_nothing():
    ref = rx.Ref(jnp.array(1.0))

    def body(x):
        assert rx.aliases([ref]) == {ref: ("0",)}
        return x

    jax.jit(body)(1.0)


def test_mutable_limits_what_is_written():
    tree = make()
    with rx.mutable("counts"):
        tree["n"].value += 1
        with raises(
            rx.ImmutableError,
            match=(
                r"Cannot write an unnamed ref \(collection 'params'\): this code runs "
                r"under `rx.mutable\(rx.collection\('counts'\)\)`, which does not select "
                r"it. Widen the filter, or write the ref outside the `with` block."
            ),
        ):
            tree["enc"][0]["w"].value = 5.0
    assert tree["enc"][0]["w"].value == 1.0
    assert tree["n"].value == 1
    tree["enc"][0]["w"].value = 5.0  # one remedy
    with rx.mutable(rx.collection("counts", "params")):  # the other
        tree["enc"][0]["w"].value = 6.0
    assert tree["enc"][0]["w"].value == 6.0


def test_nested_mutables_must_all_allow_a_write():
    a, b = rx.Ref(1, "a"), rx.Ref(1, "b")
    with rx.mutable(rx.collection("a", "b")), rx.mutable("a"):
        a.value = 2
        with pytest.raises(rx.ImmutableError):
            b.value = 2
    with rx.mutable(False), rx.mutable(True), pytest.raises(rx.ImmutableError):
        a.value = 3
    assert (a.value, b.value) == (2, 1)


def test_mutable_ends_when_its_block_raises():
    ref = rx.Ref(1)
    with pytest.raises(ZeroDivisionError), rx.mutable(False):
        raise ZeroDivisionError
    ref.value = 2
    assert ref.value == 2


def test_mutable_takes_paths_with_the_tree():
    tree = make()
    with rx.mutable(rx.path("enc.**"), tree):
        tree["enc"][1]["w"].value = 2.0
        with raises(rx.ImmutableError, match=r"rx.path\('enc.\*\*'\)"):
            tree["n"].value = 1
    with (
        rx.mutable(rx.path("enc.**")),
        raises(TypeError, match=r"pass the tree too: `rx.mutable\(filter, tree\)`"),
    ):
        tree["n"].value = 1


def test_mutable_holds_inside_lifted_transforms():
    w, n = rx.Ref(jnp.array(1.0), "params"), rx.Ref(jnp.array(0), "counts")

    @rx.filter_jit
    def both(tree):
        tree["n"].value += 1
        tree["w"].value += 1.0

    @rx.filter_jit
    def count(tree):
        tree["n"].value += 1

    tree = {"w": w, "n": n}
    with rx.mutable("counts"):
        count(tree)
        with raises(rx.ImmutableError, match="collection 'params'"):
            both(tree)
    assert (w.value, n.value) == (1.0, 1)
    with rx.mutable(rx.path("n"), tree):
        count(tree)
        with raises(rx.ImmutableError, match="collection 'params'"):
            both(tree)
    assert (w.value, n.value) == (1.0, 2)


def test_mutable_holds_for_what_a_cached_program_writes():
    # Compiled outside of the context: nothing runs in Python at the second call.
    ref = rx.Ref(jnp.array(0), "counts")

    @rx.filter_jit
    def count(ref):
        ref.value += 1

    count(ref)
    with rx.mutable("params"), pytest.raises(rx.ImmutableError):
        count(ref)
    assert ref.value == 1


def test_mutable_is_of_one_thread():
    ref = rx.Ref(0)
    inside, done = threading.Event(), threading.Event()
    failures = []

    def other():
        inside.wait(10)
        try:
            ref.value = 1
        except rx.ImmutableError as e:
            failures.append(e)
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with rx.mutable(False):
        inside.set()
        assert done.wait(10)
    thread.join()
    assert not failures
    assert ref.value == 1


def nested(depth):
    tree = rx.Ref(0.0, "params")
    for _ in range(depth):
        tree = {"next": tree, "w": rx.Ref(1.0, "params")}
    return tree


def test_a_deep_tree_is_walked_once(monkeypatch):
    texts, steps = [], []
    key_text, step = _paths.key_text, _paths.Pattern._step

    def counted_text(key):
        texts.append(key)
        return key_text(key)

    def counted_step(walk, reached, key):
        steps.append(key)
        return step(walk, reached, key)

    monkeypatch.setattr(_select, "key_text", counted_text)
    monkeypatch.setattr(_paths.Pattern, "_step", counted_step)
    spec = rx.filter_spec(nested(200), rx.path("**.next.w"))
    assert sum(jax.tree.leaves(spec)) == 199
    assert len(texts) <= 4 * 200 and len(steps) <= 4 * 200


@pytest.mark.parametrize(
    "pattern, paths",
    [
        ("**", {"", "a", "a.b", "a.b.a"}),
        ("**.b.**", {"a.b", "a.b.a"}),
        ("**.**.a", {"a", "a.b.a"}),
        ("*", {"a"}),
        ("a.**.a", {"a.b.a"}),
        ("a.?.[a-c]", {"a.b.a"}),
        ("**.c", set()),
    ],
)
def test_a_pattern_is_the_same_in_any_order_of_paths(pattern, paths):
    all_paths = [(), ("a",), ("a", "b"), ("a", "b", "a")]
    for order in itertools.permutations(all_paths):
        filter = rx.path(pattern)
        assert {".".join(p) for p in order if filter.matches(p, None)} == paths
