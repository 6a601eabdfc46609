"""Where the arrays in refs are, as far as these are on a mesh."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.tree_util as jtu
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding

from . import _jax


__tracebackhide__ = True


Shardings = tuple[Any, ...]
"""Where each array in the refs of a call is: `None` if that is one device. Empty if it is
for all. On a mesh with explicit axes it is a part of the types of arrays, and `None` here too."""


def on_mesh(arrays: Iterable[Any]) -> Shardings:
    """Where these are. An array or its shape: all else is on no mesh."""
    found = tuple(map(_on_mesh, arrays))
    return found if any(found) else ()


def _on_mesh(x: Any) -> Any:
    if type(x) is not _jax.ConcreteArray and not isinstance(x, jax.ShapeDtypeStruct):
        return None
    sharding = x.sharding
    if type(sharding) is not NamedSharding:
        return None
    if sharding.memory_kind not in (None, "device"):
        return None  # a constraint says nothing of it
    is_auto = all(kind == AxisType.Auto for kind in sharding.mesh.axis_types)
    return sharding if is_auto else None


def has_moved(old: Any, new: Any) -> bool:
    """Whether a value is elsewhere than the one that it replaces."""
    if type(old) is type(new) is _jax.ConcreteArray:
        before, after = old.sharding, new.sharding
        if before is after or type(before) is type(after) is SingleDeviceSharding:
            return False
        return before != after
    return on_mesh(jtu.tree_leaves(old)) != on_mesh(jtu.tree_leaves(new))


def put(x: Any, sharding: Any) -> Any:
    """An array at another place, with buffers of its own: those of a ref may be donated.

    `jax.device_put` shares a buffer that is already where it belongs. (With `may_alias=False`
    too, if an array of one device is replicated: seen in JAX 0.12.)
    """
    if not isinstance(x, jax.Array) or _jax.is_tracer(x):
        return jax.device_put(x, sharding)
    if x.sharding == sharding and getattr(x, "committed", False):
        return x  # the same object, and who holds that is known
    before, after = x.sharding.shard_shape(x.shape), sharding.shard_shape(x.shape)
    return jax.device_put(x.copy() if before == after else x, sharding)
