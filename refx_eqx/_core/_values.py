"""What of a value, or of a tree, is traced: its arrays. All the rest is static."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np

from . import _jax
from ._ref import Channeled


__tracebackhide__ = True


def is_traced(leaf: Any) -> bool:
    """Which leaves outside refs are traced: arrays, as in Equinox."""
    if type(leaf) is _jax.ConcreteArray:
        return True
    if isinstance(leaf, np.ndarray | np.generic):
        return eqx.is_array(leaf) and _is_of_numbers(leaf)
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def is_traced_in_ref(leaf: Any) -> bool:
    """Which leaves of the value of a ref are traced: what JAX can trace. In a module that is
    in it, arrays alone: see `split_value`."""
    if type(leaf) is _jax.ConcreteArray:
        return True
    if isinstance(leaf, np.ndarray | np.generic):
        return _is_of_numbers(leaf)
    return eqx.is_array_like(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def _is_of_numbers(x: Any) -> bool:
    """Whether JAX has arrays of this dtype: not of objects, texts or dates."""
    return x.dtype.kind not in "OSUMm"


def split_value(value: Any) -> tuple[Any, Any]:
    """The value of a ref as `(arrays, statics)`, each with `None` for the other; the second
    is `None` if there is nothing static. A channel is no part of the structure.

    A number of Python is traced, as the state that a ref is made for. In a module it is an
    option, as in Equinox: `eqx.nn.Dropout.inference` is asked in an `if`.
    """
    if is_traced_in_ref(value):
        return value, None
    if type(value) is Channeled:
        arrays, statics = split_value(value.value)
        return Channeled(arrays, value.channel), statics
    arrays, statics = eqx.partition(value, _spec_of(value))
    return arrays, statics if jtu.tree_leaves(statics) else None


def _spec_of(value: Any) -> Any:
    def spec(x: Any) -> Callable[[Any], bool]:
        return is_traced if _is_module(x) else is_traced_in_ref

    return jtu.tree_map(spec, value, is_leaf=_is_module)


def _is_module(x: Any) -> bool:
    return isinstance(x, eqx.Module)


def join_value(arrays: Any, statics: Any) -> Any:
    """The opposite of `split_value`."""
    if statics is None:
        return arrays
    if type(arrays) is Channeled:
        return Channeled(join_value(arrays.value, statics), arrays.channel)
    # As `eqx.combine`, without a call of Python for each leaf.
    leaves, treedef = _jax.flatten_with_none(statics)
    both = zip(treedef.flatten_up_to(arrays), leaves)
    return treedef.unflatten([x if static is None else static for x, static in both])
