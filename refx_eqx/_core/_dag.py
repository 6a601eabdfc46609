"""`Dag`: a tree of refs as a pytree node, for a transform that has never heard of refs."""

from typing import Any, Generic, TypeVar

import equinox as eqx
import jax.tree_util as jtu

from . import _trace
from ._deref import deref, reref
from ._errors import describe, TraceLevelError
from ._ref import is_ref, Ref


__tracebackhide__ = True


_T = TypeVar("_T")

# What a `Dag` holds instead of a derefed tree once its refs are made.
_MADE: Any = object()


class Dag(Generic[_T]):
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
    another transform: a solver's vector field, a step of `jax.lax.scan`. The body may read
    what it gets at `.value`, but not write it: nothing would carry that out.

    **Arguments:**

    - `value`: any pytree of refs. Its refs must be readable where the node is flattened.

    **Raises:**

    When `.value` is asked for:

    - `TraceLevelError`: where the `Dag` was unflattened, if the body of an inner transform
        has read it already: it would not see what is written from now on.
    - `StructureError`: if the leaves of the derefed tree were replaced by what no ref holds.
    """

    __slots__ = ("_copy", "_derefed", "_home", "_tree")

    def __init__(self, value: _T):
        self._tree: Any = value
        self._derefed: Any = _MADE

    @property
    def value(self) -> _T:
        """The tree, with refs that may be read and written here."""
        if self._derefed is _MADE:
            return self._tree
        here = _trace.current_trace_ref()
        if here is not self._home:
            if self._copy is None or self._copy[0] is not here:
                self._copy = here, _lend(self._derefed)
            return self._copy[1]
        if self._copy is not None:
            raise TraceLevelError(
                "Cannot open a Dag in two trace levels: its `.value` was asked for inside "
                "an inner transform before, which would not see what is written here. Give the inner transform a Dag of its own: "
                "`jax.tree.map(lambda x: x, dag)`, made here."
            )
        self._tree = reref(self._derefed)
        self._derefed = _MADE
        return self._tree

    def __repr__(self) -> str:
        tree = self._tree if self._derefed is _MADE else self._derefed
        return f"Dag({eqx.tree_pformat(tree)})"

    def __reduce__(self):
        if self._derefed is _MADE:
            return Dag, (self._tree,)
        return _unflatten, (None, (self._derefed,))


class _Lent:
    """Declares of a ref that nobody may write it: what a `Dag` gives to an inner transform
    that closes over it."""

    type = None

    def checked(self, ref: Ref, value: Any) -> Any:
        raise TraceLevelError(
            "Cannot mutate ref from different trace level: "
            f"{describe(ref._name, ref._collection)}: it is of a Dag that this function "
            "closes over, and nothing would carry out what is written. Pass the Dag through "
            "the transform, as an argument or in the carry, and return it; or read a copy "
            "that is not written, such as `rx.snapshot(dag.value)`."
        )

    def check_rebuilt(self, ref: Ref) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Lent)

    def __hash__(self) -> int:
        return 0


def _lend(derefed: Any) -> Any:
    tree = reref(derefed)
    for ref in filter(is_ref, jtu.tree_leaves(tree)):
        if _LENT not in (ref._declared or ()):
            ref._declared = (*(ref._declared or ()), _LENT)
    return tree


_LENT = _Lent()


def _flatten(dag: Dag) -> tuple[tuple, None]:
    derefed = deref(dag._tree) if dag._derefed is _MADE else dag._derefed
    return (derefed,), None


def _flatten_with_keys(dag: Dag) -> tuple[tuple, None]:
    (derefed,), aux = _flatten(dag)
    return ((jtu.GetAttrKey("value"), derefed),), aux


def _unflatten(_: None, children: Any) -> Dag:
    dag = object.__new__(Dag)
    (dag._derefed,) = children
    dag._home = _trace.current_trace_ref()
    # The trace of the last inner transform that asked, and the tree that it was given.
    dag._copy = None
    return dag


jtu.register_pytree_with_keys(Dag, _flatten_with_keys, _unflatten, _flatten)
