"""What a type checker sees of a field that holds a ref. Checked, never run."""

from typing import assert_type, Generic, TypeVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import refx_eqx as rx


T = TypeVar("T")


class Linear(rx.Module):
    weight: rx.Param[Float[Array, "out in"]]
    bias: rx.Param[Float[Array, "out"]] | None
    uses: rx.Ref[Int[Array, ""]] = rx.field(collection="counts")

    def __init__(self, weight: Array, bias: Array | None = None):
        self.weight = weight
        self.bias = bias
        self.uses = jnp.array(0)

    def __call__(self, x: Array) -> Array:
        self.uses.value += 1
        return self.weight[...] @ x


class Pair(rx.Module):
    first: rx.Param[Array]
    second: rx.Param[Array]
    name: str = eqx.field(static=True, default="pair")


class Options(rx.Module):
    converted: rx.Param[Array] = rx.field(converter=jnp.asarray)
    made: rx.Cache[Array] = rx.field(init=False)
    default: rx.Ref[int] = rx.field(default=0)
    factory: rx.BatchStat[Array] = rx.field(default_factory=lambda: jnp.zeros(3))
    keyword: rx.Param[Array] = rx.field(kw_only=True)

    def __post_init__(self) -> None:
        self.made = jnp.zeros(3)


class Optional(rx.Module):
    bias: rx.Param[Array] | None

    def __init__(self, use_bias: bool, x: Array):
        self.bias = None
        self.bias = x
        self.bias = rx.Ref(x)
        self.bias = x if use_bias else None


class DefaultInit(rx.Module):
    bias: rx.Param[Array] | None = None


class Trainable(rx.Ref[T]):
    def double(self) -> None: ...


class Adapter(rx.Module):
    low_rank: Trainable[Array]


class Box(rx.Module, Generic[T]):
    item: rx.Ref[T]


class Abstract(rx.Module):
    weight: eqx.AbstractVar[rx.Ref[Array]]


class Concrete(Abstract):
    weight: rx.Param[Array]  # pyright: ignore[reportIncompatibleVariableOverride]


class Bare(eqx.Module):
    uses: rx.Ref[Array] = rx.field(collection="counts")


def reading(model: Linear) -> None:
    assert_type(model.weight, rx.Ref[Array])
    assert_type(model.weight.value, Array)
    assert_type(model.weight[...], Array)
    assert_type(model.weight[0, :], Array)
    assert_type(model.bias, rx.Ref[Array] | None)
    assert_type(model(model.weight.value), Array)


def writing(model: Linear, x: Array) -> None:
    model.weight.value = x
    model.weight.value += 1.0
    model.weight[...] = x
    model.weight[0] = 1.0
    model.weight[:, 0] = x


def constructing(x: Array) -> None:
    Pair(x, x)
    Pair(rx.Ref(x), rx.Ref(x, "params"))
    assert_type(Linear(x), Linear)
    Options(x, keyword=x)
    Options(converted=x, default=rx.Ref(1), factory=x, keyword=rx.Ref(x))
    assert_type(Options(x, keyword=x).made, rx.Ref[Array])
    Bare(x)
    Concrete(x)
    DefaultInit()
    DefaultInit(rx.Ref(x))


def subclasses(x: Array) -> None:
    adapter = Adapter(x)
    assert_type(adapter.low_rank, Trainable[Array])
    adapter.low_rank.double()
    Adapter(Trainable(x, "lora"))


def generics() -> None:
    assert_type(Box(1), Box[int])
    assert_type(Box(1).item.value, int)
    Box[int](rx.Ref(1))


def a_ref_by_itself(x: Array) -> None:
    ref = rx.Ref(x, collection="params")
    assert_type(ref, rx.Ref[Array])
    assert_type(ref.value, Array)
    assert_type(ref.name, str | None)
    assert_type(ref.shape, tuple[int, ...])
    assert_type(rx.Ref({"a": 1}).value, dict[str, int])
