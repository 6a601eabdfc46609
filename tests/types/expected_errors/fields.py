"""What a type checker must refuse. `# E: rule | code`: of pyright and of mypy."""

from typing import assert_type

import equinox as eqx
from jaxtyping import Array, Float

import refx_eqx as rx


class Linear(rx.Module):
    weight: rx.Param[Float[Array, "out in"]]

    def __init__(self, weight: Array):
        self.weight = weight

    def wrong(self) -> None:
        self.weight = "no"  # E: reportAttributeAccessIssue | assignment
        self.weight.value = "no"  # E: reportAttributeAccessIssue | assignment


class Auto(rx.Module):
    weight: rx.Param[Array]
    keyword: rx.Ref[int] = rx.field(kw_only=True)
    inside: rx.Ref[int] = rx.field(init=False)
    default: rx.Ref[int] = 0  # E: reportAssignmentType | assignment


class Optional(rx.Module):
    bias: rx.Param[Array] | None

    def wrong(self) -> None:
        self.bias = "no"  # E: reportAttributeAccessIssue | assignment


class Bare(eqx.Module):
    uses: rx.Ref[Array] = rx.field(collection="counts")


def constructing(x: Array) -> None:
    Linear("no")  # E: reportArgumentType | arg-type
    Auto("no", keyword=1)  # E: reportArgumentType | arg-type
    Auto(rx.Ref("no"), keyword=1)  # E: reportArgumentType | arg-type
    Auto(x, keyword="no")  # E: reportArgumentType | arg-type
    Auto(x)  # E: reportCallIssue | call-arg
    Auto(x, keyword=1, inside=2)  # E: reportCallIssue | call-arg
    Bare("no")  # E: reportArgumentType | arg-type
    # The one limit: in a generated `__init__` a union is checked as it is written.
    Optional(x)  # E: reportArgumentType | arg-type


def reading(model: Linear) -> None:
    model.weight.sum()  # E: reportAttributeAccessIssue | attr-defined
    # An `assert_type` fails for another type, and for `Any`.
    assert_type(model.weight, rx.Ref[int])  # E: reportAssertTypeFailure | assert-type
    plain = rx.snapshot(model)
    assert_type(plain, Linear)  # E: reportAssertTypeFailure | assert-type


def writing(model: Linear) -> None:
    weight = model.weight
    weight.value = 1.0  # E: reportAttributeAccessIssue | assignment
    weight[...] = "no"  # E: reportCallIssue, reportArgumentType | call-overload
    weight["a"] = 1.0  # E: reportCallIssue, reportArgumentType | call-overload
    weight.shape = (1, 2)  # E: reportAttributeAccessIssue | misc
    weight.collection = "other"  # E: reportAttributeAccessIssue | misc


def passing(ref: rx.Ref[Array]) -> None:
    def of_ints(ref: rx.Ref[int]) -> None: ...

    of_ints(ref)  # E: reportArgumentType | arg-type
