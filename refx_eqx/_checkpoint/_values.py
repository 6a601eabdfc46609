"""How a file stores a value: an array, and a note of what an array cannot represent.

The notes, each where it applies:

- `{"key": implementation}`: a `jax.random` key; the array is its data.
- `{"weak": true}`: the array is weakly typed.
- `{"dtype": text}`: a dtype that safetensors does not have. The last axis of the array has
    the bytes of each number.
- `{"value": x}`, `{"complex": [real, imaginary]}`: a Python number or a string, without an
    array.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from .._core import _jax
from .._core._errors import StructureError, TraceLevelError
from ._file import has_dtype, METADATA, Stored


Note = dict[str, Any]


def encoded(name: str, value: Any) -> tuple[Stored | None, Note]:
    """The array and the note of a value.

    **Raises:**

    - `StructureError`, `TraceLevelError`: if a file cannot hold it.
    """
    shown = name or "the root of the tree"
    if name == METADATA:
        raise StructureError(
            f"Cannot save: {name!r} cannot be a name in a safetensors file. Rename the key "
            "of the ref."
        )
    if not _is_encodable(name):
        raise StructureError(
            f"Cannot save: {name!r} cannot be a name in a file: it has half of a character, "
            "which UTF-8 cannot encode. Rename the key of the ref."
        )
    if _jax.is_tracer(value):
        raise TraceLevelError(
            f"Cannot save: the value at `{shown}` is a tracer, which has no numbers yet. "
            "Save outside the transformed function, after it has returned."
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
        f"Cannot save: `{shown}` holds {eqx.tree_pformat(value)}, but a file can only hold "
        "arrays, numbers and strings. Exclude it with `filter`, or move it out of the ref."
    )


def _is_encodable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _encoded_jax_array(name: str, value: jax.Array) -> tuple[Stored, Note]:
    if not value.is_fully_addressable:
        raise StructureError(
            f"Cannot save: the array at `{name}` is spread over several processes, but a "
            "file is written by one of them. Save `rx.state_dict(tree)` with Orbax."
        )
    if not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return _encoded_array(name, value, {"weak": True} if value.weak_type else {})
    implementation = jr.key_impl(value)
    if not isinstance(implementation, str):
        raise StructureError(
            f"Cannot save: the key at `{name}` has an implementation without a registered "
            "name. Hold its `jax.random.key_data` in the ref."
        )
    return _encoded_array(name, jr.key_data(value), {"key": implementation})


def _encoded_array(name: str, value: Any, note: Note) -> tuple[Stored, Note]:
    dtype = np.dtype(value.dtype)
    if has_dtype(dtype):
        return Stored(value, dtype, value.shape), note
    # To NumPy, a foreign dtype has kind "V"; but it has a name.
    text = dtype.name if dtype.kind == "V" else dtype.str
    if _dtype_of(text) != dtype:
        raise StructureError(
            f"Cannot save: the array at `{name}` has dtype {dtype}, which a file cannot "
            "hold. Exclude it with `filter`, or move it out of the ref."
        )
    as_bytes = Stored(_Bytes(value), np.dtype(np.uint8), (*value.shape, dtype.itemsize))
    return as_bytes, {**note, "dtype": text}


class _Bytes:
    """An array whose bytes NumPy fetches when needed."""

    def __init__(self, array: Any):
        self.array = array

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.ascontiguousarray(self.array).reshape(-1).view(np.uint8)


def _dtype_of(text: str) -> np.dtype | None:
    """The dtype with this name, if there is one and it is not `object`."""
    try:
        dtype = jnp.dtype(text)
    except TypeError:
        return None
    return None if dtype.hasobject else dtype


def decoded(array: np.ndarray | None, note: Note, old: Any) -> Any:
    """Decodes an array and a note to a value that replaces `old`.

    **Raises:**

    - `ValueError`, `TypeError`, `KeyError`: if the two do not match.
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
    return array  # `load_state_dict` converts it to what the ref holds


def _put_like(new: jax.Array, old: Any) -> jax.Array:
    # An array of keys is a `jax.Array` too, of a different class.
    is_array = isinstance(old, jax.Array) and not _jax.is_tracer(old)
    return jax.device_put(new, old.sharding) if is_array and old.committed else new
