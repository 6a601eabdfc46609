"""The lifted transforms: one file a family, each a thin adapter on `_calls/_call.py`."""

from .._engine._axes import axes as axes
from .._engine._specs import specs as specs
from ._add_axis import add_axis as add_axis
from ._associative_scan import associative_scan as associative_scan
from ._branches import cond as cond, switch as switch
from ._checkpoint import filter_checkpoint as filter_checkpoint
from ._custom_jvp import filter_custom_jvp as filter_custom_jvp
from ._custom_vjp import filter_custom_vjp as filter_custom_vjp
from ._dag import Dag as Dag
from ._eval_shape import filter_eval_shape as filter_eval_shape
from ._grad import (
    filter_grad as filter_grad,
    filter_value_and_grad as filter_value_and_grad,
)
from ._jacobian import (
    filter_hessian as filter_hessian,
    filter_jacfwd as filter_jacfwd,
    filter_jacrev as filter_jacrev,
)
from ._jit import filter_jit as filter_jit
from ._jvp import filter_jvp as filter_jvp, filter_linearize as filter_linearize
from ._lift import lift as lift
from ._loops import fori_loop as fori_loop, while_loop as while_loop
from ._map import map as map
from ._scan import scan as scan
from ._shard_map import filter_shard_map as filter_shard_map
from ._staging import (
    filter_closure_convert as filter_closure_convert,
    filter_make_jaxpr as filter_make_jaxpr,
    filter_pure_callback as filter_pure_callback,
)
from ._vjp import filter_vjp as filter_vjp
from ._vmap import filter_vmap as filter_vmap
