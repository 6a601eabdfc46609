"""`Value` and `Index`: the two pytree nodes that a ref becomes at a JAX boundary.

JAX carries the derefed tree, in which each ref is a `Value` at its first place and an
`Index` at every later one. It traces the arrays of a value or tree; everything else is
static.
"""

from collections.abc import Callable, Hashable, Iterable
from operator import itemgetter
from typing import Any, TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .._trees._equality import Ignored, StandsForShared
from . import _jax
from ._errors import check_name, describe
from ._misuse import missing_attribute, misuse_of_node, refuse_to_be_a_value
from ._ref import Channeled, Ref


if TYPE_CHECKING:
    from typing_extensions import TypeIs


class Label(Ignored):
    """The attributes of a ref that are not part of its structure: `(name, declared types)`.

    It is stored in the treedef of a derefed tree without affecting it: any two labels are
    equal. (Treedefs are equal for equal structure, sharing, collections and ref types.)
    """

    __slots__ = ()

    name: str | None = property(itemgetter(0))  # type: ignore[assignment]
    declared: Any = property(itemgetter(1))

    def __repr__(self) -> str:
        return f"Label({self.name!r})"


_NO_LABEL = Label((None, None))


def label_of(ref: Ref) -> Label:
    return Label((ref._name, ref._declared))


class Node(StandsForShared):
    """The base of `Value` and `Index`: everything about a ref except its value."""

    __slots__ = ("collection", "index", "label", "ref_type")

    def __init__(self, index: int, collection: Hashable, ref_type: type[Ref]):
        which = f"rx.{type(self).__name__}"
        check_name(which, index=index, collection=collection)
        self.index = index
        self.collection = collection
        self.ref_type = ref_type
        self.label = _NO_LABEL

    # Named as in a ref, for messages.
    _name = property(lambda self: self.label.name)
    _collection = property(lambda self: self.collection)

    def with_value(self, value: Any) -> "Value":
        """A `Value` of the same ref, with this value."""
        return value_node(value, self.index, self.collection, self.ref_type, self.label)

    def structure(self) -> tuple[int, Hashable, type[Ref]]:
        return self.index, self.collection, self.ref_type

    def __getitem__(self, index: Any) -> Any:
        raise misuse_of_node(self, "`[...]`")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        # Without it NumPy makes an array of the node itself.
        raise misuse_of_node(self, "a function of NumPy")


class Value(Node):
    """A ref at its first place in a derefed tree: a pytree node with the value as its
    child.

    Made by [`refx_eqx.deref`][]. Everything but the value is structure: treedefs are equal
    only if `index`, `collection` and `ref_type` are.

    **Arguments:**

    - `value`: the value of the ref. Traced like any pytree.
    - `index`: the number of the ref in its tree. Static.
    - `collection`: the collection of the ref. Static.
    - `ref_type`: the class of the ref. Static.

    !!! Example

        ```python
        import refx_eqx as rx

        ref = rx.Ref(1.0, collection="params")
        first, second = rx.deref((ref, ref))
        assert isinstance(first, rx.Value) and first.value == 1.0
        assert isinstance(second, rx.Index) and second.index == first.index
        ```
    """

    __slots__ = ("value",)

    def __init__(
        self,
        value: Any,
        index: int,
        collection: Hashable = None,
        ref_type: type[Ref] = Ref,
    ):
        super().__init__(index, collection, ref_type)
        self.value = value

    if not TYPE_CHECKING:  # else every attribute is there for a type checker

        def __getattr__(self, name: str) -> Any:
            value = None if name in Node.__slots__ or name == "value" else self.value
            raise missing_attribute(self, name, value, "node.value")

    def __repr__(self) -> str:
        return _node_repr(self, f"{eqx.tree_pformat(self.value)}, ")

    def __eq__(self, other: object) -> bool:
        return type(other) is Value and bool(eqx.tree_equal(self, other))

    __hash__ = None  # type: ignore[assignment]


class Index(Node):
    """A ref at a later place in a derefed tree: a pytree node without children.

    Made by [`refx_eqx.deref`][]. The value is in the `Value` of the same `index`.

    **Arguments:**

    - `index`: the number of the ref in its tree. Static.
    - `collection`: the collection of the ref. Static.
    - `ref_type`: the class of the ref. Static.

    **Raises:**

    - `ValueError`: when its `.value` is read.

    !!! Example

        ```python
        import refx_eqx as rx

        ref = rx.Ref(1.0)
        _, index = rx.deref((ref, ref))
        assert isinstance(index, rx.Index) and index.index == 0
        ```
    """

    __slots__ = ()

    def __init__(
        self, index: int, collection: Hashable = None, ref_type: type[Ref] = Ref
    ):
        super().__init__(index, collection, ref_type)

    @property
    def value(self) -> Any:
        raise ValueError(
            f"Cannot get value of Index {self.index} "
            f"({describe(self)}): a shared ref keeps its value "
            "at its first place in the tree. Call `rx.reref` on the whole tree."
        )

    def __repr__(self) -> str:
        return _node_repr(self, "")

    def __eq__(self, other: object) -> bool:
        return type(other) is Index and self.structure() == other.structure()

    def __hash__(self) -> int:
        return hash(self.structure())


def _node_repr(node: "Value | Index", value: str) -> str:
    return (
        f"{type(node).__name__}({value}index={node.index}, "
        f"collection={node.collection!r}, ref_type={node.ref_type.__name__})"
    )


refuse_to_be_a_value(Node, misuse_of_node)


def is_node(x: Any) -> "TypeIs[Value | Index]":
    """Whether `x` is a `Value` or an `Index`. For use as an `is_leaf`."""
    return isinstance(x, Node)


# Bypasses `__init__`: the contents of a node are not checked again, and a label is not an
# argument of the public classes.


def value_node(
    value: Any, index: int, collection: Hashable, ref_type: type[Ref], label: Label
) -> Value:
    node = object.__new__(Value)
    node.value, node.index, node.collection = value, index, collection
    node.ref_type, node.label = ref_type, label
    return node


def index_node(
    index: int, collection: Hashable, ref_type: type[Ref], label: Label
) -> Index:
    node = object.__new__(Index)
    node.index, node.collection = index, collection
    node.ref_type, node.label = ref_type, label
    return node


_VALUE_KEY = jtu.GetAttrKey("value")


def unflatten_value(aux: tuple, children: Iterable[Any]) -> Value:
    (value,) = children
    return value_node(value, *aux)


def unflatten_index(aux: tuple, _: Iterable[Any]) -> Index:
    return index_node(*aux)


jtu.register_pytree_with_keys(
    Value,
    lambda node: (((_VALUE_KEY, node.value),), (*node.structure(), node.label)),
    unflatten_value,
    lambda node: ((node.value,), (*node.structure(), node.label)),
)
jtu.register_pytree_with_keys(
    Index,
    lambda node: ((), (*node.structure(), node.label)),
    unflatten_index,
)


# What is traced


def is_traced(leaf: Any) -> bool:
    """Whether a leaf outside refs is traced: arrays are, as in Equinox."""
    if type(leaf) is _jax.ConcreteArray:
        return True
    if isinstance(leaf, np.ndarray | np.generic):
        return eqx.is_array(leaf) and _is_of_numbers(leaf)
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def is_traced_in_ref(leaf: Any) -> bool:
    """Whether a leaf of the value of a ref is traced: anything JAX can trace is. In a
    module in the value, only arrays are: see `split_value`."""
    if type(leaf) is _jax.ConcreteArray:
        return True
    if isinstance(leaf, np.ndarray | np.generic):
        return _is_of_numbers(leaf)
    return eqx.is_array_like(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def is_number_dtype(dtype: Any) -> bool:
    """Whether JAX has arrays of this dtype, apart from keys. (To NumPy, text and bytes are
    dtypes too.)"""
    return bool(jnp.issubdtype(dtype, jnp.bool_) or jnp.issubdtype(dtype, jnp.number))


def is_convertible(new: Any, old: Any) -> bool:
    """Whether a message may advise to convert one dtype to another: that runs, and drops
    no imaginary part."""
    drops = jnp.issubdtype(new, jnp.complexfloating) and not jnp.issubdtype(
        old, jnp.complexfloating
    )
    return is_number_dtype(new) and is_number_dtype(old) and not drops


def is_inexact(x: Any) -> bool:
    """Whether `x` is array-like, and floating-point or complex."""
    return is_traced_in_ref(x) and bool(jnp.issubdtype(jnp.result_type(x), jnp.inexact))


def _is_of_numbers(x: Any) -> bool:
    """Whether JAX has arrays of this dtype (not objects, strings or dates)."""
    return x.dtype.kind not in "OSUMm"


def split_value(value: Any) -> tuple[Any, Any]:
    """The value of a ref as `(arrays, statics)`, each with `None` for the other; `statics`
    is `None` if nothing is static. A channel is not part of the structure.

    A Python number is traced, because refs are for state. In a module it is an option, as
    in Equinox: `eqx.nn.Dropout.inference` is used in an `if`.
    """
    if is_traced_in_ref(value):
        return value, None
    if type(value) is Channeled:
        arrays, statics = split_value(value.value)
        return Channeled(arrays, value.channel), statics
    arrays, statics = eqx.partition(value, _spec_of(value))
    return arrays, statics if jtu.tree_leaves(statics) else None


def _spec_of(value: Any) -> Any:
    def spec(x: Any) -> Callable[[Any], bool]:
        return is_traced if is_module(x) else is_traced_in_ref

    return jtu.tree_map(spec, value, is_leaf=is_module)


def is_module(x: Any) -> bool:
    return isinstance(x, eqx.Module)


def join_value(arrays: Any, statics: Any) -> Any:
    """The inverse of `split_value`."""
    if statics is None:
        return arrays
    if type(arrays) is Channeled:
        return Channeled(join_value(arrays.value, statics), arrays.channel)
    # As `eqx.combine`, without a Python call per leaf.
    leaves, treedef = _jax.flatten_with_none(statics)
    both = zip(treedef.flatten_up_to(arrays), leaves)
    return treedef.unflatten([x if static is None else static for x, static in both])
