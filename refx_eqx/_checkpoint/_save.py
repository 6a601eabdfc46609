"""`save` and `load`: the values of a tree of refs in one file, by name.

    tree of refs  -- state_dict -->  {name: value}  -- save -->  a safetensors file
    tree of refs  <-- load_state_dict --  {name: value}  <-- load --  a safetensors file

Any safetensors reader finds an array for each name. The metadata has, under "refx_eqx", in
JSON:

- `version`: the version of the format described here;
- `notes`: what an array cannot represent, by name (see `_values.py`);
- `tied`: the other places of each shared ref, by its first place.
"""

import dataclasses
import difflib
import functools
import json
import os
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import equinox as eqx
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from .._core._errors import CheckpointError, RefError, StructureError
from .._core._ref import Ref
from .._fields._misplaced import check_refs_in_place
from .._filters._check import also_in_functions, is_array, remedy_for
from .._filters._filters import as_filter, FilterLike
from .._filters._select import (
    aliases,
    check_all_in_tree,
    refuse_derefed,
    selected_refs,
)
from .._filters._state_dict import load_state_dict, state_dict
from .._trees._cells import reaches
from .._trees._paths import key_text, path_text
from . import _file
from ._file import Stored, TensorFile
from ._values import decoded, encoded, Note


VERSION = 1
_METADATA_KEY = "refx_eqx"

Rename = Mapping[str, str | None] | Callable[[str], str | None]


def save(path: str | os.PathLike, tree: PyTree, filter: FilterLike = True) -> None:
    """Saves the values of the refs of a tree to a file, by name.

    An array outside refs is an error, so nothing is silently left out, also not one that
    a function in the tree holds. (Pass `rx.Ref` as `filter` to save only the refs.)

    The file is in the safetensors format, which many tools read. It is written next to
    `path`, flushed to the disk, and renamed: if the process is killed meanwhile, the old
    file at `path` is still there, and complete.

    !!! Example

        ```python
        import pathlib
        import tempfile
        import jax.numpy as jnp
        import refx_eqx as rx

        shared = rx.Ref(jnp.ones(2), "params")
        model = {"encoder": shared, "decoder": shared, "step": rx.Ref(0, "counts")}
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "model.safetensors")
            rx.save(path, model)
            shared.value = jnp.zeros(2)
            rx.load(path, model)
        assert model["encoder"].value[0] == 1.0
        ```

    The names are those of [`refx_eqx.state_dict`][]. A shared ref is in the file once, and
    can be loaded by any of its names. Everything is preserved: `jax.random` keys with their
    implementation, weak types, every dtype of JAX and NumPy except objects, Python numbers
    and strings. Code has no name in a file: a function inside a value, such as the
    activation of a module in a ref, stays that of the tree that is loaded into.

    It needs the package `safetensors`: `pip install 'refx_eqx[checkpoint]'`.

    **Arguments:**

    - `path`: the path of the file. Its folder must exist.
    - `tree`: a tree of refs: a model, or a tuple or dict of everything a program needs to
        resume, which preserves sharing between them. The refs must be readable here.
    - `filter`: any filter. The leaves it selects are saved.

    **Raises:**

    - `StructureError`: if the filter selects an array outside refs, or a value that a file
        cannot hold: a function, or a value with an object that is neither code, an array, a
        number nor a string. Also whenever [`refx_eqx.state_dict`][] raises it.
        Then nothing is written.
    - `RefTypeError`: if a field that is declared a ref holds an array.
    - `DonatedError`: if an array was donated to a call, or deleted.
    - `TraceLevelError`: if a value is a tracer, or cannot be read here.
    - `OSError`: if the file cannot be written. Then the old file is still at `path`.
    """
    _file.safetensors()
    _check_in_refs(tree, filter, "Cannot save", "would not be in the file")
    arrays: dict[str, Stored] = {}
    notes: dict[str, Note] = {}
    places = _places_by_ref(tree, filter)
    state = state_dict(tree, filter)
    # The values themselves: of a `jax.random` key, a state dict only has the data.
    for name, value in _leaves_by_name(places, 1).items():
        if name not in state and _is_code(value):
            continue
        array, note = encoded(name, value)
        if array is not None:
            arrays[name] = array
        if note:
            notes[name] = note
    tied = {first: others for first, *others in places.values() if others}
    ours = {"version": VERSION, "notes": notes, "tied": tied}
    _file.write(path, arrays, {_METADATA_KEY: json.dumps(ours, separators=(",", ":"))})


def load(
    path: str | os.PathLike,
    tree: PyTree,
    filter: FilterLike = True,
    *,
    strict: bool = True,
    rename: Rename | None = None,
    convert: Callable[[str, np.ndarray], Any] | None = None,
) -> None:
    """Writes the values of a file into the refs of a tree, by name.

    Everything is validated first: on any mismatch nothing is written. Nothing in the file
    is executed.

    !!! Example

        ```python
        import pathlib
        import tempfile
        import numpy as np
        import safetensors.numpy
        import jax.numpy as jnp
        import refx_eqx as rx

        model = {"dense": {"weight": rx.Ref(jnp.zeros((2, 3)), "params")}}
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "of_another_library.safetensors")
            kernel = np.ones((3, 2), np.float32)
            safetensors.numpy.save_file({"Dense_0.kernel": kernel}, path)
            rx.load(
                path,
                model,
                rename={"Dense_0.kernel": "dense.weight"},
                convert=lambda name, array: array.T,
            )
        assert model["dense"]["weight"].value[1, 2] == 1.0
        ```

    **Arguments:**

    - `path`: a file written by [`refx_eqx.save`][], or any other safetensors file.
    - `tree`: a tree of refs, whose values have the structure, shapes and dtypes of those to
        load. They may be `jax.ShapeDtypeStruct`s, as in a model made by
        [`refx_eqx.filter_eval_shape`][]. Values go to the devices of those they replace.
    - `filter`: any filter. Only the refs it selects are written.
    - `strict`: whether each of these refs must have a value in the file, and each name of
        the file a ref. If `False`, refs without a value stay unchanged, and other names are
        ignored.
    - `rename`: maps names of the file to names in the tree: a mapping (missing names are
        unchanged) or a function. `None` leaves a name out.
    - `convert`: a function called with the name in the tree and the array of the file, for
        each loaded array. It returns the array to load, for example transposed, or with
        another dtype.

    **Raises:**

    - `CheckpointError`: if the file is truncated, or has another format or a newer version.
    - `StructureError`: if refs or names are left over, if a value has another shape or
        dtype than the one it replaces, if `rename` has a name that the file does not have,
        or gives two names the same place. Also whenever [`refx_eqx.load_state_dict`][]
        raises it.
    - `RefTypeError`: if a value breaks the declared type of its ref, or if a field that is
        declared a ref holds an array.
    - `TraceLevelError`, `ImmutableError`: if a ref cannot be written here.
    - `OSError`: if the file cannot be read.
    - `TypeError`: if `rename` is neither a mapping nor a function, or gives something else
        than a name or `None`.
    """
    _check_in_refs(tree, filter, "Cannot load", "would not be loaded")
    with _file.opened(path) as file:
        content = _Content(file, path)
        places = _places_by_ref(tree, filter)
        sources = _sources(content, places, rename)
        state = _StateOfFile(content, sources, _leaves_by_name(places), convert)
        try:
            load_state_dict(tree, state, filter, strict=strict)
        except RefError as e:
            e.add_note(
                f"The state is from {content.path}. If its names, shapes or dtypes differ "
                "intentionally, convert them with `rename=` and `convert=`."
            )
            raise


def _check_in_refs(tree: Any, filter: Any, failure: str, fate: str) -> None:
    selected = as_filter(filter)
    pairs, in_functions = also_in_functions(tree)
    refuse_derefed(pairs, failure)
    check_all_in_tree(pairs, failure)
    check_refs_in_place(tree, failure)
    for path, leaf in pairs:
        if is_array(leaf) and selected.matches(path, leaf):
            raise StructureError(
                f"{failure}: the array at {path_text(path)} is not in a ref, so it {fate}. "
                f"{remedy_for(path, in_functions)} Or pass `rx.Ref` as `filter`, which "
                "only selects refs."
            )


def _places_by_ref(tree: Any, filter: Any) -> dict[Ref, tuple[str, ...]]:
    """Each selected ref, with all its places."""
    places = aliases(tree)
    return {ref: places[ref] for ref in selected_refs(tree, filter)}


def _is_code(leaf: Any) -> bool:
    """Whether a leaf of a value is a function that holds no data."""
    return callable(leaf) and not reaches(leaf, eqx.is_array)


def _leaves_by_name(
    places: dict[Ref, tuple[str, ...]], n_names: int | None = None
) -> dict[str, Any]:
    """The leaves of the values of the refs, by each of their (first `n_names`) names."""
    held = {}
    for ref, names in places.items():
        for path, leaf in jtu.tree_leaves_with_path(ref.value):
            for name in names[:n_names]:
                keys = [name] if name else []
                held[".".join([*keys, *map(key_text, path)])] = leaf
    return held


class _Content:
    """The values of a file, by the names in it."""

    def __init__(self, file: TensorFile, path: str | os.PathLike):
        self._file = file
        self.path = os.fspath(path)
        # A file from another library only has arrays.
        ours = (
            self._parsed(file.metadata[_METADATA_KEY])
            if _METADATA_KEY in file.metadata
            else {}
        )
        self._notes: dict[str, Note] = ours.get("notes", {})
        self._tied: dict[str, list[str]] = ours.get("tied", {})
        without_array = [name for name in self._notes if name not in file.names]
        self.names = (*file.names, *without_array)

    def _parsed(self, text: str) -> dict[str, Any]:
        try:
            ours = json.loads(text)
            version = int(ours["version"])
        except (ValueError, TypeError, KeyError):
            raise self._broken("its metadata") from None
        if version > VERSION:
            raise CheckpointError(
                f"Cannot load {self.path}: it has version {version} of the format, but "
                f"this version of refx_eqx only reads up to {VERSION}. Load it with the "
                "version that wrote it, or a newer one."
            )
        return ours

    def _broken(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"Cannot load {self.path}: {what} cannot be read. Load an earlier file."
        )

    def names_of(self, name: str) -> list[str]:
        """A name of the file, and the names of the other places of the same ref."""
        first = _place_of(name, self._tied)
        others = [] if first is None else self._tied[first]
        return [name, *(other + name.removeprefix(first or "") for other in others)]

    def value(self, name: str, old: Any) -> Any:
        """The value at a name, to replace `old`."""
        array = self._file[name] if name in self._file.names else None
        try:
            return decoded(array, self._notes.get(name, {}), old)
        except (ValueError, TypeError, KeyError):
            raise self._broken(f"the value of {name!r}") from None


def _place_of(name: str, places: Container[str]) -> str | None:
    """The place of the ref that `name` refers to, or whose value contains it."""
    keys = name.split(".")
    starts = [".".join(keys[:n]) for n in range(len(keys), -1, -1)]
    return next((start for start in starts if start in places), None)


def _sources(
    content: _Content, places: dict[Ref, tuple[str, ...]], rename: Rename | None
) -> dict[str, str]:
    """For each name in the tree for which the file has a value, the name in the file."""
    renamed = _renaming(content, rename)
    known = {place for names in places.values() for place in names}
    sources: dict[str, str] = {}
    for name in content.names:
        keys = [renamed(n) for n in content.names_of(name)]
        keys = [key for key in keys if key is not None]
        # A shared ref is loaded by any of its names in the file; with none it is an error.
        there = [key for key in keys if _place_of(key, known) is not None]
        for key in there or keys[:1]:
            other = sources.setdefault(key, name)
            if other != name:
                raise StructureError(
                    f"Cannot load the state: `rename` maps both {other!r} and {name!r} to "
                    f"`{key}`. Map one of them to `None`."
                )
    return sources


def _name_from(rename: Callable[[str], str | None], name: str) -> str | None:
    key = rename(name)
    if key is not None and not isinstance(key, str):
        raise TypeError(
            f"`rx.load`: `rename` must give a name or `None`, but for {name!r} it gives "
            f"{key!r}."
        )
    return key


def _renaming(content: _Content, rename: Rename | None) -> Callable[[str], str | None]:
    if rename is None:
        return lambda name: name
    if not isinstance(rename, Mapping):
        if not callable(rename):
            raise TypeError(
                f"`rx.load`: `rename` must be a mapping from name to name, or a function, "
                f"but is {rename!r}."
            )
        return functools.partial(_name_from, rename)
    known = {n for name in content.names for n in content.names_of(name)}
    for name in rename:
        if name not in known:
            close = difflib.get_close_matches(str(name), known)
            raise StructureError(
                f"Cannot load the state: `rename` has {name!r}, but {content.path} does "
                f"not. It has {', '.join(map(repr, close or sorted(known)))}."
            )
    return functools.partial(_name_from, lambda name: rename.get(name, name))


@dataclasses.dataclass(eq=False)
class _StateOfFile(Mapping[str, Any]):
    """The mapping passed to `load_state_dict`. Values are read on access, so the whole file
    is never on the host at once."""

    _content: _Content
    _sources: dict[str, str]
    _held: dict[str, Any]
    _convert: Callable[[str, np.ndarray], Any] | None

    def __getitem__(self, key: str) -> Any:
        value = self._content.value(self._sources[key], self._held.get(key))
        # `convert` is for arrays: numbers and texts come from our own notes.
        if self._convert is not None and isinstance(value, np.ndarray):
            return self._convert(key, value)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)
