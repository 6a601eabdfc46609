"""Declared types with parts: every item of every container is checked, each time, and all
parts share the axis names."""

# A static checker objects to what is wrong on purpose here, or made at run time.
# pyright: reportArgumentType=false, reportInvalidTypeForm=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportInvalidTypeArguments=false
# pyright: reportGeneralTypeIssues=false

import collections
import copy
import typing
import typing_extensions
from collections import abc
from typing import (
    Annotated,
    Any,
    Generic,
    Literal,
    NamedTuple,
    NewType,
    Protocol,
    TypedDict,
    TypeVar,
    Union,
)

import jax.numpy as jnp
import numpy as np
import pytest
from beartype.vale import Is
from jaxtyping import Array, Float, Int, jaxtyped, PyTree
from raising import raises

import refx_eqx as rx
from refx_eqx._fields._conformance import conforms


T = TypeVar("T")
Row = Float[Array, "n"]
TWO, THREE, INTS = jnp.ones(2), jnp.ones(3), jnp.ones(2, int)


class Point(NamedTuple):
    x: Row
    y: "int" = 0


class Pair(NamedTuple, Generic[T]):
    first: T
    second: T


class Options(TypedDict):
    x: Row
    y: "typing_extensions.NotRequired[int]"


class OptionsOf(typing_extensions.TypedDict, Generic[T], total=False):
    x: typing_extensions.Required[T]
    y: T


class Rows(list[T], Generic[T]):
    pass


class IntRows(Rows[int]):
    pass


class SomeIntRows(IntRows):
    pass


class Items(Protocol[T]):  # pyright: ignore[reportInvalidTypeVarUse]
    def items(self) -> T: ...


def ordered(**kwargs):
    return collections.OrderedDict(kwargs)


def default(**kwargs):
    return collections.defaultdict(int, kwargs)


# Of each type a right value, and a wrong one: most are wrong in the last part alone.
PARTS = [
    (abc.Sequence[Row], [TWO] * 3, [TWO, TWO, INTS]),
    (abc.Sequence[Row], (TWO, TWO), [TWO, TWO, THREE]),
    (abc.Sequence[str], "abc", [1]),
    (abc.MutableSequence[Row], [TWO], (TWO,)),
    (abc.Iterable[int], [1, 2], [1, "b"]),
    (abc.Iterable[Row], jnp.ones((3, 2)), 1),
    (abc.Collection[int], {1, 2}, {1, "b"}),
    (abc.Container[int], [1], [1, "b"]),
    (abc.Mapping[str, Row], {"a": TWO, "b": TWO}, {"a": TWO, "b": THREE}),
    (abc.MutableMapping[str, int], {"a": 1}, {"a": 1, "b": 0.5}),
    (collections.OrderedDict[str, Row], ordered(a=TWO), ordered(a=TWO, b=INTS)),
    (collections.OrderedDict[str, Row], ordered(a=TWO), {"a": TWO}),
    (collections.defaultdict[str, Row], default(a=TWO), default(a=TWO, b=THREE)),
    (collections.deque[int], collections.deque([1]), collections.deque([1, "b"])),
    (collections.Counter[str], collections.Counter("ab"), {"a": 1}),
    (collections.Counter[str], collections.Counter(a=1), collections.Counter(a=0.5)),
    (set[int], {1, 2}, {1, "b"}),
    (frozenset[int], frozenset([1, 2]), frozenset([1, "b"])),
    (tuple[()], (), (1,)),
    (tuple[int, *tuple[str, ...]], (1, "a", "b"), (1, "a", 2)),
    (tuple[int, *tuple[str, ...], float], (1, "a", 2.0), (1,)),
    (tuple[int, typing.Unpack[tuple[str, ...]]], (1, "a"), (1, 2)),  # noqa: UP044
    (typing.Tuple, (1, 2), [1]),  # noqa: UP006
    (typing.List, [1, 2], (1,)),  # noqa: UP006
    (Point, Point(TWO, 1), Point(TWO, "b")),
    (Point, Point(TWO), Point(INTS)),
    (Pair[Row], Pair(TWO, TWO), Pair(TWO, THREE)),
    (Options, {"x": TWO}, {"x": INTS}),
    (Options, {"x": TWO, "y": 1}, {"x": TWO, "y": "b"}),
    (Options, {"x": TWO}, {"y": 1}),
    (Options, {"x": TWO}, [TWO]),
    (OptionsOf[Row], {"x": TWO}, {"x": INTS}),
    (OptionsOf[Row], {"x": TWO, "y": TWO}, {"x": TWO, "y": THREE}),
    (OptionsOf[Row], {"x": TWO}, {"y": TWO}),
    (Rows[int], Rows([1, 2]), Rows([1, "b"])),
    (Rows[int], Rows([1, 2]), [1, 2]),
    (IntRows, IntRows([1, 2]), IntRows([1, "b"])),
    (SomeIntRows, SomeIntRows([1, 2]), SomeIntRows([1, "b"])),
    (list[Options], [{"x": TWO}] * 2, [{"x": TWO}, {"x": THREE}]),
    (tuple[Row, Point], (TWO, Point(TWO)), (TWO, Point(THREE))),
    (abc.Mapping[str, abc.Sequence[int]], {"a": [1]}, {"a": [1, "b"]}),
    (abc.Sequence[int] | None, None, [1, "b"]),
    (Annotated[abc.Sequence[int], "some"], [1], [1, "b"]),
    (Annotated[abc.Sequence[int], Is[lambda x: len(x) > 1]], [1, 2], [1, "b"]),
    (Annotated[abc.Sequence[int], Is[lambda x: len(x) > 1]], [1, 2], [1]),
    (NewType("Ints", list[int]), [1, 2], [1, "b"]),
    (PyTree[abc.Sequence[int]], {"a": [1]}, {"a": [1, "b"]}),
    (type[int], int, str),
    (Literal[1, 2], 1, 3),
    (np.ndarray, np.ones(2), TWO),
]


@pytest.mark.parametrize(("hint", "right", "wrong"), PARTS, ids=lambda x: "")
def test_every_part_is_checked_each_time(hint, right, wrong):
    for _ in range(8):
        with jaxtyped("context"):
            assert isinstance(rx.Ref(right), rx.Ref[hint])
        with jaxtyped("context"):
            assert not isinstance(rx.Ref(wrong), rx.Ref[hint])


def test_the_items_of_an_iterator_are_left_in_it():
    value = iter([1, "b"])
    assert conforms(value, abc.Iterable[int])
    assert not conforms(1, abc.Iterable[int])
    assert list(value) == [1, "b"]


@pytest.mark.parametrize(
    ("hint", "right", "wrong"),
    [
        (TypeVar("Some", bound=abc.Sequence[int]), [1, 2], [1, "b"]),
        (TypeVar("Either", list[int], str), "a", [1, "b"]),
        (abc.ItemsView[str, int], {"a": 1}.items(), {"a": 1, "b": "c"}.items()),
        (abc.ValuesView[int], {"a": 1}.values(), {"a": 1, "b": "c"}.values()),
        (abc.KeysView[str], {"a": 1}.keys(), {"a": 1, 2: 3}.keys()),
        (abc.Mapping[str, int], {"a": 1}, {"a": 1, 2: 3}),
        (collections.Counter[str], collections.Counter("ab"), collections.Counter([1])),
    ],
    ids=lambda x: "",
)
def test_what_no_ref_can_hold_or_declare_by_itself(hint, right, wrong):
    assert conforms(right, hint) and not conforms(wrong, hint)


def test_a_protocol_is_left_to_those_who_know_it():
    assert isinstance(rx.Ref({}), rx.Ref[Items[int]])


def test_an_argument_of_a_module_is_for_static_checkers():
    class Base(rx.Module, Generic[T]):
        content: rx.Ref[T]

    class Sub(Base[Row]):
        pass

    for hint in (Base, Base[Row], Sub):
        assert conforms(Sub("anything"), hint)
    assert not conforms(Base(1), Sub)


def test_a_local_name_in_a_named_tuple_is_any_type():
    def make():
        class Local(NamedTuple):
            size: "Unknown"  # pyright: ignore[reportUndefinedVariable]
            number: "int"

        return Local

    Local: Any = make()
    assert isinstance(rx.Ref(Local("a", 1)), rx.Ref[Local])
    assert not isinstance(rx.Ref(Local("a", "b")), rx.Ref[Local])


@pytest.mark.parametrize(
    ("hint", "right", "wrong"),
    [
        (abc.Sequence[Row], [TWO] * 3, [TWO, TWO, THREE]),
        (abc.Mapping[str, Row], {"a": TWO}, {"a": TWO, "b": INTS}),
        (Point, Point(TWO, 1), Point(THREE, 1)),
        (Options, {"x": TWO}, {"x": THREE}),
    ],
    ids=lambda x: "",
)
def test_a_write_of_a_wrong_part_changes_nothing(hint, right, wrong):
    class Holder(rx.Module):
        value: rx.Param[hint]

    def write(holder, x):
        holder.value.value = x

    holder = Holder(copy.copy(right))
    before = holder.value.value
    for _ in range(8):
        with raises(rx.RefTypeError, match=r"`Holder.value`.* cannot hold"):
            holder.value.value = wrong
        assert holder.value.value is before
        with raises(rx.RefTypeError, match=r"`Holder.value`.* cannot hold"):
            rx.filter_jit(write)(holder, wrong)
    holder.value.value = right


# Unions.


def test_a_type_of_a_union_that_fails_binds_no_names():
    class Both(rx.Module):
        x: rx.Param[Union[tuple[Row, Row], tuple[Float[Array, "m"], Float[Array, "k"]]]]
        y: rx.Param[Row]

    both = Both((TWO, THREE), jnp.ones(5))
    both.x.value = (jnp.zeros(2), jnp.zeros(3))
    with raises(rx.RefTypeError, match=r"with k=3, m=2, n=5, and"):
        both.x.value = (jnp.zeros(2), jnp.zeros(4))


@pytest.mark.parametrize(
    "fails",
    [
        tuple[Row, Row],
        abc.Sequence[Row],
        tuple[PyTree[Row], Row],
        Annotated[tuple[Row, Row], "two"],
        tuple[Row, Int[Array, "n+1"]],
    ],
    ids=str,
)
def test_what_fails_binds_no_names(fails):
    with jaxtyped("context"):
        assert not isinstance(rx.Ref((TWO, THREE)), rx.Ref[fails])
        assert isinstance(rx.Ref(jnp.ones(5)), rx.Ref[Row])
