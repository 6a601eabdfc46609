"""`cond` and `switch`."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import ArrayLike, PyTree

from .._calls._call import Call, call
from .._calls._places import leaf_place, ref_place
from .._calls._structure import arrays_of, Leaves, Outcome, Structure, values_of
from .._core._errors import describe, MismatchError
from .._core._nodes import is_node, Value
from .._core._ref import Ref
from .._engine._carry import as_callable, numbers_to_arrays
from .._engine._control_flow import runs_in_python, TracedBody
from .._engine._kinds import convert, join_kinds, Kind, kind_of
from .._engine._program import Program, program_of
from .._trees._closure import Part
from .._trees._keys import static_keys


T = TypeVar("T")


def _true_branch(_: None, pred: Any, true_fun: Any, false_fun: Any, *operands) -> Any:
    return numbers_to_arrays(true_fun(*operands))


def _false_branch(_: None, pred: Any, true_fun: Any, false_fun: Any, *operands) -> Any:
    return numbers_to_arrays(false_fun(*operands))


def _branch(i: int) -> Callable[..., Any]:
    def apply(_: None, index: Any, branches: Sequence[Any], *operands: Any) -> Any:
        return numbers_to_arrays(branches[i](*operands))

    return apply


def _run_branches(
    derefed: Call,
    arrays: list[Leaves],
    name: str,
    which: dict[str, Callable[..., Any]],
    position: Callable[[Any], int],
    choose: Callable[[Any, list[Callable], Any], Any],
) -> Outcome:
    """Traces each branch, checks that they agree, and builds the conditional.

    **Arguments:**

    - `which`: the name of each branch, and the function that calls it.
    - `position`: maps the first argument to the number of the branch, if it is concrete.
    - `choose`: called with the first argument, functions of the arrays, and the arrays.
    """
    (first,) = arrays[0]
    if runs_in_python(first):
        # Only the chosen branch runs.
        apply = list(which.values())[position(first)]
        outcome = derefed.run(name, arrays, False, apply)
        return Outcome(*arrays_of(outcome), outcome.info)

    def stage(apply: Callable[..., Any]) -> TracedBody:
        return TracedBody(
            lambda arrays: derefed.run(name, arrays, False, apply), arrays
        )

    staged = [stage(apply) for apply in which.values()]
    names = list(which)
    info = staged[0].avals.info
    for other, other_name in zip(staged[1:], names[1:]):
        both = names[0], other_name
        results = info.result, other.avals.info.result
        _check_same_results(derefed, results, both, name)
    written = sorted({i for branch in staged for i in branch.avals.updates})
    nodes = derefed.structure.refs()

    def completed(outcome: Outcome, arrays: list[Leaves]) -> tuple[Leaves, dict]:
        """A branch that does not write a ref leaves it unchanged."""
        before = values_of(arrays)
        return outcome.out, {i: outcome.updates.get(i, before[i]) for i in written}

    avals = jtu.tree_map(jax.typeof, arrays)
    found = [completed(branch.avals, avals) for branch in staged]
    whats = _places_in_result(info.result.parts[0], found[0][0])
    for i in written:
        ref = derefed.refs[i]
        values = [updates[i] for _, updates in found]
        statics = [b.avals.info.written.get(i, nodes[i].value) for b in staged]
        _check_values(ref, values, statics, names, name)
        which_ref = describe(ref)
        whats += [which_ref] * len(jtu.tree_leaves(values[0]))
        info.written.setdefault(i, nodes[i].value)
    kinds = [
        _joined_kind([kind_of(x) for x in each], names, what, name)
        for what, *each in zip(whats, *map(jtu.tree_leaves, found))
    ]
    treedef = jtu.tree_structure(found[0])

    def function_of(branch: TracedBody) -> Callable[..., Any]:
        def run(arrays: list[Leaves]) -> Any:
            leaves = jtu.tree_leaves(completed(branch(arrays), arrays))
            leaves = map(jnp.asarray, leaves)
            return jtu.tree_unflatten(treedef, map(convert, leaves, kinds))

        return run

    out, updates = choose(first, [*map(function_of, staged)], arrays)
    return Outcome(out, updates, info)


def _joined_kind(kinds: list[Kind], names: list[str], what: str, name: str) -> Kind:
    kind = join_kinds(kinds)
    if kind is None:
        i = next(i for i, k in enumerate(kinds) if join_kinds([kinds[0], k]) is None)
        if kinds[0].split != kinds[i].split:
            raise MismatchError(
                f"`{name}`: the branches must agree on how {what} is split over the mesh: it "
                f"is {kinds[0]!r} after {names[0]}, and {kinds[i]!r} after {names[i]}. Make "
                "it the same in each: `jax.sharding.reshard(x, P(...))`."
            )
        raise MismatchError(
            f"`{name}`: the branches must agree on the shape and dtype of {what}: it is "
            f"{kinds[0]!r} after {names[0]}, and {kinds[i]!r} after {names[i]}. Make it the "
            "same in each, for example with `x.astype(...)` or `x.reshape(...)`."
        )
    return kind


def _check_values(
    ref: Ref, values: list[Any], statics: list[Any], names: list[str], name: str
) -> None:
    """The value of a ref must have the same structure after every branch."""
    structures = [
        (jtu.tree_structure(value), static_keys(static))
        for value, static in zip(values, statics)
    ]
    for structure, branch_name in zip(structures, names):
        if structure != structures[0]:
            raise MismatchError(
                f"`{name}`: the value of {describe(ref)} has another structure, or other "
                f"static parts, after {branch_name} than after {names[0]}. Write values of "
                "the same structure in all branches; only arrays may depend on the branch."
            )


def _check_same_results(
    derefed: Call,
    results: tuple[Structure, Structure],
    names: tuple[str, str],
    name: str,
) -> None:
    """Refuses branches whose results differ in anything but the values of arrays."""
    a, b = results
    if a.key == b.key:
        return
    (part,), (other,) = a.parts, b.parts
    if part != other:
        one, two = _told_apart(
            [_structure_text(a), _structure_text(b)],
            "another, which prints the same: they differ in a static field, or in a "
            "function that closes over refs",
        )
        raise MismatchError(
            f"`{name}`: the branches must return the same structure. {names[0]} returns "
            f"{one}, and {names[1]} returns {two}."
        )
    for k, (x, y) in enumerate(zip(a.statics[0], b.statics[0])):
        if is_node(x) or is_node(y) or (x is None) != (y is None):
            if static_keys(x) == static_keys(y):
                continue
            texts = [_leaf_text(derefed, leaf, name) for leaf in (x, y)]
            other_text = (
                "another, which differs in its type or in the structure of its value"
            )
            remedy = (
                "The choice of ref cannot depend on the branch: return the same ref from "
                "each, or new refs of one kind from all, or the values."
            )
        elif x is None or static_keys(x) == static_keys(y):
            continue
        else:
            texts = [f"the static value {static!r}" for static in (x, y)]
            other_text = "another, which prints the same and is not equal"
            remedy = (
                "Only arrays may depend on the branch: make it one, or return the same "
                "value from each."
            )
        one, two = _told_apart(texts, other_text)
        raise MismatchError(
            f"`{name}`: the results differ at {leaf_place(part, k)}: {names[0]} "
            f"returns {one}, and {names[1]} returns {two}. {remedy}"
        )


# What comes before the operands.
_ARGUMENTS = {
    "cond": ["the predicate", "`true_fun`", "`false_fun`"],
    "switch": ["the index", "the branches"],
}


def _told_apart(texts: list[str], other: str) -> list[str]:
    """The two texts, with `other` as the second if they are equal."""
    return [texts[0], other] if texts[0] == texts[1] else texts


def _leaf_text(derefed: Call, leaf: Any, name: str) -> str:
    if not is_node(leaf):
        return "an array" if leaf is None else "a static value"
    if leaf.index >= len(derefed.refs):
        return f"a new ref, {describe(leaf)}"
    place = ref_place(derefed, leaf.index, _ARGUMENTS[name])
    return f"{describe(derefed.refs[leaf.index])} of {place}"


def _structure_text(structure: Structure) -> str:
    text = str(structure.parts[0].treedef)
    return text.removeprefix("PyTreeDef(").removesuffix(")")


def _places_in_result(part: Part, out: Leaves) -> list[str]:
    """Says where each array of a result is."""
    found = []
    for k, leaf in enumerate(out):
        what = f"the array of the result at {leaf_place(part, k)}"
        if type(leaf) is Value:
            what = f"a new ref of the result, {describe(leaf)}"
        found += [what] * len(jtu.tree_leaves(leaf))
    return found


def _run_cond(derefed: Call, arrays: list[Leaves]) -> Outcome:
    choose = lambda pred, branches, arrays: jax.lax.cond(pred, *branches, arrays)
    position = lambda pred: 0 if pred else 1
    which = {"`true_fun`": _true_branch, "`false_fun`": _false_branch}
    return _run_branches(derefed, arrays, "cond", which, position, choose)


def cond(
    pred: ArrayLike,
    true_fun: Callable[..., T],
    false_fun: Callable[..., T],
    *operands: PyTree,
) -> T:
    """As `jax.lax.cond`, by reference.

    The branches may read and write refs: those in the operands, in the modules they are
    methods of, and those they close over. They need not write the same refs: a branch
    leaves the others unchanged.

    !!! Example

        ```python
        import jax.numpy as jnp
        import refx_eqx as rx

        skipped, total = rx.Ref(jnp.array(0)), rx.Ref(jnp.array(0.0))

        def add(skipped, total, x):
            total.value += x

        def skip(skipped, total, x):
            skipped.value += 1

        for x in [1.0, float("nan"), 2.0]:
            rx.cond(jnp.isfinite(x), add, skip, skipped, total, x)
        assert skipped.value == 1 and total.value == 3.0
        ```

    **Arguments:**

    - `pred`: a boolean scalar.
    - `true_fun`, `false_fun`: functions of the operands. Their results must have the same
        structure, shapes and dtypes, the same static leaves, and the same refs at the same
        places, or new refs of one kind. Python numbers become arrays, as in JAX; those in a
        module are static, as in Equinox.
    - `*operands`: any pytrees.

    **Returns:**

    What the chosen branch returns.

    **Raises:**

    - `StructureError`: if the results differ in structure, or if the branches leave
        different shapes or dtypes in a ref. The message names both.
    """
    branches = as_callable(true_fun), as_callable(false_fun)
    operands = numbers_to_arrays(operands)

    make = lambda: Program("cond", _run_cond)

    def transform(derefed: Call) -> Outcome:
        return program_of(branches, "cond", make)(derefed)

    args = (_as_scalar(pred, "cond", "predicate"), *branches, *operands)
    return call(None, args, {}, transform)


def switch(
    index: ArrayLike, branches: Sequence[Callable[..., T]], *operands: PyTree
) -> T:
    """As `jax.lax.switch`, by reference. See [`refx_eqx.cond`][].

    !!! Example

        ```python
        import jax.numpy as jnp
        import refx_eqx as rx

        ref = rx.Ref(jnp.array(1.0))

        def double(ref):
            ref.value *= 2

        def negate(ref):
            ref.value *= -1

        rx.switch(1, [double, negate, lambda ref: None], ref)
        assert ref.value == -1.0
        ```

    **Arguments:**

    - `index`: an integer scalar. As in JAX, it is clamped to the valid range.
    - `branches`: functions of the operands, as those of [`refx_eqx.cond`][].
    - `*operands`: any pytrees.

    **Returns:**

    What the chosen branch returns.

    **Raises:**

    As [`refx_eqx.cond`][]; and `ValueError` if there are no branches.
    """
    if not branches:
        raise ValueError("`switch` needs at least one branch.")
    fns = tuple(map(as_callable, branches))
    operands = numbers_to_arrays(operands)
    n = len(fns)

    position = lambda index: min(max(int(index), 0), n - 1)
    choose = lambda index, branches, arrays: jax.lax.switch(index, branches, arrays)

    def run(derefed: Call, arrays: list[Leaves]) -> Outcome:
        which = {f"branch {i}": _branch(i) for i in range(n)}
        return _run_branches(derefed, arrays, "switch", which, position, choose)

    make = lambda: Program("switch", run)

    def transform(derefed: Call) -> Outcome:
        return program_of(fns, "switch", make)(derefed)

    args = (_as_scalar(index, "switch", "index"), fns, *operands)
    return call(None, args, {}, transform)


def _as_scalar(x: Any, name: str, what: str) -> jax.Array:
    x = jnp.asarray(x)
    if x.shape != ():
        raise TypeError(
            f"`{name}`: the {what} must be a scalar, but is {eqx.tree_pformat(x)}. To "
            "choose for each element, use `jnp.where`, or `rx.filter_vmap`."
        )
    return x
