"""Converts a leaf of a state to what its ref holds, where that changes no number."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np

from .._core import _jax
from .._core._on_mesh import put
from ._update import is_key, sharding_of


def storable(leaf: Any) -> Any:
    """A leaf as any file format takes it: the data of a typed key."""
    return jr.key_data(leaf) if is_key(leaf) else leaf


def as_held(old: Any, new: Any) -> Any:
    """`new`, with its arrays converted to those of `old` where that changes no number."""
    old_leaves, old_def = jtu.tree_flatten(old)
    new_leaves, new_def = jtu.tree_flatten(new)
    if old_def != new_def:
        return new
    return jtu.tree_unflatten(new_def, map(_leaf_as_held, old_leaves, new_leaves))


def _leaf_as_held(old: Any, new: Any) -> Any:
    if _jax.is_tracer(new) or not eqx.is_array(new):
        return new
    if not isinstance(old, (jax.Array, jax.ShapeDtypeStruct)):
        is_numpy = isinstance(new, (np.ndarray, np.generic))
        if is_numpy and new.ndim == 0 and type(new.item()) is type(old):
            return new.item()
        return new
    if is_key(old) and not is_key(new):
        new = _as_key(old, new)
    elif old.dtype != new.dtype:
        new = _converted(new, old.dtype)
    if (old.shape, old.dtype) != (new.shape, new.dtype):
        return new
    sharding = sharding_of(old)
    if isinstance(new, jax.Array):
        return new if sharding is None else put(new, sharding)
    # A copy: `jax.device_put` may share memory with NumPy, where it could be written.
    return jnp.array(new, device=sharding)


def _as_key(old: Any, data: Any) -> Any:
    """The typed keys that `old` stands for, from their data."""
    if data.dtype != jnp.uint32 or data.shape[: old.ndim] != old.shape:
        return data
    if not isinstance(old, jax.Array):
        # For a shape, only the name of the dtype gives the implementation: `key<fry>`.
        names = {str(jr.key(0, impl=i).dtype): i for i in ("threefry2x32", "rbg")}
        return jr.wrap_key_data(jnp.array(data), impl=names.get(str(old.dtype)))
    return jr.wrap_key_data(jnp.array(data), impl=jr.key_impl(old))


def _converted(new: Any, dtype: Any) -> Any:
    """`new` in this dtype, if no number changes; else unchanged."""
    if is_key(new):
        return new
    array = np.asarray(new)
    if array.dtype.type is np.void and dtype.kind == "V":
        # NumPy's files have no name for `bfloat16` and the like, and return bytes.
        same_size = array.dtype.itemsize == dtype.itemsize
        return array.view(dtype) if array.dtype.fields is None and same_size else new
    kinds = (jnp.integer, jnp.floating, jnp.complexfloating)
    if not any(
        jnp.issubdtype(array.dtype, kind) and jnp.issubdtype(dtype, kind)
        for kind in kinds
    ):
        return new
    with np.errstate(over="ignore", invalid="ignore"):
        converted = array.astype(dtype)
        back = converted.astype(array.dtype)
    same = (back == array) | ((back != back) & (array != array))  # NaN stays NaN
    in_range = (converted < 0) == (array < 0)  # a sign that wraps around
    return converted if np.all(same) and np.all(in_range | (array != array)) else new


def is_same_bits(a: Any, b: Any) -> bool:
    """Whether two leaves that fit the same ref are equal bit by bit, including NaNs."""
    if a is b:
        return True
    if _jax.is_tracer(a) or _jax.is_tracer(b):
        return False  # unknown before the program runs
    if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jr.key_data(a), jr.key_data(b)
    if hasattr(a, "dtype"):
        return np.asarray(a).tobytes() == np.asarray(b, a.dtype).tobytes()
    return bool(a == b)
