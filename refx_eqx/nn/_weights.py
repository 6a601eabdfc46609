"""A layer whose weight is computed: what the layers around a layer have in common."""

from typing import Any

import equinox as eqx
from jaxtyping import Array

from .._core._ref import like, Ref


def weight_of(layer: Any, name: str) -> Array:
    """The value of the weight of this name."""
    weight = _weight(layer, name)
    return weight.value if isinstance(weight, Ref) else weight


def with_weight(layer: Any, name: str, value: Array) -> Any:
    """The same layer with a weight of its own. All its other refs are those it had."""
    old = _weight(layer, name)
    new = value
    if isinstance(old, Ref):
        new = like(old, value)
    # Only at this place: the other places of a shared weight keep their ref.
    return eqx.tree_at(lambda layer: getattr(layer, name), layer, new)


def _weight(layer: Any, name: str) -> Any:
    weight = getattr(layer, name, None)
    if isinstance(weight, Ref) or eqx.is_array(weight):
        return weight
    raise ValueError(
        f"A `{type(layer).__name__}` has no ref or array `{name}`. Say which field of the "
        "layer is its weight, by `weight_name=`."
    )
