"""`LoRA`: a low-rank update around a linear layer, which stays unchanged."""

from typing import Annotated, Any, TypeVar

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._core._deref import closed
from .._core._ref import Ref
from .._engine._carry import whole_number
from .._fields._collection import Collection
from .._fields._module import Module
from .._filters._select import leaves_with_paths, refuse_derefed
from .._trees._cells import is_opaque, reachable
from .._trees._closure import opened
from ._stateless import with_params
from ._weights import weight_of, with_weight


T = TypeVar("T")
_Lora = Annotated[Ref[T], Collection("lora")]


class LoRA(Module):
    """A linear layer with a low-rank update of its weight: `layer(x) + scale * b @ a @ x`.

    !!! Example

        ```python
        import jax
        import jax.numpy as jnp
        import refx_eqx as rx

        k1, k2 = jax.random.split(jax.random.key(0))
        linear = rx.nn.Linear(8, 4, key=k1)
        adapted = rx.nn.LoRA(linear, rank=2, key=k2)
        x = jnp.ones(8)
        assert (adapted(x) == linear(x)).all()  # at first there is no change

        # Only the change is trained: the weight itself is of another collection.
        grads = rx.filter_grad(lambda m: jnp.sum(m(x) ** 2), wrt="lora")(adapted)
        rx.update_refs(adapted, jax.tree.map(lambda g: -0.1 * g, grads))

        merged = rx.nn.merge_lora(adapted)
        assert isinstance(merged, rx.nn.Linear)
        assert jnp.allclose(merged(x), adapted(x), atol=1e-6)
        ```

    The layer is shared: it keeps its refs, of collection `"params"`, and the update is two
    refs of collection `"lora"`. So `wrt="lora"` trains the update and freezes the rest.
    [`refx_eqx.nn.merge_lora`][] converts back to plain layers.

    **Arguments:**

    - `layer`: any layer, from this library or not, that multiplies the last axis of its
        input by a weight of shape `(out, in)`.
    - `rank`: the rank of the update.
    - `alpha`: scales the update by `alpha / rank`; by default by one.
    - `weight_name`: the field of the layer that holds its weight.
    - `key`: for the initial `a`. `b` starts at zero.

    **Raises:**

    - `ValueError`: if the layer has no such weight, if `rank` is less than one, or if an
        input does not fit the weight.
    - `TypeError`: if `rank` is not an integer.
    """

    layer: Any
    a: _Lora[Float[Array, "rank in_features"]]
    b: _Lora[Float[Array, "out_features rank"]]
    scale: float = eqx.field(static=True)
    weight_name: str = eqx.field(static=True)

    def __init__(
        self,
        layer: eqx.Module,
        rank: int,
        alpha: float | None = None,
        weight_name: str = "weight",
        *,
        key: PRNGKeyArray,
    ):
        weight = weight_of(layer, weight_name)
        if weight.ndim != 2:
            raise ValueError(
                f"`rx.nn.LoRA`: `{weight_name}` has shape {weight.shape}, but must have "
                "shape (out, in). Around a stack of layers, make a stack: "
                "`rx.filter_vmap(lambda layer, key: rx.nn.LoRA(layer, rank, "
                "key=key))(layers, keys)`."
            )
        rank = whole_number(rank, "rx.nn.LoRA", "`rank`", 1)
        n_out, n_in = weight.shape
        limit = n_in**-0.5  # as in `equinox.nn.Linear`
        self.layer = with_params(layer)
        self.a = jr.uniform(key, (rank, n_in), weight.dtype, -limit, limit)
        # Zero, so that the layer starts out unchanged.
        self.b = jnp.zeros((n_out, rank), weight.dtype)
        self.scale = 1.0 if alpha is None else alpha / rank
        self.weight_name = weight_name

    def __call__(self, x: Array, *, key: PRNGKeyArray | None = None) -> Array:
        """**Arguments:**

        - `x`: the input of the layer, of shape `(..., in)`, or `()` for a `"scalar"` layer.
        - `key`: not used.

        **Returns:**

        The output of the layer plus the update, of the shape of that output.
        """
        n_in = self.a.shape[-1]
        # A "scalar" side of a layer is an axis of length one of its weight.
        row = x[None] if x.shape == () and n_in == 1 else x
        if row.shape[-1:] != (n_in,):
            raise ValueError(
                f"`rx.nn.LoRA`: the input has shape {x.shape}, but its last axis must have "
                f"the length {n_in} to be multiplied by the weight."
            )
        out = self.layer(x)
        update = self.scale * (row @ self.a[...].T @ self.b[...].T)
        return out + update.reshape(out.shape)


def merge_lora(tree: PyTree) -> PyTree:
    """Replaces each [`refx_eqx.nn.LoRA`][] of a tree, also in its functions, with a plain
    layer that has the updated weight.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import jax.numpy as jnp
        import refx_eqx as rx

        k1, k2 = jax.random.split(jax.random.key(0))
        model = rx.nn.MLP(3, 2, 8, 1, key=k1)
        adapt = lambda layer: rx.nn.LoRA(layer, rank=2, key=k2)
        adapted = eqx.tree_at(lambda m: m.layers[0], model, replace_fn=adapt)
        adapted.layers[0].b.value += 1

        merged = rx.nn.merge_lora(adapted)
        assert jax.tree.structure(merged) == jax.tree.structure(model)
        assert jnp.allclose(merged(jnp.ones(3)), adapted(jnp.ones(3)), atol=1e-5)
        assert merged.layers[1].weight is model.layers[1].weight
        ```

    The weight is a new ref: layers that share the old one keep it. All other refs of the
    layer are unchanged.

    **Arguments:**

    - `tree`: any pytree.

    **Returns:**

    The tree without `LoRA`s. An update that occurs at several places, around one weight,
    becomes one new shared weight. A partial, closure or bound method that holds one is
    replaced too; all other functions are those of `tree`.

    **Raises:**

    - `StructureError`: if the tree is derefed, or contains itself.
    """
    pairs, _ = leaves_with_paths(tree)
    refuse_derefed(pairs, "Cannot merge")
    merged: dict[tuple[int, int, int], Any] = {}

    def merge(x: Any) -> Any:
        if x is LoRA.__call__:  # of a bound method
            return _call
        if not isinstance(x, LoRA):
            return x
        layer = merge_lora(x.layer)
        # A layer at several places is merged once, so its weight stays shared.
        key = id(getattr(x.layer, x.weight_name)), id(x.a), id(x.b)
        if key not in merged:
            weight = weight_of(layer, x.weight_name)
            change = x.scale * (x.b[...] @ x.a[...])
            new = with_weight(layer, x.weight_name, weight + change)
            merged[key] = getattr(new, x.weight_name)
        where = lambda layer: getattr(layer, x.weight_name)
        return eqx.tree_at(where, layer, merged[key])

    is_lora = lambda x: isinstance(x, LoRA)
    found = filter(is_lora, reachable(tree, lambda x: is_opaque(x) or is_lora(x)))
    ids = {id(lora.a) for lora in found}
    nodes = opened(tree, lambda leaf: id(leaf) in ids)
    return closed(jtu.tree_map(merge, nodes, is_leaf=is_lora))


def _call(layer: Any, /, *args: Any, **kwargs: Any) -> Any:
    return layer(*args, **kwargs)
