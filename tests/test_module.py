"""`rx.Module`: an `equinox.Module` in which an annotation is enough to make a ref."""

import abc
import copy
import dataclasses
import functools
import gc
import pickle
import weakref
from typing import Any, Generic, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from jaxtyping import Array, Float, Int
from raising import raises

import refx_eqx as rx


T = TypeVar("T")


class Linear(rx.Module):
    weight: rx.Param[Float[Array, "out in"]]
    bias: rx.Param[Float[Array, "out"]] | None
    uses: rx.Ref[Int[Array, ""]] = rx.field(collection="counts")

    def __init__(self, n_in, n_out, *, key):
        self.weight = jr.normal(key, (n_out, n_in))
        self.bias = None
        self.uses = jnp.array(0)

    def __call__(self, x):
        self.uses.value += 1
        return self.weight[...] @ x

    def method(self, x):
        return self(x)


def make_linear():
    return Linear(3, 2, key=jr.key(0))


def test_a_module_is_an_equinox_module():
    linear = make_linear()
    assert isinstance(linear, eqx.Module) and dataclasses.is_dataclass(linear)
    assert [f.name for f in dataclasses.fields(Linear)] == ["weight", "bias", "uses"]
    assert jax.tree.leaves(linear) == [linear.weight, linear.uses]


def test_a_call_reads_and_writes_refs():
    linear = make_linear()
    x = jnp.ones(3)
    assert jnp.allclose(linear(x), linear.weight.value @ x)
    linear(x)
    assert linear.uses.value == 2


# Inside `__init__`


def test_inside_init_the_attribute_is_the_ref():
    seen = []

    class Holder(rx.Module):
        ref: rx.Param[Array]
        plain: float

        def __init__(self):
            self.ref = jnp.ones(2)
            seen.append(self.ref)
            self.ref.value *= 2
            self.plain = 1.0

    holder = Holder()
    assert seen == [holder.ref] and holder.ref[0] == 2.0
    assert holder.ref.collection == "params" and holder.plain == 1.0


def test_an_assignment_of_the_attribute_shares_the_ref():
    class Tied(rx.Module):
        a: rx.Param[Array]
        b: rx.Param[Array]

        def __init__(self):
            self.a = jnp.ones(2)
            self.b = self.a

    tied = Tied()
    assert tied.a is tied.b and tied.a.name == "Tied.a"


def test_a_second_assignment_makes_a_new_ref():
    class Holder(rx.Module):
        ref: rx.Param[Array]

        def __init__(self):
            self.ref = jnp.ones(2)
            self.ref = jnp.zeros(3)

    assert Holder().ref.shape == (3,)


def test_a_bare_equinox_module_converts_after_init():
    class Bare(eqx.Module):
        a: rx.Param[Array] = rx.field()
        b: rx.Param[Array] = rx.field()

        def __init__(self):
            self.a = jnp.ones(2)
            self.b = self.a  # an array still: two refs

    bare = Bare()
    assert isinstance(bare.a, rx.Ref) and bare.a is not bare.b


def test_a_field_that_is_not_set_is_the_error_of_equinox():
    class Forgetful(rx.Module):
        ref: rx.Param[Array]

        def __init__(self):
            pass

    with raises(TypeError, match="Field 'ref' was not initialized"):
        Forgetful()


def test_an_unknown_attribute_is_the_error_of_equinox():
    class Wrong(rx.Module):
        ref: rx.Param[Array]

        def __init__(self):
            self.ref = jnp.ones(1)
            self.other = jnp.ones(1)  # pyright: ignore[reportAttributeAccessIssue] (meant)

    with raises(AttributeError, match="other"):
        Wrong()


# After `__init__`


def test_assigning_to_a_ref_field_is_refused_and_both_remedies_run():
    linear = make_linear()
    with raises(
        dataclasses.FrozenInstanceError,
        match=(
            r"cannot assign to field 'weight': a module is frozen after its `__init__`\. "
            r"To change the value of the ref, write `\.weight\.value = \.\.\.`; to put "
            r"another ref there, use `eqx\.tree_at\(lambda m: m\.weight, module, ref\)`"
        ),
    ):
        linear.weight = jnp.ones((2, 3))
    linear.weight.value = jnp.ones((2, 3))
    ref = rx.Ref(jnp.zeros((2, 3)), "params")
    assert eqx.tree_at(lambda m: m.weight, linear, ref).weight is ref


def test_a_refused_assignment_leaves_the_ref_that_was_given_as_it_is():
    ref = rx.Ref(jnp.ones((2, 3)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_linear().weight = ref
    assert ref.collection is None and ref.name is None


def test_assigning_to_another_field_is_the_error_of_equinox():
    class Holder(rx.Module):
        plain: int

    with raises(dataclasses.FrozenInstanceError, match="field 'plain'$"):
        Holder(1).plain = 2  # pyright: ignore[reportAttributeAccessIssue] (meant)


# `__post_init__` and `__check_init__`


def test_post_init_may_set_and_write_refs():
    class Holder(rx.Module):
        scale: rx.Param[Array]
        derived: rx.Ref[Array] = rx.field(collection="cache", init=False)

        def __post_init__(self):
            self.derived = 2 * self.scale.value
            self.scale.value += 1

    holder = Holder(jnp.ones(1))
    assert holder.derived.value == 2.0 and holder.derived.collection == "cache"
    assert holder.scale.value == 2.0


def test_check_init_of_each_class_sees_refs():
    seen = []

    class Base(rx.Module):
        ref: rx.Param[Array]

        def __check_init__(self):
            seen.append(("Base", self.ref.value))

    class Derived(Base):
        def __check_init__(self):
            seen.append(("Derived", self.ref.value))

    Derived(1.0)  # pyright: ignore[reportArgumentType] (a scalar becomes an array)
    assert sorted(name for name, _ in seen) == ["Base", "Derived"]


def test_an_error_in_check_init_is_raised():
    class Positive(rx.Module):
        ref: rx.Param[Array]

        def __check_init__(self):
            if not jnp.all(self.ref.value > 0):
                raise ValueError("must be positive")

    Positive(jnp.ones(1))
    with raises(ValueError, match="must be positive"):
        Positive(jnp.zeros(1))


# Inheritance


def test_super_init_sets_the_fields_of_the_base():
    class Scaled(Linear):
        scale: rx.Param[Float[Array, ""]]

        def __init__(self, n_in, n_out, *, key):
            super().__init__(n_in, n_out, key=key)
            self.scale = jnp.array(2.0)

        def __call__(self, x):
            return self.scale[...] * super().__call__(x)

    scaled = Scaled(3, 2, key=jr.key(0))
    assert scaled.weight.name == "Scaled.weight"
    assert jnp.allclose(scaled(jnp.ones(3)), 2 * make_linear()(jnp.ones(3)))
    assert scaled.uses.value == 1


def test_a_generated_init_has_the_fields_of_the_base_first():
    class Base(rx.Module):
        a: rx.Param[Array]

    class Derived(Base):
        b: rx.BatchStat[Array]

    derived = Derived(jnp.ones(1), jnp.zeros(2))
    assert derived.a.shape == (1,) and derived.b.collection == "batch_stats"


def test_a_field_may_be_overridden_with_another_collection():
    class Base(rx.Module):
        ref: rx.Param[Array]
        gone: rx.Param[Array]

    class Derived(Base):
        ref: rx.Cache[Array]
        gone: int  # pyright: ignore[reportIncompatibleVariableOverride] (no ref any more)

    derived = Derived(jnp.ones(1), 3)
    assert derived.ref.collection == "cache" and derived.gone == 3
    assert Base(jnp.ones(1), jnp.ones(1)).ref.collection == "params"


def test_a_plain_field_may_become_a_ref():
    class Base(rx.Module):
        value: Any

    class Derived(Base):
        value: rx.Param[Array]

    assert isinstance(Derived(jnp.ones(1)).value, rx.Ref)
    assert not isinstance(Base(jnp.ones(1)).value, rx.Ref)


def test_a_module_of_refs_may_derive_from_a_bare_equinox_module():
    class Bare(eqx.Module):
        size: int
        uses: rx.Ref[int] = rx.field(collection="counts")

    class Derived(Bare, rx.Module):
        # To a checker the field specifier of a bare module is Equinox's alone.
        weight: rx.Param[Array] = rx.field(kw_only=True)

    derived = Derived(3, 0, weight=jnp.ones(1))
    assert derived.size == 3 and derived.uses.collection == "counts"
    assert derived.weight.collection == "params"


def test_abstract_variables():
    class Abstract(rx.Module):
        weight: eqx.AbstractVar[rx.Ref[Array]]

        def double(self):
            return 2 * self.weight.value

    class Concrete(Abstract):
        weight: rx.Param[Array]

    with raises(TypeError, match="abstract"):
        Abstract()  # pyright: ignore[reportCallIssue] (meant)
    concrete = Concrete(jnp.ones(1))
    assert concrete.weight.collection == "params" and concrete.double() == 2.0


def test_strict_modules():
    class Abstract(rx.Module, strict=True):
        ref: eqx.AbstractVar[rx.Ref[Array]]

        @abc.abstractmethod
        def __call__(self) -> Array: ...

    class Layer(Abstract, strict=True):
        ref: rx.Param[Array]

        def __call__(self):
            return self.ref.value

    assert Layer(jnp.ones(1))() == 1.0


def test_generic_modules():
    class Box(rx.Module, Generic[T]):
        item: rx.Ref[T]

    class IntBox(Box[int]):
        extra: rx.Param[Array]

    assert Box(1).item.value == 1
    assert Box[str]("a").item.value == "a"
    assert IntBox(1, jnp.ones(1)).extra.collection == "params"


# Methods and nesting


def test_a_bound_method_is_a_pytree_that_carries_refs():
    linear = make_linear()
    step = rx.filter_jit(linear.method)
    step(jnp.ones(3))
    step(jnp.ones(3))
    assert linear.uses.value == 2
    assert jax.tree.leaves(linear.method) == [linear.weight, linear.uses]


def test_a_lifted_transform_as_a_decorator_of_a_method():
    class Counter(rx.Module):
        count: rx.Ref[Int[Array, ""]]

        @rx.filter_jit
        def add(self, n):
            self.count.value += n
            return self

        @property
        def doubled(self):
            return 2 * self.count.value

        @classmethod
        def zero(cls):
            return cls(jnp.array(0))

    counter = Counter.zero()
    assert counter.add(jnp.array(2)).count is counter.count
    assert counter.doubled == 4


def test_modules_nest_and_share_through_containers():
    class Stack(rx.Module):
        layers: list[Linear]
        by_name: dict[str, Linear]
        head: Any

        def __init__(self, key):
            layer = Linear(2, 2, key=key)
            self.layers = [layer, layer]
            self.by_name = {"again": layer}
            self.head = functools.partial(layer, jnp.ones(2))

    stack = Stack(jr.key(0))
    places = rx.aliases(stack)[stack.layers[0].weight]
    assert places[:3] == (
        "layers.0.weight",
        "layers.1.weight",
        "by_name.again.weight",
    )
    rx.filter_jit(lambda s: s.layers[1](jnp.ones(2)))(stack)
    assert stack.by_name["again"].uses.value == 1


def test_a_module_made_inside_a_lifted_transform_has_refs_that_live_outside():
    linear = rx.filter_jit(Linear)(3, 2, key=jr.key(0))
    assert jnp.allclose(linear.weight.value, make_linear().weight.value)
    linear.weight.value = jnp.zeros((2, 3))
    assert linear.weight.name == "Linear.weight"


def test_a_named_tuple_stays_one_where_a_tuple_of_refs_is_declared():
    class Ends(NamedTuple):
        first: Any
        last: Any

    class Line(rx.Module):
        ends: tuple[rx.Param[Array], rx.Param[Array]]

    line = Line(Ends(jnp.zeros(2), jnp.ones(2)))
    assert isinstance(line.ends, Ends)
    assert line.ends.last.name == "Line.ends[1]" and line.ends.last[0] == 1.0


def test_items_of_a_container_may_be_left_out_or_be_no_refs():
    class Layers(rx.Module):
        layers: tuple[rx.Param[Array] | None, int, rx.Param[Array]]
        more: list[rx.Param[Array]] | None = None

    # A static checker knows only that a whole field takes values.
    make: Any = Layers
    layers = make((None, 3, jnp.ones(2)))
    assert layers.layers[:2] == (None, 3) and layers.more is None
    assert isinstance(layers.layers[2], rx.Ref)
    (more,) = make((None, 3, jnp.ones(2)), [jnp.ones(2)]).more
    assert more.collection == "params"


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_a_copy_is_frozen_and_is_freed(duplicate):
    twin = duplicate(make_linear())
    with raises(dataclasses.FrozenInstanceError, match=r"write `\.weight\.value"):
        twin.weight = jnp.zeros((2, 3))
    assert twin(jnp.ones(3)).shape == (2,)
    alive = weakref.ref(twin)
    del twin
    gc.collect()
    assert alive() is None
