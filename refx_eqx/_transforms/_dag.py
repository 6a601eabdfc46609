"""`Dag`: a tree of refs as a pytree node, for a transform that has never heard of refs."""

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


__tracebackhide__ = True


T = TypeVar("T")

# What a `Dag` holds instead of a derefed tree once its refs are made.
_MADE: Any = object()


class Dag(ByValue, Generic[T]):
    """A pytree node that derefs a tree of refs when it is flattened. With it any
    third-party transform carries refs, by value.

    Flattened and unflattened it stays the derefed tree, whatever a transform does with its
    leaves: split and joined again (`equinox.filter_grad`), mapped, replaced by `None`. It
    makes its refs when `.value` is first asked for, in the trace that asks.

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

    A `Dag` that a transform has handed to a function may be closed over there by the body of
    another transform: a solver's vector field, a step of `jax.lax.scan`, or a loss by
    another argument. At `.value` the body gets a copy, and what it writes ends with it. Ask
    once in a body: `model = dag.value`.

    **Arguments:**

    - `value`: any pytree of refs. Its refs must be readable where the node is flattened.

    **Raises:**

    When `.value` is asked for:

    - `TraceLevelError`: where JAX has handed it over as it is, which it does with what is not
        differentiated; and where the `Dag` was unflattened, if the body of an inner transform
        has read it already: it would not see what is written from now on. In such a body,
        if what it was given before is gone, and with it what was written.
    - `StructureError`: if the leaves of the derefed tree were replaced by what no ref holds.
    """

    __slots__ = ("_copy", "_derefed", "_home", "_tree")

    def __init__(self, value: T):
        self._tree: Any = value
        self._derefed: Any = _MADE
        self._home = _jax.current_trace_ref()

    @property
    def value(self) -> T:
        """The tree, with refs that may be read and written here."""
        if self._derefed is _MADE:
            if _jax.current_trace_ref() is not self._home:
                self._check_reached()
            return self._tree
        if _jax.current_trace_ref() is not self._home:
            return self._copy_here()
        if self._copy is not None:
            raise TraceLevelError(
                "Cannot open a Dag in two trace levels: its `.value` was asked for inside "
                "an inner transform before, which would not see what is written here. Give the inner transform a Dag of its own: "
                "`jax.tree.map(lambda x: x, dag)`, made here."
            )
        self._tree = reref(self._derefed)
        self._derefed = _MADE
        return self._tree

    def _check_reached(self) -> None:
        """Says what to do where JAX has handed over the very same `Dag`."""
        for ref in filter(is_ref, jtu.tree_leaves(self._tree)):
            try:
                check_readable(ref)
            except TraceLevelError:
                raise TraceLevelError(
                    "Cannot open a Dag that did not go through this transform: a function "
                    "is given as it is what it closes over, and by an eager `jax.grad` or "
                    "`eqx.filter_grad` also each argument that is not differentiated. Hand "
                    "over `jax.tree.map(lambda x: x, dag)` instead: that is opened where it "
                    "is asked for."
                ) from None

    def _copy_here(self) -> T:
        """The tree for a body that closes over the `Dag`: the same refs each time it asks.

        They are held weakly. What the body writes to them is its own, and may not stay
        behind in a `Dag` that outlives it.
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
                "Cannot open a Dag twice inside a transform that it was not passed to: the "
                "refs that it made there are gone, and with them what was written. Ask "
                "once, `model = dag.value`, and use that; or pass the Dag as an argument."
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
