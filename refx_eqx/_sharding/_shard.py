"""`filter_shard`: moves a tree to its shardings, by reference."""

from typing import Any, TypeVar

import jax
import jax.tree_util as jtu
from jax.sharding import AxisType, NamedSharding, Sharding
from jaxtyping import PyTree

from .._core import _jax
from .._core._access import check_writable
from .._core._deref import closed, deref
from .._core._nodes import Value
from .._core._on_mesh import put
from .._core._ref import Ref
from .._filters._select import leaves_with_paths
from .._filters._update import write_all
from ._prefix import leaf_shardings


T = TypeVar("T")


def filter_shard(x: T, device_or_shardings: PyTree) -> T:
    """As `equinox.filter_shard`, by reference: moves the values of the refs of a tree to
    their shardings, in place. Inside a transform it constrains their shardings.

    A ref that is on a mesh when a compiled function is called has the same sharding when it
    returns: a constraint inside only applies to intermediate values. To move it, call this
    outside the function. (A ref that is not on a mesh can also be moved inside.)

    (`equinox.filter_shard` itself sees no arrays in a tree of refs, and does nothing.)

    !!! Example

        ```python
        import jax
        import jax.numpy as jnp
        import refx_eqx as rx
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

        mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
        model = {"w": rx.Ref(jnp.ones((2, 3)), "params"), "n": rx.Ref(jnp.array(0), "counts")}

        rx.filter_shard(model, NamedSharding(mesh, P()))  # replicated
        with jax.set_mesh(mesh):
            rx.filter_shard(model, rx.axis_rules({rx.collection("params"): P("data")}))
        assert model["w"].value.sharding == NamedSharding(mesh, P("data"))
        assert model["n"].value.sharding == NamedSharding(mesh, P())
        ```

    **Arguments:**

    - `x`: any pytree. Its refs must be writable here. Arrays are moved. A tracer is
        constrained (`jax.lax.with_sharding_constraint`; on an explicit mesh
        `jax.sharding.reshard`), and a `jax.ShapeDtypeStruct` gets the sharding. Everything
        else, including numbers and NumPy arrays, is unchanged.
    - `device_or_shardings`: a device; a `jax.sharding.Sharding`; an
        [`refx_eqx.axis_rules`][], under `jax.set_mesh`; or a tree of shardings that is a
        prefix of `rx.deref(x)`, such as `rules.shardings(x, mesh)`, with `None` for leaves
        that should stay. Under `jax.set_mesh` a `PartitionSpec` also works as a sharding.

    **Returns:**

    The tree with the same refs, and with moved or constrained arrays outside refs.

    **Raises:**

    - `StructureError`: if the shardings are not a prefix of `rx.deref(x)`, if an array
        cannot be split by its sharding, or if one ref is given two shardings. Then nothing
        has moved.
    - `ValueError`: if a mesh is needed but there is none.
    - `TraceLevelError`, `ImmutableError`: if a ref cannot be written here.
    """
    pairs, treedef = leaves_with_paths(x)
    derefed = deref(x)
    shardings = leaf_shardings(device_or_shardings, x, derefed, "`rx.filter_shard`")
    placed = placed_tree(derefed, shardings)
    writes: list[tuple[Ref, Any]] = []
    outside, is_moved = [], False
    for (_, leaf), (_, new) in zip(pairs, leaves_with_paths(placed)[0]):
        if not isinstance(leaf, Ref):
            outside.append(new)
            is_moved = is_moved or new is not leaf
            continue
        outside.append(leaf)
        if isinstance(new, Value):
            # Checked for all refs before the first write.
            check_writable(leaf)
            writes.append((leaf, new.value))
    write_all(writes)
    return closed(jtu.tree_unflatten(treedef, outside)) if is_moved else x


def placed_tree(derefed: Any, shardings: list[Any]) -> Any:
    """A derefed tree with each leaf moved to its sharding; `None` leaves it where it is."""
    leaves, treedef = jtu.tree_flatten(derefed)
    return treedef.unflatten(map(_placed, leaves, shardings))


def _placed(x: Any, sharding: Sharding | None) -> Any:
    if sharding is None:
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=sharding, weak_type=x.weak_type
        )
    if not isinstance(x, jax.Array):
        return x
    if _jax.is_evaluating():
        return put(x, sharding)
    # On explicit mesh axes the sharding is part of the type, which a constraint cannot change.
    if (
        isinstance(sharding, NamedSharding)
        and AxisType.Explicit in sharding.mesh.axis_types
    ):
        return jax.sharding.reshard(x, sharding)
    return jax.lax.with_sharding_constraint(x, sharding)
