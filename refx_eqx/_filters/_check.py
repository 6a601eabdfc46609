"""`check`: checks that all arrays of a model are in refs."""

from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from .._core._errors import StructureError
from .._fields._misplaced import check_refs_in_place
from .._trees._paths import path_text
from ._filters import FilterLike
from ._select import check_all_in_tree, choose, leaves_with_paths


_MOST = 8


def check(tree: PyTree, constants: FilterLike = False) -> None:
    """Checks that every array of a model is in a ref. Use it at the end of an `__init__`,
    or in a test.

    An array in a field that is not declared a ref is a constant. Training `wrt="params"`
    and [`refx_eqx.update_refs`][] do not change it, and [`refx_eqx.state_dict`][] does not
    contain it. If it was meant to be a parameter, nothing else reports it.

    !!! Example

        ```python
        import jax
        import jax.numpy as jnp
        import refx_eqx as rx

        class Scale(rx.Module):
            by: rx.Param[jax.Array]
            offset: jax.Array  # not declared a ref

        scale = Scale(jnp.ones(3), jnp.zeros(3))
        try:
            rx.check(scale)
        except rx.StructureError as e:
            assert "`offset`" in str(e)
        rx.check(scale, constants=rx.path("offset"))
        ```

    **Arguments:**

    - `tree`: a tree of refs, or a derefed one. No ref is read, so this may be called
        anywhere.
    - `constants`: any filter. The arrays it selects need not be in refs.

    **Returns:**

    Nothing.

    **Raises:**

    - `StructureError`: if there are arrays outside refs, or a ref is only in a set, or among
        the keys of a dict. It names them.
    - `RefTypeError`: if a field that is declared a ref holds an array.
    """
    check_refs_in_place(tree, "`rx.check`")
    pairs, _ = leaves_with_paths(tree)
    check_all_in_tree(pairs, "`rx.check`")
    found = [
        f"{path_text(path)}, {leaf.dtype}{list(leaf.shape)}"
        for (path, leaf), answer in zip(pairs, choose(pairs, constants))
        if answer != 0 and _is_array(leaf)
    ]
    if found:
        more = [f"{len(found) - _MOST} more"] if len(found) > _MOST else []
        raise StructureError(
            f"`rx.check`: {len(found)} of the arrays are not in refs: "
            f'{"; ".join(found[:_MOST] + more)}. They are not trained by `wrt="params"`, and '
            "not in the state dict. Declare their fields, such as `weight: "
            "rx.Param[Array]`, or turn them into refs with `rx.as_refs`; if they are "
            "constants, say so: `rx.check(model, constants=rx.path(...))`."
        )


def _is_array(x: Any) -> bool:
    return eqx.is_array(x) or isinstance(x, np.ndarray | jax.ShapeDtypeStruct)
