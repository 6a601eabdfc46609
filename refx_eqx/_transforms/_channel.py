"""The channel of a ref: floating-point arrays that encode its value, exactly.

Cotangents are all that comes out of a backward pass of JAX, and only a floating-point array
has one. What channels are for is told in `_backward.py`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import wadler_lindig as wl

from .. import _trace
from .._ref import Ref
from .._structure import join_value, split_value


_trace.register_exclusion(__file__)


class Channelled:
    """The value of a ref, and its channel: for each array, the arrays that encode it."""

    __slots__ = ("channel", "value")

    def __init__(self, value: Any, channel: list[list[Any]]):
        self.value = value
        self.channel = channel

    def __pdoc__(self, **kwargs: Any) -> Any:
        return wl.pdoc(self.value, **kwargs)


jtu.register_pytree_node(
    Channelled,
    lambda x: ((x.value, x.channel), None),
    lambda _, children: Channelled(*children),
)


@functools.cache
def channelled_type(ref_type: type[Ref]) -> type[Ref]:
    """A subclass of `ref_type` whose value may be a `Channelled`, and does not look it."""

    cell = Ref.__dict__["_value"]

    def read(self: Ref) -> Any:
        __tracebackhide__ = True
        value = ref_type.value.fget(self)  # type: ignore[attr-defined]
        return value.value if type(value) is Channelled else value

    def store(self: Ref, value: Any) -> None:
        # Whoever writes, the channel stays. A new ref has nothing in its cell yet.
        old = cell.__get__(self) if hasattr(self, "_value") else None
        if type(old) is Channelled and type(value) is not Channelled:
            value = Channelled(value, old.channel)
        cell.__set__(self, value)

    namespace = {
        "__slots__": (),
        "__module__": ref_type.__module__,
        "__qualname__": ref_type.__qualname__,
        "_value": property(cell.__get__, store),
        "value": property(read, ref_type.value.fset),  # type: ignore[attr-defined]
        "plain_type": ref_type,
    }
    return type(ref_type.__name__, (ref_type,), namespace)


def plain_type(ref_type: type[Ref]) -> type[Ref]:
    return getattr(ref_type, "plain_type", ref_type)


def encode(value: Any) -> list[list[Any]]:
    """The arrays of the value of a ref as floating-point arrays, and exactly."""
    return [_encode(jnp.asarray(x)) for x in split_value(value)[1]]


def _encode(x: Any) -> list[Any]:
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return [x]
    if x.dtype == jnp.bool_:
        return [x.astype(jnp.float32)]
    # Sixteen bits are exact in a `float32`.
    bits = jax.lax.bitcast_convert_type(x, _unsigned(x.dtype))
    shifts = range(0, 8 * x.dtype.itemsize, 16)
    return [((bits >> s) & 0xFFFF).astype(jnp.float32) for s in shifts]


def _unsigned(dtype: Any) -> Any:
    return jnp.dtype(f"uint{8 * dtype.itemsize}")


def decode(channel: list[list[Any]], like: Any) -> Any:
    """The value again, of the structure and dtypes of `like`."""
    inside, arrays = split_value(like)
    decoded = [_decode(c, jnp.asarray(x).dtype) for c, x in zip(channel, arrays)]
    return join_value(inside, iter(decoded))


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


def has_channel(value: Any) -> bool:
    """Whether a channel can be made for a value: not for the keys of `jax.random`."""
    dtypes = [jnp.asarray(x).dtype for x in split_value(value)[1]]
    return not any(jnp.issubdtype(dtype, jax.dtypes.extended) for dtype in dtypes)
