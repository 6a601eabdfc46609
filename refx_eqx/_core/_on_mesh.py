"""The shardings of the arrays in refs that are on a mesh."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding

from .._trees._changes import try_leaves
from . import _jax


Shardings = tuple[Any, ...]
"""The sharding of each array in the refs of a call: `None` if it is on one device. Empty if
all are. On a mesh with explicit axes it is part of the array types, and `None` here too."""


def on_mesh(arrays: Iterable[Any]) -> Shardings:
    """The shardings of these. Only an array or its shape can be on a mesh."""
    found = tuple(map(_on_mesh, arrays))
    return found if any(found) else ()


def _on_mesh(x: Any) -> Any:
    if type(x) is not _jax.ConcreteArray and not isinstance(x, jax.ShapeDtypeStruct):
        return None
    sharding = x.sharding
    if type(sharding) is not NamedSharding:
        return None
    if sharding.memory_kind not in (None, "device"):
        return None  # a constraint does not apply to it
    is_auto = all(kind == AxisType.Auto for kind in sharding.mesh.axis_types)
    return sharding if is_auto else None


def has_moved(old: Any, new: Any) -> bool:
    """Whether a value has another sharding than the value it replaces."""
    if type(old) is type(new) is _jax.ConcreteArray:
        before, after = old.sharding, new.sharding
        if before is after or type(before) is type(after) is SingleDeviceSharding:
            return False
        return before != after
    before = try_leaves(old)
    # Where the arrays of a value that cannot be flattened were is not known anymore.
    return before is None or on_mesh(before) != on_mesh(jtu.tree_leaves(new))


def put(x: Any, sharding: Any) -> Any:
    """An array with another sharding, and its own buffers: those of a ref may be donated.

    `jax.device_put` shares a buffer that is already in place. (Even with `may_alias=False`,
    if an array on one device is replicated: seen in JAX 0.12.)
    """
    if not isinstance(x, jax.Array) or _jax.is_tracer(x):
        return jax.device_put(x, sharding)
    if x.sharding == sharding and getattr(x, "committed", False):
        return x  # the same object, whose holders are known
    before, after = x.sharding.shard_shape(x.shape), sharding.shard_shape(x.shape)
    return jax.device_put(x.copy() if before == after else x, sharding)


def put_copy(x: np.ndarray, sharding: Any) -> jax.Array:
    """A JAX array with the numbers that a NumPy array has now; on one device if `sharding`
    is `None`.

    `jax.device_put` may share memory with NumPy, where it could be written. And
    `jnp.array(x, device=sharding)` constrains the result, which JAX refuses outside of
    `jax.set_mesh` if the mesh has explicit axes (seen in JAX 0.10).
    """
    return jnp.array(x) if sharding is None else jax.device_put(np.array(x), sharding)
