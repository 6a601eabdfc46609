"""Declared types with their names bound by an instance.

A class declares a field `weight: rx.Param[Float[Array, "out in"]]`, see `_declared.py`. An
instance binds the names: `out` is 2 and `in` is 3. Every ref of the instance carries that
`BoundType`, and every write is checked against it.

A ref may hold more, or less, than its declared type. `filter_vmap(Linear)(keys)` makes refs
with an axis in front; inside `filter_vmap` and `scan` it is gone again; under a `shard_map`
a ref holds a shard. The type need not be told: the value *before* a write has already been
checked, so it shows which axes are extra.
"""

import sys
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np

from .._core._errors import describe_named, RefTypeError
from .._core._nodes import is_convertible, is_number_dtype
from .._trees._changes import try_leaves
from .._trees._equality import is_same_tree
from ._axis_names import AxisNames, name_scope
from ._config import config
from ._conformance import has_placeholder, why_not_of_type
from ._hints import hint_text
from ._numbers import promotions


class BoundType:
    """The declared type of a ref with its names bound, as one instance bound them.

    Hashable and compared by value: equal for two instances of equal sizes, which can thus
    use the same compiled program. `declared` is a `DeclaredRef`.
    """

    __slots__ = ("_hash", "declared", "names")

    def __init__(self, declared: Any, names: AxisNames):
        self.declared = declared
        self.names = names
        # Needed on every call of a program with modules it has not seen.
        self._hash = hash((id(declared), names))

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, BoundType) and (
            self.declared is other.declared and self.names == other.names
        )

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        names = f" with {self.names}" if any(self.names) else ""
        return f"`{hint_text(self.declared.hint)}`{names}"

    def __reduce__(self):
        declared, owner = self.declared, self.declared.owner
        where = owner.__module__, owner.__qualname__, declared.field, declared.number
        return _find, (*where, self.names)

    def why_not(self, value: Any, axes: tuple[int, ...] = ()) -> str | None:
        """Why `value`, without these axes, does not have this type; or `None`."""
        leaves, treedef = jtu.tree_flatten(value)
        if not axes and not has_placeholder(value):
            with name_scope(self.names):
                return why_not_of_type(value, self.declared.hint)
        if any(_is_sized(x) and len(x.shape) < len(axes) for x in leaves):
            return "it has fewer axes than the stack that it is written to"
        reasons: list[str | None] = []

        def judge(arrays: list[Any]) -> None:
            rest = iter(arrays)
            one = [next(rest) if _is_sized(x) else x for x in leaves]
            with name_scope(self.names):
                reason = why_not_of_type(
                    jtu.tree_unflatten(treedef, one), self.declared.hint
                )
            reasons.append(reason)

        # Tracers of the remaining shape stand for the value: nothing is computed.
        jax.eval_shape(judge, [_without(x, axes) for x in leaves if _is_sized(x)])
        return reasons[0]

    def extra_axes(self, value: Any) -> tuple[int, ...] | None:
        """The axes that `value` has on top of those of this type, as in a stack. `None` if
        it does not have this type without any choice of axes."""
        for axes in _candidates(value):
            if self.why_not(value, axes) is None:
                return axes
        return None

    def rebound(self, name: str | None, collection: Any, value: Any) -> "BoundType":
        """The same type with the sizes of `value`: the whole, if a shard bound the names.

        **Raises:**

        - `RefTypeError`: if `value` does not have this type for any sizes.
        """
        if not _is_data(value) or self.extra_axes(value) is not None:
            return self
        free = self._free()
        with name_scope(free.names):
            if why_not_of_type(value, self.declared.hint) is None:
                return BoundType(
                    self.declared,
                    self.declared.names()._replace(attributes=self.names.attributes),
                )
        if free.extra_axes(value) is None:
            raise self.error(name, collection, value, self.why_not(value))
        return free

    def _free(self) -> "BoundType":
        """The same type, with no sizes."""
        return BoundType(self.declared, AxisNames(attributes=self.names.attributes))

    def checked(self, ref: Any, value: Any) -> Any:
        """`value`, converted to this type for storage in `ref`.

        **Raises:**

        - `RefTypeError`: if it does not have this type.
        """
        old = ref._value
        if not config.check_types:
            _unchecked.any = True
            return value
        if (
            isinstance(value, jax.Array)
            and self.declared.by_shape
            and not _unchecked.any
        ):
            # The common case: like the current value, which was checked before.
            known = type(old) is type(value) or isinstance(old, jax.Array)
            if known and old.shape == value.shape and old.dtype == value.dtype:
                return value
        return self._checked(ref, value, old)

    def check_rebuilt(self, ref: Any) -> None:
        """As `checked`, for the current value, which a transform may have stacked
        meanwhile."""
        if config.check_types and self.is_part(ref) and not _is_in_shard():
            value = ref._value
            raise self.error(ref._name, ref._collection, value, self.why_not(value))

    def is_part(self, ref: Any) -> bool:
        """Whether `ref` holds neither a value of this type nor a stack of these: under a
        `shard_map`, a shard of one."""
        return _is_data(ref._value) and self.extra_axes(ref._value) is None

    def _checked(self, ref: Any, value: Any, old: Any) -> Any:
        axes: tuple[int, ...] | None = ()
        if _is_data(old):
            axes = self.extra_axes(old)
            if axes is None and ref._body is None:
                axes = ()  # it was written while checks were off
            if axes is None:
                if is_same_tree(_same_type, old, value):
                    return value
                reason = (
                    "inside this transform it is part of the declared value (a shard, or "
                    f"a slice), and must keep its shape and dtype, {eqx.tree_pformat(old)}"
                )
                raise self.error(ref._name, ref._collection, value, reason, old)
        elif (
            _is_data(value)
            and not self._is_held(old)
            and self.extra_axes(value) is not None
        ):
            return value  # replaces a `None` in a partitioned tree, or a consumed state
        reason = self.why_not(value, axes)
        if reason is not None:
            new = self.converted(value, old)
            if new is not None:
                return new
        if reason is None and axes:
            # There may be more arrays than before, or none.
            known, new = _sizes(old, axes)[0], dict.fromkeys(_sizes(value, axes))
            if any(sizes != known for sizes in new):
                found = " and ".join(map(str, new))
                reason = f"the sizes of the stack are {found} instead of {known}"
        if reason is None:
            return value
        raise self.error(ref._name, ref._collection, value, reason, old, axes)

    def converted(self, value: Any, old: Any = None) -> Any:
        """A Python number promoted to the declared type; `None` if it cannot be."""
        for new in promotions(value, old):
            if self.why_not(new) is None:
                return new
        return None

    def _is_held(self, value: Any) -> bool:
        """Whether a value without arrays is one of the declared type, not a placeholder."""
        leaves = try_leaves(value, lambda x: x is None)
        is_whole = bool(leaves) and all(x is not None for x in leaves)
        return is_whole and self.why_not(value) is None

    def error(
        self,
        name: str | None,
        collection: Any,
        value: Any,
        reason: str | None,
        old: Any = None,
        axes: tuple[int, ...] | None = None,
    ) -> RefTypeError:
        got = eqx.tree_pformat(value)
        stack = ""
        if axes:
            stack = f" It is a stack: the sizes {_sizes(old, axes)[0]} come on top of the type."
        remedy = "Write a value of the declared type, or declare a wider one."
        if isinstance(value, (np.ndarray, np.generic)) and is_number_dtype(value.dtype):
            remedy = "Make a JAX array of it: `jnp.asarray(value)`."
        elif self._is_converted(value, old, axes):
            remedy = "Convert it: `value.astype(ref.dtype)`."
        elif (
            _has_more_axes(value, old)
            and self.extra_axes(value)
            and self._free().why_not(value) is not None
        ):
            remedy = (
                "A write keeps the number of axes. To map over the ref, give it the axis: "
                f"`module = rx.add_axis(module, size, {collection!r})`."
            )
        elif any(self.names):
            remedy = (
                "Write a value of the declared type. The names stay bound as they were "
                "when the module was made: for other sizes, make a new module."
            )
        why = f": {reason}" if reason else ""
        return RefTypeError(
            f"{describe_named(name, collection)} is declared {self!r}, and cannot hold "
            f"{got}{why}.{stack} {remedy}"
        )

    def _is_converted(self, value: Any, old: Any, axes: tuple[int, ...] | None) -> bool:
        """Whether `astype` makes of `value` what may replace `old`."""
        if not _is_sized(old) or not _is_sized(value) or old.shape != value.shape:
            return False
        if value.dtype == old.dtype or not is_convertible(value.dtype, old.dtype):
            return False
        # `old` itself is wrong if it was written while checks were off. (A part of a value,
        # which has no axes here, only has to be like `old`.)
        like_old = jax.ShapeDtypeStruct(value.shape, old.dtype)
        return axes is None or self.why_not(like_old, axes) is None


class _Unchecked:
    """Whether any value was written while checks were off: then current values may not have
    their declared types."""

    any = False


_unchecked = _Unchecked()


def _is_sized(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct))


def _without(leaf: Any, axes: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    shape = list(leaf.shape)
    for axis in axes:
        del shape[axis]
    return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)


def _sizes(value: Any, axes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The sizes of these axes, removed one after the other, in each array."""
    found = []
    for leaf in filter(_is_sized, jtu.tree_leaves(value)):
        shape = list(leaf.shape)
        found.append(tuple(shape.pop(axis) for axis in axes))
    return found


def _candidates(value: Any) -> Iterator[tuple[int, ...]]:
    """The possible axes of a stack: none, any single axis, several in front."""
    yield ()
    ranks = [len(x.shape) for x in jtu.tree_leaves(value) if _is_sized(x)]
    rank = min(ranks, default=0)
    stacks = [(axis,) for axis in range(rank)] + [(0,) * n for n in range(2, rank + 1)]
    for axes in stacks:
        # The arrays of one value are stacked together.
        if len(set(_sizes(value, axes))) == 1:
            yield axes


def _is_data(value: Any) -> bool:
    """Whether this is a value, not a placeholder from a transform or a filter."""
    leaves = try_leaves(value, lambda x: x is None)
    return bool(leaves) and all(map(_is_sized, leaves))


def _is_in_shard() -> bool:
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def _same_type(a: Any, b: Any) -> bool:
    return _is_sized(b) and a.shape == b.shape and a.dtype == b.dtype


def _has_more_axes(value: Any, old: Any) -> bool:
    return _is_sized(old) and _is_sized(value) and len(value.shape) > len(old.shape)


def _find(
    module: str, qualname: str, field: str, number: int, names: AxisNames
) -> BoundType | None:
    """Unpickles a bound type from the declaration in its class. `None` if the class cannot
    be found, for example if it was defined inside a function."""
    owner: Any = sys.modules.get(module)
    for part in qualname.split("."):
        owner = getattr(owner, part, None)
    found = getattr(owner, "__dataclass_fields__", {}).get(field)
    for declared in getattr(found, "refs", ()):
        if declared.number == number:
            return BoundType(declared, names)
    return None
