"""Serialization of derefed trees for `jax.export`, whose files contain the structure of the
arguments and the result of an exported function.

The attributes of a node are written as JSON. Declared types are not: they are not part of
the structure, and come from the refs that the values are written to.
"""

import importlib
import json
from collections.abc import Hashable
from typing import Any

import jax.export

from .._core._deref import NOTHING
from .._core._errors import describe_named, StructureError
from .._core._nodes import Index, Label, unflatten_index, unflatten_value, Value
from .._core._ref import Ref
from ._dag import Dag


_PLAIN = str, int, float, bool, type(None)


def _encoded(key: Hashable, which: str) -> Any:
    if type(key) in _PLAIN:
        return key
    if type(key) is tuple:
        return [_encoded(x, which) for x in key]
    raise StructureError(
        f"Cannot serialize a tree with {which}: {key!r} cannot be written to a file. Name "
        "a collection by a string, a number or a tuple of these."
    )


def _decoded(key: Any) -> Hashable:
    return tuple(map(_decoded, key)) if type(key) is list else key


def _to_file(aux: tuple) -> bytes:
    index, collection, ref_type, label = aux
    which = describe_named(label.name, collection)
    if "<locals>" in ref_type.__qualname__:
        raise StructureError(
            f"Cannot serialize a tree with {which}: its class, {ref_type.__qualname__}, "
            "cannot be found by its name. Define it at the top level of a module."
        )
    found = {
        "index": _encoded(index, which),
        "collection": _encoded(collection, which),
        "type": [ref_type.__module__, ref_type.__qualname__],
        "name": label.name,
    }
    return json.dumps(found).encode()


def _from_file(data: bytes) -> tuple:
    found = json.loads(data)
    module, qualname = found["type"]
    ref_type: Any = importlib.import_module(module)
    for name in qualname.split("."):
        ref_type = getattr(ref_type, name, None)
    if not (isinstance(ref_type, type) and issubclass(ref_type, Ref)):
        raise StructureError(
            "Cannot read a tree with "
            f"{describe_named(found['name'], found['collection'])}: `{module}.{qualname}` "
            "is not a ref class. Keep the class where it was when the function was "
            "exported."
        )
    index, collection = _decoded(found["index"]), _decoded(found["collection"])
    return index, collection, ref_type, Label((found["name"], None))


# Under the names used in files.
_register: Any = jax.export.register_pytree_node_serialization
for _node, _unflatten in ((Value, unflatten_value), (Index, unflatten_index)):
    _register(
        _node,
        serialized_name=f"refx_eqx.{_node.__name__}",
        serialize_auxdata=_to_file,
        deserialize_auxdata=_from_file,
        from_children=_unflatten,
    )
for _node, _name in ((Dag, "Dag"), (type(NOTHING), "NOTHING")):
    _register(
        _node,
        serialized_name=f"refx_eqx.{_name}",
        serialize_auxdata=lambda _: b"",
        deserialize_auxdata=lambda _: None,
    )
