"""A value that a field cannot hold is an error that names the field, and changes nothing."""

# A static checker objects to what is wrong on purpose here, or made at run time.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Final, Optional, Union

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import _decorator, Array, Float, Int8
from raising import message_of, raises

import refx_eqx as rx
from refx_eqx._fields._axis_names import bind_in_methods


class Pair(rx.Module):
    a: rx.Param[Float[Array, ""]]
    b: rx.Param[Float[Array, "3"]]


class Bias(rx.Module):
    bias: rx.Param[Array]


class BarePair(eqx.Module):
    a: rx.Param[Float[Array, ""]] = rx.field()
    b: rx.Param[Float[Array, "3"]] = rx.field()


class Checked(rx.Module):
    a: rx.Param[Float[Array, ""]]

    def __check_init__(self):
        raise ValueError("never")


class Outer(rx.Module):
    inner: Any

    def __init__(self, ref, inner=Pair):
        self.inner = inner(ref, jnp.ones(3))
        raise ValueError("never")


def never(*_):
    raise ValueError("never")


class Bare(eqx.Module):
    a: rx.Param[Float[Array, ""]] = rx.field()


class BareChecked(Bare):
    b: rx.Param[Array] = rx.field(default=2.0, converter=jnp.asarray)
    __check_init__ = never


class BareBaseChecked(BareChecked):
    c: rx.Param[Array] = rx.field(default=2.0, converter=jnp.asarray)


class BareSubclassChecked(Bare):
    __check_init__ = never


class BareConverted(Bare):
    later: Any = eqx.field(converter=never, default=None)


class BareRefConverted(Bare):
    later: rx.Param[Array] = rx.field(converter=never, default=None)


class BareWithoutLater(eqx.Module):
    a: rx.Param[Float[Array, ""]] = rx.field()
    later: Any = eqx.field(init=False)

    def __init__(self, ref):
        self.a = ref


def state(ref):
    return ref.value, ref.collection, ref.name, ref._declared


# A module that is not made.


@pytest.mark.parametrize(
    "make",
    [
        lambda ref: Pair(ref, jnp.ones(2)),
        lambda ref: BarePair(ref, jnp.ones(2)),
        Checked,
        Outer,
        functools.partial(Outer, inner=BarePair),
        BareChecked,
        BareBaseChecked,
        BareSubclassChecked,
        BareConverted,
        BareRefConverted,
        BareWithoutLater,
    ],
)
def test_a_module_whose_construction_fails_leaves_the_refs_it_was_given(make):
    ref = rx.Ref(1.0)
    before = state(ref)
    with pytest.raises((rx.RefTypeError, ValueError, TypeError), match="never|3|later"):
        make(ref)
    assert state(ref) == before and type(ref.value) is float
    # And afterwards it serves another module as ever.
    pair = Pair(ref, jnp.ones(3))
    assert pair.a is ref and ref.name == "Pair.a" and ref.collection == "params"
    assert isinstance(ref.value, jax.Array)
    bare = BarePair(rx.Ref(2.0), jnp.ones(3))
    assert bare.a.name == "BarePair.a" and isinstance(bare.a.value, jax.Array)


@pytest.mark.parametrize("base", [rx.Module, eqx.Module])
def test_a_ref_has_what_its_field_declares_in_the_checks_of_its_class(base):
    class Holder(base):
        a: rx.Param[Float[Array, ""]] = rx.field()

        def __check_init__(self):
            assert self.a.collection == "params" and str(self.a.name).endswith(".a")
            seen.append(self)

    class Derived(Holder):
        b: rx.Param[Float[Array, ""]] = rx.field()

        def __check_init__(self):
            super().__check_init__()

    seen = []
    ref = rx.Ref(1.0)
    made = Derived(ref, rx.Ref(2.0))
    assert made.a is ref and made.b.collection == "params"
    assert seen == [made, made]
    for x in made.a, made.b:
        with raises(rx.RefTypeError, match=r"is declared `Float\[Array, \"\"\]`"):
            x.value = jnp.ones(2)


def test_a_failure_does_not_undo_the_module_before_it():
    ref = rx.Ref(1.0)
    made = BarePair(ref, jnp.ones(3))
    with pytest.raises(rx.RefTypeError):
        BarePair(rx.Ref(1.0), jnp.ones(2))
    assert made.a is ref and ref.name == "BarePair.a"


# Annotations.


@pytest.mark.parametrize(
    "annotation, value, get",
    [
        (Final[rx.Param[Array]], 1.0, lambda x: x),
        (Optional["rx.Param[Array]"], 1.0, lambda x: x),
        (list["rx.Param[Array]"], [1.0], lambda x: x[0]),
        (dict[str, "rx.Param[Array] | None"], {"a": 1.0}, lambda x: x["a"]),
    ],
)
def test_an_annotation_around_a_ref_makes_one(annotation, value, get):
    class Holder(rx.Module):
        field: annotation  # pyright: ignore[reportInvalidTypeForm]

    ref = get(Holder(jax.tree.map(jnp.asarray, value)).field)
    assert isinstance(ref, rx.Ref) and ref.collection == "params"


@pytest.mark.parametrize("kind", [set, frozenset])
def test_a_set_of_refs_is_refused(kind):
    with raises(TypeError, match=f"a {kind.__name__} of refs, .* not a pytree"):

        class Holder(rx.Module):
            field: kind[rx.Param[Array]]  # pyright: ignore


def _cause(caught):
    return caught.value.__cause__ or caught.value  # Python 3.11 wraps it


def test_a_field_of_a_plain_dataclass_is_refused():
    with pytest.raises((TypeError, RuntimeError)) as caught:

        @dataclasses.dataclass
        class Plain:
            ref: rx.Param[Array] = rx.field()  # noqa: RUF009

    assert "`Plain` is not a module. Derive it from `rx.Module`" in str(_cause(caught))


def test_a_default_that_is_a_ref_is_refused():
    ref = rx.Ref(1.0)
    with raises(TypeError, match="which all instances would share"):

        class Holder(rx.Module):
            ref: rx.Param[float] = rx.Ref(1.0)

    with raises(TypeError, match="which all instances would share"):
        rx.field(default=ref)

    # The remedies.
    class Own(rx.Module):
        ref: rx.Param[float] = 1.0

    class Shared(rx.Module):
        ref: rx.Param[float] = rx.field(default_factory=lambda: ref)

    assert Own().ref is not Own().ref and Shared().ref is Shared().ref is ref


@pytest.mark.parametrize("contain", [lambda m: m, lambda m: (m,), lambda m: lambda: m])
def test_a_default_that_holds_a_ref_is_refused(contain):
    made = Bias(jnp.ones(2))
    default = contain(made)
    text = "default of a field holds `Bias.bias`.*, which all instances would share"
    with raises(TypeError, match=text):

        class Holder(rx.Module):
            sub: Any = default

    with raises(TypeError, match=text):

        class WithField(rx.Module):
            sub: Any = eqx.field(default=default)

    with raises(TypeError, match=text):
        rx.field(default=default)

    # The remedies.
    class Own(rx.Module):
        sub: Bias = rx.field(default_factory=lambda: Bias(jnp.ones(2)))

    class Shared(rx.Module):
        sub: Any = rx.field(default_factory=lambda: default)
        of_class: ClassVar[Any] = default

    assert Own().sub.bias is not Own().sub.bias
    assert Shared().sub is Shared().sub is Shared.of_class is default


STATIC = (
    "`Holder.a` is annotated as a ref, but is static: a static field cannot hold a ref"
)


@pytest.mark.parametrize("base", [rx.Module, eqx.Module])
@pytest.mark.parametrize(
    "annotation", [rx.Param[Array], tuple[rx.Ref[Array], ...] | None]
)
def test_a_static_field_annotated_as_a_ref_is_refused(base, annotation):
    with pytest.raises((ValueError, RuntimeError)) as caught:

        class Holder(base):
            a: annotation = rx.field(static=True)  # pyright: ignore[reportInvalidTypeForm]

    assert isinstance(_cause(caught), ValueError) and STATIC in str(_cause(caught))


def test_an_equinox_field_that_is_static_cannot_be_annotated_as_a_ref():
    with raises(ValueError, match=STATIC):

        class Holder(rx.Module):
            a: rx.Param[Array] = eqx.field(static=True)

    # The remedies.
    class NotStatic(rx.Module):
        a: rx.Param[Array] = eqx.field()

    class OfValue(rx.Module):
        a: float = eqx.field(static=True)

    assert NotStatic(jnp.ones(1)).a.collection == "params" and OfValue(1.0).a == 1.0


@pytest.mark.parametrize(
    "annotation, text",
    [
        (
            Annotated[rx.Param[Array], rx.Collection("lora")],
            "annotated with collections 'params' and 'lora'. Give only one.",
        ),
        (
            list[Annotated[rx.Ref[Array], rx.Collection("a"), rx.Collection("b")]],
            "annotated with collections 'a' and 'b'. Give only one.",
        ),
        (
            rx.Param[Array] | rx.BatchStat[Array],
            "annotated with a union of refs, .* Give only one. Its value may be of several "
            r"types: `rx\.Param\[A | B\]`",
        ),
        (rx.Ref[Array] | tuple[rx.Ref[Array], ...] | None, "union of refs"),
        (
            Annotated[Array, rx.Collection("a")],
            r"annotated with `rx\.Collection\('a'\)`, but `Array` is not a ref, so it has no "
            r"collection\. Annotate a ref: `Annotated\[rx\.Ref\[...\], rx\.Collection\('a'\)\]`",
        ),
        (Annotated[rx.Ref[Array] | None, rx.Collection("a")], "is not a ref"),
        (Annotated[tuple[rx.Ref[Array], ...], rx.Collection("a")], "is not a ref"),
        (Annotated[Pair, rx.Collection("a")], "`Pair` is not a ref"),
    ],
)
@pytest.mark.parametrize("base", [rx.Module, eqx.Module])
def test_an_annotation_that_gives_not_one_collection_to_one_ref(annotation, text, base):
    with pytest.raises((rx.CollectionError, RuntimeError)) as caught:

        class Holder(base):
            a: annotation = rx.field()  # pyright: ignore[reportInvalidTypeForm]

    error = _cause(caught)
    assert isinstance(error, rx.CollectionError)
    assert re.search(f"The field `Holder.a` is .*{text}", message_of(error))


@pytest.mark.parametrize(
    "annotation, text",
    [
        (rx.Param[Array] | float, "`float`"),
        (float | rx.Param[Array] | None, "`float`"),
        (Union[rx.Param[Array], "Pair"], "`Pair`"),
        (tuple[rx.Param[Array], ...] | Array, "`Array`"),
        (rx.Param[Array] | list[int], r"`list\[int\]`"),
    ],
)
@pytest.mark.parametrize("base", [rx.Module, eqx.Module])
def test_next_to_a_ref_in_a_union_is_only_none(annotation, text, base):
    with pytest.raises((TypeError, RuntimeError)) as caught:

        class Holder(base):
            a: annotation = rx.field()  # pyright: ignore[reportInvalidTypeForm]

    error = _cause(caught)
    assert isinstance(error, TypeError)
    assert re.search(
        f"`Holder.a` is annotated with a union of a ref and {text}, but what is assigned to "
        "it becomes the value of a ref. Leave the other type out, or declare two fields. "
        r"Its value may be of several types: `rx\.Param\[A \| B\]`\.$",
        message_of(error),
    )

    class Remedy(rx.Module):
        a: rx.Param[Array | float]

    assert Remedy(1.0).a.value == 1.0


def test_a_type_that_is_not_known_may_stand_next_to_a_ref():
    class Holder(rx.Module):
        a: "rx.Param[Array] | Unknown"  # pyright: ignore[reportUndefinedVariable]
        b: Union[rx.Param[Array], Any]
        c: Union[rx.Param[Array], "None"]

    holder = Holder(jnp.ones(2), jnp.ones(2), None)
    assert rx.is_ref(holder.a) and rx.is_ref(holder.b) and holder.c is None


@pytest.mark.parametrize(
    "annotation, value, collection",
    [
        (Annotated[rx.Ref[Array], rx.Collection("a")], 1.0, "a"),
        (Annotated["rx.Ref[Array]", rx.Collection("a")], 1.0, "a"),
        (Annotated[rx.Param[Array], rx.Collection("params")], 1.0, "params"),
        (rx.Param[Array | float], 1.0, "params"),
        (Annotated["OnlyForTheTypeChecker", rx.Collection("a")], 1.0, None),  # pyright: ignore[reportUndefinedVariable]
        (Annotated[float, "a comment"], 1.0, None),
    ],
)
def test_an_annotation_that_gives_one_collection_or_none(annotation, value, collection):
    class Holder(rx.Module):
        a: annotation  # pyright: ignore[reportInvalidTypeForm]

    a: Any = Holder(value).a
    assert a == 1.0 if collection is None else a.collection == collection


def test_slots_are_refused():
    with raises(TypeError, match=r"`Slotted` has `__slots__ = \('w',\)`"):

        class Slotted(rx.Module):
            __slots__ = ("w",)
            w: rx.Param[Array]


@pytest.mark.parametrize("value", [range(3), "abc"])
def test_a_sequence_that_is_no_pytree_is_refused(value):
    class Holder(rx.Module):
        refs: Sequence[rx.Ref[Any]]

    text = r"`Holder\.refs` is declared a Sequence of refs, .* not a pytree\. Assign a tuple"
    with raises(rx.RefTypeError, match=text):
        Holder(value)
    assert [r.value for r in Holder(list(value)).refs] == list(value)


def test_a_defaultdict_keeps_its_factory():
    class Holder(rx.Module):
        refs: dict[str, rx.Ref[int]]

    given = defaultdict(int, a=1)
    held = Holder(given).refs
    assert held.default_factory is int and held["a"].value == 1 and given["a"] == 1


# Called, set, subscripted.


def test_a_collection_that_is_called_makes_a_ref_of_it():
    assert rx.Param(1.0).collection == "params"
    assert rx.BatchStat[float](1.0).collection == "batch_stats"
    assert rx.Ref[float](1.0).collection is None
    assert rx.Param(1.0, collection="lora").collection == "lora"


def test_batched_is_a_type():
    with raises(TypeError, match=r"is a type to subscript"):
        rx.Batched(Pair)
    with raises(TypeError, match=r"rx\.filter_vmap\(Pair\)"):
        rx.Batched[Pair, "n"](1)
    for axes in (3, "", " "):
        with raises(TypeError, match=r"the axes are names, in a string"):
            rx.Batched[Pair, axes]


def test_config_takes_a_bool_and_nothing_else():
    with raises(TypeError, match=r"must be a bool, but was given 'no'\. Set it to"):
        rx.config.check_types = "no"  # pyright: ignore[reportAttributeAccessIssue]
    with raises(TypeError, match=r"must be a bool, but was given 0"):
        with rx.config(check_types=0):  # pyright: ignore[reportArgumentType]
            pass
    with raises(AttributeError, match="check_type"):
        rx.config.check_type = False  # pyright: ignore[reportAttributeAccessIssue]
    assert rx.config.check_types is True


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda x: rx.Ref(1, x), "`rx.Ref` was given collection="),
        (rx.Collection, "`rx.Collection` was given name="),
        (lambda x: rx.field(collection=x), "`rx.field` was given collection="),
        (lambda x: rx.Value(1, x), "`rx.Value` was given index="),
        (lambda x: rx.Index(1, x), "`rx.Index` was given index=1, collection="),
    ],
)
def test_what_is_not_hashable_is_named(make, text):
    for x in ([], {}):
        with raises(TypeError, match=rf"{text}.* not hashable\. Use a string"):
            make(x)


def test_as_refs_asks_a_function():
    with raises(TypeError, match="`where` must be a function .* but was given 5"):
        rx.as_refs({"a": jnp.ones(2)}, where=5)  # pyright: ignore[reportArgumentType]


def test_merge_partitions_asks_a_treedef():
    parts, treedef = rx.tree_partition([rx.Ref(1, "params")], "params")
    with raises(rx.StructureError, match="the treedef is None.* second result"):
        rx.merge_partitions(parts, None)
    assert rx.merge_partitions(parts, treedef)[0].value == 1


# Writes.


def test_an_update_by_numbers_keeps_the_dtype():
    refs = [rx.Ref(jnp.array(1.0, jnp.bfloat16)), rx.Ref(jnp.array(1, jnp.int8))]
    rx.update_refs(refs, [2.0, 3])
    assert [r.dtype for r in refs] == [jnp.bfloat16, jnp.int8]
    assert [r.value.item() for r in refs] == [2.0, 3]


@pytest.mark.parametrize("typed", [False, True])
def test_an_update_out_of_range_changes_nothing(typed):
    class Small(rx.Module):
        n: rx.Ref[Int8[Array, ""]]

    n = Small(jnp.array(1, jnp.int8)).n if typed else rx.Ref(jnp.array(1, jnp.int8))
    first = rx.Ref(jnp.array(1.0))
    kind = rx.RefTypeError if typed else rx.StructureError
    with raises(kind, match=r"cannot hold 300|holds i8\[\], and the source has 300"):
        rx.update_refs([first, n], [2.0, 300])
    assert first.value == 1.0 and n.value == 1
    if typed:
        with raises(rx.RefTypeError, match="cannot hold 300"):
            n.value = 300


def test_a_subclass_that_refuses_attributes_is_written_like_all():
    class Refusing(rx.Ref):
        def __setattr__(self, name, value):
            if name == "_value" and hasattr(self, "_value"):
                raise RuntimeError("no")
            super().__setattr__(name, value)

    refs = [rx.Ref(1), Refusing(2)]
    rx.update_refs(refs, [5, 6])
    assert [r.value for r in refs] == [5, 6]


def test_the_buffer_of_a_numpy_array_is_not_shared():
    given = np.zeros(2)
    ref, tree = rx.Ref(given), rx.Ref({"a": given})
    given[0] = 1.0
    assert ref.value[0] == 0.0 and tree.value["a"][0] == 0.0
    ref.value = given
    given[1] = 1.0
    assert ref.value.tolist() == [1.0, 0.0]


def test_a_state_dict_has_no_argument_of_savez_in_it():
    with raises(rx.StructureError, match="`allow_pickle` is the path of an unnamed"):
        rx.state_dict({"allow_pickle": rx.Ref(1.0)})


def test_a_jaxtyping_without_the_function_that_is_replaced_is_told(monkeypatch):
    monkeypatch.delattr(_decorator, "push_shape_memo")
    with pytest.warns(UserWarning, match=r"`jaxtyping\._decorator\.push_shape_memo`"):
        bind_in_methods(Pair, functools.partial(getattr, 1))
    assert not hasattr(_decorator, "push_shape_memo") and np.ones(1).size == 1


def test_a_module_that_makes_a_stack_of_modules_keeps_no_tracer():
    class Inner(rx.Module):
        weight: rx.Param[jax.Array]

    class Outer(rx.Module):
        layers: Inner
        given: rx.Param[jax.Array]

        def __init__(self, given, fails):
            # Under the leak checks of JAX, which ask when the `vmap` ends.
            self.layers = rx.filter_vmap(Inner)(jnp.ones((3, 2)))
            self.given = given
            if fails:
                raise ValueError("no")

    given = rx.Ref(jnp.zeros(2))
    with raises(ValueError, match="no"):
        Outer(given, True)
    assert given.collection is None and given.name is None
    assert Outer(given, False).layers.weight.shape == (3, 2)
