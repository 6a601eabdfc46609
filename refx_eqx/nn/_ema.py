"""`EMA`: an average of a model over its training steps, or a target copy of it."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import ArrayLike, PyTree

from .._core._deref import is_whole, refuse_lookups
from .._core._errors import StructureError
from .._core._nodes import is_inexact
from .._core._ref import make_ref, Ref
from .._fields._module import Module
from .._filters._filters import FilterLike
from .._filters._select import selected_refs
from .._filters._update import check_and_write


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

    `ema.model` is the model with new refs, of collection `"ema"`, for the averages; all
    other refs (batch statistics, randomness) are shared with the model. So it is called
    like the model, and `wrt="params"` selects none of the averages.

    A target network is also an `EMA`: with `decay=0.995` it moves by 0.005 in each step;
    with `decay=0.0` each update sets it to the model.

    **Arguments:**

    - `model`: any tree of refs.
    - `decay`: the fraction of the average that an update keeps, from 0 to 1. The first
        average is the model itself, so no bias correction is needed.
    - `wrt`: any filter, which selects the refs to average.

    **Raises:**

    - `StructureError`: if `wrt` selects no ref, or if `update` or `swap` is given a model
        of another structure.
    - `ValueError`: if `decay` is a number that is not between 0 and 1.
    - `TypeError`: if it is no number.
    """

    model: Any
    decay: Any
    # The places of the averages among the leaves of the model.
    _places: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, model: PyTree, decay: ArrayLike, wrt: FilterLike = "params"):
        selected = selected_refs(model, wrt)
        if not selected:
            raise StructureError(
                f"`rx.nn.EMA`: {wrt!r} selects no ref of this model, so there is nothing to "
                "average. Name a collection that it has; `rx.aliases(model)` lists its refs."
            )
        if not eqx.is_array_like(decay):
            raise TypeError(
                f"`rx.nn.EMA`: `decay` must be a number or an array, but was {decay!r}."
            )
        if isinstance(decay, int | float) and not 0 <= decay <= 1:
            raise ValueError(
                "`rx.nn.EMA`: `decay` is the fraction of the average that an update "
                f"keeps, between 0 and 1, but was {decay!r}."
            )
        refuse_lookups(model, jtu.tree_leaves(model, is_leaf=is_whole), "average")
        averages = {id(ref): _average_of(ref) for ref in selected}
        self.model = jtu.tree_map(lambda x: averages.get(id(x), x), model)
        self.decay = decay
        places = {id(x): i for i, x in enumerate(jtu.tree_leaves(model))}
        self._places = tuple(places[i] for i in averages)

    def update(self, model: PyTree) -> None:
        """Moves the averages one step toward the values of the model.

        **Arguments:**

        - `model`: the model that the average was made from, or a copy of it.
        """
        updates = []
        for average, ref in self._pairs(model):
            value = jtu.tree_map(self._move, average.value, ref.value)
            updates.append((average, value))
        check_and_write(updates)

    def swap(self, model: PyTree) -> None:
        """Exchanges the averages and the values of the model, in place.

        **Arguments:**

        - `model`: as for `update`.
        """
        pairs = self._pairs(model)
        updates = [(ref, average.value) for average, ref in pairs]
        check_and_write(updates + [(average, ref.value) for average, ref in pairs])

    def _move(self, average: Any, value: Any) -> Any:
        if not is_inexact(value):
            return value  # integers and keys have no average
        value = jnp.asarray(value)
        decay = jnp.asarray(self.decay).astype(value.dtype)
        return decay * average + (1 - decay) * value

    def _pairs(self, model: Any) -> list[tuple[Ref, Ref]]:
        """Each average, with the corresponding ref of the model."""
        averages, treedef = jtu.tree_flatten(self.model)
        refs, given = jtu.tree_flatten(model)
        pairs = [(averages[i], refs[i]) for i in self._places if i < len(refs)]
        if treedef != given or not all(isinstance(ref, Ref) for _, ref in pairs):
            raise StructureError(
                "`rx.nn.EMA`: the model has another structure than the one that the "
                "average was made from. Pass that model, or a copy by `rx.clone`; for a "
                "model that was changed by `eqx.tree_at`, make a new `rx.nn.EMA`."
            )
        return pairs


def _average_of(ref: Ref) -> Ref:
    return make_ref(type(ref), ref.value, "ema", ref._name, ref._declared)
