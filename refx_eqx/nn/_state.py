"""The state of a layer keeps its dtype, whatever the dtype of the inputs."""

from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu

from .._core._ref import Ref


def write_state(ref: Ref, new: Any) -> None:
    """Writes a new state, in the dtypes of the old one: a compiled step is not traced again,
    a scan can carry the state, and the file of another run fits."""
    ref.value = jtu.tree_map(_in_dtype_of, ref.value, new)


def _in_dtype_of(old: Any, new: Any) -> Any:
    # The declared type refuses complex numbers, which a real dtype would cut off.
    return new.astype(old.dtype) if jnp.issubdtype(new.dtype, jnp.floating) else new
