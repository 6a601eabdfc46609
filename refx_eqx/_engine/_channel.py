"""The channel of a ref: floating-point arrays that encode its value exactly.

JAX's backward pass only returns cotangents, and only a floating-point array has one. See
`_backward.py` for the use of channels.
"""

from typing import Any

import jax
import jax.numpy as jnp

from .._core import _jax


def encode(arrays: Any) -> Any:
    """Encodes the arrays of the value of a ref exactly as floating-point arrays."""
    return jax.tree.map(lambda x: _encode(jnp.asarray(x)), arrays)


def _encode(x: Any) -> list[Any]:
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return [x]
    if x.dtype == jnp.bool_:
        return [x.astype(jnp.float32)]
    # A `float32` represents sixteen bits exactly.
    bits = jax.lax.bitcast_convert_type(x, _unsigned(x.dtype))
    shifts = range(0, 8 * x.dtype.itemsize, 16)
    return [((bits >> s) & 0xFFFF).astype(jnp.float32) for s in shifts]


def _unsigned(dtype: Any) -> Any:
    return jnp.dtype(f"uint{8 * dtype.itemsize}")


def decode(channel: Any, like: Any) -> Any:
    """Decodes to arrays with the structure and dtypes of `like`."""
    return jax.tree.map(_decoded_like, like, channel)


def _decoded_like(like: Any, pieces: list[Any]) -> Any:
    like = jnp.asarray(like)
    decoded = _decode(pieces, like.dtype)
    # Cotangents are never weakly typed, but an array that no rule wrote must not change
    # type.
    return _jax.as_weak(decoded) if jax.typeof(like).weak_type else decoded


def _decode(pieces: list[Any], dtype: Any) -> Any:
    if jnp.issubdtype(dtype, jnp.inexact):
        return pieces[0]
    if dtype == jnp.bool_:
        return pieces[0] != 0
    unsigned = _unsigned(dtype)
    bits = sum(
        (piece.astype(unsigned) << (16 * i) for i, piece in enumerate(pieces)),
        jnp.zeros((), unsigned),
    )
    return jax.lax.bitcast_convert_type(bits, dtype)


def has_channel(arrays: Any) -> bool:
    """Whether these can have a channel: `jax.random` keys cannot."""
    dtypes = [jnp.asarray(x).dtype for x in jax.tree.leaves(arrays)]
    return not any(jnp.issubdtype(dtype, jax.dtypes.extended) for dtype in dtypes)
