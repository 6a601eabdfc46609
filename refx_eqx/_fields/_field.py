"""Fields that hold refs: what an annotation declares, and how a value becomes a ref.

`weight: rx.Param[Float[Array, "out in"]]` and `weight: Ref[...] = rx.field(collection=
"params")` come to the same: a dataclass field whose converter is a `RefSpec`. A spec wraps
a value in a `Ref` of the field's collection, and lets a `Ref` through.
"""

import builtins
import copy
import dataclasses
import inspect
import sys
import types
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from typing import (
    Annotated,
    Any,
    Final,
    ForwardRef,
    get_args,
    get_origin,
    TypeVar,
    Union,
)

import equinox as eqx
import jax.tree_util as jtu
import jaxtyping

from .._core._errors import check_hashable, CollectionError, describe, RefTypeError
from .._core._ref import commits, declare, Ref, Withheld
from ._axis_names import name_scope
from ._batched import BatchedHint
from ._config import config
from ._construction import keep_state, one_of_several
from ._declaration import check_new, Declaration, DeclaredType
from ._hints import split_hint
from ._ref_type import OpenRefHint, RefHint


__tracebackhide__ = True


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

    def __post_init__(self) -> None:
        check_hashable("rx.Collection", name=self.name)


Param = Annotated[Ref[_T], Collection("params")]
"""`Param[T]`: a ref to a `T`, of collection `"params"`: what an optimiser trains."""

BatchStat = Annotated[Ref[_T], Collection("batch_stats")]
"""`BatchStat[T]`: a ref to a `T`, of collection `"batch_stats"`: running statistics."""

Cache = Annotated[Ref[_T], Collection("cache")]
"""`Cache[T]`: a ref to a `T`, of collection `"cache"`: keys and values while decoding."""


def _collection_of_alias(ref: Ref, alias: Any) -> None:
    # `typing` tells what it made by which alias: `rx.Param(x)` is of collection "params".
    for metadata in getattr(alias, "__metadata__", ()):
        if isinstance(metadata, Collection) and ref._collection is None:
            ref._collection = metadata.name


Ref.__orig_class__ = property(fset=_collection_of_alias)  # type: ignore[attr-defined]


class RefSpec:
    """What a field declares of its refs. As a converter, it makes them."""

    def __init__(self, collection: Any, converter: Callable[[Any], Any] | None):
        self.collection = collection
        self.converter = converter
        # One ref, or a container of them; `None` for a field that holds none.
        self.declared: Declared | Container | None = None
        self.declared_types: tuple[DeclaredType, ...] = ()
        self.owner_name = ""
        self.field_name = ""
        # An `rx.Module` checks all its fields together, so that they share axis names.
        self.checked_by_module = False
        # The specs of one bare `equinox.Module`, in order.
        self.siblings: list[RefSpec] = [self]

    @property
    def is_ref_field(self) -> bool:
        return self.declared is not None

    def bind(self, owner: type, name: str, annotation: Any) -> None:
        """Takes what the annotation of the field says, once its class is known."""
        self.owner_name, self.field_name = owner.__name__, name
        declared = read_annotation(annotation, owner)
        if declared is None and self.collection is not _UNSET:
            declared = Declared(Ref, Any, None, False)
        types_found: list[DeclaredType] = []
        self.declared = self._bind(declared, owner, types_found)
        self.declared_types = tuple(types_found)

    def _bind(self, declared: Any, owner: type, types_found: list) -> Any:
        """The same, with the collection of the field, and each ref with its type."""
        if isinstance(declared, Container):
            items = [self._bind(item, owner, types_found) for item in declared.items]
            return dataclasses.replace(declared, items=tuple(items))
        if declared is None:
            return None
        collection = declared.collection
        if self.collection is not _UNSET:
            if collection not in (None, self.collection):
                raise CollectionError(
                    f"The field `{owner.__name__}.{self.field_name}` is annotated with "
                    f"collection {collection!r} and `rx.field` says "
                    f"{self.collection!r}. Say it once."
                )
            collection = self.collection
        number, hint = len(types_found), declared.value_hint
        types_found.append(DeclaredType(owner, self.field_name, number, hint))
        return dataclasses.replace(
            declared, collection=collection, type=types_found[-1]
        )

    def __call__(self, value: Any) -> Any:
        """The converter of a bare `equinox.Module`, which has no other hook: each ref is
        checked by itself, so axis names are shared within one annotation."""
        if self.checked_by_module:
            return self.convert(value, self.owner_name)
        with one_of_several(self is self.siblings[0], self is self.siblings[-1]):
            value = self.convert(value, self.owner_name)
            if self.is_ref_field and config.check_types:
                self._check(value)
        return value

    def _check(self, value: Any) -> None:
        for ref, where, declared in self.refs_in(value, self.owner_name):
            with name_scope():
                check_declared(ref, where, declared)
                names = declared.type.names()
            keep_state(ref)
            declare(ref, Declaration(declared.type, names))

    def convert(self, value: Any, owner_name: str) -> Any:
        """What the field is to hold: a ref in place of each value that is declared one."""
        if self.declared is None:
            return value if self.converter is None else self.converter(value)
        if self.converter is not None and not isinstance(value, Ref):
            if value is not None or not self.declared.optional:
                value = self.converter(value)
        name = f"{owner_name}.{self.field_name}"
        return map_declared(_as_ref, self.declared, value, name)

    def refs_in(self, value: Any, owner_name: str) -> list[tuple[Any, str, "Declared"]]:
        """What `value` has at each place that is declared a ref: the ref, where it is, and
        what is declared of it."""
        found: list[tuple[Any, str, Declared]] = []

        def visit(declared: Declared, ref: Any, where: str) -> Any:
            found.append((ref, where, declared))
            return ref

        name = f"{owner_name}.{self.field_name}"
        map_declared(visit, self.declared, value, name)
        return found


def _as_ref(declared: "Declared", value: Any, name: str) -> Ref:
    """A new ref for `value`; or `value` itself, if it is a ref."""
    if isinstance(value, Ref):
        _adopt(value, declared.collection, name)
        return value
    ref = declared.ref_type(value, declared.collection)
    ref._name = name
    return ref


def _adopt(ref: Ref, collection: Hashable, name: str) -> None:
    keep_state(ref)
    if ref._collection is None:
        ref._collection = collection
        commits.irregular += 1
    elif collection is not None and ref._collection != collection:
        raise CollectionError(
            f"The field `{name}` is of collection {collection!r}, and was given "
            f"{describe(ref._name, ref._collection)}. Give it a ref of that "
            "collection, or pass the value (`ref.value`) to make a ref of its own."
        )
    if ref._name is None:
        ref._name = name


def check_declared(ref: Any, where: str, declared: "Declared") -> None:
    """That there is a ref of the declared class at this place, with a value of its type.
    Binds axis names in the running scope.

    **Raises:**

    - `RefTypeError`: if not.
    """
    if not isinstance(ref, declared.ref_type):
        raise RefTypeError(
            f"`{where}` is declared a `{declared.ref_type.__name__}`, and there is "
            f"{eqx.tree_pformat(ref)}. Put `rx.Ref(value)` there, or assign the whole "
            "field, which makes a ref of each value."
        )
    if type(ref._value) is Withheld:
        return  # a module that is rebuilt where its refs may not be touched
    value = check_new(where, ref._collection, declared.type, ref._value)
    if value is not ref._value:
        keep_state(ref)
        with commits.lock:
            commits.store(((ref, value),))


class RefField(dataclasses.Field):
    """A dataclass field whose converter is a `RefSpec`, bound when its class is made."""

    def __set_name__(self, owner: type, name: str) -> None:
        spec = self.metadata["converter"]
        for other in owner.__dict__.values():
            if isinstance(other, RefField) and other is not self:
                siblings = other.metadata["converter"].siblings
                if siblings[0].owner_name:  # those before this one
                    spec.siblings = siblings
                    siblings.append(spec)
                    break
        own = inspect.get_annotations(owner)
        if not issubclass(owner, eqx.Module):
            raise TypeError(
                f"`rx.field` of `{owner.__name__}.{name}` makes no ref: "
                f"`{owner.__name__}` is no module. Derive it from `rx.Module` or "
                "`eqx.Module`."
            )
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
    - `TypeError`: if `collection` is not hashable, if the default is a ref, or if the field
        is in a class that is no `equinox.Module`.
    """
    if static:
        if collection is not _UNSET:
            raise ValueError(
                "`rx.field(collection=..., static=True)`: a static field cannot hold a "
                "ref, because it is not part of the pytree. Leave out one of the two."
            )
        return eqx.field(converter=converter, static=True, **kwargs)
    if collection is not _UNSET:
        check_hashable("rx.field", collection=collection)
    return ref_field(eqx.field(**kwargs), RefSpec(collection, converter))


def ref_field(plain: dataclasses.Field, spec: RefSpec) -> RefField:
    """The field `plain` with the converter `spec`."""
    if isinstance(plain.default, Ref):
        raise TypeError(
            "The default of a field is a ref, which all instances would share. Give the "
            "value, of which each makes a ref of its own; or "
            "`rx.field(default_factory=lambda: ref)`, if sharing is meant."
        )
    # The parameters of `Field` grow from one Python to the next (3.14 adds `doc`).
    names = inspect.signature(dataclasses.Field).parameters
    arguments = {name: getattr(plain, name) for name in names}
    arguments["metadata"] = {**plain.metadata, "converter": spec}
    return RefField(**arguments)


_plain_hints: weakref.WeakKeyDictionary[type, dict[str, Any]] = (
    weakref.WeakKeyDictionary()
)


def plain_hints(cls: type) -> dict[str, Any]:
    """The types of the fields without refs, as far as they can be checked: arrays of
    jaxtyping, and stacks."""
    hints: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        hints.update(_plain_hints.get(base, {}))
    return {name: hint for name, hint in hints.items() if _is_checkable(hint)}


def _is_checkable(hint: Any) -> bool:
    if isinstance(hint, BatchedHint):
        return True
    return isinstance(hint, type(jaxtyping.AbstractArray))


def declare_ref_fields(cls: type) -> None:
    """Gives every field of `cls` that is annotated as a ref its `RefSpec`.

    For the class body `weight: rx.Param[Array]` this is as if it had said
    `weight: rx.Param[Array] = rx.field()`.
    """
    hints = _plain_hints[cls] = {}
    slots = cls.__dict__.get("__slots__")
    if slots:
        raise TypeError(
            f"`{cls.__name__}` has `__slots__ = {slots!r}`: a module keeps its fields in "
            "its `__dict__`, as Equinox does. Leave `__slots__` out."
        )
    for name, annotation in inspect.get_annotations(cls).items():
        default = cls.__dict__.get(name, dataclasses.MISSING)
        if isinstance(default, RefField):
            default.metadata["converter"].checked_by_module = True
            continue
        annotation = resolve_annotation(cls, annotation)
        if read_annotation(annotation, cls) is None:
            hints[name] = annotation
            continue
        if isinstance(default, dataclasses.Field):
            plain = default
        elif default is dataclasses.MISSING:
            plain = eqx.field()
        else:
            plain = eqx.field(default=default)
        spec = RefSpec(_UNSET, plain.metadata.get("converter"))
        spec.checked_by_module = True
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
    # Once the class is known that the annotation is in.
    type: Any = None


@dataclasses.dataclass(frozen=True)
class Container:
    """What an annotation says of a tuple, list or dict that holds refs.

    `items` has one entry for each item of the container, or only one for all of them.
    """

    kind: type
    items: tuple["Declared | Container | None", ...]
    is_same_for_all: bool
    optional: bool


def map_declared(
    fn: Callable[[Declared, Any, str], Any],
    declared: Declared | Container | None,
    value: Any,
    where: str,
) -> Any:
    """`value` with `fn(declared, x, where)` in place of each `x` that is declared a ref.

    The same object, if nothing in it changes.

    **Raises:**

    - `RefTypeError`: if a container is of another kind, or has another number of items.
    """
    if declared is None or (value is None and declared.optional):
        return value
    if isinstance(declared, Declared):
        return fn(declared, value, where)
    _check_container(declared, value, where)
    container: Any = value  # which pyright takes for a possible `None` until here
    keys = list(value) if isinstance(value, Mapping) else range(len(container))
    items = declared.items * len(keys) if declared.is_same_for_all else declared.items
    new = {
        key: map_declared(fn, item, container[key], f"{where}[{key!r}]")
        for key, item in zip(keys, items)
    }
    if all(new[key] is container[key] for key in keys):
        return container
    if isinstance(value, Mapping):
        changed: Any = copy.copy(container)  # a `defaultdict` keeps its factory
        changed.update(new)
        return changed
    kind: Any = type(container)
    if hasattr(value, "_fields"):  # a named tuple
        return kind(*new.values())
    return kind(new.values())


def _check_container(declared: Container, value: Any, where: str) -> None:
    n = len(declared.items)
    if not isinstance(value, declared.kind):
        expected = f"a {declared.kind.__name__}"
    elif not declared.is_same_for_all and len(value) != n:
        expected = f"a {declared.kind.__name__} of {n} items"
    elif jtu.all_leaves([value]):  # a range, a text, a subclass of `list`
        raise RefTypeError(
            f"`{where}` is declared a {declared.kind.__name__} of refs, and was given "
            f"{eqx.tree_pformat(value)}, which JAX does not look into: it is no pytree. "
            "Assign a tuple, a list or a dict."
        )
    else:
        return
    raise RefTypeError(
        f"`{where}` is declared {expected}, and cannot hold {eqx.tree_pformat(value)}. "
        "Assign what is declared, or declare what is assigned."
    )


def read_annotation(
    annotation: Any, owner: type | None = None
) -> Declared | Container | None:
    """What `annotation` says of refs; `None` if it does not speak of any.

    **Arguments:**

    - `annotation`: the type; strings in it are looked up from `owner`.
    - `owner`: the class that the annotation is in.

    **Raises:**

    - `TypeError`: if it says that refs are in something which is no pytree.
    """
    if owner is not None:
        annotation = resolve_annotation(owner, annotation)
    hint, metadata = split_hint(annotation)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Final and arguments:
        return read_annotation(arguments[0], owner)
    if origin in (Union, types.UnionType):
        found = [read_annotation(member, owner) for member in arguments]
        first = next((d for d in found if d is not None), None)
        if first is None:
            return None
        return dataclasses.replace(first, optional=type(None) in arguments)
    if isinstance(origin, type) and issubclass(origin, Sequence | Mapping | Set):
        return _read_container(origin, arguments, owner)
    collection = next((m.name for m in metadata if isinstance(m, Collection)), None)
    if isinstance(hint, RefHint | OpenRefHint):
        return Declared(hint.ref_type, hint.value_hint, collection, False)
    if isinstance(hint, type) and issubclass(hint, Ref):
        return Declared(hint, Any, collection, False)
    return None


def _read_container(
    kind: type, arguments: tuple, owner: type | None
) -> Container | None:
    if issubclass(kind, Mapping):
        arguments, is_same_for_all = arguments[1:], True
    elif issubclass(kind, tuple):
        is_same_for_all = arguments[1:] == (Ellipsis,)
        arguments = arguments[:1] if is_same_for_all else arguments
    else:
        is_same_for_all = True
    items = tuple(read_annotation(argument, owner) for argument in arguments)
    if all(item is None for item in items):
        return None
    if issubclass(kind, Set):
        raise TypeError(
            f"A field is annotated as a {kind.__name__} of refs, which JAX does not look "
            "into: it is no pytree. Use a tuple, a list or a dict."
        )
    return Container(kind, items, is_same_for_all, False)


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
    """The annotation itself, where `from __future__ import annotations` left a string, or
    quotes did (`Optional["Param[Array]"]`)."""
    for _ in range(2):  # An annotation in quotes is a string in a string there.
        if isinstance(annotation, ForwardRef):
            annotation = annotation.__forward_arg__
        if isinstance(annotation, str):
            annotation = eval(annotation, {}, _Namespace(owner))
    return annotation
