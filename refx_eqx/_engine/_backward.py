"""Channels: how a backward rule writes a ref.

JAX runs the backward pass after the function has ended, and its only outputs are
cotangents. So a ref that a backward rule writes travels as one:

- `filter_grad` gives the ref a *channel*: an input of zeros, which is differentiated too.
    The inner ref stores it next to its value, and every lifted transform on the way (jit,
    scan, cond, vmap, checkpoint) carries the two together, as a `Channeled`.
- A `filter_custom_vjp` function takes the channel of each ref it carries, and returns it:
    the channel becomes a thread through the calls, in order.
- The backward pass follows the thread in reverse. It starts (`seed`) with the value that
  the ref has at the end of the function, as the cotangent of the channel. Each backward
  rule finds the current value of the ref there, and replaces it with the new one.
- `filter_grad` writes back the value that arrives at the beginning.

So the backward rules run one after the other on one state, in the reverse order of the
calls, as Python code would. A channel is never used twice, so JAX adds nothing up.

We only learn which refs need a channel by tracing the backward rules. A rule that writes a
ref without a channel raises `BackwardWrite`; then `filter_grad` opens the channels of that
collection, and traces its function once more.
"""

import copy
import operator
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._calls._call import Call
from .._calls._structure import Leaves, map_values, Outcome, values_of
from .._core import _jax
from .._core._access import why_immutable
from .._core._errors import CarryError, ImmutableError, MismatchError
from .._core._ref import Channeled
from .._trees._equality import is_same_tree
from ._channel import decode, encode, has_channel


class BackwardWrite(CarryError):
    """A backward rule wrote a ref that has no channel. `which` says who wrote what."""

    def __init__(self, which: str, collection: Hashable):
        super().__init__(
            f"{which}, but the transform that differentiates it here cannot return the "
            "value. Take the derivative with `rx.filter_grad` or "
            "`rx.filter_value_and_grad`, of a function that is given this ref, or closes "
            "over it."
        )
        self.which = which
        self.collection = collection


# The class that a user sees, and may catch.
BackwardWrite.__module__ = CarryError.__module__
BackwardWrite.__qualname__ = CarryError.__qualname__


def without_channels(derefed: Call) -> tuple[Call, dict[int, Any]]:
    """A call without the channels of its refs; and the channels, by the number of the
    ref."""
    channels = {
        i: value.channel
        for i, value in values_of(derefed.arrays).items()
        if type(value) is Channeled
    }
    if not channels:
        return derefed, {}
    plain = copy.copy(derefed)
    plain.arrays = [map_values(_without_channel, x) for x in derefed.arrays]
    plain.flat = None
    return plain, channels


def _without_channel(_: int, value: Any) -> Any:
    return value.value if type(value) is Channeled else value


def with_channels(arrays: list[Leaves], channels: dict[int, Any]) -> list[Leaves]:
    """The arrays of a call, with a channel for each of these refs."""

    def with_channel(i: int, value: Any) -> Any:
        return Channeled(value, channels[i]) if i in channels else value

    return [map_values(with_channel, leaves) for leaves in arrays]


def new_channels(derefed: Call, collections: Iterable[Hashable]) -> dict[int, Any]:
    """A channel of zeros for each ref of these collections that may be written here, by
    number."""
    wanted = list(collections)
    return {
        i: jtu.tree_map(lambda x: _mapped_like(jnp.zeros_like(x), x), encode(value))
        for i, value in values_of(derefed.arrays).items()
        if derefed.refs[i].collection in wanted
        and has_channel(value)
        and why_immutable(derefed.refs[i]) is None
    }


def check_mutable(derefed: Call, write: BackwardWrite) -> None:
    """Raises if the ref that a rule writes has no channel because it may not be written."""
    for ref in derefed.refs:
        where = why_immutable(ref)
        if ref.collection == write.collection and where is not None:
            raise ImmutableError(f"{write.which}, but this code runs {where}") from None


def _mapped_like(x: Any, y: Any) -> Any:
    """`x`, mapped under a `vmap` like `y`."""
    return jnp.where(jnp.zeros(x.shape, bool), y, x)


def with_updates(outcome: Outcome, updates: dict[int, Any]) -> Outcome:
    """The same outcome, with these new values of the written refs."""
    return Outcome(outcome.out, updates, outcome.info)


@jax.custom_vjp
def _seed(loss: Any, channels: Any, values: Any) -> Any:
    """`loss`; in the backward pass, `values` are the cotangents of `channels`."""
    del channels, values
    return loss


_seed.defvjp(
    lambda loss, channels, values: (loss, values),
    lambda values, g: (g, values, None),
)


def with_channels_ended(
    loss: Any, outcome: Outcome, channels: dict[int, Any]
) -> tuple[Any, Outcome, dict[int, Any]]:
    """Ends the channels at the loss of a body that ran with them. Returns also its outcome
    without channels, and the seed of each."""
    updates = dict(outcome.updates)
    ends, seeds = {}, {}
    for i in channels.keys() & updates.keys():
        end = updates[i]
        ends[i], updates[i] = end.channel, end.value
        seed = jtu.tree_map(_mapped_like, encode(end.value), end.channel)
        seeds[i] = jax.lax.stop_gradient(seed)
    if seeds:
        loss = _seed(loss, ends, seeds)
    return loss, with_updates(outcome, updates), seeds


def with_backward_writes(
    outcome: Outcome,
    ends: dict[int, Any],
    seeds: dict[int, Any],
    before: dict[int, Any],
) -> Outcome:
    """An outcome updated with the values that arrived at the beginning of the channels.

    Where that is the seed itself, no rule has written the ref; then it is only written if
    the function wrote it. (A value that went through a loop, a branch or a compiled
    function is never the seed itself: there a ref that no rule writes is written with its
    own value.)

    **Arguments:**

    - `before`: the values of the refs when the function began.
    """
    updates = dict(outcome.updates)
    for i in ends.keys() & updates.keys():
        if not is_same_tree(operator.is_, ends[i], seeds[i]):
            updates[i] = decode(ends[i], updates[i])
        elif is_same_tree(operator.is_, updates[i], before[i]):
            del updates[i]
    return with_updates(outcome, updates)


def apart_from_channels(
    transform: Callable[[Call], Outcome],
) -> Callable[[Call], Outcome]:
    """Adapts a differentiating transform that does not know about channels."""

    def inner(derefed: Call) -> Outcome:
        plain, channels = without_channels(derefed)
        return with_outer_channels(transform(plain), channels)

    return inner


def with_outer_channels(outcome: Outcome, channels: dict[int, Any]) -> Outcome:
    """The inverse of `without_channels`, for written values."""
    updates = {
        i: Channeled(x, channels[i]) if i in channels else x
        for i, x in outcome.updates.items()
    }
    return with_updates(outcome, updates)


def written_by_rule(
    which: str, collection: Hashable, value: Any, old: Any, end: Any
) -> Any:
    """Encodes the value that a backward rule wrote to a ref for its channel. `end` came
    along the channel; `which` says who wrote what."""
    if end is None:
        raise BackwardWrite(which, collection)
    if _types_in(value) != _types_in(old):
        raise MismatchError(
            f"{which} with {eqx.tree_pformat(value)}, but it holds "
            f"{eqx.tree_pformat(old)}. A write in a backward rule must keep the structure, "
            "the shape and the dtype: convert the value, or create the ref with the type "
            "it will need."
        )
    channel = encode(value)
    # A value that comes along a channel is mapped where the channel is.
    for new_over, old_over in zip(_mapped(channel), _mapped(end)):
        if any(a and not b for a, b in zip(new_over, old_over)):
            raise CarryError(
                f"{which}, which is broadcast by `filter_vmap`, with a value that differs "
                "along the mapped axis. Either map it, with `in_axes=`; or write one value for "
                "all, such as `jax.lax.pmax(value, axis_name)`."
            )
    return channel


def _mapped(channel: Any) -> list[tuple[bool, ...]]:
    return [_jax.mapped_over(x) for x in jtu.tree_leaves(channel)]


def _types_in(arrays: Any) -> Any:
    types = [(jnp.shape(x), jnp.result_type(x)) for x in jtu.tree_leaves(arrays)]
    return jtu.tree_structure(arrays), types


def mapped_with(arrays: Any, carriers: Any) -> Any:
    """The same carriers, mapped under a `vmap` if any of the arrays is.

    Under `vmap`, the cotangent of an unmapped input is a sum along the mapped axis, but
    that of a channel must not be. JAX (since 0.12) refuses a rule that has both, because it
    cannot distinguish them. So we take the sums outside, by making the carriers mapped.
    Without a `vmap`, the compiler removes this.
    """
    differs = jnp.zeros((), bool)
    for x in jtu.tree_leaves(arrays):
        if jnp.size(x) > 0:
            is_key = jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)
            first = jnp.ravel(jax.random.key_data(x) if is_key else x)[0]
            differs = differs | (first != first)
    return jtu.tree_map(lambda x: jnp.where(differs, x, x), carriers)
