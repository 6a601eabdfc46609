"""`EMA`: an average of a model over its training steps, or a target copy of it."""

from collections.abc import Hashable, Iterator
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import ArrayLike, PyTree

from .._core import _jax
from .._core._errors import describe, MismatchError, StructureError
from .._core._nodes import is_convertible, is_inexact, join_value, split_value
from .._core._ref import make_ref, Ref
from .._fields._module import Module
from .._filters._filters import FilterLike
from .._filters._select import leaves_with_paths, selected_refs, with_other_refs
from .._filters._update import aligned_leaves, check_and_write
from .._trees._paths import path_text


class EMA(Module):
    """The exponential moving average of a model: a copy that follows it slowly.

    !!! Example

        ```python
        import jax
        import jax.numpy as jnp
        import refx_eqx as rx

        model = rx.nn.Linear(3, 2, key=jax.random.key(0))
        ema = rx.nn.EMA(model, decay=0.9)

        @rx.filter_jit
        def step(model, ema):
            model.bias.value += 1.0
            ema.update(model)

        bias = model.bias.value
        step(model, ema)
        assert jnp.allclose(ema.model.bias.value, 0.9 * bias + 0.1 * (bias + 1))
        assert ema.model(jnp.ones(3)).shape == (2,)  # to evaluate, or as a target

        ema.swap(model)  # the averages are in the model now, and its values in `ema`
        ema.swap(model)  # and back
        ```

    `ema.model` is the model with new refs, of collection `"ema"`, for the averages, also in
    its functions; all other refs (batch statistics, randomness) are shared with the model.
    So it is called like the model, and `wrt="params"` selects none of the averages.

    A target network is also an `EMA`: with `decay=0.995` it moves by 0.005 in each step;
    with `decay=0.0` each update sets it to the model.

    **Arguments:**

    - `model`: any tree of refs.
    - `decay`: the fraction of the average that an update keeps, a number or an array, from
        0 to 1. The first average is the model itself, so no bias correction is needed.
    - `wrt`: any filter, which selects the refs to average.

    **Raises:**

    - `StructureError`: if `wrt` selects no ref; or if `update` or `swap` is given a model of
        another structure, or whose refs have other ties, collections, shapes or dtypes.
        Then nothing is written.
    - `ValueError`: if `decay` is not between 0 and 1. (The value of a traced array is not
        known.)
    - `TypeError`: if it is no real number.
    """

    model: Any
    decay: Any
    # For each average: its place among the leaves of the model, and the collection of the
    # averaged ref.
    _averaged: tuple[tuple[int, Hashable], ...] = eqx.field(static=True)

    def __init__(self, model: PyTree, decay: ArrayLike, wrt: FilterLike = "params"):
        selected = selected_refs(model, wrt)
        if not selected:
            raise StructureError(
                f"`rx.nn.EMA`: {wrt!r} selects no ref of this model, so there is nothing to "
                "average. Name a collection that it has; `rx.aliases(model)` lists its refs."
            )
        _check_decay(decay)
        averages = {id(ref): _average_of(ref) for ref in selected}
        self.model = with_other_refs(model, averages, "average")
        self.decay = decay
        pairs, _ = leaves_with_paths(model)
        places = {id(leaf): i for i, (_, leaf) in enumerate(pairs)}
        self._averaged = tuple((places[id(ref)], ref.collection) for ref in selected)

    def update(self, model: PyTree) -> None:
        """Moves the averages one step toward the values of the model.

        **Arguments:**

        - `model`: the model that the average was made from, or a copy of it.

        **Raises:**

        - `StructureError`: if it is neither: see above.
        - `TraceLevelError`, `ImmutableError`: if a ref cannot be read or written here.
        """
        updates = []
        for average, ref in self._pairs(model):
            old, _ = split_value(average.value)
            new, statics = split_value(ref.value)
            moved = jtu.tree_map(self._moved, old, new)
            updates.append((average, join_value(moved, statics)))
        check_and_write(updates)

    def swap(self, model: PyTree) -> None:
        """Exchanges the averages and the values of the model, in place.

        **Arguments:**

        - `model`: as for `update`.

        **Raises:**

        As `update`.
        """
        pairs = self._pairs(model)
        updates = [(ref, average.value) for average, ref in pairs]
        check_and_write(updates + [(average, ref.value) for average, ref in pairs])

    def _moved(self, average: Any, value: Any) -> Any:
        if not is_inexact(value):
            return value  # integers and keys have no average
        value = jnp.asarray(value)
        decay = jnp.asarray(self.decay).astype(value.dtype)
        return decay * average + (1 - decay) * value

    def _pairs(self, model: Any) -> list[tuple[Ref, Ref]]:
        """Each average, with the corresponding ref of the model."""
        leaves, _ = leaves_with_paths(self.model)
        averaged = {id(leaves[i][1]): collection for i, collection in self._averaged}
        pairs: dict[int, tuple[Ref, Ref]] = {}
        for average, ref, where in _aligned_refs(self.model, model):
            collection = averaged.get(id(average), average.collection)
            if ref.collection != collection:
                raise _unlike(
                    f"At {where} it has {describe(ref)}, instead of a ref of collection "
                    f"{collection!r}."
                )
            if id(average) in averaged:
                if _array_types(average.value) != _array_types(ref.value):
                    raise _unlike(
                        f"Its {describe(ref)} at {where} holds "
                        f"{eqx.tree_pformat(ref.value)}, and the average of it is "
                        f"{eqx.tree_pformat(average.value)}."
                    )
                pairs[id(average)] = average, ref
        for i, _ in self._averaged:
            path, average = leaves[i]
            if id(average) not in pairs:
                raise _unlike(f"It has nothing at {path_text(path)}.")
        return list(pairs.values())


def _check_decay(decay: Any) -> None:
    dtype = jnp.result_type(decay) if eqx.is_array_like(decay) else None
    if dtype is None or not is_convertible(dtype, jnp.float32):
        raise TypeError(
            "`rx.nn.EMA`: `decay` must be a real number or an array of such, but was "
            f"{decay!r}."
        )
    if _jax.is_tracer(decay):
        return
    # On the host: in a trace, JAX would stage a comparison of a concrete array too.
    host = np.asarray(decay)
    if not np.all((host >= 0) & (host <= 1)):
        raise ValueError(
            "`rx.nn.EMA`: `decay` is the fraction of the average that an update keeps, "
            f"between 0 and 1, but was {decay!r}."
        )


def _average_of(ref: Ref) -> Ref:
    return make_ref(type(ref), ref.value, "ema", ref._name, ref._declared)


def _aligned_refs(averages: Any, model: Any) -> Iterator[tuple[Ref, Ref, str]]:
    """Each ref of the averages at each of its places, with the ref of the model there. The
    two trees have the same ties."""
    there: dict[int, tuple[Ref, str]] = {}
    back: dict[int, tuple[Ref, str]] = {}
    for path, average, ref in aligned_leaves(averages, model, _unlike):
        if not isinstance(average, Ref):
            continue
        where = path_text(path)
        if not isinstance(ref, Ref):
            raise _unlike(f"At {where} it has {eqx.tree_pformat(ref)}, and not a ref.")
        known, first = there.setdefault(id(average), (ref, where))
        if known is not ref:
            raise _unlike(f"It has two refs at {first} and {where}, instead of one.")
        known, first = back.setdefault(id(ref), (average, where))
        if known is not average:
            raise _unlike(f"It has one ref at {first} and {where}, instead of two.")
        yield average, ref, where


def _array_types(value: Any) -> tuple[list[Any], Any]:
    """The shapes and dtypes of the arrays of a value, and where they are. A Python number
    is one."""
    leaves, treedef = jtu.tree_flatten(split_value(value)[0])
    return [(jnp.shape(x), jnp.result_type(x)) for x in leaves], treedef


def _unlike(reason: str) -> MismatchError:
    return MismatchError(
        "`rx.nn.EMA`: this is neither the model that the average was made from nor a copy "
        f"of it. {reason} Pass that model, or a copy by `rx.clone`; for another model, or "
        "one that has changed, make another average: `rx.nn.EMA(model, decay)`."
    )
