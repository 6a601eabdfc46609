"""`cond` and `switch`."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import ArrayLike, PyTree

from .._calls._call import Call, call
from .._calls._places import leaf_place, ref_place
from .._calls._structure import (
    arrays_of,
    Leaves,
    Outcome,
    OutcomeInfo,
    Structure,
    values_of,
)
from .._core._errors import describe, MismatchError
from .._core._nodes import is_node, Value
from .._engine._carry import as_callable, numbers_to_arrays
from .._engine._control_flow import runs_in_python, TracedBody
from .._engine._kinds import convert, join_kinds, Kind, kind_of
from .._engine._program import Program, program_of
from .._trees._closure import Part
from .._trees._keys import static_keys


T = TypeVar("T")


class _Choice(NamedTuple):
    """The differences between `cond` and `switch`. Both are called with the predicate or
    index, the branches, and the operands.

    - `name`: of the transform; `labels`: of the branches, for messages;
    - `position`: maps the predicate or index to the number of the branch, if it is concrete;
    - `choose`: called with the predicate or index, and functions without arguments.
    """

    name: str
    labels: list[str]
    position: Callable[[Any], int]
    choose: Callable[[Any, list[Callable[[], Any]]], Any]

    def branch(self, i: int) -> Callable[..., Any]:
        n = len(self.labels)

        # A call has one callable, but here there are several. So the branches are arguments of
        # a call whose callable is `None`, and this function selects the one to run.
        def apply(_: None, index: Any, *rest: Any) -> Any:
            return numbers_to_arrays(rest[i](*rest[n:]))

        return apply


def _run_choice(derefed: Call, arrays: list[Leaves], choice: _Choice) -> Outcome:
    """Traces each branch, checks that they agree, and builds the conditional."""
    (index,) = arrays[0]
    if runs_in_python(index):
        # Only the chosen branch runs.
        apply = choice.branch(choice.position(index))
        outcome = derefed.run(choice.name, arrays, False, apply)
        return Outcome(*arrays_of(outcome), outcome.info)

    # Traced before `jax.lax.cond` sees them: it requires results of the same structure, and we
    # know which refs a branch writes only after tracing it.
    def stage(i: int) -> TracedBody:
        apply = choice.branch(i)
        return TracedBody(
            lambda arrays: derefed.run(choice.name, arrays, False, apply), arrays
        )

    branches = [stage(i) for i in range(len(choice.labels))]
    for i in range(1, len(branches)):
        _check_same_results(derefed, branches, i, choice)
    written = sorted({i for branch in branches for i in branch.avals.updates})

    def completed(outcome: Outcome, arrays: list[Leaves]) -> tuple[Leaves, dict]:
        """A branch that does not write a ref leaves it unchanged."""
        before = values_of(arrays)
        return outcome.out, {i: outcome.updates.get(i, before[i]) for i in written}

    avals = jtu.tree_map(jax.typeof, arrays)
    found = [completed(branch.avals, avals) for branch in branches]
    info = _common_info(derefed, branches, [updates for _, updates in found], choice)
    # The branches may differ in weak types, and in the mesh axes over which arrays vary: JAX
    # requires equal types, so each branch converts what it returns.
    kinds = _common_kinds(derefed, info, found, choice)
    treedef = jtu.tree_structure(found[0])

    # The arrays are closed over, not passed: JAX makes operands only of those that are used.
    def function_of(branch: TracedBody) -> Callable[[], Any]:
        def run() -> Any:
            leaves = jtu.tree_leaves(completed(branch(arrays), arrays))
            # A result may be a constant of the jaxpr, which need not be a JAX array.
            leaves = map(jnp.asarray, leaves)
            return jtu.tree_unflatten(treedef, map(convert, leaves, kinds))

        return run

    out, updates = choice.choose(index, [*map(function_of, branches)])
    return Outcome(out, updates, info)


def _common_info(
    derefed: Call,
    branches: list[TracedBody],
    updates: list[dict[int, Any]],
    choice: _Choice,
) -> OutcomeInfo:
    """The info of the first branch, with the statics of every written ref, whose value must
    have the same structure after every branch."""
    infos, nodes = [branch.avals.info for branch in branches], derefed.structure.refs()
    for i in updates[0]:
        statics = [info.written.get(i, nodes[i].value) for info in infos]
        first, *others = [
            (jtu.tree_structure(new[i]), static_keys(static))
            for new, static in zip(updates, statics)
        ]
        for structure, label in zip(others, choice.labels[1:]):
            if structure != first:
                raise MismatchError(
                    f"`{choice.name}`: the value of {describe(derefed.refs[i])} has "
                    f"another structure, or other static parts, after {label} than after "
                    f"{choice.labels[0]}. Write values of the same structure in all "
                    "branches; only arrays may depend on the branch."
                )
        infos[0].written[i] = statics[0]
    return infos[0]


def _common_kinds(
    derefed: Call,
    info: OutcomeInfo,
    found: list[tuple[Leaves, dict[int, Any]]],
    choice: _Choice,
) -> list[Kind]:
    """The kind of each array that the branches return or leave in a ref."""
    out, updates = found[0]
    whats = _places_in_result(info.result.parts[0], out)
    for i, new in updates.items():
        whats += [describe(derefed.refs[i])] * len(jtu.tree_leaves(new))
    return [
        _joined_kind([kind_of(x) for x in each], what, choice)
        for what, *each in zip(whats, *map(jtu.tree_leaves, found))
    ]


def _joined_kind(kinds: list[Kind], what: str, choice: _Choice) -> Kind:
    kind = join_kinds(kinds)
    if kind is None:
        i = next(i for i, k in enumerate(kinds) if join_kinds([kinds[0], k]) is None)
        differs = (
            f"it is {kinds[0]!r} after {choice.labels[0]}, and {kinds[i]!r} after "
            f"{choice.labels[i]}. Make it the same in each"
        )
        if kinds[0].split != kinds[i].split:
            raise MismatchError(
                f"`{choice.name}`: the branches must agree on how {what} is split over the "
                f"mesh: {differs}: `jax.sharding.reshard(x, P(...))`."
            )
        raise MismatchError(
            f"`{choice.name}`: the branches must agree on the shape and dtype of {what}: "
            f"{differs}, for example with `x.astype(...)` or `x.reshape(...)`."
        )
    return kind


def _check_same_results(
    derefed: Call, branches: list[TracedBody], i: int, choice: _Choice
) -> None:
    """Refuses branch `i` if its result differs from that of the first in anything but the
    values of arrays."""
    a, b = (branch.avals.info.result for branch in (branches[0], branches[i]))
    if a.key == b.key:
        return
    first, other = choice.labels[0], choice.labels[i]
    (part,), (other_part,) = a.parts, b.parts
    if part != other_part:
        one, two = _told_apart(
            [_structure_text(a), _structure_text(b)],
            "another, which prints the same: they differ in a static field, or in a "
            "function that closes over refs",
        )
        raise MismatchError(
            f"`{choice.name}`: the branches must return the same structure. {first} "
            f"returns {one}, and {other} returns {two}."
        )
    for k, (x, y) in enumerate(zip(a.statics[0], b.statics[0])):
        if static_keys(x) != static_keys(y):
            one, two, remedy = _difference(derefed, x, y, choice)
            raise MismatchError(
                f"`{choice.name}`: the results differ at {leaf_place(part, k)}: {first} "
                f"returns {one}, and {other} returns {two}. {remedy}"
            )


def _difference(derefed: Call, x: Any, y: Any, choice: _Choice) -> tuple[str, str, str]:
    """Describes two leaves of results that differ, and says what to do about it."""
    if is_node(x) or is_node(y) or x is None or y is None:
        texts = [_leaf_text(derefed, leaf, choice) for leaf in (x, y)]
        other = "another, which differs in its type or in the structure of its value"
        remedy = (
            "The choice of ref cannot depend on the branch: return the same ref from each, "
            "or new refs of one kind from all, or the values."
        )
    else:
        texts = [f"the static value {static!r}" for static in (x, y)]
        other = "another, which prints the same and is not equal"
        remedy = (
            "Only arrays may depend on the branch: make it one, or return the same value "
            "from each."
        )
    one, two = _told_apart(texts, other)
    return one, two, remedy


def _told_apart(texts: list[str], other: str) -> list[str]:
    """The two texts, with `other` as the second if they are equal."""
    return [texts[0], other] if texts[0] == texts[1] else texts


def _leaf_text(derefed: Call, leaf: Any, choice: _Choice) -> str:
    if not is_node(leaf):
        return "an array" if leaf is None else "a static value"
    if leaf.index >= len(derefed.refs):
        return f"a new ref, {describe(leaf)}"
    place = ref_place(derefed, leaf.index, ["the index", *choice.labels])
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
        places, or new refs of one kind. What is weakly typed takes the dtype of the other
        branch, so that one may write `ref.value = 0.0` to a ref of `bfloat16` that the
        other leaves unchanged; `jax.lax.cond` refuses this. Python numbers become weakly
        typed arrays, as in JAX; those in a module are static, as in Equinox.
    - `*operands`: any pytrees.

    **Returns:**

    What the chosen branch returns.

    **Raises:**

    - `StructureError`: if the results differ in structure, or if the branches leave
        different shapes or dtypes in a ref. The message names both.
    """
    choice = _Choice(
        "cond",
        ["`true_fun`", "`false_fun`"],
        lambda pred: 0 if pred else 1,
        lambda pred, branches: jax.lax.cond(pred, *branches),
    )
    pred = _as_scalar(pred, "cond", "predicate")
    return _call_choice(choice, pred, (true_fun, false_fun), operands)


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

    As [`refx_eqx.cond`][]; `ValueError` if there are no branches; and `TypeError` if the
    index is not an integer, or `branches` not a sequence.
    """
    if not isinstance(branches, Sequence):
        raise TypeError(
            f"`switch`: `branches` must be a list or tuple of functions, but is "
            f"{eqx.tree_pformat(branches)}."
        )
    if not branches:
        raise ValueError("`switch` needs at least one branch.")
    n = len(branches)
    choice = _Choice(
        "switch",
        [f"branch {i}" for i in range(n)],
        lambda index: min(max(int(index), 0), n - 1),
        lambda index, branches: jax.lax.switch(index, branches),
    )
    given, index = index, _as_scalar(index, "switch", "index")
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(
            f"`switch`: the index must be an integer, but is {eqx.tree_pformat(given)}, of "
            f"dtype {index.dtype}. Convert it, `jnp.astype(index, int)`; for a bool, there is "
            "`rx.cond`."
        )
    return _call_choice(choice, index, branches, operands)


def _call_choice(
    choice: _Choice, index: Any, branches: Sequence[Any], operands: tuple
) -> Any:
    fns = tuple(map(as_callable, branches))

    def run(derefed: Call, arrays: list[Leaves]) -> Outcome:
        return _run_choice(derefed, arrays, choice)

    program = program_of(fns, choice.name, lambda: Program(choice.name, run))
    return call(None, (index, *fns, *numbers_to_arrays(operands)), {}, program)


def _as_scalar(x: Any, name: str, what: str) -> jax.Array:
    if not eqx.is_array_like(x) or jnp.shape(x) != ():
        raise TypeError(
            f"`{name}`: the {what} must be a scalar, but is {eqx.tree_pformat(x)}. To "
            "choose for each element, use `jnp.where`, or `rx.filter_vmap`."
        )
    return jnp.asarray(x)
