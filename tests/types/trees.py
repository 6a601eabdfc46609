"""Functions of trees give a tree of the type that they were given. Checked, never run."""

from typing import Any, assert_type

import equinox as eqx
from jaxtyping import Array

import refx_eqx as rx


class Linear(rx.Module):
    weight: rx.Param[Array]


def boundaries(model: Linear) -> None:
    assert_type(rx.deref(model), Linear)
    assert_type(rx.reref(rx.deref(model)), Linear)
    assert_type(rx.clone(model), Linear)
    assert_type(rx.clone({"a": [model]}), dict[str, list[Linear]])
    assert_type(rx.Dag(model).value, Linear)
    rx.update_refs(model, rx.deref(model))


def partitions(model: Linear) -> None:
    params, rest = rx.partition(model, "params")
    assert_type(params, Linear)
    assert_type(rx.combine(params, rest), Linear)
    part = rx.get_partition(model, rx.collection("params") | rx.path("**.weight"))
    assert_type(part, rx.FlatPartition)
    assert_type(rx.aliases(model), dict[rx.Ref[Any], tuple[str, ...]])


def contexts(model: Linear) -> None:
    with rx.mutable(rx.path("weight"), model):
        model.weight.value *= 2


def of_equinox(model: Linear) -> None:
    eqx.tree_at(lambda m: m.weight, model, rx.Ref(model.weight.value, "params"))
