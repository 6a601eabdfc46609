"""What an array is apart from its numbers: how a loop or a choice compares the arrays of
two traces, and converts one to the other."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp


__tracebackhide__ = True


class Kind(NamedTuple):
    """The shape and dtype of an array, and whether it came from a Python scalar."""

    shape: tuple[int, ...]
    dtype: Any
    weak: bool

    def __repr__(self) -> str:
        struct = jax.ShapeDtypeStruct(self.shape, self.dtype)
        return eqx.tree_pformat(struct, struct_as_array=True)


def kind_of(aval: Any) -> Kind:
    return Kind(aval.shape, aval.dtype, getattr(aval, "weak_type", False))


def join_kinds(kinds: Iterable[Kind]) -> Kind | None:
    """The kind that all of these can be converted to without loss; `None` if there is none.

    Only a weakly typed array is converted, as everywhere in JAX: `0.0` to `bfloat16`.
    """
    joined, *rest = kinds
    for kind in rest:
        if kind.shape != joined.shape:
            return None
        if kind.dtype == joined.dtype:
            joined = joined._replace(weak=joined.weak and kind.weak)
            continue
        low, high = sorted([joined, kind], key=_order)
        if _order(low) == _order(high):
            low, high = (low, high) if low.weak else (high, low)
        if not low.weak:
            return None
        joined = high
    return joined


def _order(kind: Kind) -> int:
    order = [jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating]
    found = (i for i, of in enumerate(order) if jnp.issubdtype(kind.dtype, of))
    return next(found, -1)


def convert(x: Any, kind: Kind) -> Any:
    """An array as this kind: `join_kinds` has found that it can be."""
    if kind_of(jax.typeof(x)) == kind or (x.dtype == kind.dtype and kind.weak):
        return x
    return jax.lax.convert_element_type(x, kind.dtype)
