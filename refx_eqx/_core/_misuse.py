"""Errors for refs, and nodes of derefed trees, that are used as if they were their values.

Python's own message for `ref + 1` only says that `Ref` does not support `+`. Ours names the
ref and says how to read its value.
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from ._errors import describe, RefTypeError, TraceLevelError


# This makes `hasattr(ref, "__float__")` and the like `True`, as for a JAX tracer, whose
# `float` raises too. There is no `__index__`: JAX and NumPy check for one to tell a
# dimension from an array.
_BINARY = "add sub mul matmul truediv floordiv mod divmod pow lshift rshift and or xor"
_UNARY = (
    "neg pos abs invert bool len int float complex round trunc floor ceil iter contains"
)
_COMPARISONS = "lt le gt ge"
_SYMBOLS = {
    "add": "+", "sub": "-", "mul": "*", "matmul": "@", "truediv": "/", "floordiv": "//",
    "mod": "%", "pow": "**", "lshift": "<<", "rshift": ">>", "and": "&", "or": "|",
    "xor": "^", "neg": "-", "pos": "+", "invert": "~", "lt": "<", "le": "<=", "gt": ">",
    "ge": ">=", "contains": "in",
}  # fmt: skip


def refuse_to_be_a_value(cls: type, misuse: Callable[..., RefTypeError]) -> None:
    """Gives a class every operator that a value may have, to refuse them with this error."""
    binary = _BINARY.split()
    for name in (*binary, *_UNARY.split(), *_COMPARISONS.split()):
        setattr(cls, f"__{name}__", _refusing(name, misuse))
    for name in binary:
        setattr(cls, f"__r{name}__", _refusing(name, misuse))

    def format_or_refuse(self: Any, spec: str) -> str:
        if spec:  # `f"{ref:.2f}"`, but not `f"{ref}"`
            raise misuse(self, "`format()`", "format")
        return str(self)

    setattr(cls, "__format__", format_or_refuse)  # noqa: B010


def _refusing(name: str, misuse: Callable[..., RefTypeError]) -> Callable[..., Any]:
    what = f"`{_SYMBOLS[name]}`" if name in _SYMBOLS else f"`{name}()`"

    def refuse(self: Any, *args: Any) -> Any:
        raise misuse(self, what, name)

    return refuse


def misuse(ref: Any, what: str, name: str = "") -> RefTypeError:
    """The error for a ref that is used as if it were its value."""
    remedy = "read it: `ref[...]`; and write it: `ref[...] = ...`."
    if _module_of_caller().startswith("equinox.nn."):
        remedy = (
            "make the refs of this layer of Equinox with `rx.as_refs(layer, 'params')`, "
            "which lets it read them; or call `rx.snapshot(layer)`."
        )
    elif name == "bool":
        remedy = (
            "read it: `ref[...]`; or test whether there is a ref: `ref is not None`."
        )
    return RefTypeError(
        f"A ref is not its value: {what} was called on {describe(ref)}. To use the value, "
        f"{remedy}"
    )


def misuse_of_node(node: Any, what: str, name: str = "") -> RefTypeError:
    """The error for a `Value` or an `Index` that is used as if it were the value."""
    return RefTypeError(
        f"A node is not its value: {what} was called on the {type(node).__name__} of "
        f"{describe(node)}, in a derefed tree such as gradients. To use the value, read "
        "it: `node.value`."
    )


def is_compared_by(*libraries: str) -> bool:
    """Whether one of these evaluates the comparison, when called from `Ref.__eq__` and the
    like. Code that runs in C has the frame of its caller."""
    return _module_of_caller().partition(".")[0] in libraries


def _module_of_caller() -> str:
    """The module that uses the operator, when called from what the operator calls."""
    return sys._getframe(3).f_globals.get("__name__", "")


def missing_attribute(
    ref: Any, name: str, value: Any, read: str = "ref[...]"
) -> AttributeError:
    """The error for an attribute that a ref or a node does not have, but its value may."""
    text = f"{type(ref).__name__!r} object has no attribute {name!r}"
    if not name.startswith("_") and hasattr(type(value), name):
        text += f". The value of {describe(ref)} has it: read it, `{read}.{name}`."
    return AttributeError(text, name=name, obj=ref)


def numpy_function(ref: Any, fn: Any, args: tuple, kwargs: dict) -> Any:
    """What `fn` of NumPy does when it is given a ref: `Ref.__array_function__`.

    Most read `ref.shape` and the like, or end in `not_an_array`. These two take any error for
    the answer "not equal".
    """
    if fn in (np.array_equal, np.array_equiv):
        not_an_array(ref)
    return fn.__wrapped__(*args, **kwargs)


def not_an_array(ref: Any) -> Any:
    """Called when JAX or NumPy is given a ref as an array."""
    raise TraceLevelError(
        f"Cannot use ref as an array: {describe(ref)} was given to JAX or NumPy as if it "
        "were one. In a computation, read it: `ref.value` or `ref[...]`. To pass it to a "
        "transform, use the lifted one of the same name (`rx.filter_jit`, "
        "`rx.filter_grad`, `rx.filter_vmap`, `rx.scan`, ...), or open the tree with "
        "`rx.deref` before it and close it with `rx.reref` inside."
    )
