"""Fields that hold refs: what an annotation declares, and how a value becomes a ref.

`weight: rx.Param[Float[Array, "out in"]]` and `weight: Ref[...] = rx.field(collection=
"params")` come to the same: a dataclass field whose converter is a `RefSpec`. A spec wraps
a value in a `Ref` of the field's collection, and lets a `Ref` through.
"""

import builtins
import dataclasses
import inspect
import sys
import types
from collections.abc import Callable, Hashable
from typing import Annotated, Any, ClassVar, get_args, get_origin, TypeVar, Union

import equinox as eqx

from . import _trace
from ._errors import CollectionError, describe
from ._ref import commits, Ref
from ._typing import OpenRefHint, RefHint, split_hint


_trace.register_exclusion(__file__)

_T = TypeVar("_T")
_UNSET: Any = object()


@dataclasses.dataclass(frozen=True)
class Collection:
    """Declares the collection of a field, inside of `typing.Annotated`.

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


Param = Annotated[Ref[_T], Collection("params")]
"""`Param[T]`: a ref to a `T`, of collection `"params"`: what an optimiser trains."""

BatchStat = Annotated[Ref[_T], Collection("batch_stats")]
"""`BatchStat[T]`: a ref to a `T`, of collection `"batch_stats"`: running statistics."""

Cache = Annotated[Ref[_T], Collection("cache")]
"""`Cache[T]`: a ref to a `T`, of collection `"cache"`: keys and values while decoding."""


class RefSpec:
    """What a field declares of its ref. As a converter, it makes the ref."""

    def __init__(self, collection: Any, converter: Callable[[Any], Any] | None):
        self.collection = collection
        self.converter = converter
        self.is_ref_field = collection is not _UNSET
        self.ref_type: type[Ref] = Ref
        self.value_hint: Any = Any
        self.optional = False
        self.owner_name = ""
        self.field_name = ""

    def bind(self, owner: type, name: str, annotation: Any) -> None:
        """Takes what the annotation of the field says, once its class is known."""
        self.owner_name, self.field_name = owner.__name__, name
        declared = read_annotation(annotation)
        if declared is not None:
            self.is_ref_field = True
            self.ref_type = declared.ref_type
            self.value_hint = declared.value_hint
            self.optional = declared.optional
            if self.collection is _UNSET:
                self.collection = declared.collection
            elif declared.collection not in (None, self.collection):
                raise CollectionError(
                    f"The field `{owner.__name__}.{name}` is annotated with collection "
                    f"{declared.collection!r} and `rx.field` says "
                    f"{self.collection!r}. Say it once."
                )
        if self.collection is _UNSET:
            self.collection = None

    def __call__(self, value: Any) -> Any:
        return self.convert(value, self.owner_name)

    def convert(self, value: Any, owner_name: str) -> Any:
        """A ref for `value`; or `value` itself, if it is a ref, or `None` for optional."""
        __tracebackhide__ = True
        if not self.is_ref_field:
            return value if self.converter is None else self.converter(value)
        name = f"{owner_name}.{self.field_name}"
        if isinstance(value, Ref):
            self._adopt(value, name)
            return value
        if value is None and self.optional:
            return None
        if self.converter is not None:
            value = self.converter(value)
        ref = self.ref_type(value, self.collection)
        ref._name = name
        return ref

    def _adopt(self, ref: Ref, name: str) -> None:
        __tracebackhide__ = True
        if ref._collection is None:
            ref._collection = self.collection
            commits.irregular += 1
        elif self.collection is not None and ref._collection != self.collection:
            raise CollectionError(
                f"The field `{name}` is of collection {self.collection!r}, and was given "
                f"{describe(ref._name, ref._collection)}. Give it a ref of that "
                "collection, or pass the value (`ref.value`) to make a ref of its own."
            )
        if ref._name is None:
            ref._name = name


class RefField(dataclasses.Field):
    """A dataclass field whose converter is a `RefSpec`, bound when its class is made."""

    def __set_name__(self, owner: type, name: str) -> None:
        spec = self.metadata["converter"]
        own = inspect.get_annotations(owner)
        spec.bind(owner, name, resolve_annotation(owner, own.get(name, Any)))


def field(
    *,
    collection: Hashable = _UNSET,
    converter: Callable[[Any], Any] | None = None,
    static: bool = False,
    **kwargs: Any,
) -> Any:
    """As `equinox.field`, for a field that holds a ref. Works in an
    [`refx_eqx.Module`][] and in a bare `equinox.Module`.

    !!! Example

        ```python
        import equinox as eqx
        import jax.numpy as jnp
        import refx_eqx as rx
        from jaxtyping import Array, Int

        class Counter(eqx.Module):
            uses: rx.Ref[Int[Array, ""]] = rx.field(
                collection="counts", converter=jnp.asarray
            )

        counter = Counter(0)
        counter.uses.value += 1
        assert counter.uses.collection == "counts" and counter.uses.value == 1
        ```

    **Arguments:**

    - `collection`: of the ref. If omitted, it is what the annotation of the field says.
    - `converter`: as in `equinox.field`; applied to a value before it is wrapped. A `Ref`
        that is assigned is shared as it is, and not converted.
    - `static`: as in `equinox.field`. A static field cannot hold a ref.
    - `**kwargs`: all other arguments of `equinox.field`.

    **Returns:**

    The dataclass field. A value assigned to it is wrapped in a `Ref`; a `Ref` is shared.

    **Raises:**

    - `ValueError`: if both `collection` and `static=True` are given.
    """
    if static:
        if collection is not _UNSET:
            raise ValueError(
                "`rx.field(collection=..., static=True)`: a static field cannot hold a "
                "ref, because it is not part of the pytree. Leave out one of the two."
            )
        return eqx.field(converter=converter, static=True, **kwargs)
    return ref_field(eqx.field(**kwargs), RefSpec(collection, converter))


def ref_field(plain: dataclasses.Field, spec: RefSpec) -> RefField:
    """The field `plain` with the converter `spec`."""
    # The parameters of `Field` grow from one Python to the next (3.14 adds `doc`).
    names = inspect.signature(dataclasses.Field).parameters
    arguments = {name: getattr(plain, name) for name in names}
    arguments["metadata"] = {**plain.metadata, "converter": spec}
    return RefField(**arguments)


def declare_ref_fields(cls: type) -> None:
    """Gives every field of `cls` that is annotated as a ref its `RefSpec`.

    For the class body `weight: rx.Param[Array]` this is as if it had said
    `weight: rx.Param[Array] = rx.field()`.
    """
    for name, annotation in inspect.get_annotations(cls).items():
        default = cls.__dict__.get(name, dataclasses.MISSING)
        if isinstance(default, RefField):
            continue
        annotation = resolve_annotation(cls, annotation)
        if read_annotation(annotation) is None:
            continue
        if isinstance(default, dataclasses.Field):
            plain = default
        elif default is dataclasses.MISSING:
            plain = eqx.field()
        else:
            plain = eqx.field(default=default)
        spec = RefSpec(_UNSET, plain.metadata.get("converter"))
        made = ref_field(plain, spec)
        spec.bind(cls, name, annotation)
        setattr(cls, name, made)


@dataclasses.dataclass(frozen=True)
class Declared:
    """What an annotation says of a ref."""

    ref_type: type[Ref]
    value_hint: Any
    collection: Hashable
    optional: bool


def read_annotation(annotation: Any) -> Declared | None:
    """What `annotation` says of a ref; `None` if it does not speak of one."""
    hint, metadata = split_hint(annotation)
    if get_origin(hint) in (Union, types.UnionType):
        members = get_args(hint)
        optional = type(None) in members
        for member in members:
            declared = read_annotation(member)
            if declared is not None:
                return dataclasses.replace(declared, optional=optional)
        return None
    collection = next((m.name for m in metadata if isinstance(m, Collection)), None)
    if isinstance(hint, RefHint):
        return Declared(hint.ref_type, hint.value_hint, collection, False)
    if isinstance(hint, OpenRefHint):
        return Declared(hint.ref_type, Any, collection, False)
    if isinstance(hint, type) and issubclass(hint, Ref):
        return Declared(hint, Any, collection, False)
    return None


class _Unknown:
    """Stands for a name in an annotation that exists for the type checker alone."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, item: Any) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __or__(self, other: Any) -> Any:
        return Union[Any, other]

    __ror__ = __or__


class _Namespace(dict):
    """The names that a string annotation may use. An unknown one is no reason to fail."""

    def __init__(self, owner: type):
        super().__init__()
        module = vars(sys.modules[owner.__module__])
        self.scopes = [vars(owner), *_enclosing_locals(module), module, vars(builtins)]

    def __missing__(self, name: str) -> Any:
        for scope in self.scopes:
            if name in scope:
                return scope[name]
        return _Unknown()


def _enclosing_locals(module: dict) -> list[dict]:
    """The local names of the functions around a class body, while it is being executed."""
    found = []
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals is module:
            found.append(frame.f_locals)
        frame = frame.f_back
    return found


def resolve_annotation(owner: type, annotation: Any) -> Any:
    """The annotation itself, where `from __future__ import annotations` left a string."""
    if not isinstance(annotation, str) or "ClassVar" in annotation:
        return ClassVar if isinstance(annotation, str) else annotation
    return eval(annotation, {}, _Namespace(owner))
