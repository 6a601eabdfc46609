"""`filter_shard_map`."""

from collections.abc import Callable, Hashable, Set
from typing import Any, overload, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import PyTree

from .._calls._call import Call, call
from .._calls._structure import arrays_of, Leaves, Outcome
from .._core import _jax
from .._core._errors import CarryError, describe, MismatchError
from .._core._nodes import join_value, Label, Value, value_node
from .._core._ref import Ref
from .._engine._by_place import given_of_result
from .._engine._call_specs import call_specs, check_known, part_of, Specs
from .._engine._rng_split import is_key, split_keys
from .._engine._specs import (
    AS_TYPED,
    axes_in,
    leaf_specs,
    specs,
    specs_in,
    specs_of_arrays,
)
from .._engine._wrapper import Lifted


P = ParamSpec("P")
T = TypeVar("T")

_NAME = "filter_shard_map"


class _ShardMap(Lifted):
    transform_name = _NAME

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        if kwargs:
            raise TypeError(
                f"`{_NAME}` functions take positional arguments only, as in JAX. Pass "
                f"{', '.join(map(repr, kwargs))} by position."
            )
        transform = lambda derefed: _sharded(derefed, args, **self.options)
        return call(self.__wrapped__, args, {}, transform)


def _sharded(
    derefed: Call,
    args: tuple,
    *,
    mesh: Any,
    in_specs: Any,
    out_specs: Any,
    axis_names: Set[Any],
    check_vma: bool,
) -> Outcome:
    mesh, manual = _manual_axes(mesh, axis_names)
    for spec in specs_in(out_specs):
        check_known(spec, mesh, f"the result of `{_NAME}`")
    specs = call_specs(derefed, args, in_specs, mesh, manual, _NAME)
    flat, treedef = jtu.tree_flatten(derefed.arrays)
    flat_specs = jtu.tree_leaves(specs.trees)
    # JAX needs the specs of the outputs before we know the outputs: so the body returns its
    # arrays grouped by spec, one list for each possible spec.
    of_results = [part_of(spec, manual) for spec in specs_in(out_specs)]
    known = list(dict.fromkeys([*flat_specs, *of_results, PartitionSpec()]))
    # The rest of the outcome, which is not arrays; filled while the body runs.
    traced: dict[str, Any] = {}

    def body(*flat: Any) -> list[list[Any]]:
        arrays = _split_by_shard(specs.split, treedef.unflatten(flat))
        outcome = derefed.run(_NAME, arrays, transparent=False)
        out, updates = arrays_of(outcome)
        updates = {i: _one_key(specs, i, new) for i, new in updates.items()}
        outcome = Outcome(out, updates, outcome.info)
        of_out = _result_specs(derefed, outcome, out_specs, manual)
        of_updates = {
            i: specs.of_update(derefed, i, new, _NAME) for i, new in updates.items()
        }
        _check_out_specs(derefed, outcome, (of_out, of_updates), manual, check_vma)
        leaves, traced["treedef"] = jtu.tree_flatten(outcome)
        traced["specs"] = jtu.tree_leaves((of_out, of_updates))
        both = list(zip(leaves, traced["specs"]))
        return [[x for x, spec in both if spec == one] for one in known]

    sharded = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=tuple(flat_specs),
        out_specs=known,
        axis_names=axis_names,
        check_vma=check_vma,
    )
    by_spec = dict(zip(known, map(iter, sharded(*flat))))
    outcome = traced["treedef"].unflatten(next(by_spec[x]) for x in traced["specs"])
    (statics,) = outcome.info.result.statics
    outcome.out = list(map(_of_whole, outcome.out, statics))
    return outcome


def _of_whole(node: Any, static: Any) -> Any:
    """A leaf of the result. The shard bound the names in the declared type of a new ref,
    but the whole has other sizes."""
    if type(node) is not Value or not node.label.declared:
        return node
    name, value = node.label.name, join_value(node.value, static.value)
    declared = tuple(
        bound.rebound(name, node.collection, value) for bound in node.label.declared
    )
    label = Label((name, declared))
    return value_node(node.value, node.index, node.collection, node.ref_type, label)


def _manual_axes(mesh: Any, axis_names: Set[Any]) -> tuple[Any, tuple[Any, ...]]:
    """The mesh, and the axes that the function is manual over, in mesh order."""
    around = jax.sharding.get_abstract_mesh()
    if mesh is None:
        if around.empty:
            raise ValueError(
                f"`{_NAME}` has no mesh. Pass one, `mesh=...`, or call it under "
                "`jax.set_mesh(mesh)`."
            )
        mesh = around
    unknown = [axis for axis in axis_names if axis not in mesh.axis_names]
    if unknown:
        raise ValueError(
            f"`{_NAME}(..., axis_names=...)` has {unknown[0]!r}, but the mesh has "
            f"{', '.join(map(repr, mesh.axis_names))}."
        )
    # The axes of an enclosing `shard_map` are already manual.
    return mesh, tuple(
        axis
        for axis in mesh.axis_names
        if (not axis_names or axis in axis_names) and axis not in around.manual_axes
    )


def _split_by_shard(
    split: dict[tuple[str, ...], tuple[int, ...]], arrays: list[Leaves]
) -> list[Leaves]:
    """The arrays of a call as one shard sees them, with its own keys."""
    for over, numbers in split.items():
        arrays = split_keys(numbers, arrays, jax.lax.axis_index(over))
    return arrays


def _one_key(specs: Specs, number: int, new: Any) -> Any:
    """The value written to a ref whose keys differ between shards: that of the first
    shard."""

    def of_first(x: Any, over: tuple[str, ...]) -> Any:
        if not is_key(x):
            return x
        is_typed = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        words = jr.key_data(x) if is_typed else x
        is_first = jax.lax.axis_index(over) == 0
        # A sum with one nonzero term: JAX knows that its result is the same on all shards.
        words = jax.lax.psum(jnp.where(is_first, words, jnp.zeros_like(words)), over)
        return jr.wrap_key_data(words, impl=jr.key_impl(x)) if is_typed else words

    for over, numbers in specs.split.items():
        if number in numbers:
            return jtu.tree_map(lambda x, over=over: of_first(x, over), new)
    return new


def _result_specs(
    derefed: Call, outcome: Outcome, out_specs: Any, manual: tuple[Any, ...]
) -> Leaves:
    of_leaves = lambda result: leaf_specs(out_specs, result, "out_specs")
    of_value = lambda given, value: jtu.tree_map(
        lambda spec: part_of(spec, manual), specs_of_arrays(given, value, "out_specs")
    )
    return given_of_result(derefed, outcome, of_leaves, of_value, _NAME, "out_specs")


def _check_out_specs(
    derefed: Call,
    outcome: Outcome,
    specs: tuple[Leaves, dict[int, Any]],
    manual: tuple[Any, ...],
    check_vma: bool,
) -> None:
    """Checks that the outputs fit their specs: each has the axes along which it is split,
    and is one value along all others (known only with `check_vma`)."""
    # JAX checks this too, but its message names an array by its position in a flat list.
    of_out, of_updates = specs
    for i, new in outcome.updates.items():
        for x, spec in zip(jtu.tree_leaves(new), jtu.tree_leaves(of_updates[i])):
            ref = derefed.refs[i]
            if len(spec) > jnp.ndim(x):
                raise CarryError(
                    f"{describe(ref)} came into `{_NAME}` split by `{spec}`, but was "
                    f"written with a value of rank {jnp.ndim(x)}. Keep the rank of the "
                    "part."
                )
            differs = _differs_along(x, spec, manual)
            if check_vma and differs:
                raise CarryError(_written_apart(ref, spec, differs))
    for (path, x), spec in zip(
        jtu.tree_flatten_with_path(outcome.out)[0], jtu.tree_leaves(of_out)
    ):
        which = f"`{_NAME}(..., out_specs=...)`: the result has "
        which += f"{jax.typeof(x).str_short()} (its array number {path[0].idx})"
        if len(spec) > jnp.ndim(x):
            raise MismatchError(
                f"{which}, which `{spec}` cannot put together: it has too many entries. "
                "Give the array an axis for each, such as `x[None]`, or use another spec."
            )
        differs = _differs_along(x, spec, manual)
        if check_vma and differs:
            raise MismatchError(
                f"{which}, which differs along {_axes_text(differs)}, and `{spec}` says that "
                f"it is one value there. Make it one, `jax.lax.pmean(x, {differs[0]!r})`, or "
                f"split it: `P({differs[0]!r})`."
            )


def _differs_along(
    x: Any, spec: PartitionSpec, manual: tuple[Any, ...]
) -> tuple[Any, ...]:
    varies = _jax.varies_over(jax.typeof(x)) - set(axes_in(spec))
    return tuple(axis for axis in manual if axis in varies)


def _axes_text(axes: tuple[Any, ...]) -> str:
    return f"the mesh axis {' and '.join(map(repr, axes))}"


def _written_apart(ref: Ref, spec: PartitionSpec, differs: tuple[Any, ...]) -> str:
    axis = differs[0] if len(differs) == 1 else differs
    what = f"came in by `{spec}`" if axes_in(spec) else "is replicated"
    split = specs.text_for(ref, f"P({differs[0]!r})")
    return (
        f"{describe(ref)} {what} in `{_NAME}`, but was written with a value that differs "
        f"along {_axes_text(differs)}. Either write one value for all, such as "
        f"`jax.lax.pmean(value, {axis!r})`; or split the ref along an axis of its own, by "
        f"a spec in `in_specs`, such as `{split}`."
    )


@overload
def filter_shard_map(
    f: Callable[P, T],
    *,
    mesh: Mesh | AbstractMesh | None = None,
    in_specs: PyTree = AS_TYPED,
    out_specs: PyTree,
    axis_names: Set[Hashable] = frozenset(),
    check_vma: bool = True,
) -> Callable[P, T]: ...


@overload
def filter_shard_map(
    *,
    mesh: Mesh | AbstractMesh | None = None,
    in_specs: PyTree = AS_TYPED,
    out_specs: PyTree,
    axis_names: Set[Hashable] = frozenset(),
    check_vma: bool = True,
) -> Callable[[Callable[P, T]], Callable[P, T]]: ...


def filter_shard_map(
    f: Callable[..., Any] | None = None,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    in_specs: PyTree = AS_TYPED,
    out_specs: PyTree,
    axis_names: Set[Hashable] = frozenset(),
    check_vma: bool = True,
) -> Callable[..., Any]:
    """As `jax.shard_map`, by reference: each device runs the function on its shards of the
    arguments, both inside and outside refs, and writes its shard of the new value of a ref.

    A ref goes out with the spec that it came in with. A replicated ref may only be written
    with a value that is the same in all shards, such as a `jax.lax.pmean`. Refs made inside
    go out with `out_specs`; refs of the caller are returned as the same objects.

    Inside, a ref holds a shard: a ref with declared type `Float[Array, "8 3"]` has shape
    `(1, 3)` if eight devices split its first axis.

    !!! Example

        ```python
        import jax
        import jax.numpy as jnp
        import refx_eqx as rx
        from jax import P

        mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        mean = rx.Ref(jnp.array(0.0), "batch_stats")

        def normalize(mean, x):
            mean.value = jax.lax.pmean(jnp.mean(x), "data")  # one value for all
            return x - mean.value

        sharded = rx.filter_shard_map(
            normalize, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")
        )
        assert sharded(mean, jnp.array([1.0, 3.0]))[0] == -1.0 and mean.value == 2.0
        ```

    A replicated ref of collection `"rng"` is split by shard: each shard sees the key with
    its own number folded in, so dropout differs between shards but not between runs. See
    [`refx_eqx.specs`][] to use the same key in all shards, or to choose the axes along
    which it differs.

    As in JAX, with `check_vma`, calling `filter_grad` *inside* gives the sum over the
    shards as the gradient of a replicated ref: for a mean, divide the loss by the number of
    shards, or take its `jax.lax.pmean`. Without it, the gradient is that of the shard.

    Eagerly, JAX runs the function operation by operation. Put [`refx_eqx.filter_jit`][]
    around it.

    **Arguments:**

    - `f`: the function to run on each device. Takes positional arguments only.
    - `mesh`: a `jax.sharding.Mesh`. By default, the mesh of `jax.set_mesh`.
    - `in_specs`: a prefix of the tuple of arguments. Each leaf is a `jax.P` (or a
        `NamedSharding`, for its spec), `None` for `P()`, [`refx_eqx.specs`][], which gives
        specs by collection, or [`refx_eqx.axis_rules`][], which gives them by axis name. A
        derefed tree, such as `rules.specs(model)`, works too. Values that functions close
        over are replicated, unless an argument splits them or `in_specs` is a single
        `rx.specs`, which covers all refs. Optional if all axes of the mesh are explicit:
        then each array is split as its type says.
    - `out_specs`: likewise, a prefix of the result.
    - `axis_names`: the mesh axes over which the function is manual. All by default.
    - `check_vma`: whether to check that replicated outputs are the same in all shards. If
        `False`, the caller promises it, as in JAX.

    **Returns:**

    A function of the whole arguments.

    **Raises:**

    When called:

    - `StructureError`: if a ref or a result differs between shards although its spec says
        it does not; if an array cannot be split as its spec says; if one ref has two specs.
    - `TypeError`: if a spec is not valid; if `in_specs` is left out and axes are not
        explicit.
    """
    return _ShardMap.of(
        f,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=frozenset(axis_names),
        check_vma=check_vma,
    )
