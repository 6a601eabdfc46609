"""Why something is not a filter, for the error that says so."""

import functools
import types
from typing import Any

import equinox as eqx
import jax
import numpy as np

from .._core._errors import is_annotation
from .._core._nodes import is_module, is_node
from .._core._ref import Ref
from .._fields._collection import Collection
from .._fields._instance import plan_of
from .._fields._ref_type import OpenRefHint
from .._fields._referenced import is_referenced
from .._trees._cells import is_opaque, reachable


_FORMS = (
    "A filter is a collection name, a subclass of `rx.Ref`, `rx.collection(...)`, "
    "`rx.path(...)`, a ref or a tree of refs, a function of a leaf, or a combination of "
    "these with `&`, `|` and `~`."
)


def refuse_what_is_no_filter(x: Any) -> None:
    """Refuses what is neither a name nor a function of a leaf. (Trees of refs are filters,
    but are not for this function.)

    **Raises:**

    - `TypeError`: it says what `x` is instead.
    """
    which, reason = f"This `{type(x).__name__}`", None
    if isinstance(x, type):
        which = f"The class `{x.__name__}`"
        reason = (
            "only subclasses of `rx.Ref` are. To select the refs of a module, pass the "
            "module itself, or `rx.path(...)`"
        )
    elif isinstance(x, Collection):
        which = f"`rx.Collection({x.name!r})`"
        reason = (
            "it annotates a field. Write it with a small letter: "
            f"`rx.collection({x.name!r})`"
        )
    elif is_annotation(x) or isinstance(x, OpenRefHint):
        which = f"The annotation `{x}`"
        reason = (
            "a filter does not ask for the type of a value. Use the name of the collection, "
            "such as 'params'; or `rx.Param`, without a type"
        )
    else:
        reason = _against_function(x) if callable(x) else _against_tree(x)
    if reason is None and not callable(x):
        try:
            hash(x)
        except TypeError:
            raise TypeError(f"{x!r} is not a filter. {_FORMS}") from None
    if reason is not None:
        raise TypeError(f"{which} is not a filter: {reason}.")


def _against_function(x: Any) -> str | None:
    called = _called(x)
    if not is_module(called) or not _is_model(called):
        return None
    if any(isinstance(leaf, Ref) for leaf in reachable(called)):
        return (
            f"it calls a module, `{type(called).__name__}`, which is no function of a "
            "leaf. To select the refs of the module, pass the module itself"
        )
    return _against_tree(called)


def _called(x: Any) -> Any:
    """The function that a partial calls, or the object whose `__call__` it is."""
    while True:
        if isinstance(x, functools.partial | eqx.Partial):
            x = x.func
        elif type(x) is types.MethodType and x.__name__ == "__call__":
            x = x.__self__
        else:
            return x


def _is_model(module: eqx.Module) -> bool:
    """Whether a module holds arrays, or is of a class whose instances hold refs. (One that
    does neither may be a predicate.)"""
    holds_refs = []

    def visit(x: Any) -> bool:
        if is_module(x) and (is_referenced(x) or plan_of(type(x)).of_refs):
            holds_refs.append(x)
        return _is_leaf(x)

    leaves = list(reachable(module, visit))
    return bool(holds_refs) or any(map(_is_held, leaves))


def _against_tree(x: Any) -> str | None:
    leaves = list(reachable(x, _is_leaf))
    if any(map(is_node, leaves)):
        return "it is derefed, so it has no refs to select. Pass the tree of refs, or a part of it"
    is_leaf = len(leaves) == 1 and leaves[0] is x
    if leaves and not is_leaf and all(type(leaf) is bool for leaf in leaves):
        return (
            "it is a tree of bools, as `rx.filter_spec` returns. Pass the filter that it "
            "was made from"
        )
    if is_module(x) or (not is_leaf and any(map(_is_held, leaves))):
        return (
            "it has no refs to select. Pass the tree of refs, or a part of it; or select by "
            "place: `rx.path('decoder.**')`"
        )
    return None


def _is_leaf(x: Any) -> bool:
    return is_node(x) or is_opaque(x)


def _is_held(leaf: Any) -> bool:
    """Whether only a model holds such a leaf."""
    arrays = jax.Array | np.ndarray | jax.ShapeDtypeStruct
    return is_node(leaf) or isinstance(leaf, arrays)
