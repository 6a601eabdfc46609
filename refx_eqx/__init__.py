"""Shared, mutable, typed references for Equinox."""

from importlib.metadata import version as _version
from typing import Any as _Any, TYPE_CHECKING as _TYPE_CHECKING

from ._capture import capture as capture
from ._checkpoint._save import load as load, save as save
from ._core import _errors as _errors
from ._core._deref import (
    block_until_ready as block_until_ready,
    clone as clone,
    deref as deref,
    NOTHING as NOTHING,
    reref as reref,
    tree_equal as tree_equal,
)
from ._core._errors import (
    CarryError as CarryError,
    CheckpointError as CheckpointError,
    CollectionError as CollectionError,
    ConcurrencyError as ConcurrencyError,
    DonatedError as DonatedError,
    ImmutableError as ImmutableError,
    MismatchError as MismatchError,
    RefError as RefError,
    RefTypeError as RefTypeError,
    StructureError as StructureError,
    TraceLevelError as TraceLevelError,
)
from ._core._nodes import Index as Index, Value as Value
from ._core._ref import is_ref as is_ref, Ref as Ref
from ._display import count as count, mermaid as mermaid, tabulate as tabulate
from ._engine._axes import axes as axes
from ._engine._specs import specs as specs
from ._fields._batched import Batched as Batched
from ._fields._collection import (
    BatchStat as BatchStat,
    Cache as Cache,
    Collection as Collection,
    Param as Param,
)
from ._fields._config import config as config
from ._fields._field import field as field
from ._fields._module import Module as Module
from ._filters._as_refs import as_refs as as_refs, snapshot as snapshot
from ._filters._check import check as check
from ._filters._filters import (
    collection as collection,
    Filter as Filter,
    FilterLike as FilterLike,
    path as path,
    refs_in as refs_in,
)
from ._filters._mutable import mutable as mutable
from ._filters._partition import (
    combine as combine,
    FlatPartition as FlatPartition,
    get_partition as get_partition,
    merge_partitions as merge_partitions,
    partition as partition,
    tree_partition as tree_partition,
)
from ._filters._select import (
    aliases as aliases,
    filter_spec as filter_spec,
    values as values,
)
from ._filters._state_dict import (
    load_state_dict as load_state_dict,
    state_dict as state_dict,
)
from ._filters._update import update_refs as update_refs
from ._optim import (
    apply_updates as apply_updates,
    Optimizer as Optimizer,
    param_labels as param_labels,
    param_mask as param_mask,
)
from ._rng import Rngs as Rngs
from ._sharding._rules import axis_rules as axis_rules
from ._sharding._shard import filter_shard as filter_shard
from ._transforms import _export as _export  # registers the nodes with JAX
from ._transforms._add_axis import add_axis as add_axis
from ._transforms._associative_scan import associative_scan as associative_scan
from ._transforms._branches import cond as cond, switch as switch
from ._transforms._checkpoint import filter_checkpoint as filter_checkpoint
from ._transforms._custom_jvp import filter_custom_jvp as filter_custom_jvp
from ._transforms._custom_vjp import filter_custom_vjp as filter_custom_vjp
from ._transforms._dag import Dag as Dag
from ._transforms._eval_shape import filter_eval_shape as filter_eval_shape
from ._transforms._functionalize import functionalize as functionalize
from ._transforms._grad import (
    filter_grad as filter_grad,
    filter_value_and_grad as filter_value_and_grad,
)
from ._transforms._jacobian import (
    filter_hessian as filter_hessian,
    filter_jacfwd as filter_jacfwd,
    filter_jacrev as filter_jacrev,
)
from ._transforms._jit import filter_jit as filter_jit
from ._transforms._jvp import (
    filter_jvp as filter_jvp,
    filter_linearize as filter_linearize,
)
from ._transforms._lift import lift as lift
from ._transforms._loops import fori_loop as fori_loop, while_loop as while_loop
from ._transforms._map import map as map
from ._transforms._pure_callback import filter_pure_callback as filter_pure_callback
from ._transforms._scan import scan as scan
from ._transforms._shard_map import filter_shard_map as filter_shard_map
from ._transforms._staging import (
    filter_closure_convert as filter_closure_convert,
    filter_make_jaxpr as filter_make_jaxpr,
)
from ._transforms._vjp import filter_vjp as filter_vjp
from ._transforms._vmap import filter_vmap as filter_vmap


if _TYPE_CHECKING:
    from . import nn as nn


_errors.hide_frames(__name__)

__version__ = _version("refx_eqx")


def __getattr__(name: str) -> _Any:
    # The layers are imported on first access: making their classes takes as long as
    # importing everything else.
    if name == "nn":
        import importlib

        return importlib.import_module(f"{__name__}.nn")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "nn"})
