"""Converts the shardings given by a user to one sharding per leaf."""

from typing import Any

import jax
import jax.tree_util as jtu
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from .._core._errors import describe, MismatchError
from .._core._nodes import is_node
from .._fields._referenced import in_original_classes
from .._trees._paths import path_text
from ._mesh import check_spec, current_mesh
from ._rules import axis_rules


def leaf_shardings(given: Any, tree: Any, derefed: Any, what: str) -> list[Any]:
    """The sharding of each leaf of a derefed tree, or `None` if none is given.

    **Arguments:**

    - `given`: a device, a sharding, a `PartitionSpec`, `axis_rules`, or a tree of these that
        is a prefix of the derefed one.
    - `tree`: the same tree with its refs, for filters that depend on their identity; or
        again the derefed one.
    - `what`: what the shardings are for, for messages.

    **Raises:**

    - `MismatchError`: if they are for another tree, or if an array cannot be split by its
        sharding.
    - `ValueError`: if a mesh is needed but there is none.
    """
    if isinstance(given, axis_rules):
        # With refs, for filters that depend on their identity.
        given = given.shardings(tree)
    given = jtu.tree_map(lambda one: _as_sharding(one, what), given, is_leaf=_is_one)
    found: list[Any] = []
    of_refs: dict[int, Any] = {}

    def resolve(sharding: Any, subtree: Any) -> None:
        if isinstance(sharding, axis_rules):
            # Rules inside a prefix apply to this subtree only.
            found.extend(sharding.leaf_shardings(subtree))
            return
        for node in jtu.tree_leaves(subtree, is_leaf=is_node):
            if is_node(node):
                before = of_refs.setdefault(node.index, sharding)
                if before != sharding:
                    raise MismatchError(
                        f"{what}: {describe(node)} is one ref at two places, but is given "
                        f"two shardings: {before} and {sharding}. Give the same at both "
                        "places."
                    )
            found.extend([sharding] * len(jtu.tree_leaves(node)))

    try:
        both = in_original_classes(given), in_original_classes(derefed)
        jtu.tree_map(resolve, *both, is_leaf=_is_one)
    except MismatchError:  # ours, which is a `ValueError` as JAX's is
        raise
    except ValueError as e:
        raise MismatchError(
            f"{what}: the shardings must be a prefix of the derefed tree, `rx.deref(tree)`. "
            f"JAX says: {e}"
        ) from None
    leaves, _ = jtu.tree_flatten_with_path(derefed)
    for (path, x), sharding in zip(leaves, found):
        if isinstance(sharding, NamedSharding) and hasattr(x, "shape"):
            place = f"{path_text(path)}"
            check_spec(sharding.spec, tuple(x.shape), sharding.mesh, place)
    return found


def _is_one(x: Any) -> bool:
    return x is None or isinstance(x, (Sharding, PartitionSpec, jax.Device, axis_rules))


def _as_sharding(one: Any, what: str) -> Sharding | axis_rules | None:
    if one is None or isinstance(one, (Sharding, axis_rules)):
        return one
    if isinstance(one, jax.Device):
        return SingleDeviceSharding(one)
    if isinstance(one, PartitionSpec):
        mesh = current_mesh()
        if mesh is None:
            raise ValueError(
                f"{what}: `{one}` needs a mesh, but there is none. Give a "
                "`jax.sharding.NamedSharding(mesh, spec)`, or run this under "
                "`jax.set_mesh(mesh)`."
            )
        return NamedSharding(mesh, one)
    raise MismatchError(
        f"{what}: {one!r} is not a sharding. Give a device, a `jax.sharding.Sharding`, a "
        "`PartitionSpec`, an `rx.axis_rules`, or a tree of these that is a prefix of "
        "`rx.deref(tree)`."
    )
