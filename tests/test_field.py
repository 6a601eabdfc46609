"""What the annotation of a field says about a ref, and how a value becomes one."""

import dataclasses
import sys
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Optional, TypeVar
from typing_extensions import TypeAliasType

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array, Float, Int
from raising import message_of, raises

import refx_eqx as rx


T = TypeVar("T")
Lora = Annotated[rx.Ref[T], rx.Collection("lora")]


class Trainable(rx.Ref[T]):
    pass


# A module of refs, and a bare Equinox one that says the same with `rx.field`.


class InModule(rx.Module):
    weight: rx.Param[Float[Array, "n"]]


class InBareModule(eqx.Module):
    weight: rx.Ref[Float[Array, "n"]] = rx.field(collection="params")


class AnnotatedBareModule(eqx.Module):
    weight: rx.Param[Float[Array, "n"]] = rx.field()


class FieldInModule(rx.Module):
    weight: rx.Ref[Float[Array, "n"]] = rx.field(collection="params")


each_module = pytest.mark.parametrize(
    "module", [InModule, InBareModule, AnnotatedBareModule, FieldInModule]
)


@each_module
def test_a_value_is_wrapped_in_a_ref_of_the_collection(module):
    value = jnp.ones(2)
    weight = module(value).weight
    assert type(weight) is rx.Ref and weight.value is value
    assert weight.collection == "params"
    assert weight.name == f"{module.__name__}.weight"


@each_module
def test_a_ref_is_shared(module):
    ref = rx.Ref(jnp.ones(2), "params")
    first, second = module(ref), module(ref)
    assert first.weight is second.weight is ref
    assert ref.name == f"{module.__name__}.weight"


@each_module
def test_a_ref_without_a_collection_takes_that_of_the_field(module):
    ref = rx.Ref(jnp.ones(2))
    module(ref)
    assert ref.collection == "params"


@each_module
def test_a_ref_of_another_collection_is_refused(module):
    ref = rx.Ref(jnp.ones(2), "lora")
    with raises(
        rx.CollectionError,
        match=(
            rf"The field `{module.__name__}\.weight` has collection 'params', but was "
            r"given an unnamed ref \(collection 'lora'\)\. Give it a ref of that "
            r"collection, or pass the value \(`ref\.value`\) to make a new ref"
        ),
    ):
        module(ref)
    assert ref.collection == "lora" and ref.name is None
    # Both remedies.
    assert module(rx.Ref(jnp.ones(2), "params")).weight.collection == "params"
    assert module(ref.value).weight.collection == "params"


def test_the_error_names_the_field_that_held_the_ref_before():
    class Batch(rx.Module):
        mean: rx.BatchStat[Float[Array, "n"]]

    batch = Batch(jnp.ones(2))
    with raises(rx.CollectionError, match=r"`Batch\.mean` \(collection 'batch"):
        InModule(batch.mean)  # pyright: ignore[reportArgumentType]


def test_the_first_field_names_a_shared_ref():
    class Later(rx.Module):
        tied: rx.Param[Float[Array, "n"]]

    first = InModule(jnp.ones(2))
    assert Later(first.weight).tied.name == "InModule.weight"


# Collections


@pytest.mark.parametrize(
    "annotation, collection",
    [
        (rx.Param[Array], "params"),
        (rx.BatchStat[Array], "batch_stats"),
        (rx.Cache[Array], "cache"),
        (Lora[Array], "lora"),
        (Lora[Float[Array, "a b"]], "lora"),
        (rx.Ref[Array], None),
        (rx.Ref, None),
        (Annotated[rx.Ref[Array], "a comment"], None),
        (Annotated[rx.Ref[Array], rx.Collection(("a", 1))], ("a", 1)),
        (Annotated[rx.Param[Array], "a comment"], "params"),
    ],
)
def test_the_annotation_says_the_collection(annotation, collection):
    class Holder(rx.Module):
        ref: annotation  # pyright: ignore[reportInvalidTypeForm] (a parameter)

    assert Holder(jnp.ones((1, 1))).ref.collection == collection


def test_the_collection_may_be_said_twice_if_it_is_the_same():
    class Holder(rx.Module):
        ref: rx.Param[Array] = rx.field(collection="params")

    assert Holder(jnp.ones(1)).ref.collection == "params"


def test_two_different_collections_for_one_field_are_refused():
    # Python 3.11 wraps what `__set_name__` raises.
    with pytest.raises((rx.CollectionError, RuntimeError)) as caught:

        class Holder(rx.Module):
            ref: rx.Param[Array] = rx.field(collection="lora")

    error = caught.value.__cause__ or caught.value
    assert isinstance(error, rx.CollectionError)
    assert message_of(error) == (
        "The field `Holder.ref` is annotated with collection 'params', but `rx.field` "
        "says 'lora'. Give only one."
    )


def test_a_field_with_a_collection_and_no_ref_in_its_annotation_holds_a_ref():
    class Holder(eqx.Module):
        anything: Any = rx.field(collection="cache")

    assert isinstance(Holder(1).anything, rx.Ref)


def test_fields_without_refs_are_left_alone():
    class Plain(rx.Module):
        count: ClassVar[int] = 3
        size: int
        act: Callable[[Array], Array] = eqx.field(static=True)
        maybe: Optional[int] = None  # noqa: UP045
        field_: float = rx.field(default=1.0)

    plain = Plain(2, jnp.tanh)
    assert (plain.size, plain.maybe, plain.field_, Plain.count) == (2, None, 1.0, 3)
    assert jax.tree.leaves(plain) == [2, 1.0]


# Optional fields and subclasses


@pytest.mark.parametrize(
    "annotation",
    [
        rx.Param[Array] | None,
        Optional[rx.Param[Array]],  # noqa: UP045
        None | rx.Param[Array],
        rx.Ref[Array] | None,
    ],
)
def test_an_optional_field_keeps_none_and_wraps_a_value(annotation):
    class Holder(rx.Module):
        ref: annotation = None  # pyright: ignore[reportInvalidTypeForm] (a parameter)

    assert Holder().ref is None
    assert Holder(None).ref is None
    assert isinstance(Holder(jnp.ones(1)).ref, rx.Ref)
    ref = rx.Ref(jnp.ones(1))
    assert Holder(ref).ref is ref


def test_a_field_of_a_subclass_makes_refs_of_it():
    class Holder(rx.Module):
        ref: Trainable[Float[Array, "n"]] = rx.field(collection="lora")

    ref = Holder(jnp.ones(2)).ref
    assert type(ref) is Trainable and ref.collection == "lora"
    (reopened,) = jax.tree.leaves(rx.clone(Holder(jnp.ones(2))))
    assert type(reopened) is Trainable


# Converters


@pytest.mark.parametrize("field", [rx.field, eqx.field])
def test_a_converter_is_applied_to_a_value_before_it_is_wrapped(field):
    class Counter(rx.Module):
        uses: rx.Ref[Int[Array, ""]] = field(converter=jnp.asarray)

    make: Any = Counter  # pyright cannot see which of the two functions `field` is
    uses = make(0).uses
    assert isinstance(uses.value, jax.Array) and uses.dtype == jnp.int32


def test_a_converter_is_not_applied_to_a_ref():
    def refuse(value):
        raise AssertionError

    class Holder(rx.Module):
        ref: rx.Ref[Array] = rx.field(converter=refuse)

    ref = rx.Ref(jnp.ones(1))
    assert Holder(ref).ref is ref


def test_a_converter_is_not_applied_to_the_none_of_an_optional_field():
    as_array: Any = jnp.asarray  # to pyright it would have to return a ref

    class Holder(rx.Module):
        ref: rx.Ref[Array] | None = rx.field(converter=as_array)

    assert Holder(None).ref is None
    make: Any = Holder
    assert make(1.0).ref.value == 1.0


def test_a_converter_that_makes_a_ref_is_not_wrapped_again():
    shared = rx.Ref(jnp.ones(1))

    class Holder(rx.Module):
        ref: rx.Param[Array] = rx.field(converter=lambda _: shared)

    assert Holder(0).ref is shared and shared.collection == "params"


def test_a_converter_runs_once():
    calls = []

    def convert(value):
        calls.append(value)
        return jnp.asarray(value)

    class Generated(rx.Module):
        ref: rx.Ref[Array] = rx.field(converter=convert)

    class Written(rx.Module):
        ref: rx.Ref[Array] = rx.field(converter=convert)

        def __init__(self, value):
            self.ref = value

    Generated(1.0)
    Written(2.0)
    assert calls == [1.0, 2.0]


def test_a_plain_field_is_checked_as_if_it_were_not_declared_by_rx_field():
    class Model(rx.Module):
        mask: Float[Array, "n"] = rx.field(converter=jnp.asarray)
        weight: rx.Param[Float[Array, "n"]]

    values: list[Any] = [[1.0, 0.0], jnp.ones(2)]
    assert Model(*values).mask.shape == (2,)
    with raises(rx.RefTypeError, match=r"`Model\.weight` .* n=3"):
        Model(jnp.ones(3), jnp.ones(2))
    with raises(rx.RefTypeError, match=r"`Model\.mask` is declared"):
        Model(jnp.ones((2, 2)), jnp.ones(2))


def test_a_converter_of_a_plain_field_works_as_in_equinox():
    class Holder(rx.Module):
        plain: Array = rx.field(converter=jnp.asarray)

    assert isinstance(Holder(1.0).plain, jax.Array)


# Static fields


def test_a_static_field_is_no_leaf():
    class Holder(eqx.Module):
        name: str = rx.field(static=True)
        upper: str = rx.field(static=True, converter=str.upper)

    holder = Holder("a", "b")
    assert jax.tree.leaves(holder) == [] and holder.upper == "B"


def test_a_static_field_with_a_collection_is_refused():
    with raises(
        ValueError,
        match=r"`rx.field\(collection=..., static=True\)`: a static field cannot hold a "
        "ref, because it is not part of the pytree. Leave out one of the two",
    ):
        rx.field(collection="params", static=True)


# The arguments of dataclasses


class Options(rx.Module):
    required: rx.Param[Float[Array, "n"]]
    default: rx.Ref[int] = rx.field(default=1)
    plain_default: rx.Ref[int] = 2  # pyright: ignore[reportAssignmentType]
    factory: rx.Cache[Float[Array, "m"]] = rx.field(
        default_factory=lambda: jnp.zeros(3)
    )
    keyword: rx.Ref[int] = rx.field(kw_only=True)
    inside: rx.BatchStat[Float[Array, "n"]] = rx.field(init=False)

    def __post_init__(self):
        self.inside = 2 * self.required.value


def test_default_default_factory_kw_only_and_init():
    options = Options(jnp.ones(2), keyword=3)
    assert options.default.value == 1 and options.plain_default.value == 2
    assert options.factory.shape == (3,) and options.factory.collection == "cache"
    assert options.keyword.value == 3
    assert options.inside[0] == 2.0 and options.inside.collection == "batch_stats"
    given = Options(jnp.ones(2), 5, 6, jnp.zeros(1), keyword=7)
    values = [ref.value for ref in jax.tree.leaves(given)]
    assert values[1:3] == [5, 6] and values[4] == 7


def test_kw_only_and_init_are_enforced():
    with raises(TypeError, match="missing 1 required keyword-only .*'keyword'"):
        Options(jnp.ones(2))  # pyright: ignore[reportCallIssue]
    with raises(TypeError, match="unexpected keyword argument 'inside'"):
        Options(jnp.ones(2), keyword=1, inside=1)  # pyright: ignore[reportCallIssue]
    with raises(TypeError, match="missing 1 required positional .*'required'"):
        Options(keyword=1)  # pyright: ignore[reportCallIssue]


def test_a_default_value_makes_a_ref_for_each_instance():
    first, second = Options(jnp.ones(2), keyword=0), Options(jnp.ones(2), keyword=0)
    first.default.value = 10
    first.plain_default.value = 10
    assert second.default.value == 1 and second.plain_default.value == 2


def test_the_other_arguments_of_a_field_are_kept():
    class Holder(eqx.Module):
        ref: rx.Ref[int] = rx.field(repr=False, metadata={"unit": "kg"}, compare=False)

    (field,) = dataclasses.fields(Holder)
    assert field.repr is False and field.compare is False
    assert field.metadata["unit"] == "kg"
    assert "ref" not in repr(Holder(1))


def test_an_unknown_argument_is_refused():
    with raises(TypeError, match="unexpected keyword argument 'colection'"):
        rx.field(colection="params")


@pytest.mark.parametrize("base", [rx.Module, eqx.Module])
def test_a_field_is_converted_once(base):
    calls = []

    def convert(x):
        calls.append(x)
        return [jnp.asarray(item, jnp.float32) for item in x]

    class Model(base):
        weights: list[rx.Param[Float[Array, ""]]] = rx.field(converter=convert)

    model = Model([1, 2])
    assert calls == [[1, 2]]
    assert [w.value for w in model.weights] == [1.0, 2.0]


def test_a_default_that_is_not_assigned_is_converted():
    class Model(rx.Module):
        weight: rx.Param[Float[Array, ""]] = rx.field(default=1, converter=jnp.float32)

        def __init__(self):
            pass

    model = Model()
    assert model.weight.value == 1.0 and model.weight.name == "Model.weight"


Vector = TypeAliasType("Vector", Float[Array, "n"])
Weight = TypeAliasType("Weight", rx.Param[Vector])
Adapter = TypeAliasType(
    "Adapter", Annotated[rx.Ref[T], rx.Collection("lora")], type_params=(T,)
)


def test_names_of_types_say_what_they_stand_for():
    class Model(rx.Module):
        weight: Weight
        adapter: Adapter[Float[Array, "n"]]
        several: tuple[Weight, ...]
        by_name: rx.Param[dict[str, Vector]]
        plain: Vector

    one = jnp.ones(2)
    values: list[Any] = [one, one, (one,), {"x": one}]
    model = Model(*values, plain=one)
    refs = (model.weight, model.adapter, model.several[0], model.by_name)
    assert [ref.collection for ref in refs] == ["params", "lora", "params", "params"]
    for ref in refs[:3]:
        with raises(rx.RefTypeError, match="n=2"):
            ref.value = jnp.ones(3)
    with raises(rx.RefTypeError, match="n=2"):
        model.by_name.value = {"x": jnp.ones(3)}
    with raises(rx.RefTypeError, match="size of dimension n"):
        Model(*values, plain=jnp.ones(3))


@pytest.mark.skipif(
    sys.version_info < (3, 12), reason="`type X = ...` is of Python 3.12"
)
def test_names_of_types_are_looked_up_late():
    names: dict[str, Any] = {"rx": rx, "Array": Array}
    exec(
        "type Nested = tuple[rx.Param[Array], Nested] | None\n"
        "type Children = list[Node]\n"
        "class Node(rx.Module):\n"
        "    children: Children\n"
        "    nested: Nested\n",
        names,
    )
    model = names["Node"]([], (jnp.ones(2), None))
    assert model.children == [] and model.nested[0].collection == "params"
    with raises(rx.RefTypeError, match="cannot hold"):
        names["Node"]([], [jnp.ones(2)])
