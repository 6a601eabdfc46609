"""Meshes: the current one, and whether a `PartitionSpec` fits one."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from .._core import _jax
from .._core._errors import MismatchError


def current_mesh() -> Any:
    """The mesh of `jax.set_mesh`, or `None`. Inside a transform it is an abstract mesh, as
    in JAX."""
    if _jax.is_evaluating():
        mesh: Any = jax.sharding.get_mesh()
    else:
        mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def mesh_axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes named by one entry of a `PartitionSpec`."""
    if entry is None or isinstance(entry, str):
        return () if entry is None else (entry,)
    return tuple(entry) if isinstance(entry, Sequence) else ()  # `P.UNCONSTRAINED`


def check_spec(
    spec: PartitionSpec, shape: tuple[int, ...], mesh: Any, what: str
) -> None:
    """Checks that a spec can split an array of this shape over a mesh (any mesh, if it is
    `None`).

    **Arguments:**

    - `what`: the array, for messages.

    **Raises:**

    - `MismatchError`: if it cannot.
    """
    if len(spec) > len(shape):
        raise MismatchError(
            f"Cannot split {what}: `{_spec_text(spec)}` is for {len(spec)} axes, but its "
            f"shape is {shape}. Give a spec of at most {len(shape)} entries."
        )
    used: dict[str, int] = {}
    for i, entry in enumerate(spec):
        for axis in mesh_axes(entry):
            if axis in used:
                raise MismatchError(
                    f"Cannot split {what}: `{_spec_text(spec)}` has the mesh axis {axis!r} "
                    f"for axis {used[axis]} and for axis {i}, but a mesh axis can split "
                    "only one. Give this array its own spec, such as "
                    f"`rx.axis_rules({{rx.path(...): P({axis!r})}}, ...)`."
                )
            used[axis] = i
            if mesh is not None and axis not in mesh.shape:
                raise MismatchError(
                    f"Cannot split {what}: `{_spec_text(spec)}` names the mesh axis "
                    f"{axis!r}, but the mesh has {', '.join(map(repr, mesh.shape))}. Name "
                    "one of these, or `None`."
                )
        if mesh is None:
            continue
        n = math.prod(mesh.shape[axis] for axis in mesh_axes(entry))
        if shape[i] % n:
            raise MismatchError(
                f"Cannot split {what}: axis {i} has size {shape[i]}, but "
                f"`{_spec_text(spec)}` splits it in {n}, which does not divide it. Give "
                "that axis `None`, or another size."
            )


def _spec_text(spec: PartitionSpec) -> str:
    return f"P({', '.join(map(repr, spec))})"
