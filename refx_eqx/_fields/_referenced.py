"""Modules whose tree holds refs, and whose methods see the values.

An Equinox module is written for arrays: its methods compute with `self.weight`. Once its
arrays are refs, it becomes an instance of a subclass (one per class), whose methods run on
the current `view` of the module: the same module, of its original class, with the values of
the refs. From outside, its attributes are the refs.

    layer.weight      # a ref
    layer(x)          # type(layer).__call__(view(layer), x): an array

The subclass differs only in its methods. It has the fields, name, docstring and signature
of its base, and is a separate pytree type, so two trees have the same structure exactly
when the original modules would.
"""

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax.tree_util as jtu

from .._core._deref import closed
from .._core._nodes import is_module
from .._core._ref import Ref, taken
from .._trees._cells import is_lookup, may_carry, reaches
from .._trees._changes import owned
from .._trees._closure import opened


_bases: dict[type, type] = {}
_subclasses: dict[type, type] = {}
# This keeps nothing alive: JAX keeps every pytree class anyway.


def is_referenced(x: Any) -> bool:
    return type(x) in _bases


def plain_class(cls: type) -> type | None:
    """The original class of a module, if this is a subclass whose methods see values."""
    return _bases.get(cls)


def as_referenced(module: eqx.Module) -> eqx.Module:
    """The same module, with methods that see the values of its refs."""
    cls = type(module)
    return (
        module if cls in _bases else with_fields(module, subclass_of(cls), vars(module))
    )


def subclass_of(cls: type) -> type:
    subclass = _subclasses.get(cls)
    if subclass is None:
        names = {"__module__", "__qualname__", "__doc__"} & vars(cls).keys()
        namespace = {name: vars(cls)[name] for name in names if name != "__qualname__"}
        namespace["__qualname__"] = cls.__qualname__
        for name, attribute in _attributes(cls).items():
            on_values = _on_values(name, attribute)
            if on_values is not None:
                namespace[name] = on_values
        namespace["__reduce__"] = _reduce
        subclass = type(cls)(cls.__name__, (cls,), namespace)
        _subclasses[cls] = subclass
        _bases[subclass] = cls
    return subclass


def view(module: Any) -> Any:
    """What the methods of a module see: the module in its original class, with the values
    of refs.

    A submodule that was written for refs is left unchanged.
    """
    return _lowered(module, _value_in_zone)


def snapshot_of(tree: Any) -> Any:
    """The tree without refs, with its modules in their original classes."""
    return _lowered_leaf(tree, _value_everywhere)


def in_original_classes(tree: Any) -> Any:
    """The tree, with its leaves, and with its modules in their original classes: for aligning
    it with another tree, which may have been made before its arrays were refs."""
    return _lowered_leaf(tree, _same_everywhere)


def zone(module: eqx.Module) -> Callable[[Any], bool]:
    """Marks where the fields of a module end: at its submodules. For use as an
    `is_leaf`."""
    return lambda x: x is not module and isinstance(x, eqx.Module)


def _value_in_zone(x: Any) -> Any:
    if isinstance(x, Ref):
        return x.value
    return _lowered(x, _value_in_zone) if is_referenced(x) else x


def _value_everywhere(x: Any) -> Any:
    if isinstance(x, Ref):
        return owned(taken(x))
    if may_carry(x):
        return closed(_lowered_leaf(opened(x), _value_everywhere)) if reaches(x) else x
    return _lowered(x, _value_everywhere) if is_referenced(x) else x


def _same_everywhere(x: Any) -> Any:
    return _lowered(x, _same_everywhere) if is_referenced(x) else x


def _lowered_leaf(tree: Any, value: Callable[[Any], Any]) -> Any:
    return jtu.tree_map(value, tree, is_leaf=_is_whole)


def _is_whole(x: Any) -> bool:
    return is_referenced(x) or is_lookup(x)


def _lowered(module: Any, value: Callable[[Any], Any]) -> Any:
    is_leaf = is_module if value is _value_in_zone else _is_whole
    static = {
        name
        for name, field in type(module).__dataclass_fields__.items()
        if field.metadata.get("static", False)
    }
    fields = {
        name: x if name in static else jtu.tree_map(value, x, is_leaf=is_leaf)
        for name, x in vars(module).items()
    }
    return with_fields(module, _bases[type(module)], fields)


def with_fields(module: Any, cls: type, fields: Any) -> Any:
    new = object.__new__(cls)
    for name, x in fields.items():
        object.__setattr__(new, name, x)
    return new


# Methods that make a module or treat it as an object, but do not compute with it.
_NAMES_OF_THE_OBJECT = (
    "init new post_init check_init init_subclass class_getitem getattr getattribute setattr "
    "delattr repr str format dir hash eq ne reduce reduce_ex getstate setstate copy deepcopy "
    "sizeof del pdoc tree_pp"
)
_OF_THE_OBJECT = frozenset(f"__{name}__" for name in _NAMES_OF_THE_OBJECT.split())


def _attributes(cls: type) -> dict[str, Any]:
    """The attributes of a class and its bases, up to `equinox.Module`."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base is not object and base not in eqx.Module.__mro__:
            if base.__module__ != "typing":
                found.update(vars(base))
    fields = getattr(cls, "__dataclass_fields__", {})
    return {name: x for name, x in found.items() if name not in fields}


def _on_values(name: str, attribute: Any) -> Any:
    """The attribute of a class, bound to `view(self)` instead of `self`; `None` if it has
    no `self`."""
    if name in _OF_THE_OBJECT or isinstance(
        attribute, (staticmethod, classmethod, type)
    ):
        return None
    if isinstance(attribute, types.FunctionType):
        # Unchanged: a module calls it on a view.
        return _method(attribute, lambda self: attribute.__get__(self))
    if not hasattr(type(attribute), "__get__"):
        return None
    if callable(attribute):  # a method under `filter_jit`, say
        return _method(attribute, lambda self: attribute.__get__(self, type(self)))
    if isinstance(attribute, (property, functools.cached_property)):
        return property(lambda self: getattr(view(self), name), doc=attribute.__doc__)
    return None


def _method(attribute: Any, bind: Callable[[Any], Any]) -> Any:
    def method(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        return bind(view(self))(*args, **kwargs)

    functools.update_wrapper(method, attribute)
    return method


def _reduce(self: Any) -> tuple:
    # Its class is generated, so it cannot be found by name.
    return _rebuild, (_bases[type(self)], dict(vars(self)))


def _rebuild(cls: type, fields: dict[str, Any]) -> Any:
    return with_fields(None, subclass_of(cls), fields)


def refs_in_zone(module: eqx.Module) -> Iterator[Ref]:
    for leaf in jtu.tree_leaves(module, is_leaf=zone(module)):
        if isinstance(leaf, Ref):
            yield leaf
