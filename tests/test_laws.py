"""The laws that every tree of refs, and every program on one, must obey."""

import copy
import dataclasses
import functools
import pickle
from typing import Any

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    arrays,
    assert_same_tree,
    build,
    canonical,
    Lora,
    Place,
    refs_of,
    same_value,
    specs,
    trees,
    TreeSpec,
)
from jax.sharding import AxisType, PartitionSpec as P

import refx_eqx as rx


def law(max_examples):
    return hypothesis.settings(
        max_examples=max_examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
    )


@law(60)
@hypothesis.given(specs())
def test_reref_of_deref_has_the_values_and_the_sharing(spec):
    tree = build(spec)
    again = rx.reref(rx.deref(tree))
    assert_same_tree(tree, again)
    assert not set(refs_of(tree)) & set(refs_of(again))


@law(60)
@hypothesis.given(specs())
def test_deref_of_reref_is_the_derefed_tree(spec):
    opened = rx.deref(build(spec))
    again = rx.deref(rx.reref(opened))
    assert jax.tree.structure(again) == jax.tree.structure(opened)
    assert same_value(jax.tree.leaves(again), jax.tree.leaves(opened))


def changed(spec: TreeSpec) -> st.SearchStrategy[TreeSpec]:
    """The same spec, or one that differs from it in one respect; or in many."""

    def with_pool(ref, **fields):
        pool = tuple(r._replace(**fields) if r is ref else r for r in spec.pool)
        return spec._replace(pool=pool)

    def with_places(numbers):
        return spec._replace(tree=_renumber(spec.tree, numbers))

    ref = st.sampled_from(spec.pool)
    return st.one_of(
        st.just(spec),
        st.builds(
            with_pool, ref, collection=st.sampled_from([None, "params", "counts"])
        ),
        st.builds(with_pool, ref, ref_type=st.sampled_from([rx.Ref, Lora])),
        st.builds(with_pool, ref, value=st.sampled_from([1, "x", None, (1, 2)])),
        # Another sharing, or another numbering of the same one.
        st.builds(with_places, st.permutations(range(4))),
        st.builds(with_places, st.tuples(*[st.integers(0, 3)] * 4)),
        st.builds(spec._replace, tree=trees()),
        specs(),
    )


def _renumber(tree: Any, numbers: Any) -> Any:
    if isinstance(tree, Place):
        return Place(numbers[tree.ref])
    if isinstance(tree, dict):
        return {k: _renumber(v, numbers) for k, v in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_renumber(x, numbers) for x in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(_renumber(x, numbers) for x in tree)
    return tree


@law(150)
@hypothesis.given(specs().flatmap(lambda s: st.tuples(st.just(s), changed(s))))
def test_treedefs_are_equal_iff_structure_sharing_collections_and_types_are(pair):
    a, b = (jax.tree.structure(rx.deref(build(spec))) for spec in pair)
    same = canonical(pair[0]) == canonical(pair[1])
    hypothesis.event(f"the same: {same}")
    assert (a == b) == same
    if same:
        assert hash(a) == hash(b)


# What a name selects may be nothing in a random tree: `| False` says so.
FILTERS = [
    rx.collection("params") | False,
    rx.collection("counts") | False,
    rx.collection(None) | False,
    rx.collection(("a", 1)) | False,
    Lora,
    rx.Ref,
    True,
    False,
    rx.collection("params", None) | False,
    ~(rx.collection("params") | False),
    (rx.collection("params") & Lora) | False,
    Lora | (rx.collection("counts") | False),
    rx.path("**"),
    ~rx.path("**"),
    lambda x: isinstance(x, str),
    lambda x: isinstance(x, rx.Ref) and isinstance(x.value, int),
]
some_filters = st.lists(st.sampled_from(FILTERS), max_size=3)


@law(60)
@hypothesis.given(specs(), some_filters)
def test_combine_of_partition_is_the_tree(spec, filters):
    tree = build(spec)
    parts = rx.partition(tree, *filters)
    assert len(parts) == len(filters) + 1
    _assert_identical(rx.combine(*parts), tree)
    # Each ref is in one part only.
    found = [set(refs_of(part)) for part in parts]
    assert sum(map(len, found)) == len(set(refs_of(tree)))

    parts, treedef = rx.tree_partition(tree, *filters)
    _assert_identical(rx.merge_partitions(parts, treedef), tree)
    if filters:
        assert rx.get_partition(tree, filters[0]) == parts[0]


def _assert_identical(a: Any, b: Any) -> None:
    a_leaves, a_def = jax.tree.flatten(a)
    b_leaves, b_def = jax.tree.flatten(b)
    assert a_def == b_def
    assert all(x is y for x, y in zip(a_leaves, b_leaves))


@law(60)
@hypothesis.given(specs(), some_filters)
def test_combine_of_partition_is_the_derefed_tree(spec, filters):
    tree = build(spec)
    opened = rx.deref(tree)
    parts = rx.partition(opened, *filters)
    assert_same_tree(rx.reref(rx.combine(*parts)), tree)
    for part in parts:
        rx.reref(part)  # no tie is torn: each part is closed in itself

    parts, treedef = rx.tree_partition(opened, *filters)
    assert_same_tree(rx.reref(rx.merge_partitions(parts, treedef)), tree)


@law(60)
@hypothesis.given(specs(), st.sampled_from(FILTERS))
def test_combine_of_partition_is_the_tree_with_the_functions_of_equinox(spec, filter):
    tree = build(spec)
    filter_spec = rx.filter_spec(tree, filter)
    opened = rx.deref(tree)
    assert eqx.tree_equal(rx.filter_spec(opened, filter), filter_spec)
    parts = eqx.partition(opened, filter_spec)
    assert_same_tree(rx.reref(eqx.combine(*parts)), tree)


def through_dag(tree):
    leaves, treedef = jax.tree.flatten(rx.Dag(tree))
    return jax.tree.unflatten(treedef, leaves).value


@pytest.mark.parametrize(
    "round_trip",
    [
        copy.deepcopy,
        lambda tree: pickle.loads(pickle.dumps(tree)),
        rx.clone,
        through_dag,
        lambda tree: copy.deepcopy(rx.Dag(tree)).value,
        lambda tree: rx.reref(copy.deepcopy(rx.deref(tree))),
    ],
    ids=["deepcopy", "pickle", "clone", "Dag", "deepcopy of Dag", "deepcopy of deref"],
)
@law(30)
@hypothesis.given(spec=specs())
def test_round_trips_keep_values_and_sharing(round_trip, spec):
    tree = build(spec)
    again = round_trip(tree)
    assert_same_tree(tree, again)
    assert not set(refs_of(tree)) & set(refs_of(again))


def _zero(x: Any) -> Any:
    if isinstance(x, np.ndarray | jax.Array):
        return x * np.zeros_like(x)
    return type(x)(0) if eqx.is_array_like(x) else x


@law(30)
@hypothesis.given(specs())
def test_update_refs_from_a_clone_restores_every_value(spec):
    tree = build(spec)
    saved = rx.deref(rx.clone(tree))
    for ref in refs_of(tree):
        ref.value = jax.tree.map(_zero, ref.value)
    rx.update_refs(tree, saved)
    assert_same_tree(rx.reref(saved), tree)


#
# Programs. A program is a list of instructions on a list of refs: at first those in a
# tree, one entry per place. It returns what it was told to return.
#


@dataclasses.dataclass(frozen=True)
class Write:
    """`refs[to].value = refs[a].value <op> refs[b].value`"""

    to: int
    a: int
    b: int
    op: int

    def run(self, refs, x):
        ops = [jnp.add, jnp.subtract, jnp.maximum, lambda a, b: a + x, lambda a, b: -b]
        a, b = refs[self.a % len(refs)].value, refs[self.b % len(refs)].value
        refs[self.to % len(refs)].value = ops[self.op](a, b)


@dataclasses.dataclass(frozen=True)
class Swap:
    """Two refs swap their values, which are not computed again."""

    a: int
    b: int

    def run(self, refs, x):
        a, b = refs[self.a % len(refs)], refs[self.b % len(refs)]
        a.value, b.value = b.value, a.value


@dataclasses.dataclass(frozen=True)
class SetPart:
    """`refs[to][0] = refs[a][1]`"""

    to: int
    a: int

    def run(self, refs, x):
        refs[self.to % len(refs)][0] = refs[self.a % len(refs)][1]


@dataclasses.dataclass(frozen=True)
class Make:
    """A new ref, with the value of another one."""

    a: int

    def run(self, refs, x):
        refs.append(rx.Ref(refs[self.a % len(refs)].value, "made"))


@dataclasses.dataclass(frozen=True)
class Tie:
    """From here on two places of the list are one ref."""

    to: int
    a: int

    def run(self, refs, x):
        refs[self.to % len(refs)] = refs[self.a % len(refs)]


@dataclasses.dataclass(frozen=True)
class WriteIfSame:
    """What a program does may depend on what is shared."""

    a: int
    b: int

    def run(self, refs, x):
        if refs[self.a % len(refs)] is refs[self.b % len(refs)]:
            refs[self.a % len(refs)].value += 1.0


@dataclasses.dataclass(frozen=True)
class Nested:
    """Instructions in a lifted transform of their own."""

    program: tuple
    n: int
    transform: int

    def run(self, refs, x):
        def inner(refs, x):
            refs = list(refs)
            for instruction in self.program:
                instruction.run(refs, x)
            return refs

        lifted = [
            rx.filter_jit(inner),
            rx.filter_vmap(inner, in_axes=None, out_axes=None, axis_size=2),
            rx.lift(jax.checkpoint)(inner),
        ][self.transform]
        refs[: self.n] = lifted(tuple(refs[: self.n]), x)[: self.n]


number = st.integers(0, 7)
plain_instruction = st.one_of(
    st.builds(Write, number, number, number, st.integers(0, 4)),
    st.builds(Write, number, number, number, st.integers(0, 4)),
    st.builds(Swap, number, number),
    st.builds(SetPart, number, number),
    st.builds(Make, number),
    st.builds(Tie, number, number),
    st.builds(WriteIfSame, number, number),
)
nested_instruction = st.builds(
    Nested,
    st.lists(plain_instruction, min_size=1, max_size=3).map(tuple),
    st.integers(1, 4),
    st.integers(0, 2),
)
programs = st.tuples(
    st.lists(
        st.one_of(plain_instruction, plain_instruction, nested_instruction), max_size=6
    ),
    st.lists(number, max_size=4),
)
program_specs = specs(value=arrays()).filter(lambda spec: refs_of(build(spec)))


def interpret(program, tree, x):
    instructions, returned = program
    refs = refs_of(tree)
    for instruction in instructions:
        instruction.run(refs, x)
    results = [refs[i % len(refs)] for i in returned]
    return {
        "refs": results,
        "again": (results[:1], tree if len(returned) % 2 else None),
        "values": [ref.value for ref in results],
        "x": x + 1.0,
    }


X = jnp.array([1.0, 2.0])


@pytest.mark.parametrize("carry", ["argument", "closure", "both"])
@law(10)
@hypothesis.given(spec=program_specs, program=programs)
def test_a_program_gives_under_filter_jit_what_plain_python_gives(carry, spec, program):
    plain, lifted = build(spec), build(spec)
    # The new refs of the calls live on, and must not be tied to anything later.
    plain_seen, lifted_seen = [plain], [lifted]
    traces = 0

    def body(tree, x):
        nonlocal traces
        traces += 1
        return interpret(program, tree, x)

    if carry == "argument":
        call = functools.partial(rx.filter_jit(body), lifted)
    elif carry == "closure":
        call = rx.filter_jit(lambda x: body(lifted, x))
    else:
        jitted = rx.filter_jit(lambda tree, x: (body(lifted, x), tree)[0])
        call = functools.partial(jitted, lifted)

    for _ in range(2):  # the second time from the cache
        plain_seen.append(interpret(program, plain, X))
        lifted_seen.append(call(X))
        assert_same_tree(plain_seen, lifted_seen)
    assert traces == 1


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs 2 devices")
@pytest.mark.parametrize("jit", [False, True])
@law(10)
@hypothesis.given(spec=program_specs, program=programs)
def test_a_program_gives_in_each_shard_what_plain_python_gives(jit, spec, program):
    plain, tree = build(spec), build(spec)
    expected = interpret(program, plain, X), plain
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    sharded = rx.filter_shard_map(
        functools.partial(interpret, program), mesh=mesh, in_specs=P(), out_specs=P()
    )
    found = (rx.filter_jit(sharded) if jit else sharded)(tree, X)
    assert_same_tree((found, tree), expected)


@law(10)
@hypothesis.given(spec=program_specs, program=programs)
def test_a_program_that_raises_changes_nothing(spec, program):
    tree = build(spec)
    before = build(spec)

    @rx.filter_jit
    def run(tree):
        interpret(program, tree, X)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(tree)
    assert_same_tree(tree, before)


@law(10)
@hypothesis.given(spec=program_specs, program=programs)
def test_a_functionalized_program_is_pure_and_right(spec, program):
    plain, tree, untouched = build(spec), build(spec), build(spec)
    expected = interpret(program, plain, X)

    pure = eqx.filter_jit(rx.functionalize(functools.partial(interpret, program)))
    out, updates = pure(*rx.deref((tree, X)))
    assert_same_tree(tree, untouched)
    rx.update_refs((tree, X), updates)
    assert_same_tree(tree, plain)
    assert_same_tree(rx.reref(out), expected)


@law(10)
@hypothesis.given(spec=program_specs, program=programs)
def test_a_program_through_dag_is_right(spec, program):
    plain, tree = build(spec), build(spec)
    expected = interpret(program, plain, X), plain

    @eqx.filter_jit
    def run(dag):
        return rx.Dag((interpret(program, dag.value, X), dag.value))

    assert_same_tree(run(rx.Dag(tree)).value, expected)
