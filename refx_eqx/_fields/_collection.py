"""Collections: the purpose of a ref, given in an annotation."""

import dataclasses
from collections.abc import Hashable
from typing import Annotated, Any, TypeVar

from .._core._errors import check_name
from .._core._ref import Ref
from . import _ref_type as _ref_type  # `Ref[T]` means something from here on


T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Collection:
    """Declares the collection of a field, inside `typing.Annotated`.

    !!! Example

        ```python
        from typing import Annotated, TypeVar

        import jax.numpy as jnp
        import refx_eqx as rx
        from jaxtyping import Array, Float

        T = TypeVar("T")
        Lora = Annotated[rx.Ref[T], rx.Collection("lora")]

        class Adapter(rx.Module):
            a: Lora[Float[Array, "rank in"]]

        assert Adapter(jnp.zeros((2, 3))).a.collection == "lora"
        ```

    **Arguments:**

    - `name`: the collection; any hashable.
    """

    name: Hashable

    def __post_init__(self) -> None:
        check_name("rx.Collection", name=self.name)


Param = Annotated[Ref[T], Collection("params")]
"""`Param[T]`: a ref to a `T`, of collection `"params"`: what an optimizer trains."""

BatchStat = Annotated[Ref[T], Collection("batch_stats")]
"""`BatchStat[T]`: a ref to a `T`, of collection `"batch_stats"`: running statistics."""

Cache = Annotated[Ref[T], Collection("cache")]
"""`Cache[T]`: a ref to a `T`, of collection `"cache"`: keys and values while decoding."""


def _collection_of_alias(ref: Ref, alias: Any) -> None:
    # `typing` records the alias of an object: `rx.Param(x)` has collection "params".
    for metadata in getattr(alias, "__metadata__", ()):
        if isinstance(metadata, Collection) and ref._collection is None:
            ref._collection = metadata.name


Ref.__orig_class__ = property(fset=_collection_of_alias)  # type: ignore[attr-defined]
