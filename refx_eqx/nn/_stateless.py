"""The stateless layers of `equinox.nn`, with refs for their arrays.

`rx.nn.Linear(3, 2, key=key)` is `rx.as_refs(eqx.nn.Linear(3, 2, key=key), "params")`. The
class here only makes such a layer: the result is of Equinox's own class, as made by
`as_refs`, so `snapshot` and `as_refs` convert between our layers and plain ones.

Layers without arrays (`Identity`, `Lambda`, the pools) are Equinox's, unchanged.
"""

from collections.abc import Callable, Sequence
from typing import Any, TYPE_CHECKING

import equinox as eqx
import jax.tree_util as jtu

from .._fields._referenced import is_referenced
from .._filters._as_refs import as_refs


_plain: dict[type, type] = {}


class _LayerMeta(type(eqx.Module)):
    """The metaclass of the layers: calling a class makes a layer with refs."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        # A subclass defined elsewhere is made as usual, and then gets its refs.
        plain = _plain.get(cls)
        make = super().__call__ if plain is None else plain
        return with_params(make(*args, **kwargs))

    def __instancecheck__(cls, x: Any) -> bool:
        plain = _plain.get(cls)
        if plain is None:
            return super().__instancecheck__(x)
        return isinstance(x, plain) and (is_referenced(x) or not _has_arrays(x))


def with_params(layer: Any) -> Any:
    """The layer, with a ref of collection "params" for each floating-point array."""
    return as_refs(layer, "params", eqx.is_inexact_array)


def _has_arrays(layer: Any) -> bool:
    return any(map(eqx.is_inexact_array, jtu.tree_leaves(layer)))


def _layer_class(plain: type) -> Any:
    namespace = {
        "__module__": "refx_eqx.nn",
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
    }
    meta: Any = _LayerMeta
    cls = meta(plain.__name__, (plain,), namespace)
    _plain[cls] = plain
    return cls


if TYPE_CHECKING:
    from equinox.nn import (
        Conv as Conv,
        Conv1d as Conv1d,
        Conv2d as Conv2d,
        Conv3d as Conv3d,
        ConvTranspose as ConvTranspose,
        ConvTranspose1d as ConvTranspose1d,
        ConvTranspose2d as ConvTranspose2d,
        ConvTranspose3d as ConvTranspose3d,
        Embedding as Embedding,
        GroupNorm as GroupNorm,
        LayerNorm as LayerNorm,
        Linear as Linear,
        MLP as MLP,
        PReLU as PReLU,
        RMSNorm as RMSNorm,
    )
else:
    Conv = _layer_class(eqx.nn.Conv)
    Conv1d = _layer_class(eqx.nn.Conv1d)
    Conv2d = _layer_class(eqx.nn.Conv2d)
    Conv3d = _layer_class(eqx.nn.Conv3d)
    ConvTranspose = _layer_class(eqx.nn.ConvTranspose)
    ConvTranspose1d = _layer_class(eqx.nn.ConvTranspose1d)
    ConvTranspose2d = _layer_class(eqx.nn.ConvTranspose2d)
    ConvTranspose3d = _layer_class(eqx.nn.ConvTranspose3d)
    Embedding = _layer_class(eqx.nn.Embedding)
    GroupNorm = _layer_class(eqx.nn.GroupNorm)
    LayerNorm = _layer_class(eqx.nn.LayerNorm)
    Linear = _layer_class(eqx.nn.Linear)
    MLP = _layer_class(eqx.nn.MLP)
    PReLU = _layer_class(eqx.nn.PReLU)
    RMSNorm = _layer_class(eqx.nn.RMSNorm)


class Sequential(eqx.nn.Sequential):
    """As `equinox.nn.Sequential`, with refs: layers applied one after the other.

    !!! Example

        ```python
        import jax
        import jax.numpy as jnp
        import refx_eqx as rx

        k1, k2 = jax.random.split(jax.random.key(0))
        model = rx.nn.Sequential(
            [
                rx.nn.Linear(3, 4, key=k1),
                rx.nn.Lambda(jax.nn.relu),
                rx.nn.Dropout(0.5, rngs=rx.Rngs(0)),
                rx.nn.Linear(4, 2, key=k2),
            ]
        )
        assert model(jnp.ones(3)).shape == (2,)
        assert model[0].weight.collection == "params"
        ```

    None of our layers has a state to thread, so it is called with just the input.

    **Arguments:**

    - `layers`: a sequence of callables. The floating-point arrays of those without refs
        become refs of collection `"params"`.
    """

    def __init__(self, layers: Sequence[Callable]):
        super().__init__(with_params(tuple(layers)))
