"""Common parts of layers that compute the weight of another layer."""

from typing import Any

import equinox as eqx
from jaxtyping import Array

from .._core._ref import like, Ref


def weight_of(layer: Any, name: str) -> Array:
    """The value of the weight with this name."""
    weight = _weight(layer, name)
    return weight.value if isinstance(weight, Ref) else weight


def with_weight(layer: Any, name: str, value: Array) -> Any:
    """The same layer with another weight. All other refs are unchanged."""
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
        "layer holds its weight, with `weight_name=`."
    )
