"""`cond` and `switch`."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._core._call import call, Opened
from .._core._errors import describe, StructureError
from .._core._ref import Ref
from .._core._structure import (
    arrays_of,
    DYNAMIC,
    held,
    inside_of,
    Outcome,
    OutcomeInfo,
    STATIC,
    Structure,
)
from .._engine._control_flow import (
    as_callable,
    bare_parts,
    convert,
    join_kinds,
    Kind,
    kind_of,
    numbers_to_arrays,
    place_text,
    program_of_all,
    Staged,
)
from .._engine._in_python import runs_in_python
from .._engine._places import ref_place


__tracebackhide__ = True


_T = TypeVar("_T")


def _true_branch(_: None, pred: Any, true_fun: Any, false_fun: Any, *operands) -> Any:
    return numbers_to_arrays(true_fun(*operands))


def _false_branch(_: None, pred: Any, true_fun: Any, false_fun: Any, *operands) -> Any:
    return numbers_to_arrays(false_fun(*operands))


def _branch(i: int) -> Callable[..., Any]:
    def apply(_: None, index: Any, branches: Sequence[Any], *operands: Any) -> Any:
        return numbers_to_arrays(branches[i](*operands))

    return apply


def _run_branches(
    opened: Opened,
    arrays: list[Any],
    name: str,
    which: dict[str, Callable[..., Any]],
    position: Callable[[Any], int],
    choose: Callable[[Any, list[Callable], list[Any]], Any],
) -> Outcome:
    """Traces each branch, finds what they have in common, and builds the choice.

    **Arguments:**

    - `which`: what each branch is called, and what calls it.
    - `position`: from the first argument to the number of the branch, if it is known.
    - `choose`: from the first argument, functions of the arrays, and the arrays.
    """
    first = bare_parts(opened)[1].start
    if runs_in_python(arrays[first]):
        # Only the branch that is chosen runs.
        apply = list(which.values())[position(arrays[first])]
        outcome = opened.run(name, arrays, False, apply)
        return Outcome(*arrays_of(outcome), outcome.info)

    def stage(apply: Callable[..., Any]) -> Staged:
        return Staged(lambda arrays: opened.run(name, arrays, False, apply), arrays)

    staged = [stage(apply) for apply in which.values()]
    names = list(which)
    info = staged[0].avals.info
    for other, other_name in zip(staged[1:], names[1:]):
        both = names[0], other_name
        _check_results(opened, info, other.avals.info, both, name)
    written = sorted({number for branch in staged for number in branch.avals.updates})

    def completed(outcome: Outcome, arrays: list[Any]) -> tuple[list, dict[int, Any]]:
        """A branch that does not write a ref leaves it as it is."""
        updates = {}
        for number in written:
            inside = opened.structure.slots[number].inside
            before = held(inside, arrays[slice(*opened.spans[number])])
            updates[number] = outcome.updates.get(number, before)
        return outcome.out, updates

    avals = [jax.typeof(x) for x in arrays]
    found = [completed(branch.avals, avals) for branch in staged]
    whats = [_place(info.result, i) for i in range(len(found[0][0]))]
    for number in written:
        new = [updates[number] for _, updates in found]
        _check_insides(opened.refs[number], [*map(inside_of, new)], names, name)
        ref = opened.refs[number]
        whats += [describe(ref._name, ref._collection)] * len(jtu.tree_leaves(new[0]))
    kinds = [
        _joined([kind_of(x) for x in each], names, what, name)
        for what, *each in zip(whats, *map(jtu.tree_leaves, found))
    ]
    treedef = jtu.tree_structure(found[0])

    def function_of(branch: Staged) -> Callable[..., Any]:
        def run(*arrays: Any) -> Any:
            both = completed(branch(list(arrays)), list(arrays))
            leaves = map(jnp.asarray, jtu.tree_leaves(both))
            return jtu.tree_unflatten(treedef, map(convert, leaves, kinds))

        return run

    out, updates = choose(arrays[first], [*map(function_of, staged)], arrays)
    return Outcome(out, updates, info)


def _joined(kinds: list[Kind], names: list[str], what: str, name: str) -> Kind:
    kind = join_kinds(kinds)
    if kind is None:
        i = next(i for i, k in enumerate(kinds) if join_kinds([kinds[0], k]) is None)
        raise StructureError(
            f"`{name}`: the branches must agree on the shape and dtype of {what}: it is "
            f"{kinds[0]!r} after {names[0]}, and {kinds[i]!r} after {names[i]}. Make it the "
            "same in each, for example with `x.astype(...)` or `x.reshape(...)`."
        )
    return kind


def _check_insides(ref: Ref, insides: list[Any], names: list[str], name: str) -> None:
    """The structure of the value of a ref must be one after every branch."""
    for inside, branch_name in zip(insides, names):
        if inside != insides[0]:
            raise StructureError(
                f"`{name}`: the value of {describe(ref._name, ref._collection)} has "
                f"another structure, or other static parts, after {branch_name} than "
                f"after {names[0]}. Write values of one structure in all branches; what "
                "is not an array cannot depend on the branch."
            )


def _check_results(
    opened: Opened,
    first: OutcomeInfo,
    other: OutcomeInfo,
    names: tuple[str, str],
    name: str,
) -> None:
    """Refuses branches whose results differ in anything but the values of arrays."""
    a, b = first.result, other.result
    if a.parts != b.parts:
        one, two = _told_apart(
            [_structure_text(a), _structure_text(b)],
            "another, which prints the same: it differs in a static field, or in a function "
            "that closes over refs",
        )
        raise StructureError(
            f"`{name}`: the branches must return the same structure. {names[0]} returns "
            f"{one}, and {names[1]} returns {two}."
        )
    statics = iter(zip(a.statics, b.statics))
    for i, (code, other_code) in enumerate(zip(a.codes, b.codes)):
        if code == other_code == DYNAMIC:
            continue
        if code == other_code == STATIC:
            x, y = next(statics)
            if x == y:
                continue
            texts = [f"the static value {static.obj!r}" for static in (x, y)]
            texts = _told_apart(
                texts, "another, which prints the same and is not equal"
            )
            remedy = (
                "What is not an array cannot depend on the branch: make it one, or "
                "return the same in each."
            )
        else:
            texts = [
                _ref_text(opened, first, code, name),
                _ref_text(opened, other, other_code, name),
            ]
            same_ref = (
                code == other_code
                and first.carried.get(code) == other.carried.get(code)
                and (code in first.carried or a.slots[code] == b.slots[code])
            )
            if same_ref:
                continue
            texts = _told_apart(
                texts,
                "another, which differs in its type or in what its value is made of",
            )
            remedy = (
                "Which ref it is cannot depend on the branch: return the same ref from "
                "each, or new refs of one kind from all, or the values."
            )
        raise StructureError(
            f"`{name}`: the results differ at {_leaf_path(a, i)}: {names[0]} returns {texts[0]}, "
            f"and {names[1]} returns {texts[1]}. {remedy}"
        )


# What comes before the operands.
_ARGUMENTS = {
    "cond": ["the predicate", "`true_fun`", "`false_fun`"],
    "switch": ["the index", "the branches"],
}


def _told_apart(texts: list[str], other: str) -> list[str]:
    """Two texts; `other` instead of the second, if it says what the first does."""
    return [texts[0], other] if texts[0] == texts[1] else texts


def _ref_text(opened: Opened, info: OutcomeInfo, code: int, name: str) -> str:
    if code == DYNAMIC:
        return "an array"
    if code == STATIC:
        return "a static value"
    if code in info.carried:
        number = info.carried[code]
        ref = opened.refs[number]
        place = ref_place(opened.structure, number, _ARGUMENTS[name])
        return f"{describe(ref._name, ref._collection)} of {place}"
    slot, note = info.result.slots[code], info.result.notes[code]
    return f"a new ref, {describe(note.name, slot.collection)}"


def _structure_text(structure: Structure) -> str:
    (part,) = structure.parts
    text = str(part.treedef)
    return text.removeprefix("PyTreeDef(").removesuffix(")")


def _leaf_path(structure: Structure, i: int) -> str:
    (part,) = structure.parts
    if part.nodes:
        return "one of the leaves"
    leaves = list(range(part.treedef.num_leaves))
    pairs, _ = jtu.tree_flatten_with_path(jtu.tree_unflatten(part.treedef, leaves))
    return place_text(pairs[i][0])


def _place(structure: Structure, i: int) -> str:
    """Where in a result its array number `i` is."""
    bare = [k for k, code in enumerate(structure.codes) if code == DYNAMIC]
    if i < len(bare):
        return f"the array of the result at {_leaf_path(structure, bare[i])}"
    return "a new ref of the result"


def _run_cond(opened: Opened, arrays: list[Any]) -> Outcome:

    def choose(pred: Any, branches: list[Callable], arrays: list[Any]) -> Any:
        return jax.lax.cond(pred, *branches, *arrays)

    which = {"`true_fun`": _true_branch, "`false_fun`": _false_branch}
    return _run_branches(
        opened, arrays, "cond", which, lambda pred: 0 if pred else 1, choose
    )


def cond(
    pred: Any,
    true_fun: Callable[..., _T],
    false_fun: Callable[..., _T],
    *operands: Any,
) -> _T:
    """As `jax.lax.cond`, by reference.

    The branches may read and write refs: those in the operands, in the modules whose
    methods they are, and in what they close over. They need not write the same ones: a
    branch leaves what it does not write as it is.

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
    - `true_fun`, `false_fun`: functions of the operands. Their results have the same
        structure, shapes and dtypes, the same static leaves, and the same refs at the same
        places, or new refs of one kind. Python numbers among them become arrays, as in JAX;
        those in a module are static, as in Equinox.
    - `*operands`: any pytrees.

    **Returns:**

    What the chosen branch returns.

    **Raises:**

    - `StructureError`: if the results differ in structure, or the shapes and dtypes that
        the branches leave in a ref do. The message names both.
    """
    branches = as_callable(true_fun), as_callable(false_fun)
    operands = numbers_to_arrays(operands)

    def transform(opened: Opened) -> Outcome:
        return program_of_all(branches, "cond", _run_cond)(opened)

    args = (_scalar(pred, "cond", "predicate"), *branches, *operands)
    return call(None, args, {}, transform)


def _run_switch(opened: Opened, arrays: list[Any], n: int) -> Outcome:

    def choose(index: Any, branches: list[Callable], arrays: list[Any]) -> Any:
        return jax.lax.switch(index, branches, *arrays)

    which = {f"branch {i}": _branch(i) for i in range(n)}

    def position(index: Any) -> int:
        return min(max(int(index), 0), n - 1)

    return _run_branches(opened, arrays, "switch", which, position, choose)


def switch(index: Any, branches: Sequence[Callable[..., _T]], *operands: Any) -> _T:
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

    - `index`: an integer scalar. As in JAX it is clamped to the branches that there are.
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

    def run(opened: Opened, arrays: list[Any]) -> Outcome:
        return _run_switch(opened, arrays, n)

    def transform(opened: Opened) -> Outcome:
        return program_of_all(fns, "switch", run)(opened)

    args = (_scalar(index, "switch", "index"), fns, *operands)
    return call(None, args, {}, transform)


def _scalar(x: Any, name: str, what: str) -> jax.Array:
    x = jnp.asarray(x)
    if x.shape != ():
        raise TypeError(
            f"`{name}`: the {what} must be a scalar, and it is {eqx.tree_pformat(x)}. To "
            "choose for each element, use `jnp.where`, or `rx.filter_vmap`."
        )
    return x
