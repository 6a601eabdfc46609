"""`add_axis`: gives refs an axis to map over."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._core._errors import describe, StructureError
from .._core._nodes import is_traced_in_ref
from .._core._ref import like, Ref
from .._engine._by_filter import RNG
from .._engine._carry import whole_number
from .._engine._rng_split import fold_in, is_key
from .._filters._filters import FilterLike
from .._filters._select import selected_refs, with_other_refs


T = TypeVar("T")


def add_axis(tree: T, size: int, filter: FilterLike = True, *, axis: int = 0) -> T:
    """Adds an axis to some refs of a tree, for [`refx_eqx.filter_vmap`][],
    [`refx_eqx.scan`][] or [`refx_eqx.map`][] to map over.

    This lets a stateful cell run on a batch, with one state per element and shared
    parameters.

    !!! Example

        ```python
        import jax
        import jax.numpy as jnp
        import refx_eqx as rx
        from jaxtyping import Array, Float

        class Cell(rx.Module):
            weight: rx.Param[Float[Array, "n n"]]
            h: rx.Ref[Float[Array, "n"]] = rx.field(collection="state")

            def __call__(self, x):
                self.h.value = jnp.tanh(self.weight[...] @ self.h[...] + x)
                return self.h[...]

        cell = Cell(jnp.eye(3), jnp.zeros(3))
        cells = rx.add_axis(cell, 8, "state")
        assert cells.h.shape == (8, 3) and cells.weight is cell.weight

        step = rx.filter_vmap(Cell.__call__, in_axes=(rx.axes(state=0, default=None), 0))
        assert step(cells, jnp.ones((8, 3))).shape == (8, 3)
        ```

    The declared type of a ref does not change: inside the mapped function the axis is gone,
    and a write outside must keep it.

    **Arguments:**

    - `tree`: any pytree of refs.
    - `size`: the size of the new axis.
    - `filter`: any filter, which selects refs. By default all of them.
    - `axis`: the position of the new axis.

    **Returns:**

    The tree, with a new ref for each selected one. Its value is repeated along the new
    axis; a key of collection `"rng"` is split along it. Shared refs stay shared, also with
    functions in the tree that hold them, and all other refs are those of `tree`.

    **Raises:**

    - `StructureError`: if no ref is selected, or if a value cannot have such an axis.
    - `TypeError`, `ValueError`: if `size` or `axis` is not an integer, or `size` is
        negative.
    """
    size = whole_number(size, "rx.add_axis", "`size`", 0)
    axis = whole_number(axis, "rx.add_axis", "`axis`")
    selected = selected_refs(tree, filter)
    if not selected:
        raise StructureError(
            f"`rx.add_axis`: {filter!r} selects no ref of this tree. Name a collection "
            "that it has; `rx.aliases(tree)` lists its refs."
        )
    new = {id(ref): _with_axis(ref, size, axis) for ref in selected}
    return with_other_refs(tree, new, "add an axis to")


def _with_axis(ref: Ref, size: int, axis: int) -> Ref:
    def stack(leaf: Any) -> Any:
        if not is_traced_in_ref(leaf):
            return leaf
        one = jnp.asarray(leaf)
        if not -one.ndim - 1 <= axis <= one.ndim:
            raise StructureError(
                f"`rx.add_axis` cannot give {describe(ref)} an axis "
                f"{axis}: its shape is {one.shape}. Put it in front: `axis=0`."
            )
        # Copies of one key would draw the same numbers at every place.
        if ref._collection == RNG and is_key(one):
            many = jax.vmap(lambda number: fold_in(one, number))(jnp.arange(size))
        else:
            many = jnp.broadcast_to(one, (size, *one.shape))
        return jnp.moveaxis(many, 0, axis)

    return like(ref, jtu.tree_map(stack, ref.value))
