"""Channels: how a backward rule writes a ref.

JAX runs the backward pass after the function has ended, and the only thing that comes out of
it is cotangents. So a ref that a backward rule writes travels as one:

- `filter_grad` gives the ref a *channel*: an input of zeros, which is differentiated too.
  It rides along in the value of the inner ref, as a `Channelled`, so that every lifted
  transform on the way (jit, scan, cond, vmap, checkpoint) carries it as it carries values.
- A `filter_custom_vjp` function takes the channel of each ref that it carries, and returns
  it: the channel becomes a thread through the calls, in their order.
- The backward pass follows the thread in reverse. It starts (`seed`) with the value that
  the ref has at the end of the function, as the cotangent of the channel. Each backward rule
  finds the present value of the ref there, and puts the new one in its place.
- What arrives at the beginning is the value that `filter_grad` writes back.

So the backward rules run one after the other on one state, in the reverse order of the
calls, as Python code would. A channel is never used twice, so that JAX adds up nothing.

Which refs need a channel is not known before a backward rule was traced. The rule that
writes a ref without a channel raises `BackwardWrite`; `filter_grad` opens the channels of
that collection, and traces its function once more.
"""

import copy
import functools
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import wadler_lindig as wl

from .. import _trace
from .._errors import StructureError
from .._functionalize import Opened
from .._ref import Ref
from .._structure import join_value, Outcome, split_value, Structure


_trace.register_exclusion(__file__)


class BackwardWrite(StructureError):
    """A backward rule wrote a ref that has no channel."""

    def __init__(self, collection: Hashable, message: str):
        super().__init__(message)
        self.collection = collection


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
def _channelled_type(ref_type: type[Ref]) -> type[Ref]:
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


def _plain_type(ref_type: type[Ref]) -> type[Ref]:
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


def _reopened(opened: Opened, values: list[Any], types: list[type[Ref]]) -> Opened:
    """The same call, with other values and types of its refs."""
    structure = opened.structure
    arrays = opened.arrays[: structure.n_bare]
    slots, spans = [], []
    for slot, ref_type, value in zip(structure.slots, types, values):
        inside, its_arrays = split_value(value)
        spans.append((len(arrays), len(arrays) + len(its_arrays)))
        arrays.extend(its_arrays)
        slots.append(slot._replace(ref_type=ref_type, inside=inside))
    again = copy.copy(opened)
    again.arrays, again.spans = arrays, spans
    again.structure = Structure(
        structure.parts,
        structure.codes,
        structure.statics,
        tuple(slots),
        structure.notes,
    )
    return again


def without_channels(opened: Opened) -> tuple[Opened, dict[int, Any]]:
    """A call without the channels of its refs; and these, by the number of the ref."""
    channels = {
        i: value.channel
        for i, value in enumerate(opened.values)
        if type(value) is Channelled
    }
    types = [_plain_type(slot.ref_type) for slot in opened.structure.slots]
    if not channels and all(
        a is slot.ref_type for a, slot in zip(types, opened.structure.slots)
    ):
        return opened, {}
    values = [x.value if type(x) is Channelled else x for x in opened.values]
    plain = _reopened(opened, values, types)
    plain.values = values
    return plain, channels


def with_channels(opened: Opened, channels: dict[int, Any]) -> Opened:
    """A call with a channel for each of these refs."""
    values, types = [], []
    for i, (value, slot) in enumerate(zip(opened.values, opened.structure.slots)):
        is_open = i in channels
        values.append(Channelled(value, channels[i]) if is_open else value)
        types.append(_channelled_type(slot.ref_type) if is_open else slot.ref_type)
    return _reopened(opened, values, types)


def new_channels(opened: Opened, collections: Iterable[Hashable]) -> dict[int, Any]:
    """A channel of zeros for each ref of these collections, by number."""
    wanted = list(collections)
    return {
        i: jtu.tree_map(lambda x: _mapped_like(jnp.zeros_like(x), x), encode(value))
        for i, (value, slot) in enumerate(zip(opened.values, opened.structure.slots))
        if slot.collection in wanted and has_channel(value)
    }


def _mapped_like(x: Any, y: Any) -> Any:
    """`x`, mapped under a `vmap` if `y` is."""
    return jnp.where(jnp.zeros(x.shape, bool), y, x)


def updates_by_number(outcome: Outcome) -> dict[int, Any]:
    """The new values of the refs that a body wrote."""
    arrays = iter(outcome.updates)
    return {i: join_value(inside, arrays) for i, inside in outcome.info.written}


def with_updates(outcome: Outcome, updates: dict[int, Any]) -> Outcome:
    """The same outcome, with these refs written. Refs that it made are of plain types."""
    written, arrays = [], []
    for i, value in updates.items():
        inside, its_arrays = split_value(value)
        written.append((i, inside))
        arrays.extend(its_arrays)
    info = copy.copy(outcome.info)
    info.written = written
    result = info.result
    slots = [
        slot._replace(ref_type=_plain_type(slot.ref_type)) for slot in result.slots
    ]
    info.result = Structure(
        result.parts, result.codes, result.statics, tuple(slots), result.notes
    )
    return Outcome(outcome.out, arrays, info)


def moved(plain: Opened, opened: Opened, positions: list[int]) -> list[int]:
    """Where the arrays at these positions of a call are, once it has channels."""
    where = {i: i for i in range(plain.structure.n_bare)}
    for (start, stop), (new_start, _) in zip(plain.spans, opened.spans):
        # A channel comes behind its value.
        where.update((i, new_start + i - start) for i in range(start, stop))
    return [where[i] for i in positions]


@jax.custom_vjp
def _seed(loss: Any, channels: Any, values: Any) -> Any:
    """`loss`; in the backward pass, `values` are the cotangents of `channels`."""
    del channels, values
    return loss


_seed.defvjp(
    lambda loss, channels, values: (loss, values),
    lambda values, g: (g, values, None),
)


def seeded(
    loss: Any, outcome: Outcome, plain: Opened, channels: dict[int, Any]
) -> tuple[Any, Outcome]:
    """Ends the channels at the loss of a body that ran with them; and its outcome without
    them."""
    __tracebackhide__ = True
    if not channels:
        return loss, outcome
    updates = updates_by_number(outcome)
    ends, values = {}, {}
    for i in channels.keys() & updates.keys():
        end = updates[i]
        ends[i], updates[i] = end.channel, end.value
        seeds = jtu.tree_map(_mapped_like, encode(end.value), end.channel)
        values[i] = jax.lax.stop_gradient(seeds)
    return _seed(loss, ends, values), with_updates(outcome, updates)


def with_backward_writes(outcome: Outcome, ends: dict[int, Any]) -> Outcome:
    """An outcome with what arrived at the beginning of the channels."""
    if not ends:
        return outcome
    updates = updates_by_number(outcome)
    for i in ends.keys() & updates.keys():
        updates[i] = decode(ends[i], updates[i])
    return with_updates(outcome, updates)


def stripped(transform: Callable[[Opened], Outcome]) -> Callable[[Opened], Outcome]:
    """A transform that differentiates, and does not know of channels."""

    def inner(opened: Opened) -> Outcome:
        __tracebackhide__ = True
        plain, channels = without_channels(opened)
        return with_outer_channels(transform(plain), channels)

    return inner


def with_outer_channels(outcome: Outcome, channels: dict[int, Any]) -> Outcome:
    """The opposite of `without_channels`, for what was written."""
    if not channels:
        return outcome
    updates = updates_by_number(outcome)
    for i in channels.keys() & updates.keys():
        updates[i] = Channelled(updates[i], channels[i])
    return with_updates(outcome, updates)
