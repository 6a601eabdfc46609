"""The values of a tree of refs as a flat dict, for a file format, and back into the refs.

tree of refs   -- state_dict -->  {"encoder.weight": array, ...}  -- load_state_dict -->
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .._core import _trace
from .._core._errors import describe, RefTypeError, StructureError
from .._core._nodes import is_opened
from .._core._ref import check_value, check_writable, Ref
from .._fields._instance import check_refs_in_place
from ._filters import dotted, leaves_with_paths, selected_refs
from ._update import check_fits, write_all


__tracebackhide__ = True


def state_dict(tree: Any, filter: Any = True) -> dict[str, Any]:
    """The values of the refs of a tree, each by the first place of its ref.

    What is not in a ref is not in the dict: turn the arrays of a plain tree into refs
    first, with [`refx_eqx.as_refs`][].

    !!! Example

        ```python
        import jax.numpy as jnp
        import refx_eqx as rx

        ref = rx.Ref(jnp.ones(2), "params")
        model = {"decoder": ref, "layers": [ref, rx.Ref(0, "counts")]}

        assert list(rx.state_dict(model)) == ["decoder", "layers.1"]
        assert list(rx.state_dict(model, "params")) == ["decoder"]
        ```

    **Arguments:**

    - `tree`: a tree of refs. Those that are selected must be readable here.
    - `filter`: any filter. The refs that it selects are in the dict.

    **Returns:**

    A dict from path to value, in the order of the tree. A path is the keys on the way
    to the ref, joined with dots, as in [`refx_eqx.path`][] and [`refx_eqx.aliases`][]; that
    of a ref that is itself the tree is `""`. A shared ref is in it once.

    Values are as the refs hold them. One that is a pytree of several arrays stays one: how
    to store it is up to the format. Nothing is copied.

    **Raises:**

    - `StructureError`: if `tree` is derefed, if `filter` selects a ref at one of its places
        and not at another, or if two refs have the same path.
    - `RefTypeError`: if a field that is declared a ref holds an array.
    - `TraceLevelError`: if a ref may not be read here.
    """
    places = places_of(tree, filter, "Cannot make a state dict")
    if "allow_pickle" in places:
        raise StructureError(
            "Cannot make a state dict: `allow_pickle` is the path of "
            f"{_described(places['allow_pickle'])}, and `numpy.savez` would take it for its "
            "own argument, and leave it out. Call the field or the key something else."
        )
    return {path: ref.value for path, ref in first_places(places).items()}


def load_state_dict(
    tree: Any, state: Mapping[str, Any], filter: Any = True, *, strict: bool = True
) -> None:
    """Writes the values of a state dict into the refs of a tree.

    All is validated first: on any mismatch nothing is written.

    !!! Example

        ```python
        import io
        import jax.numpy as jnp
        import numpy as np
        import refx_eqx as rx

        model = {"w": rx.Ref(jnp.ones(2), "params"), "n": rx.Ref(jnp.array(3), "counts")}
        file = io.BytesIO()
        np.savez(file, **rx.state_dict(model))

        other = {"w": rx.Ref(jnp.zeros(2), "params"), "n": rx.Ref(jnp.array(0), "counts")}
        file.seek(0)
        rx.load_state_dict(other, np.load(file))
        assert other["w"].value[1] == 1.0 and other["n"].value == 3
        ```

    **Arguments:**

    - `tree`: a tree of refs, whose values are of the structure, shapes and dtypes of those
        to load. A `jax.ShapeDtypeStruct` is enough, as in the model that
        [`refx_eqx.filter_eval_shape`][] makes.
    - `state`: a mapping from path to value, as [`refx_eqx.state_dict`][] gives. Any place
        of a ref may be its key, so what was saved before two refs were tied, or with their
        places in another order, can be loaded. If several places of one ref are keys, their
        values must be the same. A NumPy array becomes what the ref holds: a JAX array, on
        the devices of the one that it replaces, or a Python scalar.
    - `filter`: any filter. Only the refs that it selects are written.
    - `strict`: whether each of these refs must have a value, and each key be a place of
        one of them. If `False`, refs without a value stay as they are, and other keys are
        not looked at.

    **Raises:**

    - `StructureError`: if refs or keys are left over, if a value has another shape or
        dtype than what it replaces, or if two keys give different values for one ref. Also
        whenever [`refx_eqx.state_dict`][] raises it.
    - `RefTypeError`: if a value breaks the declared type of its ref.
    - `TraceLevelError`, `ImmutableError`: if a ref may not be written here.
    """
    places = places_of(tree, filter, "Cannot load the state")
    if strict:
        _check_complete(places, state)
    new_values: dict[int, tuple[Ref, Any, str]] = {}
    for key in state:
        if key in places:
            ref = places[key]
            value = _checked(ref, key, state[key])
            _, earlier, other_key = new_values.setdefault(id(ref), (ref, value, key))
            if not _is_same(earlier, value):
                raise StructureError(
                    f"Cannot load the state: {describe(ref._name, ref._collection)} is one "
                    f"ref at `{_shown(other_key)}` and `{_shown(key)}`, and the "
                    "state has a different value for each. Remove one of the two keys from "
                    "the state, or untie the ref: put `rx.clone(ref)` at one of its places."
                )
    write_all([(ref, value) for ref, value, _ in new_values.values()])


def places_of(tree: Any, filter: Any, failure: str) -> dict[str, Ref]:
    """Each place of each selected ref: the refs in the order of the tree, the first place
    of a ref before its others."""
    for path, leaf in leaves_with_paths(tree)[0]:
        if is_opened(leaf):
            raise StructureError(
                f"{failure}: the tree is derefed, and has a {type(leaf).__name__} at "
                f"`{dotted(path)}`. Pass the tree of refs itself."
            )
    check_refs_in_place(tree, failure)
    # By id: a program in which a ref is hashed is used for no other refs.
    paths: dict[int, list[str]] = {}
    for path, leaf in leaves_with_paths(tree)[0]:
        if isinstance(leaf, Ref):
            paths.setdefault(id(leaf), []).append(".".join(path))
    places: dict[str, Ref] = {}
    for ref in selected_refs(tree, filter):
        for path in paths[id(ref)]:
            other = places.setdefault(path, ref)
            if other is not ref:
                raise StructureError(
                    f"{failure}: {describe(other._name, other._collection)} and "
                    f"{describe(ref._name, ref._collection)} are two refs, and `{path}` is "
                    "the path of both. Rename one of the keys on the way, such as a dict "
                    "key with a dot in it."
                )
    return places


def first_places(places: dict[str, Ref]) -> dict[str, Ref]:
    """Of these places, the first of each ref."""
    first: dict[int, tuple[str, Ref]] = {}
    for path, ref in places.items():
        first.setdefault(id(ref), (path, ref))
    return dict(first.values())


def _described(ref: Ref) -> str:
    return describe(ref._name, ref._collection)


def _shown(key: str) -> str:
    return key or "the root of the tree"


def _check_complete(places: dict[str, Ref], state: Mapping[str, Any]) -> None:
    given = {id(places[key]) for key in state if key in places}
    missing = [
        f"`{_shown(path)}`, {describe(ref._name, ref._collection)}"
        for path, ref in first_places(places).items()
        if id(ref) not in given
    ]
    unexpected = [repr(key) for key in state if key not in places]
    reasons = []
    if missing:
        reasons.append(f"It has no value for {'; '.join(missing)}.")
    if unexpected:
        reasons.append(
            "No ref that the filter selects is at its key"
            f"{'s' if len(unexpected) > 1 else ''} {', '.join(unexpected)}."
        )
    if reasons:
        raise StructureError(
            f"Cannot load the state: it does not fit the tree. {' '.join(reasons)} Pass as "
            "`filter` what the state was made of; or pass `strict=False`, which leaves "
            "refs without a value as they are, and other keys out."
        )


def _checked(ref: Ref, key: str, value: Any) -> Any:
    check_writable(ref)  # before its value is looked at, which may be forbidden too
    value = _as_held(ref.value, value)
    try:
        try:
            check_fits(
                ref, value, "Cannot load the state", f"`{_shown(key)}`", "the state"
            )
        except StructureError:
            # A declared type that is broken too says more than a wrong shape.
            if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
                check_value(ref, jnp.asarray(value))
            else:
                check_value(ref, value)
            raise
        return check_value(ref, value)
    except RefTypeError as e:
        raise RefTypeError(f"Cannot load the state: at `{_shown(key)}`: {e}") from None


def _as_held(old: Any, new: Any) -> Any:
    """`new` with its NumPy arrays as `old` has them, where they are of equal shape and
    dtype."""
    old_leaves, old_def = jtu.tree_flatten(old)
    new_leaves, new_def = jtu.tree_flatten(new)
    if old_def != new_def:
        return new
    return jtu.tree_unflatten(new_def, map(_leaf_as_held, old_leaves, new_leaves))


def _leaf_as_held(old: Any, new: Any) -> Any:
    if not isinstance(new, (np.ndarray, np.generic)):
        return new
    if isinstance(old, (jax.Array, jax.ShapeDtypeStruct)):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            return new
        placed = type(old) is _trace.ConcreteArray and old.committed
        # A copy: `jax.device_put` may share memory with NumPy, where it may be written.
        return jnp.array(new, device=old.sharding if placed else None)
    if new.ndim == 0 and type(new.item()) is type(old):
        return new.item()
    return new


def _is_same(a: Any, b: Any) -> bool:
    """Whether two values, both of which fit one ref, are equal bit by bit: NaN is NaN."""
    return all(map(_is_same_leaf, jtu.tree_leaves(a), jtu.tree_leaves(b)))


def _is_same_leaf(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if _trace.is_tracer(a) or _trace.is_tracer(b):
        return False  # not known before the program runs
    if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    if hasattr(a, "dtype"):
        return np.asarray(a).tobytes() == np.asarray(b, a.dtype).tobytes()
    return bool(a == b)
