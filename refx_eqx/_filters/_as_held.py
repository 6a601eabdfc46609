"""Converts a new value to what its ref holds, where that changes no number."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np

from .._core import _jax
from .._core._on_mesh import put, put_copy
from .._trees._changes import try_leaves


def is_key(leaf: Any) -> bool:
    is_array = isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct))
    return is_array and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def sharding_of(old: Any) -> Any:
    """The sharding for the replacement of `old`: the one it was given, or `None`."""
    if isinstance(old, jax.ShapeDtypeStruct):
        return old.sharding
    # An array of keys is a `jax.Array` too, of a different class.
    is_placed = isinstance(old, jax.Array) and not _jax.is_tracer(old) and old.committed
    return old.sharding if is_placed else None


def storable(leaf: Any) -> Any:
    """A leaf as any file format takes it: the data of a typed key."""
    return jr.key_data(leaf) if is_key(leaf) else leaf


def number_as_held(old: Any, new: Any) -> Any:
    """A Python number that replaces an array, as an array like it; anything else, and what
    does not fit, unchanged.

    As in `x.at[...].set(0.1)`, a Python number has no precision of its own, but a kind
    (bool, integer, floating-point, complex), and must be in the range of the dtype.
    """
    if not is_number(new) or not _has_dtype(old) or is_key(old) or old.shape:
        return new
    number = np.asarray(new)
    if not _is_same_kind(number.dtype, old.dtype):
        return new
    with np.errstate(over="ignore"):
        array = number.astype(old.dtype)
    if jnp.issubdtype(old.dtype, jnp.inexact):
        fits = np.isfinite(array) or not np.isfinite(number)
    else:
        fits = int(array) == new  # else it wraps around
    if not fits:
        return new
    if isinstance(old, np.ndarray | np.generic):
        return array[()] if isinstance(old, np.generic) else array
    new = put_copy(array, sharding_of(old))
    return _jax.as_weak(new) if getattr(old, "weak_type", False) else new


def leaf_as_held(old: Any, new: Any) -> Any:
    """As `number_as_held`, and for arrays: converted to the precision, the sharding and the
    class of what they replace."""
    if is_number(new):
        return number_as_held(old, new)
    if _jax.is_tracer(new) or not eqx.is_array(new):
        return new
    if is_number(old):
        same = new.ndim == 0 and not is_key(new) and type(new.item()) is type(old)
        return new.item() if same else new
    if isinstance(old, str):  # which NumPy's files have as an array
        return new.item() if new.ndim == 0 and new.dtype.kind == "U" else new
    if not isinstance(old, (jax.Array, jax.ShapeDtypeStruct)):
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
    return put_copy(new, sharding)


def as_held(old: Any, new: Any, convert: Callable[[Any, Any], Any]) -> Any:
    """`new`, with its leaves converted, given the leaf of `old` that each replaces."""
    if try_leaves(old) is None:
        return new
    old_leaves, old_def = jtu.tree_flatten(old)
    new_leaves, new_def = jtu.tree_flatten(new)
    if old_def != new_def:
        return new
    return jtu.tree_unflatten(new_def, map(convert, old_leaves, new_leaves))


def is_number(x: Any) -> bool:
    """Whether `x` is a Python number. (`np.float64` is a `float` too.)"""
    is_python = isinstance(x, bool | int | float | complex)
    return is_python and not isinstance(x, np.generic)


def _has_dtype(x: Any) -> bool:
    return eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)


def _is_same_kind(a: Any, b: Any) -> bool:
    kinds = (np.bool_, jnp.integer, jnp.floating, jnp.complexfloating)
    return any(jnp.issubdtype(a, kind) and jnp.issubdtype(b, kind) for kind in kinds)


def _as_key(old: Any, data: Any) -> Any:
    """The typed keys that `old` stands for, from their data; unchanged if it is not the
    data of such keys."""
    impls = []

    def data_of(key: Any) -> Any:
        # A tracer has an implementation; a shape has not.
        impls.append(jr.key_impl(key))
        return jr.key_data(key)

    wanted = jax.eval_shape(data_of, old)
    if (data.dtype, data.shape) != (wanted.dtype, wanted.shape):
        return data
    return jr.wrap_key_data(jnp.array(data), impl=impls[0])


def _converted(new: Any, dtype: Any) -> Any:
    """`new` in this dtype, if no number changes; else unchanged."""
    if is_key(new):
        return new
    array = np.asarray(new)
    if array.dtype.type is np.void and dtype.kind == "V":
        # NumPy's files have no name for `bfloat16` and the like, and return bytes.
        same_size = array.dtype.itemsize == dtype.itemsize
        return array.view(dtype) if array.dtype.fields is None and same_size else new
    if not _is_same_kind(array.dtype, dtype):
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
