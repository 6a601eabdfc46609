"""A ref is a leaf: a mutable cell that is held, compared and copied by identity."""

import copy
import functools
import gc
import pickle
import types
import weakref
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from raising import raises

import refx_eqx as rx


class Frozen(rx.Ref):
    """A subclass, at the top level so that it can be pickled."""

    def doubled(self):
        return self.value * 2


def test_value_is_read_and_written():
    ref = rx.Ref(1, "counts")
    assert ref.value == 1
    ref.value = 2
    assert ref.value == 2
    ref.value += 3
    assert ref.value == 5


def test_a_write_through_one_place_is_seen_at_the_other():
    ref = rx.Ref(1)
    tree = {"a": ref, "b": [ref, (ref,)]}
    tree["a"].value = 10
    assert tree["b"][0].value == 10
    assert tree["b"][1][0].value == 10


def test_index_notation_is_that_of_a_jax_ref():
    ref = rx.Ref(jnp.zeros(3))
    ref[...] = jnp.ones(3)
    assert ref[...] is ref.value
    ref[0] = 5.0
    ref[1:] = jnp.array([6.0, 7.0])
    assert ref.value.tolist() == [5.0, 6.0, 7.0]
    assert ref[1] == 6.0
    assert ref[1:].shape == (2,)
    ref[0] += 1.0
    assert ref[0] == 6.0
    ref[...] += 1.0
    assert ref.value.tolist() == [7.0, 7.0, 8.0]


def test_writing_a_part_leaves_the_old_array_as_it_was():
    old = jnp.zeros(3)
    ref = rx.Ref(old)
    ref[0] = 1.0
    assert old.tolist() == [0.0, 0.0, 0.0]


def test_writing_a_part_of_a_numpy_array_does_not_change_it_in_place():
    old = np.zeros(3, np.float32)
    ref = rx.Ref(old)
    ref[0] = 1.0
    assert old.tolist() == [0.0, 0.0, 0.0]
    assert ref.value.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("old", "index", "part", "new"),
    [
        (np.array([2**40, 1]), 1, 3, [2**40, 3]),
        (np.array([2**40, 1]), jnp.array(1), jnp.array(3), [2**40, 3]),
        (np.array([1.0 + 1e-12, 1.0]), slice(1, None), 2.0, [1.0 + 1e-12, 2.0]),
        (np.array(["a", "b"]), 0, "c", ["c", "b"]),
        (np.zeros((2, 2), np.int8), (0, jnp.array([0, 1])), [1, 2], [[1, 2], [0, 0]]),
    ],
)
def test_writing_a_part_of_a_numpy_array_keeps_the_other_elements(
    old, index, part, new
):
    ref = rx.Ref(old)
    ref[index] = part
    assert type(ref.value) is np.ndarray and ref.value.dtype == old.dtype
    assert ref.value.tolist() == new
    assert old.tolist() != new


def test_writing_a_traced_part_of_a_numpy_array_makes_it_a_jax_array():
    def loss(x):
        ref = rx.Ref(np.zeros(2, np.float32))
        ref[0] = x
        return ref.value.sum() * 3.0

    assert jax.grad(loss)(1.0) == 3.0


def test_a_part_of_a_value_that_is_no_array_can_be_read():
    ref = rx.Ref({"a": 1, "b": 2})
    assert ref["b"] == 2


def test_a_ref_is_not_iterable():
    # `__getitem__` on a JAX array clamps, so the old iteration protocol never ends.
    with raises(TypeError, match=r"`iter\(\)` was called on"):
        iter(rx.Ref(jnp.zeros(3)))  # type: ignore[call-overload]


def test_array_attributes_are_those_of_the_value():
    ref = rx.Ref(jnp.zeros((2, 3), jnp.float16))
    assert ref.shape == (2, 3)
    assert ref.dtype == jnp.float16
    assert ref.ndim == 2
    assert ref.size == 6


@pytest.mark.parametrize(
    "value, dtype",
    [(1, "int32"), (1.0, "float32"), (True, "bool"), (np.ones((), np.int8), "int8")],
)
def test_scalars_have_array_attributes_too(value, dtype):
    ref = rx.Ref(value)
    assert ref.shape == ()
    assert ref.dtype == dtype


def test_shape_of_what_is_not_an_array_is_an_attribute_error():
    ref = rx.Ref("relu", "config")
    with raises(
        AttributeError,
        match=r"an unnamed ref \(collection 'config'\) holds str, which has no shape",
    ):
        _ = ref.shape
    assert not hasattr(ref, "dtype")


@pytest.mark.parametrize("collection", [None, "params", 3, ("a", "b"), frozenset("x")])
def test_any_hashable_is_a_collection(collection):
    assert rx.Ref(1, collection).collection == collection


def test_an_unhashable_collection_is_refused():
    with raises(TypeError, match=r"not hashable\. Use a string"):
        rx.Ref(1, ["params"])  # type: ignore[arg-type]


def test_collection_is_read_only():
    ref = rx.Ref(1, "params")
    with pytest.raises(AttributeError):
        ref.collection = "counts"  # type: ignore[misc]


def test_refs_are_equal_only_to_themselves():
    a, b = rx.Ref(1), rx.Ref(1)
    assert a == a
    assert a != b
    assert len({a, b, a}) == 2


def test_hash_does_not_change_with_the_value():
    ref = rx.Ref(1)
    table = {ref: "x"}
    ref.value = 2
    assert table[ref] == "x"


def test_a_ref_is_a_leaf():
    ref = rx.Ref({"a": jnp.zeros(2)})
    assert jax.tree.leaves([ref, ref]) == [ref, ref]


def test_a_ref_has_no_dict_and_takes_no_attributes():
    ref = rx.Ref(1)
    assert not hasattr(ref, "__dict__")
    with pytest.raises(AttributeError):
        ref.other = 1  # type: ignore[attr-defined]


def test_a_ref_can_be_referenced_weakly_and_is_freed_at_once():
    ref = rx.Ref(jnp.zeros(3))
    alive = weakref.ref(ref)
    gc.disable()
    try:
        del ref
        assert alive() is None
    finally:
        gc.enable()


def test_old_values_are_freed_at_once():
    class Big:
        pass

    value = Big()
    alive = weakref.ref(value)
    ref = rx.Ref(value)
    gc.disable()
    try:
        ref.value = Big()
        del value
        assert alive() is None
    finally:
        gc.enable()


def test_a_value_that_holds_a_ref_is_refused():
    inner = rx.Ref(1, "params")
    with raises(
        rx.StructureError,
        match=(
            r"The value of a ref cannot hold a ref: an unnamed ref \(no collection\) was "
            r"given one that holds an unnamed ref \(collection 'params'\). Put the two "
            "refs side by side"
        ),
    ):
        rx.Ref((inner, 2))
    outer = rx.Ref(0)
    with raises(rx.StructureError, match="cannot hold a ref"):
        outer.value = inner  # type: ignore[assignment]
    assert outer.value == 0


def _value_of(ref):
    return ref.value


class _Plain:
    def __init__(self, ref):
        self.ref = ref

    def read(self):
        return self.ref.value


FUNCTIONS = {
    "partial": lambda ref: functools.partial(_value_of, ref),
    "closure": lambda ref: lambda: ref.value,
    "default": lambda ref: lambda ref=ref: ref.value,
    "keyword default": lambda ref: lambda *, ref=ref: ref.value,
    "method": lambda ref: types.MethodType(_value_of, ref),
    "nested": lambda ref: {"f": [functools.partial(lambda f: f(), lambda: ref.value)]},
    "set": lambda ref: functools.partial(len, {ref}),
    "lifted": lambda ref: rx.filter_jit(lambda: ref.value),
}


@pytest.mark.parametrize("make", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_function_that_holds_a_ref_is_no_value(make):
    inner, outer = rx.Ref(1, "params"), rx.Ref(0)
    match = (
        r"cannot hold a ref: .* holds an unnamed ref \(collection 'params'\), in a "
        "function. Call the function with that ref"
    )
    for write in (rx.Ref, lambda value: setattr(outer, "value", value)):
        with raises(rx.StructureError, match=match):
            write(make(inner))
    assert outer.value == 0
    with raises(rx.StructureError, match="Cannot reref: the value of a ref"):
        rx.reref(rx.Value(make(inner), 0))
    read = rx.Ref(_value_of).value  # the remedy
    assert read(inner) == 1


def test_a_function_without_refs_is_a_value():
    x = jnp.ones(2)
    for value in (functools.partial(jnp.add, x), lambda: x, _Plain(rx.Ref(0)).read):
        assert rx.Ref(value).value is value


def test_any_pytree_without_refs_is_a_value():
    linear = eqx.nn.Linear(2, 2, key=jax.random.key(0))
    for value in (None, "x", (1, [2]), {"a": jnp.ones(2)}, linear, len):
        assert rx.Ref(value).value is value


def test_copy_makes_a_second_ref_with_the_same_value():
    ref = rx.Ref(jnp.ones(2), "params")
    other = copy.copy(ref)
    assert other is not ref
    assert other.value is ref.value
    assert other.collection == "params"
    other.value = jnp.zeros(2)
    assert ref.value.tolist() == [1.0, 1.0]


def test_deepcopy_keeps_sharing_and_parts_from_the_original():
    ref = rx.Ref(jnp.ones(2), "params")
    a, (b,) = copy.deepcopy((ref, [ref]))
    assert a is b and a is not ref
    a.value = jnp.zeros(2)
    assert ref.value.tolist() == [1.0, 1.0]
    assert a.collection == "params"


def test_deepcopy_copies_a_mutable_value():
    ref = rx.Ref({"a": [1]})
    copied = copy.deepcopy(ref)
    copied.value["a"].append(2)
    assert ref.value == {"a": [1]}


def test_pickle_keeps_sharing_type_collection_and_name():
    class Holder(rx.Module):
        weight: rx.Param[jax.Array]

    ref = Holder(jnp.ones(2)).weight
    frozen = Frozen(3, ("a", 1))
    a, b, c = pickle.loads(pickle.dumps((ref, ref, frozen)))
    assert a is b
    assert a.value.tolist() == [1.0, 1.0]
    assert (a.collection, a.name) == ("params", "Holder.weight")
    assert type(c) is Frozen
    assert c.collection == ("a", 1)
    assert c.doubled() == 6
    a.value = jnp.zeros(2)  # owned by the trace that runs


def test_subclasses_survive_a_boundary():
    a, b = rx.reref(rx.deref((Frozen(2), rx.Ref(3))))
    assert type(a) is Frozen and a.doubled() == 4
    assert type(b) is rx.Ref


def test_a_subscripted_ref_makes_a_plain_ref():
    ref = rx.Ref[jax.Array](jnp.ones(2), "params")
    assert type(ref) is rx.Ref
    assert ref.collection == "params"


def test_repr_shows_shape_collection_and_subclass():
    assert repr(rx.Ref(jnp.zeros((3, 2)), "params")) == 'Ref(f32[3,2], "params")'
    assert repr(rx.Ref(1)) == "Ref(1)"
    assert repr(Frozen(1, ("a", 1))) == "Frozen(1, ('a', 1))"


def test_a_name_is_given_by_the_first_field_that_holds_the_ref():
    class First(rx.Module):
        weight: rx.Param[jax.Array]

    class Second(rx.Module):
        tied: rx.Param[jax.Array]

    assert rx.Ref(1).name is None
    first = First(jnp.ones(2))
    second = Second(first.weight)
    assert second.tied is first.weight
    assert second.tied.name == "First.weight"


NOT_AN_ARRAY = (
    r"Cannot use ref as an array: an unnamed ref \(collection 'params'\) was given to JAX "
    r"or NumPy as if it were one. In a computation, read it: `ref.value` or `ref\[...\]`"
)


@pytest.mark.parametrize("use", [jnp.asarray, np.asarray, jnp.sin, jax.device_put])
def test_a_ref_in_place_of_an_array_is_refused_by_name(use):
    ref = rx.Ref(jnp.array(0.0), "params")
    with raises(rx.TraceLevelError, match=NOT_AN_ARRAY):
        use(ref)
    assert use(ref.value) == 0.0  # the remedy


def test_arithmetic_on_a_ref_is_a_type_error():
    ref = rx.Ref(jnp.ones(2))
    with raises(TypeError, match="A ref is not its value"):
        ref + 1  # type: ignore[operator]
    with raises(TypeError, match="A ref is not its value"):
        jnp.ones(2) * ref  # type: ignore[operator]


def test_errors_have_the_documented_bases():
    assert issubclass(rx.TraceLevelError, ValueError)
    assert issubclass(rx.StructureError, ValueError)
    assert issubclass(rx.CollectionError, ValueError)
    assert issubclass(rx.RefTypeError, TypeError)
    assert issubclass(rx.ImmutableError, ValueError)
    assert issubclass(rx.ConcurrencyError, RuntimeError)
    for error in (
        rx.TraceLevelError,
        rx.StructureError,
        rx.CollectionError,
        rx.RefTypeError,
        rx.ImmutableError,
        rx.ConcurrencyError,
        rx.DonatedError,
    ):
        assert issubclass(error, rx.RefError)


@pytest.mark.parametrize("value, key", [([1, 2], 0), ({"a": 1}, "a")])
def test_a_part_of_what_is_no_array_is_not_set_through_the_ref(value, key):
    ref = rx.Ref(value)
    with raises(rx.RefTypeError, match=r"holds a (list|dict).*ref.value\[i\] = x"):
        ref[key] = 5
    assert ref.value == value
    ref.value[key] = 5  # the remedy
    assert ref[key] == 5 and type(ref.value) is type(value)


@pytest.mark.parametrize("value", ["abc", None, (1, 2)])
def test_what_cannot_be_changed_in_place_is_replaced(value):
    ref = rx.Ref(value)
    text = r"holds a \w+\. Write a new value, `ref\.value = \.\.\.`\.$"
    with raises(rx.RefTypeError, match=text):
        ref[0] = 5
    ref.value = "xbc"
    assert ref.value == "xbc"


@pytest.mark.parametrize("wait", [jax.block_until_ready, rx.block_until_ready])
def test_who_waits_for_a_model_waits_for_its_refs(wait):
    waited = []

    class Computed:
        def block_until_ready(self):
            waited.append(self)

    model = {"a": rx.Ref(Computed()), "b": [rx.Ref(jnp.ones(2))]}
    assert wait(model) is not None and len(waited) == 1
    wait(model["b"])


def test_who_waits_for_a_function_waits_for_its_refs():
    waited = []

    class Computed:
        def block_until_ready(self):
            waited.append(self)

    ref = rx.Ref(Computed())
    rx.block_until_ready(lambda x: ref.value)
    assert len(waited) == 1


STAND_FOR_REFS = {
    "Value": (
        lambda ref: rx.deref(ref),
        lambda opened: opened.value,
    ),
    "Index": (
        lambda ref: rx.deref((ref, ref))[1],
        None,
    ),
    "Dag": (
        lambda ref: rx.Dag([ref]),
        lambda dag: rx.snapshot(dag.value),
    ),
    "gradients": (
        lambda ref: rx.filter_grad(lambda ref: ref.value.sum())(ref),
        lambda grads: grads.value,
    ),
}


class Untyped(rx.Module):
    held: rx.Ref


@pytest.mark.parametrize("make, values", STAND_FOR_REFS.values(), ids=STAND_FOR_REFS)
def test_what_stands_for_a_ref_is_no_value_of_a_ref(make, values):
    other = rx.Ref(jnp.ones(2), "params")
    given = make(other)
    ref = rx.Ref(0.0, "log")
    writes = [
        lambda: rx.Ref(given),
        lambda: setattr(ref, "value", given),
        lambda: Untyped(given),
    ]
    if isinstance(given, rx.Dag):
        writes.append(lambda: setattr(ref, "value", {"a": [given]}))
    for write in writes:
        with raises(
            rx.StructureError,
            match=r"cannot hold an `rx.(Value|Index|Dag)`, which stands for refs: .* was given "
            r"one\. Give it the value",
        ):
            write()
    assert ref.value == 0.0
    if values is not None:  # the remedy
        ref.value = values(given)
        assert float(sum(map(jnp.sum, jax.tree.leaves(ref.value)))) == 2.0


def test_a_derefed_tree_may_be_part_of_a_value_as_in_the_state_of_an_optimizer():
    model = {"w": rx.Ref(jnp.ones(2), "params"), "n": rx.Ref(jnp.array(0), "counts")}
    params = eqx.filter(rx.deref(model), rx.filter_spec(model, "params"))
    tx = optax.sgd(0.5, momentum=0.5)
    state: Any = rx.Ref(tx.init(params), "opt_state")

    @rx.filter_jit
    def step(model):
        grads = rx.filter_grad(lambda m: jnp.sum(m["w"].value ** 2), wrt="params")(
            model
        )
        updates, state.value = tx.update(grads, state.value)
        rx.apply_updates(model, updates)

    step(model)
    step(model)
    assert jnp.array_equal(model["w"].value, jnp.full(2, -0.5))
    assert jnp.array_equal(state.value[0].trace["w"].value, jnp.ones(2))
