"""`Following`: the type of a ref that is sharded like another, as optimizer moments are
sharded like their weight."""

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax

from .._core._ref import Ref
from .._trees._paths import Path
from ._axis_names import NO_NAMES
from ._bound import BoundType
from ._declared import DeclaredRef


_ANY_ARRAY = DeclaredRef(Ref, "value", 0, jax.Array)


class DeclaredAxes(NamedTuple):
    """What one declared type says about the axes of one array.

    - `names`: the name of each axis, or `None`;
    - `extra`: the positions of stack axes;
    - `sharding`: the `PartitionSpec` from the field for the other axes, or `None`.
    """

    names: tuple[str | None, ...]
    extra: tuple[int, ...]
    sharding: Any

    def with_rank(self, rank: int) -> "DeclaredAxes":
        """The same in a stack made since, or in a slice of one: stack axes come and go in
        front."""
        more = rank - len(self.names)
        if more == 0:
            return self
        names = (None,) * more + self.names[max(-more, 0) :]
        extra = (*range(more), *(i + more for i in self.extra if i + more >= 0))
        return DeclaredAxes(names, extra, self.sharding)


class Following(BoundType):
    """Any array, with the axes of the weight it follows.

    It is a declared type, because a ref keeps those through every transform.

    - `paths`, `collection`: the places and the collection of the weight, for filters;
    - `axes`: what the types of the weight say about its axes.
    """

    __slots__ = ("axes", "collection", "paths")

    def __init__(
        self,
        paths: tuple[Path, ...],
        collection: Hashable,
        axes: tuple[DeclaredAxes, ...],
    ):
        super().__init__(_ANY_ARRAY, NO_NAMES)
        self.paths = paths
        self.collection = collection
        self.axes = axes
        self._hash = hash(self._what)

    @property
    def _what(self) -> tuple:
        return self.paths, self.collection, self.axes

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Following) and self._what == other._what

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> Any:
        return Following, self._what


def followed(ref: Ref) -> Following | None:
    """The `Following` of a ref that follows another, or `None`."""
    found = (bound for bound in ref._declared or () if type(bound) is Following)
    return next(found, None)
