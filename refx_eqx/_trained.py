"""What an Optax optimizer sees of a model of refs.

It is the state dict of the trained refs, `rx.state_dict(model, wrt)`: a flat dict with one
entry for each selected ref, keyed by its first place.

    {"encoder.weight": f32[8,4], "encoder.bias": f32[8], "layers.0.weight": f32[8,8]}

It is not a tree like the model, although gradients are, for these reasons:

- a tied weight is one entry, so it has one slot and counts once in a norm; and refs that
    are not selected are absent, so nothing can decay them;
- masks and labels are dicts too, written in plain Python over names. (They could not be
    modules: Optax calls any callable, and most modules are callable.)
- the state of the optimizer only depends on names, not on the class of a module, its static
    fields, or layers without trained refs. So it survives an `eqx.tree_at` on another part
    of the model, and its own names are readable: `opt_state.0.mu.encoder.weight`.
"""

from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from ._core import _jax
from ._core._access import peek
from ._core._deref import deref, reref
from ._core._errors import describe, MismatchError, StructureError
from ._core._nodes import is_inexact, is_node, is_traced_in_ref, split_value, Value
from ._core._ref import Ref
from ._fields._axes_of_values import declared_axes, stacks_in
from ._fields._following import Following
from ._filters._check import also_in_functions, remedy_for
from ._filters._select import choose
from ._filters._state_dict import first_places, places_of
from ._filters._update import aligned
from ._trees._closure import opened
from ._trees._paths import Path, path_text


class Trained:
    """The trained refs of a model.

    - `refs`: the refs, by name;
    - `values`: their arrays, with `None` for everything else: what Optax sees.

    **Raises:**

    - `StructureError`: if `wrt` selects no ref to train, or an array outside refs.
    """

    def __init__(self, model: Any, wrt: Any):
        self.model = model
        self.refs: dict[str, Ref] = {}
        self.values: dict[str, Any] = {}
        self._places = places_of(model, wrt, "Cannot train the model")
        _check_wrt_in_refs(model, wrt)
        for name, ref in first_places(self._places).items():
            arrays = eqx.filter(split_value(ref.value)[0], is_inexact)
            if jtu.tree_leaves(arrays):
                self.refs[name] = ref
                self.values[name] = jtu.tree_map(_number_as_array, arrays)
        if not self.refs:
            raise StructureError(
                f"Cannot train the model: wrt={wrt!r} selects no ref of it with a "
                "floating-point or complex array. Pass the tree that has the refs, and as "
                "`wrt` a filter that selects some. (A predicate filter receives the ref, "
                "not its value.)"
            )

    def which(self, name: str) -> str:
        """How messages refer to a ref."""
        ref = self.refs[name]
        return f"`{name}`, {describe(ref)}"

    def followed(self) -> dict[tuple, tuple[Any, Following]]:
        """Each array of each ref, by its place in `values`, with the type for state that
        follows it."""
        stacks, found = stacks_in(opened(self.model)), {}
        paths: dict[int, tuple[Path, ...]] = {}
        for name, ref in self._places.items():
            paths[id(ref)] = *paths.get(id(ref), ()), tuple(name.split("."))
        for name, ref in self.refs.items():
            declared = declared_axes(ref, stacks.get(id(ref), ()))
            leaves, _ = jtu.tree_flatten_with_path(peek(ref))
            for (keys, x), axes in zip(leaves, declared):
                following = Following(paths[id(ref)], ref._collection, tuple(axes))
                found[jtu.DictKey(name), *keys] = x, following
        return found

    def check_names(self, names: Iterable[str]) -> None:
        """Checks that the refs have these names, for which the optimizer has slots."""
        known = set(names)
        missing = sorted(known - self.refs.keys())
        unknown = sorted(self.refs.keys() - known)
        if missing or unknown:
            reasons = [f"it has no ref to train at {n!r}" for n in missing]
            reasons += [f"the optimizer has no slot for {n!r}" for n in unknown]
            raise made_for_another("; ".join(reasons))

    def by_name(self, tree: Any, what: str) -> dict[str, Any]:
        """A tree aligned with the model, such as its gradients, in the form of `values`.

        **Raises:**

        - `StructureError`: if there is nothing for a trained array, or something of another
            shape.
        """
        failure = f"Cannot use the {what}"
        pieces = aligned(self.model, tree, failure, what)
        given = {id(ref): piece for ref, piece, _ in pieces}
        found, missing = {}, []
        for name, ref in self.refs.items():
            arrays = _arrays_like(self.values[name], given.get(id(ref)))
            if arrays is None:
                missing.append(self.which(name))
                continue
            found[name] = arrays
            old, new = _shapes(self.values[name]), _shapes(arrays)
            if old != new:
                raise MismatchError(
                    f"{failure}: {self.which(name)}, has the shape {_shapes_text(old)}, "
                    f"but the {what} have {_shapes_text(new)} there. Reduce per-example "
                    "values first, for example with `jnp.mean(..., axis=0)`."
                )
        if missing:
            raise MismatchError(
                f"{failure}: there is nothing for {'; '.join(missing)}. Differentiate with "
                "respect to everything that is trained: `rx.filter_grad(loss, "
                "wrt=optimizer.wrt)`."
            )
        return found

    def of_values(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Converts `fn`, a function of a model, to a function of `values`. It is called
        with a copy of the model that belongs to the calling trace: Optax may call it in a
        loop."""
        nodes = jtu.tree_leaves(deref(self.model), is_leaf=is_node)
        leaves, treedef = jtu.tree_flatten(opened(self.model))
        names = {id(ref): name for name, ref in self.refs.items()}

        def of_values(values: Any, *args: Any, **kwargs: Any) -> Any:
            new = [
                node.with_value(eqx.combine(values[names[id(ref)]], node.value))
                if isinstance(node, Value) and id(ref) in names
                else node
                for ref, node in zip(leaves, nodes)
            ]
            return fn(reref(treedef.unflatten(new)), *args, **kwargs)

        return of_values

    def writes(self, updates: Any) -> list[tuple[Ref, Any]]:
        """The writes that add `updates`, in the form of `values`."""
        expected, found = map(jtu.tree_structure, (self.values, updates))
        if expected != found:
            raise MismatchError(
                "Cannot update the model: the transformation returned updates with the "
                f"structure {found}, but was given {expected}."
            )
        return [
            (ref, with_update(ref, ref.value, updates[name], f"at `{name}`"))
            for name, ref in self.refs.items()
        ]


def made_for_another(reason: str) -> MismatchError:
    return MismatchError(
        f"Cannot update the model: the optimizer was made for another: {reason}. Pass the "
        "model it was made for; or make an optimizer for this one: "
        "`rx.Optimizer(model, tx)`."
    )


def _number_as_array(x: Any) -> Any:
    """Converts a Python number to an array, because Optax calls array methods."""
    return jnp.asarray(x) if isinstance(x, float | complex) else x


def _check_wrt_in_refs(model: Any, wrt: Any) -> None:
    """Checks that `wrt` selects no array outside refs. (It would silently not be
    trained.)"""
    pairs, in_functions = also_in_functions(model)
    for (path, leaf), which in zip(pairs, choose(pairs, wrt)):
        if which == 0 and eqx.is_inexact_array(leaf):
            raise StructureError(
                f"Cannot train the model: wrt={wrt!r} selects {eqx.tree_pformat(leaf)} at "
                f"{path_text(path)}, which is not in a ref, so it cannot be updated in "
                f"place. {remedy_for(path, in_functions)} Or select only refs, as "
                "`wrt=rx.Ref` does."
            )


def _arrays_like(value: Any, given: Any) -> Any:
    """The arrays of `given` for those of `value`; `None` if one is missing."""
    treedef = jtu.tree_structure(value)
    try:
        arrays = treedef.flatten_up_to(given)
    except (ValueError, TypeError):
        return None
    if not all(map(is_traced_in_ref, arrays)):
        return None
    return jtu.tree_unflatten(treedef, arrays)


def _shapes(value: Any) -> list[tuple[int, ...]]:
    return [jnp.shape(x) for x in jtu.tree_leaves(value)]


def _shapes_text(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join(map(str, shapes))


def as_weak_as(old: Any, new: Any) -> Any:
    """`new`, weakly typed if `old` is. To JAX that is part of the type: a step that changes
    it would recompile, and `jnp.array(0.0)` is weakly typed."""
    is_weak = jax.typeof(old).weak_type
    new = jnp.asarray(new)
    if new.weak_type == is_weak:
        return new
    return _jax.as_weak(new) if is_weak else new.astype(new.dtype)


def with_update(ref: Ref, value: Any, update: Any, where: str) -> Any:
    """The value of a ref with an update added, in its own dtype, as in
    `optax.apply_updates`. Leaves without an update are unchanged.

    **Raises:**

    - `StructureError`: if the update has another structure or shape.
    """

    def add(change: Any, old: Any) -> Any:
        if change is None:
            return old
        new = jnp.asarray(old + change).astype(jnp.result_type(old))
        if new.shape != jnp.shape(old):
            raise ValueError(
                f"{jnp.shape(old)} and {jnp.shape(change)} are not the same shape."
            )
        return as_weak_as(old, new)

    try:
        return jtu.tree_map(add, update, value, is_leaf=lambda x: x is None)
    except (ValueError, TypeError) as e:
        raise MismatchError(
            f"Cannot update {describe(ref)} {where}: it holds {eqx.tree_pformat(value)}, "
            f"but the update is {eqx.tree_pformat(update)}: {e} An update must have the "
            "structure and the shape of the value it is added to."
        ) from None
