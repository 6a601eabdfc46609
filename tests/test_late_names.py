"""Annotations that use names which are defined after the class."""

import sys
import textwrap
import types
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from raising import raises

import refx_eqx as rx


has_type_statement = pytest.mark.skipif(
    sys.version_info < (3, 12), reason="`type X = ...` is of Python 3.12"
)


HEADER = """
    from __future__ import annotations
    from typing import Annotated, ClassVar
    import equinox as eqx
    import refx_eqx as rx
    from jaxtyping import Array, Float
"""
LATER = """
    class Later(rx.Module):
        n: int
"""


def module_of(*sources: str) -> Any:
    """A module with these sources, one after the other."""
    module: Any = types.ModuleType("late_names")
    text = "\n".join(map(textwrap.dedent, (HEADER, *sources)))
    sys.modules["late_names"] = module
    try:
        exec(text, vars(module))
    finally:
        del sys.modules["late_names"]
    return module


@has_type_statement
@pytest.mark.parametrize("base", ["rx.Module", "eqx.Module"])
@pytest.mark.parametrize(
    "alias, annotation",
    [
        ("type A = rx.Param[Later]", "A"),
        ("type A = rx.Param[Later] | None", "A"),
        ("type A = rx.Param[Later]", "A | None"),
        ("type B = rx.Param[Later]; type A = B", "A"),
        ("type P[T] = rx.Param[T]; type A = P[Later]", "A"),
        ("type P[T] = rx.Param[T | Later]", "P[int]"),
        ("type V = Later; type A = rx.Ref[V]", 'Annotated[A, rx.Collection("params")]'),
        ("type V = Later", "rx.Param[V]"),
        ("type A = 'rx.Param[Later]'", "A"),
    ],
)
def test_a_type_alias_of_what_is_defined_later(base, alias, annotation):
    default = " = rx.field()" if base == "eqx.Module" else ""
    m = module_of(
        alias, f"class Holder({base}):\n    held: {annotation}{default}", LATER
    )
    held = m.Holder(m.Later(1)).held
    assert type(held) is rx.Ref and held.collection == "params"
    held.value = m.Later(2)
    with raises(rx.RefTypeError, match=r"`Holder\.held` .* cannot hold"):
        held.value = "something else"


@pytest.mark.parametrize("base", ["rx.Module", "eqx.Module"])
@pytest.mark.parametrize(
    "annotation",
    [
        'rx.Param["Later"]',
        '"rx.Param[Later]"',
        "rx.Param['Later | None']",
        'rx.Param[Optional["Later"]]',
        'rx.Param[Annotated["Later", "not a type"]]',
        'rx.Param[Union["Later", Literal["Later"]]]',
        'Annotated[rx.Ref["Later"], rx.Collection("params")]',
    ],
)
def test_a_type_in_quotes_inside_of_an_annotation(base, annotation):
    default = " = rx.field()" if base == "eqx.Module" else ""
    m = module_of(
        f"from typing import *\nclass Holder({base}):\n    held: {annotation}{default}",
        LATER,
    )
    held = m.Holder(m.Later(1)).held
    assert type(held) is rx.Ref and held.collection == "params"
    held.value = m.Later(2)
    with raises(rx.RefTypeError, match=r"`Holder\.held` .* cannot hold"):
        held.value = "something else"


def test_types_in_quotes_inside_of_containers():
    m = module_of(
        """
    from collections.abc import Sequence
    from jaxtyping import PyTree
    class Holder(rx.Module):
        several: rx.Param[Sequence["Row"]]
        tree: rx.Param[PyTree["Row"]]
        refs: list[rx.Param["Row"]]
        unknown: rx.Param[dict[str, "Missing"]]
    Row = Float[Array, "n"]
    """
    )
    rows = [jnp.ones(2)]
    holder = m.Holder(rows, rows, rows, {"a": "anything"})
    for ref in (holder.several, holder.tree):
        with raises(rx.RefTypeError, match="with n=2, and cannot hold"):
            ref.value = [jnp.ones(2), jnp.ones(3)]
    with raises(rx.RefTypeError, match="with n=2, and cannot hold"):
        holder.refs[0].value = jnp.ones(3)
    holder.unknown.value = {"a": 1}
    with raises(rx.RefTypeError, match="cannot hold"):
        m.Holder(rows, rows, rows, {1: "a"})


@pytest.mark.parametrize("hint", [rx.Ref["Row"], rx.Ref[list["Row"]]])  # pyright: ignore[reportUndefinedVariable]
def test_a_type_in_quotes_has_no_meaning_outside_of_a_field(hint):
    text = r"name 'Row' is in quotes inside a type.*`\"rx.Ref\[Row\]\"` instead of `rx.Ref\["
    with raises(TypeError, match=text):
        isinstance(rx.Ref([jnp.ones(2)]), hint)


@has_type_statement
def test_a_container_of_refs_in_a_late_alias_and_a_field_of_a_base():
    m = module_of(
        """
    type Several = tuple[rx.Param[Later], ...]
    type Plain = Float[Array, "n"] | Later
    class Base(rx.Module):
        several: Several
        plain: Plain
    class Holder(Base):
        more: Several = ()
    """,
        LATER,
    )
    later = m.Later(1)
    holder = m.Holder((later, later), later)
    assert [ref.value for ref in holder.several] == [later, later]
    assert holder.plain is later and holder.more == ()
    assert holder.several[0].name == "Holder.several[0]"


def test_a_name_of_a_ref_type_that_is_defined_later():
    m = module_of(
        """
    class Holder(rx.Module):
        weight: Weight
        several: list[Weight] | None
        plain: Vector
        own: Holder | None = None
        constant: ClassVar[Vector] = 3
    Weight = rx.Param[Float[Array, "n"]]
    Vector = Float[Array, "n"]
    """
    )
    one = jnp.ones(2)
    holder = m.Holder(one, [one], one, m.Holder(one, None, one))
    refs = [holder.weight, holder.several[0], holder.own.weight]
    assert [ref.collection for ref in refs] == ["params"] * 3
    assert holder.plain is one and holder.constant == m.Holder.constant == 3
    with raises(rx.RefTypeError, match="n=2"):
        holder.weight.value = jnp.ones(3)
    with raises(rx.RefTypeError, match=r"`Holder\.plain` is declared"):
        m.Holder(one, None, jnp.ones((2, 2)))


def test_a_name_that_was_found_is_kept():
    def make():
        class LocalRef(rx.Ref):
            pass

        class Holder(rx.Module):
            ref: "LocalRef | Late"  # pyright: ignore[reportUndefinedVariable]

        return Holder, LocalRef

    holder, local_ref = make()
    assert type(holder(1).ref) is local_ref


@has_type_statement
def test_an_alias_of_what_is_never_defined_is_an_error_that_says_so():
    source = """
    type Alias = rx.Param[Unknown]
    class Holder(rx.Module):
        held: Alias
    """
    holder = module_of(source).Holder
    for _ in range(2):
        with raises(
            NameError,
            match=r"`Holder\.held` is annotated with a type alias that uses an undefined "
            r"name: name 'Unknown' is not defined\. So it is not known whether the "
            r"field holds a ref\. Define that name before the first `Holder` is made \(an import "
            r"under `if TYPE_CHECKING` does not\), or write what the alias stands for, in "
            r"quotes, instead of the alias\.",
        ):
            holder(jnp.ones(1))
    # Both remedies.
    defined = module_of(source, "Unknown = Array")
    assert type(defined.Holder(jnp.ones(1)).held) is rx.Ref
    quoted = module_of(source.replace("held: Alias", 'held: "rx.Param[Unknown]"'))
    assert type(quoted.Holder(jnp.ones(1)).held) is rx.Ref


@has_type_statement
def test_an_alias_of_the_type_checker_alone_inside_of_a_ref():
    m = module_of(
        """
    type Value = Unknown
    class Holder(rx.Module):
        held: rx.Param[Value]
    """
    )
    assert m.Holder(jnp.ones(1)).held.collection == "params"


@has_type_statement
def test_what_is_wrong_with_a_late_annotation_is_said_at_the_first_instance():
    m = module_of(
        """
    type A = rx.Param[Later]
    type S = set[A]
    class Twice(rx.Module):
        held: A = rx.field(collection="lora")
    class InSet(rx.Module):
        held: S
    """,
        LATER,
    )
    with raises(rx.CollectionError, match="Give only one"):
        m.Twice(m.Later(1))
    with raises(TypeError, match="a set of refs, which is not a pytree"):
        m.InSet({m.Later(1)})


@has_type_statement
def test_a_module_with_late_annotations_is_compiled_once():
    m = module_of(
        """
    type A = rx.Param[Later]
    class Holder(rx.Module):
        held: A
    Later = Float[Array, "n"]
    """
    )
    count = 0

    @rx.filter_jit
    def step(holder):
        nonlocal count
        count += 1
        holder.held.value += 1

    for _ in range(2):
        holder = m.Holder(jnp.zeros(2))
        step(holder)
        assert jnp.array_equal(holder.held.value, jnp.ones(2))
    assert count == 1
    stack = rx.filter_vmap(m.Holder)(jnp.zeros((3, 2)))
    assert isinstance(stack, rx.Batched[m.Holder, "k"])  # pyright: ignore
    leaves, treedef = jax.tree.flatten(stack)
    assert eqx.tree_equal(jax.tree.unflatten(treedef, leaves), stack)
