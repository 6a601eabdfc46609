"""Kinds of arrays: how loops and branches compare arrays of two traces, and convert one to
the other."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from .._core import _jax


class Kind(NamedTuple):
    """The parts of the type of an array that a loop must preserve.

    - `weak`: whether it came from a Python scalar;
    - `varies`: the mesh axes of a running `shard_map` along which it may differ;
    - `split`: for each of its axes, the explicit mesh axes that split it; `()` if it is not
        split.
    """

    shape: tuple[int, ...]
    dtype: Any
    weak: bool
    varies: frozenset[Any] = frozenset()
    split: tuple[Any, ...] = ()

    def __repr__(self) -> str:
        struct = jax.ShapeDtypeStruct(self.shape, self.dtype)
        text = eqx.tree_pformat(struct, struct_as_array=True)
        if self.split:
            text += f" split by `P({', '.join(map(repr, self.split))})`"
        return text


def kind_of(aval: Any) -> Kind:
    return Kind(
        aval.shape,
        aval.dtype,
        getattr(aval, "weak_type", False),
        _jax.varies_over(aval),
        _jax.split_of(aval),
    )


def join_kinds(kinds: Iterable[Kind]) -> Kind | None:
    """The kind that all of these can be converted to without loss, or `None`.

    Only weakly typed arrays are converted, as everywhere in JAX: `0.0` to `bfloat16`. And a
    value that is the same in all shards can be used as one per shard.
    """
    kinds = list(kinds)
    varies = frozenset().union(*(kind.varies for kind in kinds))
    joined, *rest = (kind._replace(varies=varies) for kind in kinds)
    for kind in rest:
        if (kind.shape, kind.split) != (joined.shape, joined.split):
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
    """Converts an array to this kind, which `join_kinds` has found possible."""
    own = kind_of(jax.typeof(x))
    if kind.varies != own.varies:
        x = jax.lax.pcast(x, tuple(kind.varies - own.varies), to="varying")
        own = own._replace(varies=kind.varies)
    if own == kind or (x.dtype == kind.dtype and kind.weak):
        return x
    return jax.lax.convert_element_type(x, kind.dtype)
