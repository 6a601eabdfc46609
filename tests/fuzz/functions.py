"""The models of a history, and what is called on them: lifted, and in plain Python.

All numbers are small and whole, so that no order of a sum shows in a bit.
"""

from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

import refx_eqx as rx


class Node(eqx.Module):
    """A model: refs in all that may hold them."""

    ref: rx.Ref
    items: list
    named: dict
    child: Any = None
    scale: int = eqx.field(static=True, default=1)

    def __call__(self, x: Any) -> Any:
        return write(self, x)


class Weight(eqx.Module):
    """A value that is a module, with a static part."""

    array: Any
    sign: int = eqx.field(static=True)


class Failure(Exception):
    """Raised by a function in the middle of its work."""


def places(tree: Any, scale: int = 1) -> Iterator[tuple[rx.Ref, int]]:
    """Each place of a ref in the tree, with the scale of the node that holds it."""
    match tree:
        case rx.Ref():
            yield tree, scale
        case Node():
            parts = [tree.ref, tree.items, tree.named, tree.child]
            for part in parts:
                yield from places(part, tree.scale)
        case list() | tuple():
            for item in tree:
                yield from places(item, scale)
        case dict():
            for key in sorted(tree):
                yield from places(tree[key], scale)


def _is_number(leaf: Any) -> bool:
    return not isinstance(leaf, str) and jnp.result_type(leaf).kind != "b"


def number(value: Any) -> Any:
    """A number of all that a ref may hold."""
    sign = value.sign if isinstance(value, Weight) else 1
    if isinstance(value, dict):
        sign = len(value["mode"])
        value = value["x"]
    leaves = jax.tree.leaves(value)
    return sum((sign * jnp.sum(jnp.asarray(x, float)) for x in leaves), jnp.zeros(()))


def total(tree: Any, x: Any) -> Any:
    out = jnp.asarray(x, float)
    for ref, scale in places(tree):
        out = out + scale * number(ref.value)
    return out


def write(tree: Any, x: Any) -> Any:
    before = total(tree, x)
    for i, (ref, scale) in enumerate(places(tree)):
        if i % 2 == 0:
            ref.value = jax.tree.map(
                lambda leaf: leaf + scale if _is_number(leaf) else leaf, ref.value
            )
    return before, total(tree, x)


def exchange(tree: Any, x: Any) -> Any:
    refs = [ref for ref, _ in places(tree) if ref.collection == "state"]
    refs[0].value, refs[-1].value = refs[-1].value, refs[0].value
    return refs[-1], rx.Ref(total(tree, x)), tree


def write_checked(tree: Any, x: Any) -> Any:
    out = write(tree, x)
    return eqx.error_if(out, jnp.asarray(x, float) > 2, "x is too large")


def fail(tree: Any, x: Any) -> Any:
    write(tree, x)
    raise Failure


def cost(tree: Any, x: Any) -> Any:
    before, after = write(tree, x)
    return before * after


def trained(tree: Any) -> list[rx.Ref]:
    refs = dict.fromkeys(ref for ref, _ in places(tree))
    return [ref for ref in refs if ref.collection == "params"]


def slope(tree: Any, x: Any) -> Any:
    params = trained(tree)
    return rx.filter_grad(lambda params: cost(tree, x))(params) if params else None


def slope_by_hand(tree: Any, x: Any) -> Any:
    refs = {ref: ref.value for ref, _ in places(tree)}
    params = trained(tree)

    def of_values(values: Any) -> Any:
        new = {**refs, **dict(zip(params, values))}
        copies = {ref: rx.Ref(new[ref], ref.collection) for ref in new}
        return cost(jax.tree.map(copies.__getitem__, tree), x)

    if not params:
        return None
    grads = jax.grad(of_values)([refs[ref] for ref in params])
    cost(tree, x)
    return grads


def twice(tree: Any, x: Any) -> Any:
    def step(carry: Any, _: Any) -> Any:
        return carry, write(tree, x)

    _, out = rx.scan(step, None, None, length=2)
    return jax.tree.map(lambda leaf: leaf[-1], out)


def twice_by_hand(tree: Any, x: Any) -> Any:
    write(tree, x)
    return write(tree, x)


def write_more(tree: Any, x: Any) -> Any:
    out = write(tree, x)
    return write(tree, x + 1)[0], out[1]


def choose(tree: Any, x: Any) -> Any:
    return rx.cond(x > 2, write, write_more, tree, x)


def choose_by_hand(tree: Any, x: Any) -> Any:
    return write(tree, x) if x > 2 else write_more(tree, x)


# Each function as it is lifted, and in plain Python.
FUNCTIONS: dict[str, tuple[Callable, Callable]] = {
    "read": (rx.filter_jit(total), total),
    "write": (rx.filter_jit(write), write),
    "donate": (rx.filter_jit(write, donate="refs"), write),
    "exchange": (rx.filter_jit(exchange), exchange),
    "method": (rx.filter_jit(Node.__call__), write),
    "checkpoint": (rx.filter_checkpoint(write), write),
    "jit checkpoint": (rx.filter_jit(rx.filter_checkpoint(write)), write),
    "vmap": (rx.filter_vmap(write, in_axes=None, out_axes=None, axis_size=2), write),
    "scan": (rx.filter_jit(twice), twice_by_hand),
    "cond": (rx.filter_jit(choose), choose_by_hand),
    "grad": (slope, slope_by_hand),
    "jit grad": (rx.filter_jit(slope), slope_by_hand),
    "check": (rx.filter_jit(write_checked), write_checked),
    "fail": (rx.filter_jit(fail), fail),
}
