"""`Dag`: a tree of refs as a pytree node, for transforms that do not know about refs."""

import weakref
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax.tree_util as jtu

from .._core import _jax
from .._core._access import check_readable
from .._core._deref import deref, reref
from .._core._errors import TraceLevelError
from .._core._ref import is_ref, Ref
from .._trees._equality import ByValue


T = TypeVar("T")

# What a `Dag` holds instead of a derefed tree once its refs are made.
_MADE: Any = object()


class Dag(ByValue, Generic[T]):
    """A pytree node that derefs a tree of refs when it is flattened. With it, any
    third-party transform carries refs by value.

    After flattening and unflattening it stays the derefed tree, whatever a transform does
    with its leaves: split and combine them (`equinox.filter_grad`), map them, or replace
    them with `None`. It makes its refs when `.value` is first accessed, in the trace of
    that access.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import jax.numpy as jnp
        import refx_eqx as rx

        @jax.jit
        def double(dag):
            dag.value["a"].value *= 2
            return dag

        ref = rx.Ref(jnp.array(1.0))
        dag = double(rx.Dag({"a": ref, "b": ref}))
        assert dag.value["b"].value == 2.0
        assert ref.value == 1.0  # by value: the caller's own refs are not written

        grads = eqx.filter_grad(lambda dag: dag.value["a"][...] * dag.value["b"][...])(dag)
        assert grads.value["a"].value == 4.0
        ```

    A function that receives a `Dag` from a transform may close over it in the body of
    another transform: a solver's vector field, a step of `jax.lax.scan`, or a loss that
    differentiates another argument. There `.value` is a copy, and writes to it are
    discarded when the body ends. Access it once per body: `model = dag.value`.

    **Arguments:**

    - `value`: any pytree of refs. Its refs must be readable wherever the node is flattened.

    **Raises:**

    When `.value` is accessed:

    - `TraceLevelError`: if JAX passed the `Dag` through without flattening it, as it does
        with arguments that are not differentiated; where the `Dag` was unflattened, if the
        body of an inner transform has already read it, because that body would miss later
        writes; and inside such a body, if the copy it was given before no longer exists,
        and its writes with it.
    - `StructureError`: if leaves of the derefed tree were replaced with something no ref
        can hold.
    """

    __slots__ = ("_copy", "_derefed", "_home", "_tree")

    def __init__(self, value: T):
        self._tree: Any = value
        self._derefed: Any = _MADE
        self._home = _jax.current_trace_ref()

    @property
    def value(self) -> T:
        """The tree, with refs that can be read and written here."""
        if self._derefed is _MADE:
            if _jax.current_trace_ref() is not self._home:
                self._check_reached()
            return self._tree
        if _jax.current_trace_ref() is not self._home:
            return self._copy_here()
        if self._copy is not None:
            raise TraceLevelError(
                "Cannot open a Dag in two trace levels: its `.value` was already accessed "
                "inside an inner transform, which would not see what is written here. "
                "Give the inner transform its own Dag: `jax.tree.map(lambda x: x, dag)`, "
                "made here."
            )
        self._tree = reref(self._derefed)
        self._derefed = _MADE
        return self._tree

    def _check_reached(self) -> None:
        """Raises, with a remedy, if JAX passed through the very same `Dag`."""
        for ref in filter(is_ref, jtu.tree_leaves(self._tree)):
            try:
                check_readable(ref)
            except TraceLevelError:
                raise TraceLevelError(
                    "Cannot open a Dag that did not go through this transform: JAX does "
                    "not flatten what a function closes over, nor, in an eager `jax.grad` "
                    "or `eqx.filter_grad`, arguments that are not differentiated. Pass "
                    "`jax.tree.map(lambda x: x, dag)` instead: that is opened where it is "
                    "accessed."
                ) from None

    def _copy_here(self) -> T:
        """The tree for a body that closes over the `Dag`: the same refs at each access.

        They are held weakly: what the body writes is its own, and must not stay in a `Dag`
        that outlives it.
        """
        here = _jax.current_trace_ref()
        if self._copy is None or self._copy[0] is not here:
            tree = reref(self._derefed)
            leaves, treedef = jtu.tree_flatten(tree)
            held = [weakref.ref(x) if isinstance(x, Ref) else x for x in leaves]
            self._copy = here, treedef, held
            return tree
        _, treedef, held = self._copy
        leaves = [x() if isinstance(x, weakref.ref) else x for x in held]
        if any(new is None and old is not None for new, old in zip(leaves, held)):
            raise TraceLevelError(
                "Cannot open a Dag twice inside a transform that it was not passed to: "
                "the refs it made there no longer exist, and their writes are lost. "
                "Access it once, `model = dag.value`, and use that; or pass the Dag as an "
                "argument."
            )
        return jtu.tree_unflatten(treedef, leaves)

    def __repr__(self) -> str:
        tree = self._tree if self._derefed is _MADE else self._derefed
        return f"Dag({eqx.tree_pformat(tree)})"

    def __reduce__(self):
        if self._derefed is _MADE:
            return Dag, (self._tree,)
        return _unflatten, (None, (self._derefed,))


def _flatten(dag: Dag) -> tuple[tuple, None]:
    derefed = deref(dag._tree) if dag._derefed is _MADE else dag._derefed
    return (derefed,), None


def _flatten_with_keys(dag: Dag) -> tuple[tuple, None]:
    (derefed,), aux = _flatten(dag)
    return ((jtu.GetAttrKey("value"), derefed),), aux


def _unflatten(_: None, children: Any) -> Dag:
    dag = object.__new__(Dag)
    (dag._derefed,) = children
    dag._home = _jax.current_trace_ref()
    # For the last inner transform that asked: its trace, and the tree it was given.
    dag._copy = None  # pyright: ignore[reportAttributeAccessIssue] (a generic slot)
    return dag


jtu.register_pytree_with_keys(Dag, _flatten_with_keys, _unflatten, _flatten)
