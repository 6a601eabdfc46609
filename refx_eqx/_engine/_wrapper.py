"""What a lifted transform returns."""

import functools
import sys
from typing import Any

import equinox as eqx
import jax.tree_util as jtu

from .._core._errors import name_of
from .._trees._keys import contents_key


class Lifted:
    """The base class of what a lifted transform returns: a callable and a pytree.

    The wrapped callable is its child, so another transform that carries the lifted function
    sees the refs in a wrapped module or closure.
    """

    transform_name = "a lifted transform"

    def __init__(self, fn: Any, **options: Any):
        self.__wrapped__ = fn
        self.options = options
        functools.update_wrapper(self, fn, updated=())

    @classmethod
    def of(cls, fn: Any, **options: Any) -> Any:
        """The lifted function; or, without a function, a decorator with these options."""
        if fn is None:
            return functools.partial(cls, **options)
        return cls(fn, **options)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else eqx.Partial(self, instance)

    def __reduce__(self) -> Any:
        # As Python pickles a function: by name, if that leads to it. Otherwise by its
        # parts; the attributes copied from the function do not always pickle.
        if _is_named(self):
            return getattr(self, "__qualname__")  # noqa: B009 (set by `update_wrapper`)
        return functools.partial(type(self), **self.options), (self.__wrapped__,)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("A lifted transform defines what a call does.")

    def __repr__(self) -> str:
        return f"{self.transform_name}({name_of(self.__wrapped__)})"

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        jtu.register_pytree_with_keys(
            cls,
            lambda x: (
                ((jtu.GetAttrKey("__wrapped__"), x.__wrapped__),),
                _Options(x.options),
            ),
            lambda aux, children: cls(*children, **aux.options),
        )


def _is_named(lifted: Lifted) -> bool:
    """Whether the name of the function leads to the lifted function, as after
    `@filter_jit`."""
    obj: Any = sys.modules.get(getattr(lifted, "__module__", None) or "")
    for part in getattr(lifted, "__qualname__", "").split("."):
        obj = getattr(obj, part, None)
    return obj is lifted


class _Options:
    """The options of a lifted function, as the static part of a pytree. `key` says what the
    functions among them, such as filters, close over now."""

    __slots__ = ("key", "options")

    def __init__(self, options: dict[str, Any]):
        self.options = options
        self.key = contents_key(list(options.values()))

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Options) and (
            self.options == other.options and self.key == other.key
        )

    def __hash__(self) -> int:
        return hash((tuple(sorted(self.options)), self.key))
