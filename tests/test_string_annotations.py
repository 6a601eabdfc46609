"""Fields whose annotations are strings, because of `from __future__ import annotations`."""

from __future__ import annotations

import typing
from typing import Annotated, ClassVar, Generic, TYPE_CHECKING, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import refx_eqx
import refx_eqx as rx


if TYPE_CHECKING:
    from somewhere import Unknown  # pyright: ignore[reportMissingImports]

T = TypeVar("T")
Lora = Annotated[rx.Ref[T], rx.Collection("lora")]


class AtModuleLevel(rx.Module):
    weight: rx.Param[Float[Array, "out in"]]
    other_name: refx_eqx.Param[Float[jax.Array, "out"]]
    optional: rx.Param[Array] | None
    lora: Lora[Array]
    plain: int
    constant: ClassVar[int] = 3
    qualified: typing.ClassVar[int] = 4
    field: rx.Ref[Array] = rx.field(collection="counts", default=0)


def test_names_of_the_module():
    made = AtModuleLevel(
        rx.Ref(jnp.ones((2, 3))), jnp.ones(2), None, jnp.ones(1), plain=5
    )
    assert made.weight.collection == made.other_name.collection == "params"
    assert made.optional is None
    assert made.lora.collection == "lora"
    assert made.plain == 5
    assert AtModuleLevel.constant == 3 and AtModuleLevel.qualified == 4
    assert made.field.collection == "counts"


def test_local_names():
    class LocalRef(rx.Ref[T]):
        pass

    class Inner(rx.Module):
        ref: LocalRef[Array]
        again: LocalRef[Array] | None = None

    made = Inner(jnp.ones(1))
    assert type(made.ref) is LocalRef and made.again is None


def test_local_names_of_the_functions_around():
    class LocalRef(rx.Ref[T]):
        pass

    def make():
        class Inner(rx.Module):
            ref: LocalRef[Array]

        return Inner(jnp.ones(1))

    assert type(make().ref) is LocalRef


def test_names_that_exist_for_the_type_checker_alone():
    class Holder(rx.Module):
        unknown: Unknown
        optional: Unknown | None
        nested: dict[str, Unknown.Inner[int]]
        weight: rx.Param[Unknown]
        maybe: rx.Param[Unknown] | None
        shaped: rx.Param[Float[Array, "n"]]

    made = Holder(1, None, {}, jnp.ones(2), rx.Ref(jnp.ones(2)), jnp.ones(2))
    assert made.unknown == 1 and made.optional is None
    assert made.weight.collection == made.shaped.collection == "params"
    assert made.maybe is not None and made.maybe.collection == "params"


def test_a_name_that_is_defined_later():
    class Node(rx.Module):
        value: rx.Param[Array]
        child: Node | None = None

    inner = Node(jnp.ones(1))
    assert Node(jnp.ones(1), inner).child is inner


def test_names_of_the_class_body():
    class Holder(rx.Module):
        class OwnRef(rx.Ref[T]):
            pass

        weight: OwnRef[Array]

    assert type(Holder(jnp.ones(1)).weight) is Holder.OwnRef


def test_a_name_that_sounds_like_a_class_variable():
    class ClassVariance(rx.Ref[T]):
        pass

    class Holder(rx.Module):
        ref: ClassVariance[Array]

    assert type(Holder(jnp.ones(1)).ref) is ClassVariance


def test_a_quoted_annotation_in_quotes():
    class Holder(rx.Module):
        weight: "rx.Param[Array]"

    assert Holder(jnp.ones(1)).weight.collection == "params"


def test_generics_and_abstract_variables():
    class Abstract(rx.Module, Generic[T]):
        weight: eqx.AbstractVar[rx.Ref[Array]]
        item: rx.Ref[T]

    class Concrete(Abstract[int]):
        weight: rx.Param[Array] = rx.field(kw_only=True)

    made = Concrete(1, weight=jnp.ones(1))
    assert made.item.value == 1 and made.weight.collection == "params"


def test_a_bare_equinox_module():
    class Bare(eqx.Module):
        uses: rx.Ref[Array] = rx.field(collection="counts")

    assert Bare(jnp.array(0)).uses.collection == "counts"


def test_a_class_of_no_module():
    names: dict = {"__name__": "nowhere", "rx": rx, "jax": jax}
    exec('class Made(rx.Module):\n    w: "rx.Param[jax.Array]"', names)
    assert names["Made"](jnp.ones(2)).w.collection == "params"
