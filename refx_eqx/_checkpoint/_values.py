"""What a value is in a file: an array, and a note of what an array cannot say.

The notes, each where it applies:

- `{"key": implementation}`: a key of `jax.random`; its data is the array.
- `{"weak": true}`: the array is weakly typed.
- `{"dtype": text}`: a dtype that safetensors does not have. The array has the bytes of each
  number along a last axis.
- `{"value": x}`, `{"complex": [real, imaginary]}`: a number of Python or a text. There is no
  array.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from .._core import _jax
from .._core._errors import DonatedError, StructureError, TraceLevelError
from ._file import has_dtype, METADATA, Stored


Note = dict[str, Any]


def encoded(name: str, value: Any) -> tuple[Stored | None, Note]:
    """The array and the note of a value.

    **Raises:**

    - `StructureError`, `DonatedError`, `TraceLevelError`: if a file cannot hold it.
    """
    shown = name or "the root of the tree"
    if name == METADATA:
        raise StructureError(
            f"Cannot save: {name!r} cannot be a name in a safetensors file. Rename the key "
            "of the ref."
        )
    if _jax.is_tracer(value):
        raise TraceLevelError(
            f"Cannot save: the value at `{shown}` is a tracer, which has no numbers yet. "
            "Save outside of the transformed function, when it has returned."
        )
    if isinstance(value, jax.Array):
        return _encoded_jax_array(shown, value)
    if isinstance(value, (np.ndarray, np.generic)):
        return _encoded_array(shown, value, {})
    if type(value) is complex:
        return None, {"complex": [value.real, value.imag]}
    if type(value) in (bool, int, float, str):
        return None, {"value": value}
    raise StructureError(
        f"Cannot save: `{shown}` holds {eqx.tree_pformat(value)}, and a file holds arrays, "
        "numbers and texts. Leave it out by `filter`, or put it outside of the refs."
    )


def _encoded_jax_array(name: str, value: jax.Array) -> tuple[Stored, Note]:
    if _jax.is_deleted(value):
        raise DonatedError(
            f"Cannot save: the array at `{name}` was given away to a call that donates its "
            "arguments, and is deleted. Save what that call returned."
        )
    if not value.is_fully_addressable:
        raise StructureError(
            f"Cannot save: the array at `{name}` is spread over several processes, and one "
            "of them writes one file. Save `rx.state_dict(tree)` with Orbax."
        )
    if not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return _encoded_array(name, value, {"weak": True} if value.weak_type else {})
    implementation = jr.key_impl(value)
    if not isinstance(implementation, str):
        raise StructureError(
            f"Cannot save: the key at `{name}` is of an implementation without a name to "
            "find it by. Hold `jax.random.key_data` of it in the ref."
        )
    return _encoded_array(name, jr.key_data(value), {"key": implementation})


def _encoded_array(name: str, value: Any, note: Note) -> tuple[Stored, Note]:
    dtype = np.dtype(value.dtype)
    if has_dtype(dtype):
        return Stored(value, dtype, value.shape), note
    # To NumPy, a dtype that is not its own is of kind "V"; but it has a name.
    text = dtype.name if dtype.kind == "V" else dtype.str
    if _dtype_of(text) != dtype:
        raise StructureError(
            f"Cannot save: the array at `{name}` is of dtype {dtype}, which a file cannot "
            "hold. Leave it out by `filter`, or put it outside of the refs."
        )
    as_bytes = Stored(_Bytes(value), np.dtype(np.uint8), (*value.shape, dtype.itemsize))
    return as_bytes, {**note, "dtype": text}


class _Bytes:
    """An array whose bytes NumPy may ask for, when their turn comes."""

    def __init__(self, array: Any):
        self.array = array

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.ascontiguousarray(self.array).reshape(-1).view(np.uint8)


def _dtype_of(text: str) -> np.dtype | None:
    """The dtype of that name, if it has one and is no object."""
    try:
        dtype = jnp.dtype(text)
    except TypeError:
        return None
    return None if dtype.hasobject else dtype


def decoded(array: np.ndarray | None, note: Note, old: Any) -> Any:
    """The value of an array and a note again, to replace `old`.

    **Raises:**

    - `ValueError`, `TypeError`, `KeyError`: if the two do not fit each other.
    """
    if array is None:
        return complex(*note["complex"]) if "complex" in note else note["value"]
    if "dtype" in note:
        dtype = _dtype_of(note["dtype"])
        if dtype is None:
            raise ValueError(f"there is no dtype {note['dtype']!r}")
        array = array.reshape(-1).view(dtype).reshape(array.shape[:-1])
    if "key" in note:
        return _put_like(jr.wrap_key_data(jnp.asarray(array), impl=note["key"]), old)
    if isinstance(old, np.generic):
        return array[()]
    if "weak" in note and isinstance(old, (jax.Array, jax.ShapeDtypeStruct)):
        return _put_like(_jax.as_weak(jnp.asarray(array)), old)
    return array  # `load_state_dict` makes of it what the ref holds


def _put_like(new: jax.Array, old: Any) -> jax.Array:
    # An array of keys is a `jax.Array` too, of a class of its own.
    is_array = isinstance(old, jax.Array) and not _jax.is_tracer(old)
    return jax.device_put(new, old.sharding) if is_array and old.committed else new
