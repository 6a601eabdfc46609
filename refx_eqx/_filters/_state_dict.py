"""The values of a tree of refs as a flat dict, for file formats, and back into the refs.

tree of refs   -- state_dict -->  {"encoder.weight": array, ...}  -- load_state_dict -->
"""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from .._core._access import check_carried, check_value, check_writable
from .._core._errors import describe, MismatchError, RefTypeError, StructureError
from .._core._ref import Ref, taken
from .._fields._misplaced import check_refs_in_place
from .._trees._equality import is_same_tree
from .._trees._paths import key_text
from ._as_held import as_held, is_same_bits, leaf_as_held, storable
from ._filters import FilterLike
from ._select import check_all_in_tree, choose, leaves_with_paths, refuse_derefed
from ._update import check_fits, write_all


def state_dict(tree: PyTree, filter: FilterLike = True) -> dict[str, Any]:
    """The values of the refs of a tree, keyed by the first place of each ref.

    The dict only contains the values of refs. Arrays outside refs are constants of the tree
    and are left out: [`refx_eqx.check`][] names such arrays, [`refx_eqx.save`][] refuses
    them, and [`refx_eqx.as_refs`][] turns them into refs.

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

    - `tree`: a tree of refs. The selected ones must be readable here.
    - `filter`: any filter. The refs it selects are in the dict.

    **Returns:**

    A dict from path to value, in tree order. A path is the keys on the way to the ref,
    joined with dots, as in [`refx_eqx.path`][] and [`refx_eqx.aliases`][], or `""` if the
    tree itself is the ref. A shared ref appears once.

    A value that is a pytree has an entry for each of its arrays, numbers and strings, with
    the path continued into the value: `"layer.weight"` for a ref `layer` to a module. Its
    other leaves, such as functions, are not in the dict. A typed key is stored as its data,
    which [`refx_eqx.load_state_dict`][] turns back into a key.

    The dict works with any format that takes arrays by name: `numpy.savez`, safetensors,
    Orbax. Nothing is copied, so write the dict to a file, or copy its arrays, before a call
    of `filter_jit(donate="refs")` reuses them.

    **Raises:**

    - `StructureError`: if `tree` is derefed, if `filter` selects a ref at one of its places
        and not at another, or if two refs have the same path.
    - `RefTypeError`: if a field that is declared a ref holds an array.
    - `TraceLevelError`: if a ref cannot be read here.
    - `DonatedError`: if the buffer of a value is gone.
    """
    places = places_of(tree, filter, "Cannot make a state dict")
    if "allow_pickle" in places:
        raise StructureError(
            "Cannot make a state dict: `allow_pickle` is the path of "
            f"{describe(places['allow_pickle'])}, which `numpy.savez` would take for its "
            "own argument, and leave out. Rename the field or the key."
        )
    slots = _slots(places, "Cannot make a state dict")
    first = first_places(places)
    leaves = {path: jtu.tree_leaves(taken(ref)) for path, ref in first.items()}
    return {
        key: storable(leaves[path][i])
        for key, (_, i, path) in slots.items()
        if path in first
    }


def load_state_dict(
    tree: PyTree,
    state: Mapping[str, Any],
    filter: FilterLike = True,
    *,
    strict: bool = True,
) -> None:
    """Writes the values of a state dict into the refs of a tree.

    Everything is validated first: on any mismatch nothing is written.

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

    - `tree`: a tree of refs, whose values have the structure, shapes and dtypes of those to
        load. They may be `jax.ShapeDtypeStruct`s, as in a model made by
        [`refx_eqx.filter_eval_shape`][].
    - `state`: a mapping from path to value, as returned by [`refx_eqx.state_dict`][]. Any
        place of a ref may be its key, so a state saved before two refs were tied, or with
        their places in another order, can be loaded. If several places of one ref are keys,
        their values must be the same. A ref to a pytree also accepts its whole value under
        its own path. A value is converted to what the ref holds: a JAX array, with the
        sharding of the array it replaces, a Python number or string, or a typed key. Another
        precision is converted if no number changes: an `int64` counter to `int32`,
        `bfloat16` to `float32`. A Python number has no precision: it is converted as in
        [`refx_eqx.update_refs`][].
    - `filter`: any filter. Only the refs it selects are written.
    - `strict`: whether each of these refs must have a value, and each key must be a place
        of one of them. If `False`, refs without a value stay unchanged, and other keys are
        ignored.

    **Raises:**

    - `StructureError`: if refs or keys are left over, if a value has another shape than the
        one it replaces, or a dtype that changes its numbers, if a Python number is of
        another kind or out of range, if the data of a key is of another implementation, or
        if two keys give different values for one ref. Also whenever [`refx_eqx.state_dict`][] raises it.
    - `RefTypeError`: if a value breaks the declared type of its ref.
    - `TraceLevelError`, `ImmutableError`: if a ref cannot be written here.
    - `TypeError`: if `state` is not a mapping, or `strict` is not a `bool`.
    """
    if not isinstance(state, Mapping):
        raise TypeError(
            "`rx.load_state_dict` takes a mapping from path to value, but was given a "
            f"`{type(state).__name__}`. For a tree of values, use `rx.update_refs`."
        )
    if not isinstance(strict, bool):
        raise TypeError(
            f"`rx.load_state_dict`: `strict` must be `True` or `False`, but is {strict!r}."
        )
    places = places_of(tree, filter, "Cannot load the state")
    slots = _slots(places, "Cannot load the state")
    if strict:
        _check_complete(places, slots, state)
    # For each ref: the keys of its leaves, and of its whole value under -1.
    given: dict[int, tuple[Ref, dict[int, list[str]]]] = {}
    for key in state:
        if key in slots or key in places:
            ref, i, _ = slots[key] if key in slots else (places[key], -1, key)
            given.setdefault(id(ref), (ref, {}))[1].setdefault(i, []).append(key)
    write_all([(ref, _new_value(ref, keys, state)) for ref, keys in given.values()])


def _new_value(ref: Ref, given: dict[int, list[str]], state: Mapping[str, Any]) -> Any:
    """The value of a ref, with its leaves from the state."""
    check_writable(ref)  # before reading its value, which may be forbidden too
    old_leaves, treedef = jtu.tree_flatten(ref.value)
    held, leaves = {}, list(old_leaves)
    for i, keys in given.items():
        old = ref.value if i == -1 else old_leaves[i]
        held[i] = [(key, as_held(old, state[key], leaf_as_held)) for key in keys]
        if i != -1:
            leaves[i] = held[i][0][1]
    first_key = next(iter(held.values()))[0][0]
    whole = held[-1][0][1] if -1 in held else jtu.tree_unflatten(treedef, leaves)
    value = _checked_value(ref, first_key, whole)
    for (key, earlier), *others in held.values():
        for other_key, other in others:
            if not is_same_tree(is_same_bits, earlier, other):
                raise MismatchError(
                    f"Cannot load the state: {describe(ref)} is one ref at "
                    f"`{_shown(key)}` and `{_shown(other_key)}`, and the state has a "
                    "different value for each. Remove one of the two keys from the state, "
                    "or untie the ref: put `rx.clone(ref)` at one of its places."
                )
    return value


def places_of(tree: Any, filter: Any, failure: str) -> dict[str, Ref]:
    """Each place of each selected ref: the refs in tree order, the first place of a ref
    before its others."""
    pairs, _ = leaves_with_paths(tree)
    refuse_derefed(pairs, failure)
    check_refs_in_place(tree, failure)
    check_all_in_tree(pairs, failure)
    chosen = choose(pairs, filter)
    # By id: a program in which a ref is hashed is not used for other refs.
    paths: dict[int, tuple[Ref, list[str]]] = {}
    for (path, leaf), answer in zip(pairs, chosen):
        if answer == 0 and isinstance(leaf, Ref):
            paths.setdefault(id(leaf), (leaf, []))[1].append(".".join(path))
    places: dict[str, Ref] = {}
    for ref, all_paths in paths.values():
        for path in all_paths:
            other = places.setdefault(path, ref)
            if other is not ref:
                raise StructureError(
                    f"{failure}: {describe(other)} and "
                    f"{describe(ref)} are two refs, and `{path}` is "
                    "the path of both. Rename one of the keys on the way, such as a dict "
                    "key with a dot in it."
                )
    return places


Slots = dict[str, tuple[Ref, int, str]]


def _slots(places: dict[str, Ref], failure: str) -> Slots:
    """Each array of each ref, by its key in a state dict: the ref, the number of the leaf
    in its value, and the place of the ref."""
    slots: Slots = {}
    named = {id(ref): _named_leaves(ref) for ref in first_places(places).values()}
    for path, ref in places.items():
        for name, i in named[id(ref)]:
            key = ".".join(filter(None, (path, name)))
            other = places[key] if name and key in places else ref
            other, j, _ = slots.setdefault(key, (other, i, path))
            if other is not ref or i != j:
                raise StructureError(
                    f"{failure}: `{key}` is the path of an array in {describe(ref)}, and "
                    f"of {describe(other)} or another array in it. Rename one of the keys "
                    "on the way, such as a dict key with a dot in it."
                )
    return slots


def _named_leaves(ref: Ref) -> list[tuple[str, int]]:
    # The structure is no secret even where the value may not be read.
    check_carried(ref, ref._value)
    leaves, _ = jtu.tree_flatten_with_path(ref._value)
    return [
        (".".join(map(key_text, path)), i)
        for i, (path, leaf) in enumerate(leaves)
        if not path or _is_stored(leaf)
    ]


def _is_stored(leaf: Any) -> bool:
    return eqx.is_array_like(leaf) or isinstance(leaf, str | jax.ShapeDtypeStruct)


def first_places(places: dict[str, Ref]) -> dict[str, Ref]:
    """The first of these places of each ref."""
    first: dict[int, tuple[str, Ref]] = {}
    for path, ref in places.items():
        first.setdefault(id(ref), (path, ref))
    return dict(first.values())


def _shown(key: str) -> str:
    return key or "the root of the tree"


def _check_complete(
    places: dict[str, Ref], slots: Slots, state: Mapping[str, Any]
) -> None:
    whole = {id(places[key]) for key in state if key in places and key not in slots}
    given = {(id(slots[key][0]), slots[key][1]) for key in state if key in slots}
    wanted: dict[tuple[int, int], tuple[str, Ref]] = {}
    for key, (ref, i, _) in slots.items():
        if id(ref) not in whole:
            wanted.setdefault((id(ref), i), (key, ref))
    missing = [
        f"`{_shown(key)}`, {describe(ref)}"
        for which, (key, ref) in wanted.items()
        if which not in given
    ]
    unexpected = [repr(key) for key in state if key not in slots and key not in places]
    reasons = []
    if missing:
        reasons.append(f"It has no value for {'; '.join(missing)}.")
    if unexpected:
        reasons.append(
            "No ref that the filter selects is at its key"
            f"{'s' if len(unexpected) > 1 else ''} {', '.join(unexpected)}."
        )
    if reasons:
        raise MismatchError(
            f"Cannot load the state: it does not match the tree. {' '.join(reasons)} Pass "
            "the `filter` that the state was made with; or pass `strict=False`, which "
            "leaves refs without a value unchanged, and ignores other keys."
        )


def _checked_value(ref: Ref, key: str, value: Any) -> Any:
    try:
        try:
            check_fits(
                ref, value, "Cannot load the state", f"`{_shown(key)}`", "the state"
            )
        except StructureError:
            # A broken declared type is more informative than a wrong shape.
            if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
                with np.errstate(over="ignore"):
                    check_value(ref, jnp.asarray(value))
            else:
                check_value(ref, value)
            raise
        return check_value(ref, value)
    except RefTypeError as e:
        raise RefTypeError(
            f"Cannot load the state: at `{_shown(key)}`: {e.args[0]}"
        ) from None
